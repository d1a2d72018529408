"""Files of JSON lines that grow by whole batches, and go on where a kill, at any moment, has left them.

Beside FILE stands FILE.progress: by which settings it is made, how many batches are in it, and the length
and hash of what they wrote. It is replaced after each batch; what stands in a file beyond its length was
written by a process that did not live to say so, and is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from maxllm.errors import UserError
from maxllm.files import finite, locked, read_json, write_json


class Growing:
    """The files while they are open; `open_growing` makes one."""

    def __init__(self, paths: Sequence[Path], settings: Mapping[str, Any]) -> None:
        """Reads how far they are.

        Raises:
          UserError: they were made by other settings, or are not what was written.
        """
        self.paths = paths
        self._settings = dict(settings)
        self._progress = progress_path(paths[0])
        self._hashes = [xxhash.xxh3_128() for _ in paths]
        self._lengths = [0] * len(paths)
        self.batches = 0
        """Batches that are in the files."""
        self.facts: dict[str, Any] = {}
        """What the last of them left for the next."""
        if self._progress.exists():
            self._go_on(read_json(self._progress))
            return
        for path in paths:
            if path.exists():
                raise UserError(
                    f"{path} exists, and no {self._progress.name} says how it was made; remove it, or give "
                    "another --out"
                )
        self._write()

    def _go_on(self, progress: dict[str, Any]) -> None:
        """Takes up what an earlier process wrote, and cuts off what it did not finish."""
        told = f"give another --out, or remove {listed_paths(self.paths)} and {self._progress.name}"
        former = progress.get("settings", {})
        for name in sorted(former.keys() | self._settings.keys()):
            then, now = former.get(name), self._settings.get(name)
            if then != now:
                raise UserError(f"{self.paths[0]} was begun with {name}={then}, not {now}; {told}")
        for number, (path, written) in enumerate(zip(self.paths, progress["files"], strict=True)):
            content = path.read_bytes()[: written["bytes"]] if path.exists() else b""
            self._hashes[number].update(content)
            self._lengths[number] = len(content)
            if written != self._written(number):
                raise UserError(f"{path} is not what was written to it; {told}")
        for path, length in zip(self.paths, self._lengths, strict=True):
            if path.exists():
                os.truncate(path, length)
        self.batches, self.facts = progress["batches"], progress["facts"]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in the first file."""
        with self.paths[0].open("rb") as stream:
            for line in stream:
                yield json.loads(line)

    def append(self, rows: Sequence[Iterable[Mapping[str, Any]]], facts: Mapping[str, Any]) -> None:
        """Adds a batch.

        Args:
          rows: for each file.
          facts: plain data to find again as `facts`.
        """
        for number, (path, some) in enumerate(zip(self.paths, rows, strict=True)):
            content = "".join(map(line_of, some)).encode("utf-8")
            with path.open("ab") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())  # before its length is written down
            self._hashes[number].update(content)
            self._lengths[number] += len(content)
        self.batches += 1
        self.facts = dict(facts)
        self._write()

    def _written(self, number: int) -> dict[str, Any]:
        return {"bytes": self._lengths[number], "hash": self._hashes[number].hexdigest()}

    def _write(self) -> None:
        files = [self._written(number) for number in range(len(self.paths))]
        progress = {"settings": self._settings, "batches": self.batches, "facts": self.facts, "files": files}
        write_json(self._progress, progress)


@contextmanager
def open_growing(paths: Sequence[Path], settings: Mapping[str, Any]) -> Iterator[Growing]:
    """Opens files that one command makes, the first of which gives the others' progress its name.

    Args:
      paths: the files; what is there must have been made by the same settings.
      settings: plain data, by which all that is written is decided.

    Raises:
      UserError: another process writes them; they were made by other settings, or are not what was written.
    """
    lock = paths[0].with_name(f".{paths[0].name}.lock")
    with locked(lock, f"another process is writing {paths[0]}"):
        growing = Growing(paths, settings)
        for path in paths:
            path.touch()
        yield growing


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line that people can read in any language."""
    return json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False) + "\n"


def progress_path(path: Path) -> Path:
    """Where the progress of a file stands; its ending keeps it from being read as rows."""
    return path.with_name(f"{path.name}.progress")


def listed_paths(paths: Sequence[Path]) -> str:
    """Names for a sentence."""
    return " and ".join(str(path) for path in paths)
