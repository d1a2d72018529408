"""A batch is a pure function of (seed, step); an epoch is a permutation; evaluation sees each row once."""

import jax
import numpy as np
import pytest

from maxllm.data.loader import ArrayBatches, PromptBatches, fingerprint, in_order, row_count
from maxllm.records import PairBatch, PromptBatch

ORDER = [[4, 6, 0, 2], [5, 3, 1, 2], [1, 3, 4, 6]]
"""Rows of three batches of 4 of 7 rows, seed 3, from before batches were built in parts."""
HASH = "fd391be0e9b49e5f76d8937b1cc992ba"
"""Of 23 prompts, from before they kept their numbers."""


def prompts(n):
    """Row i holds i everywhere."""
    ids = np.arange(n, dtype=np.int32)
    return PromptBatch(np.repeat(ids[:, None], 3, 1), ids)


def rows_of(batches, steps):
    return np.concatenate([batches.at(step).lengths_B for step in steps])


def test_a_batch_is_a_function_of_seed_and_step():
    """Asked for out of order, twice, by another object: always the same rows."""
    first = ArrayBatches(prompts(23), 4, seed=5)
    there = [first.at(step) for step in range(12)]
    other = ArrayBatches(prompts(23), 4, seed=5)
    for step in (11, 3, 0, 7, 3):
        again = other.at(step)
        np.testing.assert_array_equal(again.tokens_BP, there[step].tokens_BP)
        np.testing.assert_array_equal(again.tokens_BP[:, 0], again.lengths_B)  # arrays stay together


@pytest.mark.parametrize(("rows", "batch"), [(24, 4), (23, 4), (5, 8), (1, 3)])
def test_every_epoch_is_a_permutation(rows, batch):
    """Also where epochs end inside a batch, and where a batch is longer than an epoch."""
    batches = ArrayBatches(prompts(rows), batch, seed=0)
    order = rows_of(batches, range(-(-3 * rows // batch)))[: 3 * rows].reshape(3, rows)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    if rows > 20:
        assert len({tuple(epoch) for epoch in order}) == 3  # each in another order
        assert tuple(order[0]) != tuple(range(rows))


def test_another_seed_is_another_order():
    orders = {tuple(rows_of(ArrayBatches(prompts(40), 8, seed), range(5))) for seed in range(6)}
    assert len(orders) == 6


def test_another_batch_size_cuts_the_same_order():
    small, large = ArrayBatches(prompts(30), 5, seed=1), ArrayBatches(prompts(30), 15, seed=1)
    np.testing.assert_array_equal(rows_of(small, range(12)), rows_of(large, range(4)))


def test_a_batch_keeps_types_and_shapes():
    rows = PairBatch(np.zeros((9, 2, 4), np.int32), np.ones((9, 2), np.int32), np.ones(9, np.float32))
    batch = ArrayBatches(rows, 4, 0).at(1)
    assert batch.tokens_BCT.shape == (4, 2, 4) and batch.tokens_BCT.dtype == np.int32
    assert batch.weights_B.dtype == np.float32
    assert row_count(rows) == 9


def test_the_order_is_that_of_every_release():
    """A run goes on with the rows it would have had."""
    numbers = [ArrayBatches(prompts(7), 4, seed=3).at(step).lengths_B.tolist() for step in range(3)]
    assert numbers == ORDER


@pytest.mark.parametrize("kind", [ArrayBatches, PromptBatches])
def test_parts_of_a_batch_are_parts_of_the_whole(kind):
    batches = kind(prompts(23), 8, seed=5)
    for step in (0, 2, 7):
        whole = batches.at(step)
        for rows in (slice(0, 8), slice(2, 4), slice(7, 8), slice(4, None), slice(3, 3)):
            for part, array in zip(*map(jax.tree.leaves, (batches.at(step, rows), whole)), strict=True):
                np.testing.assert_array_equal(part, array[rows])


def test_prompts_keep_their_numbers_and_the_data_its_fingerprint():
    with_numbers, without = (kind(prompts(23), 4, seed=5) for kind in (PromptBatches, ArrayBatches))
    for step in range(12):
        batch = with_numbers.at(step)
        np.testing.assert_array_equal(batch.row_B, batch.lengths_B)  # row i holds i
        assert batch.row_B.dtype == np.int32 and without.at(step).row_B is None
    assert with_numbers.fingerprint() == without.fingerprint() == fingerprint(prompts(23))
    assert fingerprint(prompts(23)) == {"rows": 23, "hash": HASH}


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (8, 4), (3, 8)])
def test_in_order_covers_all_rows_once(rows, batch):
    """The last batch is filled with zeros, whose weight is 0, and says how many rows are real."""
    tokens = np.arange(rows * 6, dtype=np.int32).reshape(rows, 2, 3) + 1
    pairs = PairBatch(tokens, np.full((rows, 2), 3, np.int32), np.ones(rows, np.float32))
    found = []
    for part, real in in_order(pairs, batch):
        assert part.tokens_BCT.shape == (batch, 2, 3) and 0 < real <= batch
        found.append(part.tokens_BCT[:real])
        assert not part.tokens_BCT[real:].any() and not part.lengths_BC[real:].any()
        assert part.weights_B.sum() == real and not part.weights_B[real:].any()
    assert len(found) == -(-rows // batch)
    np.testing.assert_array_equal(np.concatenate(found), tokens)


def test_a_fingerprint_tells_data_apart():
    rows = {"a": np.arange(3000).reshape(1000, 3), "b": np.ones(1000, np.float32)}
    same = fingerprint({name: array.copy() for name, array in rows.items()})
    assert fingerprint(rows) == same and same["rows"] == 1000
    shorter = {name: array[:-1] for name, array in rows.items()}
    other = rows | {"a": rows["a"] + 1}
    assert len({fingerprint(each)["hash"] for each in (rows, shorter, other)}) == 3


def test_a_fingerprint_reads_every_value():
    """One changed value anywhere, also in a file that is mapped, and one changed answer."""
    rows = np.arange(5000 * 3, dtype=np.int32).reshape(5000, 3)
    answers = [str(number) for number in range(5000)]
    former = fingerprint((rows, answers))
    for number in (0, 1, 1023, 1024, 2777, 4998, 4999):
        changed = rows.copy()
        changed[number, 1] ^= 1
        assert fingerprint((changed, answers)) != former
        assert fingerprint((rows, [*answers[:number], "x", *answers[number + 1 :]])) != former


def test_a_fingerprint_of_a_mapped_file_is_that_of_its_values(tmp_path):
    rows = np.arange(3000, dtype=np.int32).reshape(1000, 3)
    np.save(tmp_path / "rows.npy", rows)
    assert fingerprint(np.load(tmp_path / "rows.npy", mmap_mode="r")) == fingerprint(rows)
