"""The order of data: a batch is a pure function of (seed, step), and so is every part of its rows.

A dataset is a record of numpy arrays whose first axis counts its rows: an `LmBatch` of all packed rows, a
`PairBatch` of all pairs, a `PromptBatch` of all prompts. Resuming needs the step number and nothing else, and
works on another number of hosts, of which each asks for the rows of its own devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grain.python as grain
import jax
import numpy as np
import xxhash

from maxllm.data.remote import RemoteArray
from maxllm.records import PromptBatch

Record = TypeVar("Record")
Given = TypeVar("Given", covariant=True)

ALL = slice(None)
"""Every row of a batch."""

HASHED_ROWS = 1 << 10
"""Rows that are hashed at a time."""


class Batches(Protocol[Given]):
    """The training data of a run, in order."""

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""

    def at(self, step: int, rows: slice = ALL) -> Given:
        """Some rows of the global batch at `step`, a record of numpy arrays; the same whoever asks, and when.

        No other row of the batch is built.
        """

    def fingerprint(self) -> dict[str, Any]:
        """{"rows", "hash"}: which data this is."""


def row_count(rows: Any) -> int:
    """Rows in a record of arrays."""
    return len(jax.tree.leaves(rows)[0])


def shuffled(rows: int, seed: int) -> grain.MapDataset:
    """An endless order of `rows` row numbers: each epoch is another permutation of all of them."""
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


def places(step: int, batch_rows: int, rows: slice) -> range:
    """The places of some rows of a batch in the endless order of all rows."""
    return range(step * batch_rows, (step + 1) * batch_rows)[rows]


@dataclass(frozen=True)
class ArrayBatches(Generic[Record]):
    """Batches of a dataset in memory or in mapped files, in a seeded order without an end."""

    rows: Record
    batch_rows: int
    seed: int

    def indices(self, step: int, rows: slice = ALL) -> np.ndarray:
        """Row numbers in the dataset of some rows of the batch at `step`, [rows]."""
        order = shuffled(row_count(self.rows), self.seed)
        return np.array([order[place] for place in places(step, self.batch_rows, rows)], np.int64)

    def at(self, step: int, rows: slice = ALL) -> Record:
        """Some rows of the batch at `step`."""
        chosen = self.indices(step, rows)
        return jax.tree.map(lambda array: np.asarray(array[chosen]), self.rows)

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is, whatever its order."""
        return fingerprint(self.rows)


@dataclass(frozen=True)
class PromptBatches(ArrayBatches[PromptBatch]):
    """Batches of prompts that keep their row numbers, by which a host finds what belongs to them."""

    def at(self, step: int, rows: slice = ALL) -> PromptBatch:
        """Some rows of the batch at `step`, with their numbers."""
        numbers_B = self.indices(step, rows).astype(np.int32)
        return super().at(step, rows).replace(row_B=numbers_B)


def fingerprint(rows: Any) -> dict[str, Any]:
    """{"rows", "hash"} of a dataset: XXH3 of its shapes and all its values; leaves may be lists of texts.

    Of arrays in a bucket it is what was written down with them, for reading all of them takes long.
    """
    digest, leaves = xxhash.xxh3_128(), jax.tree.leaves(rows, is_leaf=lambda leaf: isinstance(leaf, list))
    if isinstance(leaves[0], RemoteArray) and leaves[0].recorded is not None:
        return leaves[0].recorded
    for leaf in leaves:
        if isinstance(leaf, list):
            digest.update(json.dumps(leaf).encode())
            continue
        digest.update(f"{leaf.shape} {leaf.dtype}".encode())
        for start in range(0, len(leaf), HASHED_ROWS):  # the array may be a file larger than memory
            digest.update(np.ascontiguousarray(leaf[start : start + HASHED_ROWS]).data)
    return {"rows": len(leaves[0]), "hash": digest.hexdigest()}


def in_order(rows: Record, batch_rows: int) -> Iterator[tuple[Record, int]]:
    """All rows once, in order, for evaluation: (batch, number of real rows in it).

    The last batch is filled up with rows of zeros, whose weights are therefore 0.
    """
    for start in range(0, row_count(rows), batch_rows):
        part = jax.tree.map(lambda array, start=start: np.asarray(array[start : start + batch_rows]), rows)
        real = row_count(part)
        yield (
            jax.tree.map(lambda a, n=batch_rows - real: np.pad(a, [(0, n)] + [(0, 0)] * (a.ndim - 1)), part),
            real,
        )
