"""What comparing content hashes adds to the time of restoring a checkpoint.

    python tools/bench_restore.py
    python tools/bench_restore.py --megabytes 2000

Saves a training state (parameters and AdamW's two moments, compressed) and converted parameters (as they
are), and restores each in turns with and without the comparison, from the page cache: the worst case, for a
disk adds to both alike and the second reading finds what the first fetched. Prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from maxllm.folder import RunFolder
from maxllm.run import checkpoint, hashes
from maxllm.run import restore as read
from maxllm.steps.state import TrainState

LAYERS, ARRAYS = 8, 6


def arrays(megabytes: float, seed: int) -> dict[str, jax.Array]:
    """Stacked matrices of float32, `megabytes` in all."""
    width = int((megabytes * 1e6 / 4 / LAYERS / ARRAYS) ** 0.5)
    keys = jax.random.split(jax.random.key(seed), ARRAYS)
    return {f"w{i}": jax.random.normal(key, (LAYERS, width, width)) * 0.02 for i, key in enumerate(keys)}


def described(tree: Any) -> Any:
    """Shapes, types and shardings."""
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def compare(name: str, restore: Callable[[], Any], turns: int) -> None:
    """Times `restore` in turns with and without hashes, and prints what they add."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * turns + 2):
        hashed = turn % 2 == 0
        off = mock.patch.multiple(hashes, hashes_of=lambda item, names: {}, compare=lambda *args: None)
        started = time.perf_counter()
        if hashed:
            jax.block_until_ready(restore())
        else:
            with off:
                jax.block_until_ready(restore())
        if turn >= 2:  # the first of each finds nothing warm
            seconds[hashed].append(time.perf_counter() - started)
    plain, hashed_ = statistics.median(seconds[False]), statistics.median(seconds[True])
    print(f"{name}: {plain:.3f} s without hashes, {hashed_:.3f} s with: {hashed_ / plain - 1:+.1%}")


def main() -> None:
    """Saves, restores, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=600, help="size of the training state")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    part = options.megabytes / 3
    with tempfile.TemporaryDirectory() as folder:
        params = {"decoder": {"layers": arrays(part, 0)}}
        state = TrainState(jnp.int32(1), params, {"mu": arrays(part, 1), "nu": arrays(part, 2)})
        runs = [RunFolder(Path(folder) / name) for name in ("trained", "converted")]
        checkpoints = checkpoint.Checkpoints(runs[0], checkpoint.Keep(1))
        checkpoints.save(1, state)
        checkpoints.close()
        checkpoint.save_params(runs[1], params)
        trained, converted = (run.find() for run in runs)
        compare("training state", lambda: read.restore(trained, described(state)), options.turns)
        compare("converted weights", lambda: read.load_params(converted, described(params)), options.turns)


if __name__ == "__main__":
    main()
