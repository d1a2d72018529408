"""A mixture of several datasets in exact shares, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import xxhash

from maxllm.data.loader import ALL, Batches, places, shuffled

Record = TypeVar("Record")


@dataclass(frozen=True)
class Mixture(Generic[Record]):
    """Blocks of rows, each of them one batch of every part, shuffled.

    The parts' `batch_rows` are therefore their shares: of parts with 7, 2 and 1 rows, every block of 10 rows
    holds exactly 7, 2 and 1. Block b is made of the parts' batches at step b; where batches of the mixture
    begin and end has nothing to do with it.
    """

    parts: Sequence[Batches[Record]]
    batch_rows: int
    seed: int

    def at(self, step: int, rows: slice = ALL) -> Record:
        """Some rows of the batch at `step`; of the parts no other rows are asked for."""
        ends = list(accumulate(part.batch_rows for part in self.parts))
        order, found = shuffled(ends[-1], self.seed), []
        for place in places(step, self.batch_rows, rows):
            # An epoch of the order is a block: its row numbers count through the parts' batches, one by one.
            row, block = order[place], place // ends[-1]
            number = int(np.searchsorted(ends, row, side="right"))
            part = self.parts[number]
            first = row - (ends[number] - part.batch_rows)
            found.append(part.at(block, slice(first, first + 1)))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *found)

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is, and in which shares."""
        prints = [(part.batch_rows, part.fingerprint()) for part in self.parts]
        hashes = " ".join(f"{share} {one['hash']}" for share, one in prints)
        rows = sum(one["rows"] for _, one in prints)
        return {"rows": rows, "hash": xxhash.xxh3_128_hexdigest(hashes.encode())}
