"""A mixture has exact shares in every block, reads each part in its order, and is a function of the step."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from maxllm.data.loader import ALL, ArrayBatches
from maxllm.data.mixture import Mixture

SHARES = (5, 2, 1)


@dataclass(frozen=True)
class Asked(ArrayBatches):
    """Batches that note what they are asked for."""

    asked: list = field(default_factory=list)

    def at(self, step, rows=ALL):
        self.asked.append((step, rows))
        return super().at(step, rows)


def mixture(batch=6, seed=1, size=7, shares=SHARES):
    """Rows of part n are 100 n, 100 n + 1, …"""
    parts = [Asked(100 * n + np.arange(size), share, seed=n) for n, share in enumerate(shares)]
    return Mixture(parts, batch, seed)


def rows_of(batches, steps):
    return np.concatenate([batches.at(step) for step in steps])


@pytest.mark.parametrize("batch", [1, 6, 8, 20])
def test_every_block_holds_exact_shares_whatever_the_batch(batch):
    """And the batch does not change the order."""
    rows = rows_of(mixture(batch), range(80 // batch)).reshape(-1)[: 80 // batch * batch]
    np.testing.assert_array_equal(rows, rows_of(mixture(8), range(10))[: len(rows)])
    for block in rows[: len(rows) // 8 * 8].reshape(-1, 8) // 100:
        assert tuple(np.bincount(block, minlength=3)) == SHARES


def test_each_block_is_one_batch_of_every_part_in_another_order():
    blocks = [mixture(8).at(step) for step in range(10)]
    for number, block in enumerate(blocks):
        batches = np.concatenate([part.at(number) for part in mixture().parts])
        np.testing.assert_array_equal(np.sort(block), np.sort(batches))
    assert len({tuple(block // 100) for block in blocks}) > 5


def test_parts_of_a_batch_are_parts_of_the_whole_and_ask_for_no_other_row():
    for step in (5, 0, 3):
        whole = mixture().at(step)
        for rows in (slice(0, 6), slice(2, 5), slice(5, None)):
            one = mixture()
            np.testing.assert_array_equal(one.at(step, rows), whole[rows])
            asked = [(number, *ask) for number, part in enumerate(one.parts) for ask in part.asked]
            assert len(asked) == len(set(map(str, asked))) == len(whole[rows])
            assert all(part.stop - part.start == 1 for *_, part in asked)


def test_a_mixture_of_mixtures():
    inner = mixture(batch=4)
    outer = Mixture([inner, ArrayBatches(900 + np.arange(3), 1, 0)], 10, 0)
    blocks = rows_of(outer, range(4)).reshape(-1, 5)
    assert ((blocks >= 900).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(np.sort(blocks[blocks < 900]), np.sort(rows_of(inner, range(8))))


def test_another_seed_is_another_order_and_other_shares_are_other_data():
    assert rows_of(mixture(seed=1), range(4)).tolist() != rows_of(mixture(seed=2), range(4)).tolist()
    former = mixture().fingerprint()
    assert former["rows"] == 21 and mixture(batch=3).fingerprint() == former
    assert mixture(shares=(5, 1, 2)).fingerprint() != former != mixture(size=8).fingerprint()
