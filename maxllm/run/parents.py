"""What a run started from: recorded when it begins, and found again, or refused, whenever it is opened.

"The newest checkpoint of another run" is another one tomorrow: adapters would lie beside weights that they
were not trained on, and a KL penalty would hold a policy to another reference. A run's folder therefore
records the step and the content of each parent, and a parent's folder, who began from what there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import xxhash

from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.files import read_json, write_json
from maxllm.run.checkpoint import FOLDER, find, latest_step, steps_of
from maxllm.run.hashes import content_hash

PARENTS = "parents.json"
"""In a run's folder: {role: {"run", "path", "step", "hash"}}; `run` is for people, `path` leads from the
run's folder to its parent's."""

DEPENDENTS = "dependents"
"""In a parent's folder: a file for each run that began from one of its checkpoints."""

Role = Literal["policy", "reward"]


def roles_of(config: Config) -> dict[Role, str]:
    """The run folders that a recipe starts from, by what they are to it."""
    found: dict[Role, str | None] = {"policy": config.start.policy, "reward": config.start.reward}
    return {role: folder for role, folder in found.items() if folder is not None}


def parent_of(run_dir: Path, config: Config, role: Role) -> Path:
    """The checkpoint that a run began from, or, where it has not begun, the one that it will begin from.

    Args:
      run_dir: the run's folder.
      config: its recipe, which says where the parent's folder is now.
      role: what the parent is to it.

    Raises:
      UserError: the parent has no checkpoint, or no longer the one that the run began from; or nothing says
        which one that was.
    """
    folder = Path(roles_of(config)[role])
    if latest_step(run_dir) is None:
        return find(folder, config.start.checkpoint)
    recorded = read_parents(run_dir).get(role)
    if recorded is None:
        raise UserError(
            f"{run_dir / PARENTS} does not say which checkpoint of {folder} this run began from; put that "
            "file back, or give another run.dir"
        )
    step, former = recorded["step"], recorded["hash"]
    # Where the recipe says, which is true in the folder that training was started in; or where it lay from
    # the run's own folder, which stays true when both move together.
    places = [folder, *([moved_along(run_dir, recorded)] if "path" in recorded else [])]
    for place in places:
        checkpoint = (place / FOLDER).absolute() / str(step)
        if step in steps_of(place) and content_hash(checkpoint / "params") == former:
            return checkpoint
    folder = next((place for place in places if steps_of(place)), folder)
    began = f"{run_dir} began from step {step} of {recorded['run']} (content {former})"
    if step not in steps_of(folder):
        there = ", ".join(str(number) for number in steps_of(folder)[-5:])
        raise UserError(
            f"{began}; {folder} holds {f'steps {there}' if there else 'no checkpoint'} now: put that "
            "checkpoint back, or give another run.dir"
        )
    now = content_hash((folder / FOLDER).absolute() / str(step) / "params")
    raise UserError(
        f"{began}; step {step} of {folder} has the content {now} now: put the former back, or give "
        "another run.dir"
    )


def moved_along(run_dir: Path, recorded: Mapping[str, str | int]) -> Path:
    """The folder of a recorded parent, seen from the folder of the run that began from it."""
    return Path(os.path.normpath(run_dir.resolve() / str(recorded["path"])))


def read_parents(run_dir: Path) -> dict[str, dict[str, str | int]]:
    """{role: {"run", "path", "step", "hash"}} of a run that has begun; nothing where no record is."""
    return read_json(run_dir / PARENTS) if (run_dir / PARENTS).is_file() else {}


def check_parents(run_dir: Path, parents: Mapping[Role, Path]) -> None:
    """Looks again, once the run's folder is locked: another process may have begun the run meanwhile.

    Raises:
      UserError: the run began from other checkpoints than these.
    """
    if latest_step(run_dir) is None:
        return
    for role, former in read_parents(run_dir).items():
        now = entry_of(parents[role], run_dir)  # type: ignore[index]
        if former["hash"] != now["hash"]:
            raise UserError(
                f"{run_dir} began from step {former['step']} of {former['run']} (content {former['hash']}), "
                f"not from step {now['step']} of {now['run']} (content {now['hash']})"
            )


def record_parents(run_dir: Path, parents: Mapping[Role, Path], say: Callable[[str], None]) -> None:
    """Writes down what a run begins from, here and in each parent's folder.

    Args:
      run_dir: the run's folder, whose lock the caller holds.
      parents: the checkpoints it begins from, or has begun from.
      say: told where a parent cannot be marked.
    """
    entries = {role: entry_of(checkpoint, run_dir) for role, checkpoint in parents.items()}
    write_json(run_dir / PARENTS, entries)
    for checkpoint in parents.values():
        mark_in_use(checkpoint, run_dir, say)


def entry_of(checkpoint: Path, run_dir: Path) -> dict[str, str | int]:
    """What a run's folder records of a parent's checkpoint."""
    return {
        "run": shown(run_dir_of(checkpoint)),
        "path": os.path.relpath(run_dir_of(checkpoint).resolve(), run_dir.resolve()),
        "step": int(checkpoint.name),
        "hash": content_hash(checkpoint / "params"),
    }


def mark_in_use(checkpoint: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Leaves a file beside a checkpoint's run that keeps it from deleting that checkpoint."""
    folder = run_dir_of(checkpoint) / DEPENDENTS
    user = os.path.relpath(run_dir.absolute(), run_dir_of(checkpoint))
    try:
        folder.mkdir(exist_ok=True)
        write_json(
            folder / f"{xxhash.xxh3_64_hexdigest(user.encode())}.json",
            {"run": user, "step": int(checkpoint.name)},
        )
    except OSError as error:
        say(
            f"{run_dir_of(checkpoint)} cannot be told that this run begins from its step {checkpoint.name} "
            f"({error.strerror}): training there may delete that checkpoint"
        )


def in_use(run_dir: Path) -> dict[int, list[str]]:
    """{step: run folders} of the runs that began from a run's checkpoints and are still there."""
    users: dict[int, list[str]] = {}
    for file in sorted((run_dir / DEPENDENTS).glob("*.json")):
        entry = read_json(file)
        folder = run_dir / entry["run"]
        if (folder / PARENTS).is_file():
            users.setdefault(entry["step"], []).append(shown(folder))
    return users


def shown(folder: Path) -> str:
    """A folder for people: relative to here where it lies below."""
    path = Path(os.path.abspath(folder))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run_dir_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint's folder lies in."""
    return checkpoint.parent.parent
