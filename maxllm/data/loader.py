"""The order of data: a batch is a pure function of (seed, step).

Every dataset is a record of numpy arrays whose first axis counts its rows: an `LmBatch` of all packed rows,
a `PairBatch` of all pairs, a `PromptBatch` of all prompts. Resuming needs the step number and nothing else,
and works on another number of hosts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain.python as grain
import jax
import numpy as np

Record = TypeVar("Record")


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
    """{"rows", "sha256"} of a dataset: its shapes and up to 256 of its rows, evenly spaced."""
    digest, count = hashlib.sha256(), row_count(rows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, 256)).astype(np.int64))
    for array in jax.tree.leaves(rows):
        digest.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array[chosen]).tobytes())
    return {"rows": count, "sha256": digest.hexdigest()}


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
