"""How fast a checkpoint is restored: beside reading its files, and beside restoring without its hashes.

    python tools/bench_restore.py
    python tools/bench_restore.py --megabytes 2000

Saves a training state (parameters and AdamW's two moments) and converted parameters (in smaller
chunks). Restores each in turns with and without the comparison: from the page cache, which is the worst case,
and from the disk, where the second reading finds what the first fetched. Then restores from the disk in turns
with merely reading all files, by as many threads as there are cores. Prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def compare(name: str, files: list[Path], restore: Callable[[], Any], turns: int) -> None:
    """Times `restore` in turns with and without hashes, and prints what they add.

    Args:
      name: what is restored.
      files: what leaves the page cache before each turn.
      restore: does it.
      turns: of each.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * turns + 2):
        hashed = turn % 2 == 0
        off = mock.patch.multiple(hashes, hashes_of=lambda item, names: {}, compare=lambda *args: None)
        leave_cache(files)
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


def against_disk(name: str, files: list[Path], restore: Callable[[], Any], turns: int) -> None:
    """Times `restore` in turns with reading a checkpoint's files, from the disk, and prints both speeds."""
    seconds: dict[str, list[float]] = {"read": [], "restored": []}
    with ThreadPoolExecutor() as pool:
        for _ in range(turns):
            for what, work in (("read", lambda: [*pool.map(read_file, files)]), ("restored", restore)):
                leave_cache(files)
                started = time.perf_counter()
                jax.block_until_ready(work())
                seconds[what].append(time.perf_counter() - started)
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    read_, restored = (megabytes / statistics.median(times) for times in seconds.values())
    print(
        f"{name}, {megabytes:.0f} MB on disk: read at {read_:.0f} MB/s, restored at {restored:.0f} MB/s: "
        f"{restored / read_:.0%}"
    )


def read_file(file: Path) -> int:
    """Reads a file as plainly as can be; how many bytes it has."""
    size, buffer = 0, bytearray(1 << 20)
    with file.open("rb", buffering=0) as stream:
        while done := stream.readinto(buffer):
            size += done
    return size


def leave_cache(files: list[Path]) -> None:
    """Takes files out of the page cache (Linux), once they are on the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
        for name, checkpoint_, restore in (
            ("training state", trained, lambda: read.restore(trained, described(state))),
            ("converted weights", converted, lambda: read.load_params(converted, described(params))),
        ):
            files = [file for file in checkpoint_.rglob("*") if file.is_file()]
            compare(f"{name} from the page cache", [], restore, options.turns)
            compare(f"{name} from the disk", files, restore, options.turns)
            against_disk(name, files, restore, options.turns)


if __name__ == "__main__":
    main()
