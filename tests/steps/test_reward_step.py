"""The reward model reads the right token, whatever the padding, and filler rows weigh nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from maxllm.config import PpoConfig, RewardConfig
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.records import PairBatch, Rollout
from maxllm.steps import reward
from maxllm.steps.ppo import Ppo, scores
from maxllm.steps.state import TrainState, init_params

T, V = 16, 64
TOLERANCE = 1e-5
"""Scores of order 1 through two float32 layers, added up in another order: some tens of 6e-8."""


@pytest.fixture(scope="module")
def scored(tiny_model):
    """A scalar model and its parameters."""
    model = ScalarModel(tiny_model())
    return model, nn.unbox(init_params(model, jax.random.key(1)))


def sequences(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, V, n).astype(np.int32) for n in lengths]


def right_padded(rows, length=T, pad=5):
    tokens = np.full((len(rows), length), pad, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def alone(model, params, row):
    """The score of one sequence by itself, without any padding."""
    return float(reward.score(model, params, row[None], np.array([len(row)]))[0])


def pairs(lengths, weights=None, seed=0):
    """PairBatch of [(chosen length, rejected length), …]."""
    tokens, found = right_padded(sequences(*np.ravel(lengths), seed=seed))
    n = len(lengths)
    weights = np.ones(n, np.float32) if weights is None else np.array(weights, np.float32)
    return PairBatch(tokens.reshape(n, 2, T), found.reshape(n, 2), weights)


LENGTHS = [(3, 5), (16, 2), (9, 9), (1, 12)]


def test_scores_of_padded_rows_equal_single_rows(scored):
    rows = sequences(1, 4, 9, 15, 16)
    got = reward.score(*scored, *right_padded(rows))
    expected = [alone(*scored, row) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    assert np.ptp(expected) > 0.1  # they do differ


def test_what_stands_in_the_padding_does_not_matter(scored):
    rows = sequences(3, 8)
    tokens, lengths = right_padded(rows)
    noise, _ = right_padded(rows, pad=40)
    np.testing.assert_array_equal(
        reward.score(*scored, tokens, lengths), reward.score(*scored, noise, lengths)
    )


def test_a_stop_token_in_the_middle_is_not_the_end(scored):
    """The score is read by length, never by looking for an id: </s>, <|im_end|> and <pad> may stand anywhere."""
    (row,) = sequences(9)
    row[3], row[5], row[6] = 2, 4, 5
    got = reward.score(*scored, *right_padded([row]))
    np.testing.assert_allclose(got, [alone(*scored, row)], rtol=0, atol=TOLERANCE)


def test_loss_and_accuracy_follow_from_the_scores(scored):
    model, params = scored
    batch = pairs(LENGTHS)
    s = np.array(
        [
            [alone(model, params, batch.tokens_BCT[b, c, : batch.lengths_BC[b, c]]) for c in (0, 1)]
            for b in range(4)
        ]
    )
    config = RewardConfig(margin=0.25, centering=0.01)
    metrics = reward.eval_step(params, batch, model=model, config=config)
    losses = np.log1p(np.exp(-(s[:, 0] - s[:, 1] - 0.25))) + 0.01 * (s[:, 0] + s[:, 1]) ** 2
    right = (s[:, 0] > s[:, 1]).sum()
    assert 0 < right < 4
    expected = {"loss": losses.sum(), "accuracy": right, "score_chosen": s[:, 0].sum()}
    expected["score_rejected"] = s[:, 1].sum()
    for name, total in expected.items():
        got, count = map(float, metrics[name])
        assert count == 4
        np.testing.assert_allclose(got, total, rtol=0, atol=10 * TOLERANCE, err_msg=name)


def test_three_completions_are_right_only_if_the_first_beats_both(scored):
    tokens, lengths = right_padded(sequences(4, 7, 10))
    s = np.asarray(reward.score(*scored, tokens, lengths))
    best_first = np.argsort(-s)
    model, params = scored
    for order, right in ((best_first, 1), (best_first[::-1], 0), (best_first[[1, 0, 2]], 0)):
        batch = PairBatch(tokens[order][None], lengths[order][None], np.ones(1, np.float32))
        metrics = reward.eval_step(params, batch, model=model, config=RewardConfig())
        assert [float(x) for x in metrics["accuracy"]] == [right, 1]


def test_equal_scores_are_not_right(scored):
    model, params = scored
    tokens, lengths = right_padded(sequences(6))
    batch = PairBatch(np.stack([tokens, tokens], 1), np.stack([lengths, lengths], 1), np.ones(1, np.float32))
    metrics = reward.eval_step(params, batch, model=model, config=RewardConfig())
    assert float(metrics["accuracy"][0]) == 0
    np.testing.assert_allclose(metrics["loss"][0], np.log(2), rtol=1e-6)


def trained(scored, batch, microbatches=1, rate=0.1):
    model, params = scored
    optimizer = optax.sgd(rate)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = partial(
        reward.train_step,
        model=model,
        config=RewardConfig(),
        optimizer=optimizer,
        seed=0,
        microbatches=microbatches,
    )
    return jax.jit(step)(state, batch)


def test_filler_rows_weigh_nothing(scored):
    """Rows of zeros (loader.in_order's) and rows with content but weight 0 leave update and metrics alone."""
    batch = pairs(LENGTHS)
    zeros = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    loud = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, pairs(LENGTHS, weights=[0] * 4, seed=9))
    expected, expected_metrics = trained(scored, batch)
    for padded in (zeros, loud):
        state, metrics = trained(scored, padded)
        assert float(metrics["skipped"][0]) == 0
        for name in ("loss", "accuracy", "score_chosen", "score_rejected"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=0, atol=10 * TOLERANCE)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), state.params, expected.params)


def test_microbatches_do_not_change_the_update(scored):
    batch = pairs(LENGTHS, weights=[1, 0, 1, 1])
    whole, _ = trained(scored, batch)
    parts, metrics = trained(scored, batch, microbatches=4)
    assert float(metrics["loss"][1]) == 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), parts.params, whole.params)


def test_training_separates_the_pairs(scored):
    model, params = scored
    batch, state = pairs(LENGTHS), None
    before = reward.eval_step(params, batch, model=model, config=RewardConfig())
    for _ in range(10):
        state, _ = trained((model, params), batch, rate=0.05)
        params = state.params
    after = reward.eval_step(params, batch, model=model, config=RewardConfig())
    assert float(after["loss"][0]) < 0.5 * float(before["loss"][0])
    assert float(after["accuracy"][0]) == 4


def test_left_padded_rollouts_score_as_they_do_alone(scored, tiny_model):
    """PPO hands over left-padded prompts with responses that end early; the score is that of the bare text."""
    model, params = scored
    optimizer = optax.sgd(0.0)
    ppo = Ppo(PpoConfig(), Llama(tiny_model()), model, optimizer, optimizer, temperature=1.0)
    P, R = 7, 5
    shapes = [(7, 5), (1, 1), (4, 3), (7, 1), (2, 5)]  # prompt and response tokens
    rows = sequences(*[p + r for p, r in shapes], seed=3)
    tokens, segments = np.full((5, P + R), 5, np.int32), np.zeros((5, P + R), np.int32)
    for n, ((p, r), row) in enumerate(zip(shapes, rows, strict=True)):
        tokens[n, P - p : P + r], segments[n, P - p : P + r] = row, 1
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0) * segments
    mask = segments[:, P:].astype(np.float32)
    rollout = Rollout(tokens, segments, positions, mask * 0, mask, np.ones(5, bool))
    got = scores(ppo, params, rollout)
    np.testing.assert_allclose(got, [alone(model, params, row) for row in rows], rtol=0, atol=TOLERANCE)
    padded = reward.score(model, params, *right_padded(rows, P + R))
    np.testing.assert_allclose(got, padded, rtol=0, atol=1e-6)  # the same arrays, in fact
