"""Content hashes of a checkpoint's items: written before it counts as complete, compared at each read.

A disk, a cable or a copy that changes one bit changes a weight to anything up to 1e38, and neither Orbax's
formats nor their compression notice. Every array has a folder of its own, so that a file names its array.

The hash is XXH3 (Collet, xxhash.com), 128 bits, as fast as memory. It guards against accidents: nobody who
can write the files is kept from writing their hashes too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
import xxhash

from maxllm.errors import RunFailed, UserError
from maxllm.files import file_hash, read_json, write_json
from maxllm.folder import COMMITTED
from maxllm.parallel import processes
from maxllm.rank import damaged
from maxllm.storage import files_below, is_remote, name_below, path_of
from maxllm.storage import size_of as file_size

T = TypeVar("T")

HASHES = "hashes.json"

STEP_METADATA = "_CHECKPOINT_METADATA"

THREADS_FROM = 1 << 25
"""Bytes from which threads gain more than they cost each other."""

FETCHES = 32
"""Files that are fetched from a bucket at a time: each takes its service longer than it takes us."""


class HashedHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees of arrays, which leaves with them the hash of every file it wrote."""

    def __init__(self, **options: Any) -> None:
        """Takes Orbax's options; arrays are never put together into one file."""
        super().__init__(use_ocdbt=False, **options)

    def finalize(self, directory: Any) -> None:
        """Orbax calls it in the main process when all have written, before the checkpoint counts."""
        super().finalize(directory)
        folder = path_of(directory)
        write_json(folder / HASHES, hashes_of(folder, files_of(folder)))


@ocp.args.register_with_handler(HashedHandler, for_save=True)
@dataclass
class HashedSave(ocp.args.PyTreeSave):
    """What Orbax takes for an item that `HashedHandler` writes."""


@ocp.args.register_with_handler(HashedHandler, for_restore=True)
@dataclass
class HashedRestore(ocp.args.PyTreeRestore):
    """Its counterpart, without which Orbax takes no handler; reading needs none (run/restore.py)."""


def files_of(item: Path) -> list[str]:
    """Names of an item's files, relative to it and in order, but for the hashes and Orbax's last mark."""
    names = (name_below(file, item) for file in files_below(item))
    return sorted(name for name in names if name not in (HASHES, COMMITTED))


def hashes_of(item: Path, names: Iterable[str]) -> dict[str, str | None]:
    """{file name: hash} of some files of an item; None for one that cannot be read."""
    names = list(names)
    if len(names) < 2 or are_small(item, names):
        return {name: hash_of(item / name) for name in names}
    with ThreadPoolExecutor(threads_for(item, 8)) as pool:
        return dict(zip(names, pool.map(hash_of, (item / name for name in names)), strict=True))


def are_small(item: Path, names: Iterable[str]) -> bool:
    """Whether an item's files are hashed sooner than threads for them are started."""
    return not is_remote(item) and size_of(item, names) < THREADS_FROM


def threads_for(item: Path, most: int) -> int:
    """How many threads hash files of an item: `most`, or the processors there are; more in a bucket."""
    return FETCHES if is_remote(item) else max(1, min(most, os.cpu_count() or 1))


def hash_of(file: Path) -> str | None:
    """The hash of a file; None for one that cannot be read."""
    try:
        return file_hash(file)
    except OSError:
        return None


def size_of(item: Path, names: Iterable[str]) -> int:
    """Bytes of those of an item's files that are there."""
    return sum(file_size(item / name) for name in names if (item / name).is_file())


def read_hashes(item: Path) -> dict[str, str]:
    """{file name: hash} as the item was written.

    Raises:
      RunFailed: the checkpoint is not complete, or its hashes are gone or damaged.
    """
    checkpoint = item.parent
    for needed in (checkpoint / STEP_METADATA, checkpoint / COMMITTED, item / COMMITTED, item / HASHES):
        if not needed.is_file():
            raise damaged(checkpoint, f"{needed.relative_to(checkpoint)} is missing")
    try:
        return read_json(item / HASHES)
    except UserError as error:
        raise damaged(checkpoint, str(error)) from None


def verify(item: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compares an item's files with their hashes. Several processes share the work, and must all call this.

    Args:
      item: the item's folder in a checkpoint.
      wanted: which files to look at, by their names; all when absent.

    Raises:
      RunFailed: naming the first array that is not as it was written.
    """
    expected = read_hashes(item)
    compare(item, hashes_of(item, own_part(filter(wanted, expected))), expected)


def verify_beside(
    item: Path, groups: Sequence[Sequence[str]], expected: dict[str, str], read: Callable[[int], T]
) -> list[T]:
    """Reads groups of an item's files, one after another, while threads hash the same files.

    What the disk gives to one is in the page cache for the other, so that hashing costs little time;
    half of the processors are left to the reader. Nothing is returned before all is compared. Several
    processes share the hashing, and must all call this.

    Args:
      item: the item's folder in a checkpoint.
      groups: file names, relative to the item.
      expected: what `read_hashes` says of the item.
      read: called with each group's number.

    Returns:
      What `read` returned for each group.

    Raises:
      RunFailed: naming the first array that is not as it was written; where all are, an error of `read`, of
        whichever process.
    """
    own, values = [own_part(group) for group in groups], []
    small = are_small(item, (name for group in groups for name in group))
    with ThreadPoolExecutor(threads_for(item, min(8, (os.cpu_count() or 1) // 2))) as pool:
        # A task for each file, or for all of a group where handing out tasks would take longer than they do.
        parts = [[group] if small else [[name] for name in group] for group in own]
        hashing = [[pool.submit(hashes_of, item, names) for names in group] for group in parts]
        for number, tasks in enumerate(hashing):
            failure = None
            try:
                values.append(read(number))
            except Exception as error:
                failure = error
            compare(item, {name: found for task in tasks for name, found in task.result().items()}, expected)
            if processes.anywhere(failure is not None):
                raise failure or RunFailed(f"another process cannot read {item}")
    return values


def own_part(names: Iterable[str]) -> list[str]:
    """Those of some files that this process hashes."""
    return sorted(names)[jax.process_index() :: jax.process_count()]


def compare(item: Path, found: dict[str, str | None], expected: dict[str, str]) -> None:
    """Compares hashes that this process computed; all processes call it, and all raise where one does.

    Raises:
      RunFailed: naming the first array that is not as it was written.
    """
    wrong = [name for name in found if found[name] != expected[name]]
    if processes.anywhere(bool(wrong)):
        raise damaged(item.parent, described(item, wrong))


def described(item: Path, wrong: list[str]) -> str:
    """What is wrong with files of an item, in a phrase that names arrays."""
    if not wrong:
        return "as another process says"
    name, more = wrong[0], f", and {len(wrong) - 1} more files" * (len(wrong) > 1)
    array = array_of(name)
    what = f"array {array.replace('.', '/')} (file {name})" if array != name else f"file {name}"
    state = "is not as it was written" if (item / name).is_file() else "is missing"
    return f"in {item.name}, {what} {state}{more}"


def array_of(name: str) -> str:
    """The array that a file belongs to, its name with dots; the file's own name where it belongs to none."""
    folder, slash, _ = name.rpartition("/")
    return folder if slash and folder != "array_metadatas" else name


def is_description(name: str) -> bool:
    """Whether a file tells of arrays, and holds no values."""
    return array_of(name) == name or name.endswith("/.zarray")


def content_hash(item: Path) -> str:
    """One hash for all arrays of an item as they were stored, from the hashes that were written with it.

    Raises:
      RunFailed: the checkpoint is not complete, or its hashes are gone.
    """
    digest = xxhash.xxh3_128()
    for name, value in sorted(read_hashes(item).items()):
        if array_of(name) != name:  # the item's own description tells of the mesh, not of values
            digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()
