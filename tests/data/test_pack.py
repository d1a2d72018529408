"""Packing: every token but a document's first is a target exactly once, and packing changes no loss."""

import jax
import numpy as np
import pytest
import rounding

from maxllm.data.pack import OPEN_ROWS, Piece, chunks, pack
from maxllm.model.llama import Llama
from maxllm.records import LmBatch
from maxllm.steps.language import language_loss
from maxllm.weights import Weights

LENGTH, PAD = 16, 5


def documents(*lengths):
    """Ids that say where they come from: document d has d * 1000 + 0, 1, 2, … and weight 1."""
    return [[d * 1000 + i for i in range(n)] for d, n in enumerate(lengths, start=1)]


def packed(docs, length=LENGTH):
    return pack((piece for doc in docs for piece in chunks(doc, [1] * len(doc), length)), length, PAD)


MIXES = {
    "short": documents(3, 5, 2, 7, 4, 4, 9),
    "exact": documents(LENGTH + 1, LENGTH, LENGTH + 2, 2 * LENGTH + 1),
    "long": documents(100, 3, 57, 2),
    "random": documents(*np.random.default_rng(0).integers(2, 60, 200)),
}


@pytest.mark.parametrize("docs", MIXES.values(), ids=MIXES)
def test_every_token_but_the_first_is_a_target_exactly_once(docs):
    batch = packed(docs)
    counted = batch.targets_BT[batch.loss_weights_BT > 0]
    assert sorted(counted) == [token for doc in docs for token in doc[1:]]


@pytest.mark.parametrize("docs", MIXES.values(), ids=MIXES)
def test_each_target_follows_its_own_input(docs):
    """The id before a target is the one it is predicted from, also at the seam of two chunks."""
    batch = packed(docs)
    real = batch.segment_ids_BT > 0
    np.testing.assert_array_equal(batch.targets_BT[real] - batch.tokens_BT[real], 1)


@pytest.mark.parametrize("docs", MIXES.values(), ids=MIXES)
def test_segments_and_positions(docs):
    """Segments 1, 2, … then 0; inside a segment positions run from 0 and all tokens are of one document."""
    batch = packed(docs)
    for row in range(len(batch.tokens_BT)):
        segments = batch.segment_ids_BT[row]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all()
        assert (np.diff(segments[:used]) >= 0).all()
        assert set(segments[:used]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(batch.positions_BT[row, here], np.arange(here.sum()))
            assert len(set(batch.tokens_BT[row, here] // 1000)) == 1
        np.testing.assert_array_equal(batch.tokens_BT[row, used:], PAD)
        assert not batch.loss_weights_BT[row, used:].any() and not batch.positions_BT[row, used:].any()


def test_shapes_and_types():
    batch = packed(MIXES["random"])
    assert {x.shape for x in jax.tree.leaves(batch)} == {(len(batch.tokens_BT), LENGTH)}
    assert batch.loss_weights_BT.dtype == np.float32
    for x in (batch.tokens_BT, batch.targets_BT, batch.segment_ids_BT, batch.positions_BT):
        assert x.dtype == np.int32


def test_chunks_overlap_by_one_token():
    ids = list(range(10))
    pieces = [list(piece.ids) for piece in chunks(ids, [1] * 10, 4)]
    assert pieces == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]
    assert [len(piece) for piece in chunks(ids, [1] * 10, 4)] == [4, 4, 1]
    assert [list(piece.ids) for piece in chunks(ids[:5], [1] * 5, 4)] == [[0, 1, 2, 3, 4]]


def test_a_document_without_a_target_makes_no_row():
    assert list(chunks([], [], 4)) == list(chunks([7], [1], 4)) == []
    assert pack([Piece([7], [1])], 4, PAD).tokens_BT.shape == (0, 4)


def test_weights_go_with_their_targets():
    """Weight i belongs to id i as a target: the first one, never a target, is dropped."""
    batch = pack([Piece([10, 11, 12, 13], [1, 0, 1, 0])], 4, PAD)
    np.testing.assert_array_equal(batch.loss_weights_BT, [[0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[11, 12, 13, PAD]])


def test_first_fit_fills_the_oldest_open_row():
    """Pieces of 10, 10, 6, 4 and 2 targets into rows of 16: 10 + 6 and 10 + 4 + 2."""
    batch = packed(documents(11, 11, 7, 5, 3))
    np.testing.assert_array_equal(batch.segment_ids_BT.max(1), [2, 3])
    assert (batch.segment_ids_BT > 0).all()


def test_fill_on_mixed_lengths():
    """Up to 100 tokens into rows of 256: little is lost but in the rows still open at the end."""
    docs = documents(*np.random.default_rng(1).integers(2, 100, 2000))
    batch = packed(docs, 256)
    assert (batch.segment_ids_BT > 0).mean() > 0.985
    assert len(batch.tokens_BT) > OPEN_ROWS


def test_packed_loss_equals_unpacked_loss(tiny_model, params_of):
    """Through the model: one document a row, and many."""
    model = Llama(tiny_model())
    rng = np.random.default_rng(2)
    docs = [list(rng.integers(6, 64, n)) for n in rng.integers(2, LENGTH + 2, 24)]
    weights = [list(rng.integers(0, 2, len(doc))) for doc in docs]
    pieces = [Piece(doc, weight) for doc, weight in zip(docs, weights, strict=True)]
    many = pack(pieces, LENGTH, PAD)
    rows = [pack([piece], LENGTH, PAD) for piece in pieces]
    single: LmBatch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    assert len(many.tokens_BT) < 0.7 * len(single.tokens_BT)

    loss = jax.jit(lambda weights, batch: language_loss(model, weights, batch, None))
    weights_of_model = Weights(params_of(model))
    packed_loss, single_loss = loss(weights_of_model, many), loss(weights_of_model, single)
    assert float(packed_loss.weight) == float(single_loss.weight) == sum(sum(w[1:]) for w in weights)
    total = lambda weights: loss(weights, single).total  # noqa: E731
    atol = rounding.of_network(total, weights_of_model, terms=64) + rounding.of_sum(
        int(single_loss.weight), float(single_loss.total)
    )
    np.testing.assert_allclose(packed_loss.total, single_loss.total, rtol=0, atol=atol)
    np.testing.assert_array_equal(packed_loss.metrics["accuracy"], single_loss.metrics["accuracy"])
