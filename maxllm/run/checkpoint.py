"""Checkpoints through Orbax: the parameters that other stages read, and the rest that only resuming needs.

A checkpoint has two items. `params` is what the next stage starts from; `rest` is the state without it (step,
optimizer state, the critic of PPO). Each carries the hashes of its files (run/hashes.py), which every read
(run/restore.py) compares. Checkpoints taken where the run was evaluated also carry a rank, larger is better.
A restore that does not fit is an error, never a fresh start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from maxllm.config.run import RunConfig
from maxllm.errors import RunFailed
from maxllm.folder import RunFolder
from maxllm.parallel import processes
from maxllm.rank import UNRANKED, rank_of, rank_record
from maxllm.records import Params
from maxllm.run.hashes import HashedHandler, HashedSave
from maxllm.run.orbax_s3 import teach_orbax
from maxllm.run.restore import State, reason_of
from maxllm.storage import is_remote, refusal


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a run stay; the one of the highest rank does besides."""

    latest: int
    """So many of the newest."""
    every_steps: int | None = None
    every_minutes: float | None = None

    @classmethod
    def of(cls, run: RunConfig) -> Keep:
        """What a recipe says."""
        return cls(run.keep_checkpoints, run.keep_every_steps, run.keep_every_minutes)

    def policy(self) -> checkpoint_managers.PreservationPolicy:
        """The same for Orbax."""
        best = checkpoint_managers.BestN(get_metric_fn=rank_of, n=1, keep_checkpoints_without_metrics=False)
        policies: list[Any] = [checkpoint_managers.LatestN(self.latest), best]
        if self.every_steps is not None:
            policies.append(checkpoint_managers.EveryNSteps(self.every_steps))
        if self.every_minutes is not None:
            policies.append(checkpoint_managers.EveryNSeconds(round(60 * self.every_minutes)))
        return checkpoint_managers.AnyPreservationPolicy(policies)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: RunFolder,
        keep: Keep,
        in_use: Callable[[], Mapping[int, Sequence[str]]] = dict,
        say: Callable[[str], None] = lambda line: None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the checkpoints of a run folder for writing; no other process may have it open so.

        Args:
          folder: the run folder.
          keep: which checkpoints stay.
          in_use: the steps that other runs began from, which are kept too, and whose these runs are.
          say: told when a checkpoint stays for another run's sake alone.
          origin: what each checkpoint remembers of where it comes from (run/origin.py).

        Raises:
          RunFailed: a checkpoint's rank is damaged.
        """
        self._folder, self._origin = folder, dict(origin or {})
        self._best = max(folder.ranks().values(), default=UNRANKED)
        self._quiet = ExitStack()
        self._quiet.enter_context(without_merge_warning())
        self._manager = ocp.CheckpointManager(
            folder.checkpoints,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(keep, in_use, say),
                best_fn=rank_of,  # writes the ranks down, so that a resumed run knows them
                enable_async_checkpointing=True,
                atomicity_options=atomicity(folder.checkpoints),
            ),
            # zstd takes 8 % off random float32 values, and a third more time to restore them from a disk.
            item_handlers={name: HashedHandler(use_compression=False) for name in ("params", "rest")},
        )

    def is_best(self, rank: float) -> bool:
        """Whether a rank is higher than that of every checkpoint so far."""
        return rank > self._best

    def save(
        self, step: int, state: State, rank: float = UNRANKED, more: Mapping[str, Any] | None = None
    ) -> None:
        """Starts saving in the background.

        Args:
          step: the state's.
          state: what is saved.
          rank: of a state that was evaluated.
          more: plain data that stands beside the origin.
        """
        params, rest = state.detach()
        with writable(self._folder.checkpoints):
            self._manager.save(
                step,
                args=ocp.args.Composite(params=HashedSave(params), rest=HashedSave(rest)),
                metrics=rank_record(rank),
                custom_metadata=self._origin | dict(more or {}),
            )
        self._best = max(self._best, rank)

    def close(self) -> None:
        """Waits for the save under way."""
        try:
            with writable(self._folder.checkpoints):
                self._manager.wait_until_finished()
                self._manager.close()  # which tells of a failure that waiting did not
        finally:
            self._quiet.close()


class _Kept(checkpoint_managers.PreservationPolicy):
    """The checkpoints that `Keep` names, and those that other runs began from."""

    def __init__(
        self, keep: Keep, in_use: Callable[[], Mapping[int, Sequence[str]]], say: Callable[[str], None]
    ) -> None:
        self._own = keep.policy()
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


def save_params(folder: RunFolder, params: Params) -> None:
    """Writes parameters alone as the only checkpoint of a run folder, at step 0.

    Small in memory and quick: as much as the largest array is on its way to the disk at a time, in chunks, of
    one layer each where layers are stacked; and uncompressed: zstd takes a quarter off weights in twice the
    time.
    """
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, atomicity_options=atomicity(folder.checkpoints)
    )
    handler = HashedHandler(save_concurrent_gb=under_way_gb(params), use_compression=False)
    flat = flatten_dict(params, sep="/")
    chunks = unflatten_dict({path: chunks_of(path) for path in flat}, sep="/")
    with (
        writable(folder.checkpoints),
        without_merge_warning(),
        ocp.CheckpointManager(
            folder.checkpoints, options=options, item_handlers={"params": handler}
        ) as manager,
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


def atomicity(folder: Path) -> ocp.options.AtomicityOptions | None:
    """How a checkpoint becomes complete: by its name on a disk; by a mark in a bucket, where none changes."""
    if not is_remote(folder):
        return None
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns what Orbax raises while writing into one sentence."""
    teach_orbax(folder)
    try:
        yield
    except Exception as error:
        if processes.peer_lost(error):
            raise
        reason = (is_remote(folder) and refusal(error, folder)) or reason_of(error)
        raise RunFailed(
            f"a checkpoint cannot be written to {folder} ({reason}); the same command continues "
            "from the last complete one"
        ) from error
