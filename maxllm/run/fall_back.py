"""Reading the newest checkpoint of a run; where that is allowed, the newest intact one."""

from __future__ import annotations

from collections.abc import Callable

from maxllm.errors import RunFailed
from maxllm.folder import CHECKPOINTS, RunFolder
from maxllm.parallel import processes
from maxllm.run.restore import AnyState, restore
from maxllm.storage import is_remote, move_folder


def restore_newest(
    folder: RunFolder, step: int, abstract_state: AnyState, fall_back: bool, say: Callable[[str], None]
) -> tuple[int, AnyState]:
    """The state of a checkpoint, and its step.

    All processes of a run call it, and agree: what one of them cannot read none of them uses.

    Args:
      folder: the run's folder, whose lock the caller holds.
      step: the newest checkpoint's.
      abstract_state: shapes, types and shardings of the state.
      fall_back: whether a damaged checkpoint is set aside and the one before it read instead.
      say: told which one that is.

    Raises:
      RunFailed: it is damaged or cannot be read; nothing is changed.
    """
    while True:
        damage = None
        try:
            state = restore(folder.checkpoint(step), abstract_state)
        except RunFailed as error:
            damage = error
        if not processes.anywhere(damage is not None):
            return step, state
        damage = damage or RunFailed(f"another process cannot read the checkpoint {folder.checkpoint(step)}")
        older = [number for number in folder.steps() if number < step]
        if not older:
            raise damage
        if not fall_back:
            raise RunFailed(f"{damage}; run.fall_back=true continues from step {older[-1]}") from damage
        say(f"{damage}; run.fall_back: it is set aside, and the run continues from step {older[-1]}")
        if processes.is_main():
            set_aside(folder, step, "damaged")
        step = processes.agreed(older[-1])


def set_aside(folder: RunFolder, step: int, why: str) -> None:
    """Renames a checkpoint, so that it is none any more, yet can be looked at."""
    there, number = folder.checkpoint(step), 0
    while (aside := there.with_name(f"{step}.{why}{number or ''}")).exists():
        number += 1
    move_folder(there, aside)


def check_not_lost(folder: RunFolder) -> None:
    """A folder with metrics had a folder of checkpoints from its first moment on; in a bucket, which has no
    empty folders, it had a checkpoint when the second one was due.

    Raises:
      RunFailed: it is gone, and starting anew would overwrite what the run recorded.
    """
    lost = folder.has_metrics and not folder.checkpoints.is_dir()
    if lost and is_remote(folder.path):
        newest = max((record["step"] for record in folder.records()), default=0)
        lost = newest >= 2 * folder.settings()["run"]["checkpoint_every"]
    if lost:
        raise RunFailed(
            f"{folder} has metrics but no {CHECKPOINTS}/; remove the folder to start the run anew"
        )
