"""Packed rows on disk: one .npy file per array, written row by row and read as they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from maxllm.data.pack import Piece, fill, packed
from maxllm.errors import UserError
from maxllm.records import LmBatch


def write_rows(folder: Path, pieces: Iterable[Piece], length: int, pad: int) -> tuple[int, int]:
    """Packs pieces into rows on disk, one .npy file per array [N, length]; a row is written when it is full.

    Returns:
      (number of rows, number of targets).
    """
    folder.mkdir(parents=True)
    count, tokens = 0, 0
    with ExitStack() as stack:
        files = [RowFile(stack.enter_context(path.open("wb"))) for path in paths_of(folder)]
        for number, row in packed(pieces, length):
            filled = fill([row], length, pad)
            for file, field in zip(files, dataclasses.fields(filled), strict=True):
                file.write(number, getattr(filled, field.name))
            count = max(count, number + 1)
            tokens += sum(map(len, row))
        for file in files:
            file.finish(count)
    return count, tokens


def read_rows(prepared: Path, split: str) -> LmBatch:
    """Packed rows [N, T], memory-mapped.

    Raises:
      UserError: an array is missing or cut short.
    """
    try:
        return LmBatch(*(np.load(file, mmap_mode="r") for file in paths_of(prepared / split)))
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared} is damaged ({error}); remove it and prepare it anew") from None


def paths_of(folder: Path) -> list[Path]:
    """The files of a record of rows."""
    return [folder / f"{field.name}.npy" for field in dataclasses.fields(LmBatch)]


class RowFile:
    """A .npy file that grows by rows, in any order; NumPy leaves room in its head for any number of them."""

    def __init__(self, stream: BinaryIO) -> None:
        """Takes an empty file, opened for writing."""
        self._stream = stream
        self._start = 0
        self._kind: tuple[tuple[int, ...], np.dtype] | None = None

    def write(self, number: int, rows: np.ndarray) -> None:
        """Puts an array [1, ...] where row `number` belongs."""
        if self._kind is None:
            self._kind = rows.shape[1:], rows.dtype
            self._start = self._head(0)
        self._stream.seek(self._start + number * rows.nbytes)
        self._stream.write(rows.tobytes())

    def finish(self, count: int) -> None:
        """Says how many rows there are."""
        if self._kind is not None:
            assert self._head(count) == self._start, "NumPy's head keeps its length"

    def _head(self, count: int) -> int:
        assert self._kind is not None, "there is a row"
        shape, dtype = self._kind
        self._stream.seek(0)
        head = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        }
        np.lib.format.write_array_header_1_0(self._stream, head)
        return self._stream.tell()
