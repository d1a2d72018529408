"""What a run started from: recorded when it begins, and found again, or refused, whenever it is opened.

"The newest checkpoint of another run" is another one tomorrow: adapters would lie beside weights that they
were not trained on, and a KL penalty would hold a policy to another reference. A run's folder therefore
records the step and the content of each parent, and a parent's folder, who began from what there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.folder import PARENTS, RunFolder
from maxllm.run.hashes import content_hash

Role = Literal["policy", "reward"]


def roles_of(config: Config) -> dict[Role, str]:
    """The run folders that a recipe starts from, by what they are to it."""
    found: dict[Role, str | None] = {"policy": config.start.policy, "reward": config.start.reward}
    return {role: folder for role, folder in found.items() if folder is not None}


def parent_of(folder: RunFolder, config: Config, role: Role) -> Path:
    """The checkpoint that a run began from, or, where it has not begun, the one that it will begin from.

    Args:
      folder: the run's folder.
      config: its recipe, which says where the parent's folder is now.
      role: what the parent is to it.

    Raises:
      UserError: the parent has no checkpoint, or no longer the one that the run began from; or nothing says
        which one that was.
    """
    parent = RunFolder(roles_of(config)[role])
    if folder.latest_step() is None:
        return parent.find(config.start.checkpoint)
    recorded = folder.parents().get(role)
    if recorded is None:
        raise UserError(
            f"{folder}/{PARENTS} does not say which checkpoint of {parent} this run began from; put that "
            "file back, or give another run.dir"
        )
    step, former = int(recorded["step"]), recorded["hash"]
    # Where the recipe says, which is true in the folder that training was started in; or where it lay from
    # the run's own folder, which stays true when both move together.
    places = [parent, *([folder.along(str(recorded["path"]))] if "path" in recorded else [])]
    for place in places:
        if step in place.steps() and content_hash(place.checkpoint(step) / "params") == former:
            return place.checkpoint(step)
    parent = next((place for place in places if place.steps()), parent)
    began = f"{folder} began from step {step} of {recorded['run']} (content {former})"
    if step not in parent.steps():
        there = ", ".join(str(number) for number in parent.steps()[-5:])
        raise UserError(
            f"{began}; {parent} holds {f'steps {there}' if there else 'no checkpoint'} now: put that "
            "checkpoint back, or give another run.dir"
        )
    now = content_hash(parent.checkpoint(step) / "params")
    raise UserError(
        f"{began}; step {step} of {parent} has the content {now} now: put the former back, or give "
        "another run.dir"
    )


def check_parents(folder: RunFolder, parents: Mapping[Role, Path]) -> None:
    """Looks again, once the run's folder is locked: another process may have begun the run meanwhile.

    Raises:
      UserError: the run began from other checkpoints than these.
    """
    if folder.latest_step() is None:
        return
    for role, former in folder.parents().items():
        now = entry_of(parents[role], folder)  # type: ignore[index]
        if former["hash"] != now["hash"]:
            raise UserError(
                f"{folder} began from step {former['step']} of {former['run']} (content {former['hash']}), "
                f"not from step {now['step']} of {now['run']} (content {now['hash']})"
            )


def record_parents(folder: RunFolder, parents: Mapping[Role, Path], say: Callable[[str], None]) -> None:
    """Writes down what a run begins from, here and in each parent's folder.

    Args:
      folder: the run's folder, whose lock the caller holds.
      parents: the checkpoints it begins from, or has begun from.
      say: told where a parent cannot be marked.
    """
    entries = {role: entry_of(checkpoint, folder) for role, checkpoint in parents.items()}
    folder.write_parents(entries)
    for checkpoint in parents.values():
        mark_in_use(checkpoint, folder, say)


def entry_of(checkpoint: Path, folder: RunFolder) -> dict[str, str | int]:
    """What a run's folder records of a parent's checkpoint."""
    parent = RunFolder.of_checkpoint(checkpoint)
    return {
        "run": parent.shown(),
        "path": folder.way_to(parent),
        "step": int(checkpoint.name),
        "hash": content_hash(checkpoint / "params"),
    }


def mark_in_use(checkpoint: Path, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Leaves a file beside a checkpoint's run that keeps it from deleting that checkpoint."""
    parent = RunFolder.of_checkpoint(checkpoint)
    try:
        parent.add_dependent(int(checkpoint.name), folder)
    except OSError as error:
        say(
            f"{parent} cannot be told that this run begins from its step {checkpoint.name} "
            f"({error.strerror}): training there may delete that checkpoint"
        )


def in_use(folder: RunFolder) -> dict[int, list[str]]:
    """{step: run folders} of the runs that began from a run's checkpoints and are still there."""
    users: dict[int, list[str]] = {}
    for step, user in folder.dependents():
        users.setdefault(step, []).append(user.shown())
    return users
