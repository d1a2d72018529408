"""Checkpoints through Orbax: the parameters that other stages read, and the rest that only resuming needs.

A checkpoint has two items. `params` is what the next stage starts from; `rest` is the state without it (step,
optimizer state, the critic of PPO). Those taken where the run was evaluated also carry a rank, larger is
better. A restore that does not fit is an error, never a fresh start.

A training run writes through `Checkpoints`; whoever only reads uses the functions below it, which never touch
the folder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from maxllm.errors import RunFailed, UserError
from maxllm.files import read_json
from maxllm.records import Params

FOLDER = "checkpoints"

Which = Literal["latest", "best"]

UNRANKED = -math.inf
"""The rank of a state that was not evaluated."""


class State(Protocol):
    """A training state whose exported parameters can be taken out and put back."""

    def detach(self) -> tuple[Params, Self]:
        """(the parameters other stages read, the state without them)."""

    def attach(self, params: Params) -> Self:
        """The state with parameters put back."""


AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """Opens `run_dir/checkpoints` for writing; no other process may have it open so.

        Args:
          run_dir: the run folder.
          keep: latest checkpoints to keep; the one of the highest rank is kept besides.
        """
        best = BestN(get_metric_fn=rank_of, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            (run_dir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=rank_of,  # writes the ranks down, so that a resumed run knows them
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # what a kill left half-written
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, rank: float | None) -> None:
        """Starts saving in the background; `rank` is None where the state was not evaluated."""
        params, rest = state.detach()
        with writable(Path(self._manager.directory)):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)
                ),
                metrics={"rank": UNRANKED if rank is None else rank},
            )

    def restore(self, step: int, abstract_state: AnyState) -> AnyState:
        """The state saved at `step`, in the shardings of `abstract_state`.

        Raises:
          RunFailed: it cannot be read; nothing is changed.
        """
        return restore(Path(self._manager.directory) / str(step), abstract_state)

    def close(self) -> None:
        """Waits for the save under way."""
        with writable(Path(self._manager.directory)):
            self._manager.wait_until_finished()
        self._manager.close()


# --- reading -----------------------------------------------------------------------------------------------


def latest_step(run_dir: Path) -> int | None:
    """The step of a run's newest complete checkpoint."""
    folder = (run_dir / FOLDER).absolute()
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def best_step(run_dir: Path) -> int | None:
    """The step of a run's checkpoint with the highest rank."""
    folder = (run_dir / FOLDER).absolute()
    ranks = {}
    for step in ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []:
        file = folder / str(step) / "metrics" / "metrics"
        if file.is_file():
            rank = rank_of(read_json(file))
            if rank > UNRANKED:
                ranks[step] = rank
    return max(ranks, key=lambda step: ranks[step], default=None)


def rank_of(metrics: dict[str, float]) -> float:
    """What orders checkpoints: larger is better."""
    return metrics["rank"]


def find(run_dir: Path, which: Which = "latest") -> Path:
    """The folder of a run's newest or best checkpoint.

    Raises:
      UserError: there is none.
    """
    step = latest_step(run_dir) if which == "latest" else best_step(run_dir)
    if step is None:
        raise UserError(f"{run_dir} holds no {which} checkpoint; train that stage first")
    return (run_dir / FOLDER).absolute() / str(step)


def restore(checkpoint: Path, abstract_state: AnyState) -> AnyState:
    """A whole training state from one checkpoint's folder, in the shardings of `abstract_state`.

    Raises:
      RunFailed: it cannot be read.
    """
    params, rest = abstract_state.detach()
    restored = read_items(checkpoint, params=params, rest=rest)
    return restored["rest"].attach(restored["params"])


def read_items(checkpoint: Path, **abstract: Any) -> Any:
    """Some items of a checkpoint, each in the shardings and types of its abstract tree."""
    # The handler, not a Checkpointer: an item of a checkpoint is not a checkpoint of its own.
    handler = ocp.StandardCheckpointHandler()
    with readable(checkpoint):
        return {
            name: handler.restore(checkpoint / name, args=ocp.args.StandardRestore(tree))
            for name, tree in abstract.items()
        }


def check_params(checkpoint: Path, abstract_params: Params) -> None:
    """Looks at a checkpoint's shapes without reading it.

    Raises:
      UserError: it is of another model.
    """
    with readable(checkpoint):
        saved = ocp.StandardCheckpointHandler().metadata(checkpoint / "params").tree
    problems = differences(saved, abstract_params)
    if problems:
        raise UserError(f"{checkpoint} is a checkpoint of another model: {'; '.join(problems[:5])}")


def save_params(run_dir: Path, params: Params) -> None:
    """Writes parameters alone as the only checkpoint of a run folder, at step 0.

    Small in memory and quick: as much as the largest array is on its way to the disk at a time, in chunks, of
    one layer each where layers are stacked; one folder for each array, where Orbax's one file for all keeps
    much of it in memory; and uncompressed: zstd takes a quarter off weights in twice the time.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=under_way_gb(params),  # type: ignore[arg-type]  # Orbax multiplies it
        use_ocdbt=False,
        use_compression=False,
    )
    folder = (run_dir / FOLDER).absolute()
    flat = flatten_dict(params, sep="/")
    chunks = unflatten_dict({path: chunks_of(path) for path in flat}, sep="/")
    with (
        writable(folder),
        without_merge_warning(),
        ocp.CheckpointManager(folder, options=options, item_handlers={"params": handler}) as manager,
    ):
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params, save_args=chunks)))


def chunks_of(path: str) -> ocp.SaveArgs:
    """How an array is cut in files of 8 MB: stacked layers apart, so that one can be read alone."""
    return ocp.SaveArgs(chunk_byte_size=1 << 23, shard_axes=(0,) if "/layers/" in path else ())


def under_way_gb(params: Params) -> float:
    """Gigabytes that saving may hold: the largest part of an array that a device has, and a little.

    Orbax refuses a part that is not smaller than what it may hold.
    """
    parts = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return (max(parts) + 2**20) / 10**9


@contextmanager
def without_merge_warning() -> Iterator[None]:
    """Orbax warns that it finds nothing in its one-file format to merge, also where none was asked for."""

    def other(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def stored_dtypes(checkpoint: Path, abstract_params: Params) -> Params:
    """The abstract parameters in the types that a checkpoint has.

    Raises:
      UserError: it is of another model.
    """
    check_params(checkpoint, abstract_params)
    with readable(checkpoint):
        saved = ocp.StandardCheckpointHandler().metadata(checkpoint / "params").tree
    return jax.tree.map(lambda leaf, kind: leaf.update(dtype=kind.dtype), abstract_params, saved)


def load_params(checkpoint: Path, abstract_params: Params) -> Params:
    """The parameters in a checkpoint's folder, in the shardings and types of `abstract_params`.

    Raises:
      UserError: it is of another model.
      RunFailed: it cannot be read.
    """
    check_params(checkpoint, abstract_params)
    flat = flatten_dict(nn.unbox(abstract_params), sep="/")
    # The largest first, while there is room: what Orbax has under way is in memory up to three times.
    order = sorted(flat, key=lambda path: -flat[path].size)
    return unflatten_dict({path: load_array(checkpoint, path, flat[path]) for path in order}, sep="/")


def load_array(checkpoint: Path, path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """One array of the parameters; its path has slashes."""
    wanted = unflatten_dict({path: abstract}, sep="/")
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with readable(checkpoint):
        restored = ocp.PyTreeCheckpointHandler().restore(
            checkpoint / "params",
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True),
        )
    return flatten_dict(restored, sep="/")[path]


def open_array(checkpoint: Path, path: str) -> Any:
    """One array of the parameters on disk, without devices: `np.asarray(array[3])` reads its third layer.

    What was saved in pieces larger than a layer is read whole at once, because each layer would read all.

    Raises:
      RunFailed: it cannot be read.
    """
    import tensorstore

    folder, name = checkpoint / "params", path.replace("/", ".")
    if (folder / name).is_dir():
        store: dict[str, Any] = {"driver": "file", "path": str(folder / name)}
    else:  # Orbax's one file for all
        store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": name}
    with readable(checkpoint):
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        layers_apart = (array.chunk_layout.read_chunk.shape or ())[:1] == (1,)
        return array if layers_apart else np.asarray(array)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax raises while writing into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise RunFailed(
            f"a checkpoint cannot be written to {folder} ({type(error).__name__}: {reason}); the same "
            "command continues from the last complete one"
        ) from error


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turns whatever Orbax raises while reading into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise RunFailed(
            f"checkpoint {checkpoint} cannot be restored ({type(error).__name__}: {reason}); remove that "
            "folder to use the checkpoint before it"
        ) from error


def differences(saved: Any, wanted: Any) -> list[str]:
    """Parameters that are missing, extra or of another shape, one phrase each."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
        }

    have, want = shapes(saved), shapes(wanted)
    found = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
    found += [f"{name} is extra" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if have[name] != want[name]:
            found.append(f"{name} is {have[name]}, not {want[name]}")
    return found
