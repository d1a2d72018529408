"""The order of data: a batch is a pure function of (seed, step).

Every dataset is a record of numpy arrays whose first axis counts its rows: an `LmBatch` of all packed rows,
a `PairBatch` of all pairs, a `PromptBatch` of all prompts. Resuming needs the step number and nothing else,
and works on another number of hosts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain.python as grain
import jax
import numpy as np
import xxhash

Record = TypeVar("Record")


HASHED_ROWS = 1 << 10
"""Rows that are hashed at a time."""


def row_count(rows: Any) -> int:
    """Rows in a record of arrays."""
    return len(jax.tree.leaves(rows)[0])


@dataclass(frozen=True)
class Batches(Generic[Record]):
    """An endless, seeded order over a dataset: each epoch is another permutation of all rows."""

    rows: Record
    batch_rows: int
    seed: int

    def indices(self, step: int) -> np.ndarray:
        """Row numbers of the batch at `step`."""
        order = grain.MapDataset.range(row_count(self.rows)).seed(self.seed).shuffle().repeat()
        start = step * self.batch_rows
        return np.array([order[i] for i in range(start, start + self.batch_rows)])

    def at(self, step: int) -> Record:
        """The batch at `step`, numpy arrays."""
        chosen = self.indices(step)
        return jax.tree.map(lambda array: np.asarray(array[chosen]), self.rows)


def fingerprint(rows: Any) -> dict[str, Any]:
    """{"rows", "hash"} of a dataset: XXH3 of its shapes and all its values; leaves may be lists of texts."""
    digest, leaves = xxhash.xxh3_128(), jax.tree.leaves(rows, is_leaf=lambda leaf: isinstance(leaf, list))
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
