"""Checkpoints through Orbax: the parameters that other stages read, and the rest that only resuming needs.

A checkpoint has two items. `params` is what the next stage starts from; `rest` is the state without it (step,
optimizer state, the critic of PPO). Each carries the hashes of its files (run/hashes.py), which every read
compares. Checkpoints taken where the run was evaluated also carry a rank, larger is better. A restore that
does not fit is an error, never a fresh start.

A training run writes through `Checkpoints`; whoever only reads uses the functions below it, which never touch
the folder.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from maxllm.errors import RunFailed, UserError, listed
from maxllm.files import read_json
from maxllm.parallel import processes
from maxllm.records import Params
from maxllm.run.hashes import (
    HashedHandler,
    HashedSave,
    array_of,
    damaged,
    is_description,
    read_hashes,
    verify,
)

FOLDER = "checkpoints"

Which = Literal["latest", "best"] | int
"""Which checkpoint of a run: its newest, its best, or that of a step."""

UNRANKED = -math.inf
"""The rank of a state that was not evaluated, or whose figure was no number: it is never the best."""

UNFINISHED = "*.orbax-checkpoint-tmp*"
"""What Orbax calls the folder of a checkpoint that is being written."""


class State(Protocol):
    """A training state whose exported parameters can be taken out and put back."""

    def detach(self) -> tuple[Params, Self]:
        """(the parameters other stages read, the state without them)."""

    def attach(self, params: Params) -> Self:
        """The state with parameters put back."""


AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        in_use: Callable[[], Mapping[int, Sequence[str]]] = dict,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Opens `run_dir/checkpoints` for writing; no other process may have it open so.

        Args:
          run_dir: the run folder.
          keep: latest checkpoints to keep; the one of the highest rank is kept besides.
          in_use: the steps that other runs began from, which are kept too, and whose these runs are.
          say: told when a checkpoint stays for another run's sake alone.

        Raises:
          RunFailed: a checkpoint's rank is damaged.
        """
        self._best = max(ranks(run_dir).values(), default=UNRANKED)
        self._quiet = ExitStack()
        self._quiet.enter_context(without_merge_warning())
        self._manager = ocp.CheckpointManager(
            (run_dir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(keep, in_use, say),
                best_fn=rank_of,  # writes the ranks down, so that a resumed run knows them
                enable_async_checkpointing=True,
            ),
            item_handlers={"params": HashedHandler(), "rest": HashedHandler()},
        )

    def is_best(self, rank: float) -> bool:
        """Whether a rank is higher than that of every checkpoint so far."""
        return rank > self._best

    def save(self, step: int, state: State, rank: float = UNRANKED) -> None:
        """Starts saving in the background; a state that was evaluated has a rank."""
        params, rest = state.detach()
        with writable(Path(self._manager.directory)):
            self._manager.save(
                step,
                args=ocp.args.Composite(params=HashedSave(params), rest=HashedSave(rest)),
                metrics={"rank": rank, "hash": hash_of_rank(rank)},
            )
        self._best = max(self._best, rank)

    def restore(self, step: int, abstract_state: AnyState) -> AnyState:
        """The state saved at `step`, in the shardings of `abstract_state`.

        Raises:
          RunFailed: it is damaged or cannot be read; nothing is changed.
        """
        return restore(Path(self._manager.directory) / str(step), abstract_state)

    def close(self) -> None:
        """Waits for the save under way."""
        try:
            with writable(Path(self._manager.directory)):
                self._manager.wait_until_finished()
            self._manager.close()
        finally:
            self._quiet.close()


class _Kept(checkpoint_managers.PreservationPolicy):
    """The latest checkpoints, the best one, and those that other runs began from."""

    def __init__(
        self, keep: int, in_use: Callable[[], Mapping[int, Sequence[str]]], say: Callable[[str], None]
    ) -> None:
        best = checkpoint_managers.BestN(get_metric_fn=rank_of, n=1, keep_checkpoints_without_metrics=False)
        latest = checkpoint_managers.LatestN(keep)
        self._own = checkpoint_managers.AnyPreservationPolicy([latest, best])
        self._in_use, self._say = in_use, say
        self._told: set[int] = set()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints stay."""
        users = self._in_use()
        kept = []
        for checkpoint, own in zip(
            checkpoints, self._own.should_preserve(checkpoints, context=context), strict=True
        ):
            step = int(checkpoint.step)
            if not own and step in users and step not in self._told:
                self._told.add(step)
                self._say(f"keeps the checkpoint of step {step}, from which {', '.join(users[step])} began")
            kept.append(bool(own) or step in users)
        return kept


# --- reading -----------------------------------------------------------------------------------------------


def steps_of(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order; a half-written one has another kind of name."""
    folder = run_dir / FOLDER
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def latest_step(run_dir: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    return max(steps_of(run_dir), default=None)


def best_step(run_dir: Path) -> int | None:
    """The step of a run's checkpoint with the highest rank; of equal ones, the first."""
    found = {step: rank for step, rank in ranks(run_dir).items() if rank > UNRANKED}
    return max(found, key=lambda step: found[step], default=None)


def ranks(run_dir: Path) -> dict[int, float]:
    """{step: rank} of a run's checkpoints.

    Raises:
      RunFailed: a rank is damaged.
    """
    found = {}
    for step in steps_of(run_dir):
        checkpoint = run_dir / FOLDER / str(step)
        file = checkpoint / "metrics" / "metrics"
        try:
            metrics = read_json(file) if file.is_file() else {}
        except UserError as error:
            raise damaged(checkpoint, str(error)) from None
        if metrics and metrics.get("hash") != hash_of_rank(metrics.get("rank", math.nan)):
            raise damaged(checkpoint, f"{file} is not as it was written")
        found[step] = rank_of(metrics) if metrics else UNRANKED
    return found


def remove_unfinished(run_dir: Path) -> None:
    """Removes what a kill or a full disk left half-written; whoever calls it holds the run's lock."""
    for folder in (run_dir / FOLDER).glob(UNFINISHED):
        shutil.rmtree(folder, ignore_errors=True)


def rank_of(metrics: dict[str, float]) -> float:
    """What orders checkpoints: larger is better."""
    return metrics["rank"]


def hash_of_rank(rank: float) -> str:
    """What tells a damaged rank: it is in no item with hashes."""
    return xxhash.xxh3_64_hexdigest(repr(float(rank)).encode())


def find(run_dir: Path, which: Which = "latest") -> Path:
    """The folder of a run's newest or best checkpoint, or of that of a step.

    Raises:
      UserError: there is none, with those that are there.
    """
    there = steps_of(run_dir)
    if not there:
        raise UserError(f"{run_dir} holds no checkpoint; train that stage first")
    if isinstance(which, int):
        step = which if which in there else None
    else:
        step = there[-1] if which == "latest" else best_step(run_dir)
    if step is None:
        missing = f"checkpoint of step {which}" if isinstance(which, int) else f"{which} checkpoint"
        steps = listed([str(number) for number in there], limit=20)
        raise UserError(f"{run_dir} holds no {missing}: it holds steps {steps}")
    return (run_dir / FOLDER).absolute() / str(step)


def restore(checkpoint: Path, abstract_state: AnyState) -> AnyState:
    """A whole training state from one checkpoint's folder, in the shardings of `abstract_state`.

    Raises:
      RunFailed: it is damaged or cannot be read.
    """
    params, rest = abstract_state.detach()
    restored = read_items(checkpoint, params=params, rest=rest)
    return restored["rest"].attach(restored["params"])


def read_items(checkpoint: Path, **abstract: Any) -> Any:
    """Some items of a checkpoint, each in the shardings and types of its abstract tree."""
    # The handler, not a Checkpointer: an item of a checkpoint is not a checkpoint of its own.
    handler = ocp.StandardCheckpointHandler()
    for name in abstract:
        verify(checkpoint / name)
    with readable(checkpoint):
        return {
            name: handler.restore(checkpoint / name, args=ocp.args.StandardRestore(tree))
            for name, tree in abstract.items()
        }


def check_params(checkpoint: Path, abstract_params: Params) -> None:
    """Looks at a checkpoint's shapes without reading it.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged.
    """
    saved = stored_tree(checkpoint)
    problems = differences(saved, abstract_params)
    if problems:
        raise UserError(f"{checkpoint} is a checkpoint of another model: {'; '.join(problems[:5])}")


def stored_tree(checkpoint: Path) -> Any:
    """Shapes and types of the parameters in a checkpoint.

    Raises:
      RunFailed: it is damaged.
    """
    verify(checkpoint / "params", wanted=is_description)
    with readable(checkpoint):
        return ocp.StandardCheckpointHandler().metadata(checkpoint / "params").tree


def save_params(run_dir: Path, params: Params) -> None:
    """Writes parameters alone as the only checkpoint of a run folder, at step 0.

    Small in memory and quick: as much as the largest array is on its way to the disk at a time, in chunks, of
    one layer each where layers are stacked; and uncompressed: zstd takes a quarter off weights in twice the
    time.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handler = HashedHandler(save_concurrent_gb=under_way_gb(params), use_compression=False)
    folder = (run_dir / FOLDER).absolute()
    flat = flatten_dict(params, sep="/")
    chunks = unflatten_dict({path: chunks_of(path) for path in flat}, sep="/")
    with (
        writable(folder),
        without_merge_warning(),
        ocp.CheckpointManager(folder, options=options, item_handlers={"params": handler}) as manager,
    ):
        manager.save(0, args=ocp.args.Composite(params=HashedSave(params, save_args=chunks)))


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
    saved = stored_tree(checkpoint)
    return jax.tree.map(lambda leaf, kind: leaf.update(dtype=kind.dtype), abstract_params, saved)


def load_params(checkpoint: Path, abstract_params: Params) -> Params:
    """The parameters in a checkpoint's folder, in the shardings and types of `abstract_params`.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged or cannot be read.
    """
    check_params(checkpoint, abstract_params)
    flat = flatten_dict(nn.unbox(abstract_params), sep="/")
    # The largest first, while there is room: what Orbax has under way is in memory up to three times.
    order = sorted(flat, key=lambda path: -flat[path].size)
    hashes = read_hashes(checkpoint / "params")
    return unflatten_dict({path: load_array(checkpoint, path, flat[path], hashes) for path in order}, sep="/")


def load_array(
    checkpoint: Path, path: str, abstract: jax.ShapeDtypeStruct, hashes: dict[str, str]
) -> jax.Array:
    """One array of the parameters; its path has slashes, `hashes` are those of all their files.

    Raises:
      RunFailed: it is damaged or cannot be read.
    """
    verify_array(checkpoint, path, hashes)
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
      RunFailed: it is damaged or cannot be read.
    """
    import tensorstore

    verify_array(checkpoint, path)
    store = {"driver": "file", "path": str(checkpoint / "params" / path.replace("/", "."))}
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    with readable(checkpoint):
        array = tensorstore.open(spec, open=True, read=True).result()
        layers_apart = (array.chunk_layout.read_chunk.shape or ())[:1] == (1,)
        return array if layers_apart else np.asarray(array)


def verify_array(checkpoint: Path, path: str, hashes: dict[str, str] | None = None) -> None:
    """Compares the files of one array of the parameters with their hashes; its path has slashes.

    Raises:
      RunFailed: it is damaged.
    """
    name = path.replace("/", ".")
    verify(checkpoint / "params", wanted=lambda file: array_of(file) == name, expected=hashes)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns what Orbax raises while writing into one sentence."""
    try:
        yield
    except Exception as error:
        if processes.peer_lost(error):
            raise
        raise RunFailed(
            f"a checkpoint cannot be written to {folder} ({reason_of(error)}); the same command continues "
            "from the last complete one"
        ) from error


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turns what Orbax raises while reading files that are as they were written into one sentence."""
    try:
        yield
    except Exception as error:
        if processes.peer_lost(error):
            raise
        full = is_out_of_memory(error)
        why = "there is not enough memory" if full else "its files are as they were written, but"
        raise RunFailed(f"checkpoint {checkpoint} cannot be restored: {why} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An error of a library in a phrase."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:300]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or a device has no room left, which is no fault of a checkpoint."""
    return (
        isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    )


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
