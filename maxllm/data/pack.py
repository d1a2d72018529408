"""Token sequences to rows of fixed length: chunked, never truncated; packed, never mixed.

A document longer than a row is cut into chunks that overlap by one token, so that every token after the first
is a target exactly once. Several short ones share a row; each has its own segment id and positions from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maxllm.records import LmBatch

OPEN_ROWS = 64
"""Rows kept open for first-fit (95 to 99 % fill on mixed lengths), so that the work per piece is bounded."""


@dataclass(frozen=True)
class Piece:
    """A contiguous stretch to be packed: inputs are ids[:-1], targets ids[1:] with weights[1:]."""

    ids: Sequence[int] | np.ndarray
    weights: Sequence[float] | np.ndarray

    def __len__(self) -> int:
        return len(self.ids) - 1


def chunks(
    ids: Sequence[int] | np.ndarray, weights: Sequence[int] | np.ndarray, length: int
) -> Iterator[Piece]:
    """Pieces of at most `length` targets that together have every token but the first as a target."""
    for start in range(0, len(ids) - 1, length):
        yield Piece(ids[start : start + length + 1], weights[start : start + length + 1])


def packed(pieces: Iterable[Piece], length: int) -> Iterator[tuple[int, list[Piece]]]:
    """First-fit packing of pieces, each at most `length`: (number, pieces) of every row once it is finished.

    Rows are numbered in the order in which they were begun, and end in another: each number comes once.
    """
    rows: dict[int, list[Piece]] = {}
    open_rows: list[tuple[int, int]] = []  # (row, free slots), oldest first
    begun = 0
    for piece in pieces:
        if len(piece) < 1:
            continue
        place = next((i for i, (_, free) in enumerate(open_rows) if free >= len(piece)), None)
        if place is None:
            place = len(open_rows)
            open_rows.append((begun, length))
            rows[begun] = []
            begun += 1
        row, free = open_rows[place]
        rows[row].append(piece)
        free -= len(piece)
        open_rows[place] = (row, free)
        if free == 0:
            del open_rows[place]
            yield row, rows.pop(row)
        elif len(open_rows) > OPEN_ROWS:
            oldest, _ = open_rows.pop(0)
            yield oldest, rows.pop(oldest)
    yield from rows.items()


def pack(pieces: Iterable[Piece], length: int, pad: int) -> LmBatch:
    """Packed rows in memory.

    Returns:
      An LmBatch of numpy arrays [N, length]; padding has segment id 0 and weight 0.
    """
    rows = [row for _, row in sorted(packed(pieces, length), key=lambda numbered: numbered[0])]
    return fill(rows, length, pad)


def fill(rows: Sequence[Sequence[Piece]], length: int, pad: int) -> LmBatch:
    """Writes the pieces of each row one after another."""
    shape = (len(rows), length)
    tokens, targets = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    weights = np.zeros(shape, np.float32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, start=1):
            here = slice(start, start + len(piece))
            tokens[r, here], targets[r, here] = piece.ids[:-1], piece.ids[1:]
            weights[r, here] = piece.weights[1:]
            segments[r, here], positions[r, here] = segment, np.arange(len(piece))
            start += len(piece)
    return LmBatch(tokens, targets, weights, segments, positions)
