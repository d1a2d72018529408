"""Rows of an array in a bucket, fetched as they are asked for, and those that were kept on this disk.

A process asks for the rows of its own devices, and nothing else of the array's file is fetched, so that 64
processes fetch a 64th each. What was fetched is kept in shards on the disk, up to a bound, the shard that was
used least recently goes first.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import math
import os
import threading
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from maxllm.errors import UserError
from maxllm.storage import filesystem, size_of

HEAD = 4096
"""Bytes that hold the head of a .npy file."""

SHARD_BYTES = 1 << 26
"""Bytes of an array whose rows are kept and dropped together."""

SUM = np.dtype(np.uint64)


class RowCache:
    """Rows on this disk, each with a hash: what a power cut left half-written is fetched again."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Continues with what a former process kept in a folder, which no other process may use meanwhile.

        Args:
          folder: where the shards lie.
          limit: bytes that they may take.
        """
        self._folder, self._limit, self._lock = folder, limit, threading.Lock()
        former = sorted(folder.glob("*.rows"), key=lambda file: file.stat().st_mtime)
        self._sizes = OrderedDict((file, file.stat().st_blocks * 512) for file in former)
        self._drop_over_limit()

    def read(self, shard: str, number: int, size: int) -> bytes | None:
        """A row of a shard, or None where it is not kept."""
        file = self._folder / f"{shard}.rows"
        with self._lock:
            if file not in self._sizes:
                return None
            self._sizes.move_to_end(file)
            try:
                with file.open("rb") as rows, file.with_suffix(".sums").open("rb") as sums:
                    rows.seek(number * size)
                    sums.seek(number * SUM.itemsize)
                    row, kept = rows.read(size), sums.read(SUM.itemsize)
            except FileNotFoundError:
                return None
        return row if kept == sum_of(row) else None

    def write(self, shard: str, number: int, row: bytes) -> None:
        """Keeps a row of a shard; others may go for it."""
        file = self._folder / f"{shard}.rows"
        with self._lock:
            for path, place, content in (
                (file, number * len(row), row),
                (file.with_suffix(".sums"), number * SUM.itemsize, sum_of(row)),
            ):
                with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as stream:
                    stream.seek(place)
                    stream.write(content)
            self._sizes[file] = file.stat().st_blocks * 512
            self._sizes.move_to_end(file)
            self._drop_over_limit()

    def _drop_over_limit(self) -> None:
        while sum(self._sizes.values()) > self._limit:
            file, _ = self._sizes.popitem(last=False)
            file.unlink(missing_ok=True)
            file.with_suffix(".sums").unlink(missing_ok=True)


def sum_of(row: bytes) -> bytes:
    """The hash of a row; never that of a row that was not written, whose bytes are zeros."""
    return (xxhash.xxh3_64_intdigest(row) | 1).to_bytes(SUM.itemsize, "little")


@cache
def cache_of_process(limit: int) -> RowCache:
    """The cache of this process on this machine: the first that no other process has open."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxllm" / "rows"
    for number in itertools.count():
        folder = home / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)  # held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return RowCache(folder, limit)
    raise AssertionError("there is always a next number")


class RemoteArray:
    """An array [N, ...] in a .npy file of a bucket: `array[rows]` is a numpy array of some of its rows."""

    def __init__(self, file: Path, kept: RowCache, recorded: dict[str, Any] | None) -> None:
        """Reads the file's head.

        Args:
          file: where it lies.
          kept: rows on this disk.
          recorded: the fingerprint of the record that the array is part of, as it was written with it.

        Raises:
          UserError: the file is no array, or is cut short.
        """
        self._files, self._name, self._kept = filesystem(file), str(file), kept
        self.recorded = recorded
        head = io.BytesIO(self._files.cat_file(self._name, start=0, end=HEAD))
        try:
            np.lib.format.read_magic(head)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(head)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error})") from None
        self._start, self._size = head.tell(), self.dtype.itemsize * math.prod(self.shape[1:])
        if size_of(file) != self._start + len(self) * self._size:
            raise UserError(f"{file} is damaged: it is cut short")
        content = recorded["hash"] if recorded else ""
        self._key = xxhash.xxh3_64_hexdigest(f"{self._name} {content} {self.shape}".encode())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows, [len(rows), ...]."""
        numbers = [int(number) for number in (range(len(self))[rows] if isinstance(rows, slice) else rows)]
        found = {number: self._kept.read(*self._place(number), self._size) for number in set(numbers)}
        missing = sorted(number for number, row in found.items() if row is None)
        for number, row in zip(missing, self._fetch(missing), strict=True):
            found[number] = row
            self._kept.write(*self._place(number), row)
        content = b"".join(found[number] or b"" for number in numbers)
        return np.frombuffer(content, self.dtype).reshape(len(numbers), *self.shape[1:])

    def _place(self, number: int) -> tuple[str, int]:
        """(shard, number in it) of a row."""
        shard, place = divmod(number, max(1, SHARD_BYTES // self._size))
        return f"{self._key}-{shard}", place

    def _fetch(self, numbers: list[int]) -> list[bytes]:
        """Rows from the bucket, all at a time; neighbours as one piece."""
        pieces: list[list[int]] = []
        for number in numbers:
            if pieces and number == pieces[-1][1]:
                pieces[-1][1] += 1
            else:
                pieces.append([number, number + 1])
        starts = [self._start + first * self._size for first, _ in pieces]
        ends = [self._start + last * self._size for _, last in pieces]
        parts = self._files.cat_ranges([self._name] * len(pieces), starts, ends, on_error="raise")
        if any(len(part) != end - start for part, start, end in zip(parts, starts, ends, strict=True)):
            raise UserError(f"{self._name} is cut short, or was changed while it was read")
        whole = b"".join(parts)
        return [whole[place : place + self._size] for place in range(0, len(whole), self._size)]
