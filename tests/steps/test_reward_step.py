"""The reward model reads the right token, whatever the padding, and filler rows weigh nothing."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import rounding

from maxllm.config.ppo import PpoConfig
from maxllm.config.reward import RewardConfig
from maxllm.losses.token import Shaping
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.records import PairBatch, Rollout
from maxllm.steps import reward
from maxllm.steps.ppo import Learner, Ppo, scores
from maxllm.steps.state import TrainState
from maxllm.steps.update import eval_step, train_step
from maxllm.weights import Weights

T, V = 16, 64
PLAIN, SGD = RewardConfig(), plain.sgd(0.1)
TOLERANCE = 2 * rounding.of_sum(48, magnitude=2.0)
"""Scores of order 1 through two float32 layers, whose sums of 48 terms come in another order: 1.3e-5."""


@pytest.fixture(scope="module")
def scored(tiny_model, params_of):
    """A scalar model and its weights."""
    model = ScalarModel(tiny_model())
    return model, Weights(params_of(model, 1))


@cache
def jitted(function, **settings):
    """Each function is compiled once a shape, whichever tests call it."""
    return jax.jit(partial(function, **settings))


def score(model, weights, tokens, lengths):
    return np.asarray(jitted(reward.score, model=model)(weights=weights, tokens_BT=tokens, lengths_B=lengths))


def evaluate(scored, batch, config=PLAIN):
    model, weights = scored
    return jitted(eval_step, loss_fn=partial(reward.reward_loss, model, config))(weights, batch)


def sequences(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, V, n).astype(np.int32) for n in lengths]


def right_padded(rows, length=T, pad=5):
    tokens = np.full((len(rows), length), pad, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def alone(model, weights, row):
    """The score of one sequence by itself, without any padding."""
    return float(score(model, weights, row[None], np.array([len(row)]))[0])


def pairs(lengths, weights=None, seed=0):
    """PairBatch of [(chosen length, rejected length), …]."""
    tokens, found = right_padded(sequences(*np.ravel(lengths), seed=seed))
    n = len(lengths)
    weights = np.ones(n, np.float32) if weights is None else np.array(weights, np.float32)
    return PairBatch(tokens.reshape(n, 2, T), found.reshape(n, 2), weights)


LENGTHS = [(4, 9), (16, 4), (9, 9), (1, 12)]


def test_scores_of_padded_rows_equal_single_rows(scored):
    rows = sequences(1, 4, 9, 12, 16)
    got = score(*scored, *right_padded(rows))
    expected = [alone(*scored, row) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    assert np.ptp(expected) > 0.1  # they do differ


def test_what_stands_in_the_padding_does_not_matter(scored):
    rows = sequences(3, 8)
    tokens, lengths = right_padded(rows)
    noise, _ = right_padded(rows, pad=40)
    np.testing.assert_array_equal(score(*scored, tokens, lengths), score(*scored, noise, lengths))


def test_a_stop_token_in_the_middle_is_not_the_end(scored):
    """The score is read by length, never by looking for an id: stop tokens and <pad> may stand anywhere."""
    (row,) = sequences(9)
    row[3], row[5], row[6] = 2, 4, 5
    got = score(*scored, *right_padded([row]))
    np.testing.assert_allclose(got, [alone(*scored, row)], rtol=0, atol=TOLERANCE)


def test_loss_and_accuracy_follow_from_the_scores(scored):
    model, weights = scored
    batch = pairs(LENGTHS)
    s = np.array(
        [
            [alone(model, weights, batch.tokens_BCT[b, c, : batch.lengths_BC[b, c]]) for c in (0, 1)]
            for b in range(4)
        ]
    )
    config = RewardConfig(margin=0.25, centering=0.01)
    metrics = evaluate(scored, batch, config)
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
    s = np.asarray(score(*scored, tokens, lengths))
    best_first = np.argsort(-s)
    for order, right in ((best_first, 1), (best_first[::-1], 0), (best_first[[1, 0, 2]], 0)):
        batch = PairBatch(tokens[order][None], lengths[order][None], np.ones(1, np.float32))
        metrics = evaluate(scored, batch)
        assert [float(x) for x in metrics["accuracy"]] == [right, 1]


def test_equal_scores_are_not_right(scored):
    tokens, lengths = right_padded(sequences(6))
    batch = PairBatch(np.stack([tokens, tokens], 1), np.stack([lengths, lengths], 1), np.ones(1, np.float32))
    metrics = evaluate(scored, batch)
    assert float(metrics["accuracy"][0]) == 0
    np.testing.assert_allclose(metrics["loss"][0], np.log(2), rtol=rounding.of_operations(8))


def trained(scored, batch, microbatches=1, steps=1):
    model, weights = scored
    loss_fn = partial(reward.reward_loss, model, PLAIN)
    step = jitted(train_step, loss_fn=loss_fn, optimizer=SGD, seed=0, microbatches=microbatches)
    state = TrainState(jnp.int32(0), weights.base, SGD.init(weights.base))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def off_of_update(scored, batch):
    """How far rounding may move one update, whose gradients are sums over all tokens."""
    model, weights = scored

    def update(params):
        updated = trained((model, Weights(params)), batch)[0].params
        return jax.tree.map(np.subtract, updated, params)

    return rounding.of_network(update, weights.base, batch.tokens_BCT.size)


def test_filler_rows_weigh_nothing(scored):
    """Rows of zeros (loader.in_order's) and rows with content but weight 0 leave update and metrics alone."""
    batch = pairs(LENGTHS)
    zeros = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    loud = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, pairs(LENGTHS, weights=[0] * 4, seed=9))
    expected, expected_metrics = trained(scored, batch)
    close = partial(np.testing.assert_allclose, rtol=0, atol=off_of_update(scored, batch))
    for padded in (zeros, loud):
        state, metrics = trained(scored, padded)
        assert float(metrics["skipped"][0]) == 0
        for name in ("loss", "accuracy", "score_chosen", "score_rejected"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=0, atol=10 * TOLERANCE)
        jax.tree.map(close, state.params, expected.params)


def test_microbatches_do_not_change_the_update(scored):
    batch = pairs(LENGTHS, weights=[1, 0, 1, 1])
    whole, _ = trained(scored, batch)
    parts, metrics = trained(scored, batch, microbatches=4)
    assert float(metrics["loss"][1]) == 3
    close = partial(np.testing.assert_allclose, rtol=0, atol=off_of_update(scored, batch))
    jax.tree.map(close, parts.params, whole.params)


def test_training_separates_the_pairs(scored):
    batch = pairs(LENGTHS)
    state, _ = trained(scored, batch, steps=10)
    before, after = evaluate(scored, batch), evaluate((scored[0], Weights(state.params)), batch)
    assert float(after["loss"][0]) < 0.5 * float(before["loss"][0])
    assert float(after["accuracy"][0]) == 4


def test_left_padded_rollouts_score_as_they_do_alone(scored, tiny_model):
    """PPO hands over left-padded prompts with responses that end early; the score is the text's."""
    model, weights = scored
    actor, critic = Learner(Llama(tiny_model()), SGD), Learner(model, SGD)
    ppo = Ppo(PpoConfig(), actor, critic, Shaping(1.0), stop_tokens=(2, 4), pad=5)
    P, R = 9, 7
    shapes = [(9, 7), (1, 3), (6, 3), (8, 1), (9, 3)]  # prompt and response tokens
    rows = sequences(*[p + r for p, r in shapes], seed=3)
    tokens, segments = np.full((5, P + R), 5, np.int32), np.zeros((5, P + R), np.int32)
    for n, ((p, r), row) in enumerate(zip(shapes, rows, strict=True)):
        tokens[n, P - p : P + r], segments[n, P - p : P + r] = row, 1
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0) * segments
    mask = segments[:, P:].astype(np.float32)
    rollout = Rollout(tokens, segments, positions, mask * 0, mask, np.ones(5, bool))
    got = jax.jit(partial(scores, ppo))(weights, rollout)
    np.testing.assert_allclose(got, [alone(model, weights, row) for row in rows], rtol=0, atol=TOLERANCE)
    padded = score(model, weights, *right_padded(rows, P + R))
    np.testing.assert_allclose(got, padded, rtol=0, atol=TOLERANCE)
