"""DPO's step against whole logits and the papers' formulas; what counts in it, and who is trained."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import rounding

from maxllm.config.dpo import DpoConfig
from maxllm.losses import token
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.records import PairBatch, ReplyPairBatch
from maxllm.steps.dpo import dpo_loss, reply_logps
from maxllm.steps.head import head_logps
from maxllm.steps.state import TrainState
from maxllm.steps.update import eval_step, train_step
from maxllm.weights import Weights

T, V = 16, 64
SGD = plain.sgd(0.1)
CONFIG = DpoConfig(beta=0.3)
SHAPES = [((4, 5), (4, 12)), ((9, 7), (9, 1)), ((1, 3), (1, 3)), ((6, 2), (6, 8))]
"""(tokens of the prompt, of the completion) of chosen and rejected."""

TOLERANCE = 2 * rounding.of_sum(48, magnitude=4.0)
"""A log-probability is of order 4, through two layers whose sums of 48 terms change their order: 2.6e-5."""


@pytest.fixture(scope="module")
def policy(tiny_model, params_of):
    """A model, its weights, and other ones, which are the reference's."""
    model = Llama(tiny_model())
    return model, Weights(params_of(model, 1)), Weights(params_of(model, 2))


def pairs(weights=(1, 1, 1, 1), seed=0, pad=5):
    """Pairs of SHAPES; both completions follow the same prompt."""
    rng = np.random.default_rng(seed)
    tokens, lengths, starts = np.full((4, 2, T), pad, np.int32), *np.zeros((2, 4, 2), np.int32)
    for row, both in enumerate(SHAPES):
        prompt = rng.integers(6, V, both[0][0])
        for c, (before, after) in enumerate(both):
            tokens[row, c, : before + after] = [*prompt, *rng.integers(6, V, after)]
            lengths[row, c], starts[row, c] = before + after, before
    return ReplyPairBatch(PairBatch(tokens, lengths, np.array(weights, np.float32)), starts)


def swapped(batch):
    """Chosen for rejected."""
    tokens, lengths, weights = jax.tree.leaves(batch.pairs)
    return ReplyPairBatch(PairBatch(tokens[:, ::-1], lengths[:, ::-1], weights), batch.starts_BC[:, ::-1])


@cache
def jitted(function, **settings):
    """Each function is compiled once a shape, whichever tests call it."""
    return jax.jit(partial(function, **settings))


def evaluate(policy, batch, config=CONFIG):
    model, weights, reference = policy
    step = jitted(eval_step, loss_fn=partial(dpo_loss, model, config))
    return {name: float(total) for name, (total, _) in step(weights, batch, reference).items()}


@cache
def stepper(model, config, microbatches):
    """`train_step` with plain gradient descent."""
    loss_fn = partial(dpo_loss, model, config)
    return jitted(
        train_step, loss_fn=loss_fn, optimizer=SGD, seed=0, microbatches=microbatches, compares=True
    )


def trained(policy, batch, config=CONFIG, microbatches=1, steps=1):
    """(state after, metrics of the last step)."""
    model, weights, reference = policy
    state = TrainState(jnp.int32(0), weights.base, SGD.init(weights.base))
    for _ in range(steps):
        state, metrics = stepper(model, config, microbatches)(state, batch, reference)
    return state, metrics


# The same from whole logits


def said(batch):
    """[2 B, T, V]: 1 where a slot must say a token of the completion, which stands in the next slot."""
    found = np.zeros((2 * len(batch.starts_BC), T, V), np.float32)
    for row, c in np.ndindex(*batch.starts_BC.shape):
        for slot in range(batch.starts_BC[row, c], batch.pairs.lengths_BC[row, c]):
            found[2 * row + c, slot - 1, batch.pairs.tokens_BCT[row, c, slot]] = 1
    return found


def from_logits(model, weights, batch, said_BTV):
    """log p of every completion, [2 B]."""
    tokens_BT = batch.pairs.tokens_BCT.reshape(-1, T)
    inside_BT = (np.arange(T) < batch.pairs.lengths_BC.reshape(-1, 1)).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    logits_BTV = forward(model, weights, tokens_BT, inside_BT, positions_BT)
    return jnp.sum(jax.nn.log_softmax(logits_BTV) * said_BTV, (1, 2))


def logps_of(model, weights, batch):
    """[B, 2], to be calculated with in float64."""
    logps_B = jitted(from_logits, model=model)(weights=weights, batch=batch, said_BTV=said(batch))
    return np.asarray(logps_B, np.float64).reshape(-1, 2)


def weighted_gradient(model, params, batch, coefficients):
    """Gradient of the sum of log-probabilities with these coefficients, [B, 2]."""

    def total(params, coefficients_B):
        return jnp.sum(from_logits(model, Weights(params), batch, said(batch)) * coefficients_B)

    return jax.jit(jax.grad(total))(params, coefficients.reshape(-1).astype(np.float32))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "config",
    [CONFIG, DpoConfig(beta=0.3, label_smoothing=0.2, nll=0.7), DpoConfig(beta=0.3, loss="ipo")],
    ids=["dpo", "smoothed, nll", "ipo"],
)
def test_loss_and_gradients_by_the_formula(policy, config):
    """dL/dlog p is by hand, in float64. IPO's loss and gradient are up to 30 times its log-probabilities, and
    so are their errors."""
    model, weights, reference = policy
    batch, beta, s = pairs(), config.beta, config.label_smoothing
    logps = logps_of(model, weights, batch)
    ratios = logps - logps_of(model, reference, batch)
    delta = ratios[:, 0] - ratios[:, 1]
    if config.loss == "ipo":
        losses, slopes = (delta - 1 / (2 * beta)) ** 2, 2 * (delta - 1 / (2 * beta))
    else:
        losses = -(1 - s) * np.log(sigmoid(beta * delta)) - s * np.log(sigmoid(-beta * delta))
        slopes = -(1 - s) * beta * sigmoid(-beta * delta) + s * beta * sigmoid(beta * delta)
    tokens = np.array([shape[0][1] for shape in SHAPES])
    losses = losses - config.nll * logps[:, 0] / tokens
    coefficients = np.stack([slopes - config.nll / tokens, -slopes], 1) / 4

    state, metrics = trained(policy, batch, config)
    atol = TOLERANCE * (30 if config.loss == "ipo" else 1)
    np.testing.assert_allclose(metrics["loss"][0] / 4, losses.mean(), rtol=0, atol=atol)
    got = jax.tree.map(lambda before, after: (before - after) / 0.1, weights.base, state.params)
    wanted = weighted_gradient(model, weights.base, batch, coefficients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), got, wanted)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 0.05


def test_metrics_follow_from_the_log_probabilities(policy):
    model, weights, reference = policy
    batch = pairs()
    logps = logps_of(model, weights, batch)
    rewards = 0.3 * (logps - logps_of(model, reference, batch))
    right = (rewards[:, 0] > rewards[:, 1]).sum()
    assert 0 < right < 4
    expected = {"accuracy": right, "margin": (rewards[:, 0] - rewards[:, 1]).sum()}
    for c, name in enumerate(("chosen", "rejected")):
        expected |= {f"logp_{name}": logps[:, c].sum(), f"reward_{name}": rewards[:, c].sum()}
    got = evaluate(policy, batch)
    for name, total in expected.items():
        np.testing.assert_allclose(got[name], total, rtol=0, atol=4 * TOLERANCE, err_msg=name)


# What counts


def test_a_policy_that_is_the_reference_has_no_margin(policy):
    """log 2 to float32's rounding, of a sum of four; equal is not right."""
    model, weights, _ = policy
    got = evaluate((model, weights, weights), pairs())
    np.testing.assert_allclose(got["loss"], 4 * np.log(2), rtol=rounding.of_operations(8))
    assert got["margin"] == got["accuracy"] == got["reward_chosen"] == got["reward_rejected"] == 0


def test_exchanging_the_two_turns_the_sign(policy):
    one, other = evaluate(policy, pairs()), evaluate(policy, swapped(pairs()))
    assert abs(one["margin"]) > 0.1
    np.testing.assert_allclose(one["margin"], -other["margin"], rtol=1e-5)
    assert one["accuracy"] + other["accuracy"] == 4
    np.testing.assert_allclose(one["reward_chosen"], other["reward_rejected"], rtol=0, atol=4 * TOLERANCE)


def test_prompts_and_padding_do_not_count(policy):
    """Only as many tokens count as the completion has, its last one too; what stands behind it does not."""
    model, weights, _ = policy
    batch, logps = pairs(), jitted(reply_logps, model=policy[0])
    found, tokens = logps(weights=weights, batch=batch, key=None)
    np.testing.assert_array_equal(tokens, [[5, 12], [7, 1], [3, 3], [2, 8]])
    noise, _ = logps(weights=weights, batch=pairs(pad=40), key=None)
    np.testing.assert_array_equal(noise, found)
    later = ReplyPairBatch(batch.pairs, batch.pairs.lengths_BC - 1)
    last, one = logps(weights=weights, batch=later, key=None)
    assert np.all(np.asarray(one) == 1) and np.all(np.asarray(last) < 0)
    np.testing.assert_allclose(last, logps_of(model, weights, later), rtol=0, atol=TOLERANCE)


def test_filler_rows_weigh_nothing(policy):
    """Rows of zeros (loader.in_order's) and rows with content but weight 0 leave update and metrics alone."""
    batch = pairs()
    zeros = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    loud = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, pairs(weights=[0] * 4, seed=9))
    expected, expected_metrics = trained(policy, batch)
    for padded in (zeros, loud):
        state, metrics = trained(policy, padded)
        assert float(metrics["skipped"][0]) == 0
        for name in ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected"):
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=0, atol=4 * TOLERANCE)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=0, atol=0.1 * TOLERANCE), state.params, expected.params
        )


def test_microbatches_do_not_change_the_update(policy):
    batch = pairs(weights=[1, 0, 1, 1])
    whole, _ = trained(policy, batch)
    parts, metrics = trained(policy, batch, microbatches=4)
    assert float(metrics["loss"][1]) == 3
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=0.1 * TOLERANCE), parts.params, whole.params
    )


# Who is trained


def test_the_reference_is_read_and_has_no_gradient(policy):
    model, weights, reference = policy
    batch = pairs()

    def total(weights, reference):
        return dpo_loss(model, CONFIG, weights, batch, None, reference).total

    gradients = jax.jit(jax.grad(total, (0, 1)))
    (ours, theirs), (others, _) = gradients(weights, reference), gradients(weights, weights)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(theirs))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 0.1
    different = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, others)
    assert max(jax.tree.leaves(different)) > 1e-2


def test_the_reference_is_without_dropout(tiny_model, params_of):
    """Where both have the same parameters, the reward is beta times what dropout changes of log p."""
    model = Llama(tiny_model(residual_dropout=0.5))
    weights, loss = Weights(params_of(model, 1)), jitted(dpo_loss, model=model, config=CONFIG)
    dropped, whole = (
        loss(weights=weights, batch=pairs(), key=key, reference=weights).metrics
        for key in (jax.random.key(0), None)
    )
    difference = dropped["logp_chosen"][0] - whole["logp_chosen"][0]
    assert abs(difference) > 0.1 and float(whole["reward_chosen"][0]) == 0
    np.testing.assert_allclose(dropped["reward_chosen"][0], 0.3 * difference, rtol=0, atol=4 * TOLERANCE)


def test_training_separates_the_pairs(policy):
    model, weights, _ = policy
    state, _ = trained((model, weights, weights), pairs(), steps=10)
    after = evaluate((model, Weights(state.params), weights), pairs())
    assert after["loss"] < 0.7 * 4 * np.log(2)
    assert after["accuracy"] == 4


# The head


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_function_of_log_probabilities(dtype):
    """A square, whose weights are the log-probabilities themselves. bfloat16 rounds by 2^-9 the gradients of
    logits and of hidden states, so an entry of either by less than 2^-8 of the largest."""
    rng = np.random.default_rng(0)
    N, D, V = 24, 8, 40
    x = jnp.asarray(rng.normal(size=(1, N, D)), dtype)
    w = jnp.asarray(rng.normal(size=(D, V)), dtype).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (1, N)))

    def squares(logps_BT):
        return 0.5 * jnp.sum(jnp.square(logps_BT))

    def whole(x, w):
        return squares(token.token_logps(x @ w, targets))

    def parts(x, w):
        return squares(head_logps(x, w, targets))

    got, ours = jax.jit(jax.value_and_grad(parts, (0, 1)))(x, w)
    wanted, theirs = jax.jit(jax.value_and_grad(whole, (0, 1)))(x.astype(jnp.float32), w)
    rtol = rounding.of_sum(V, magnitude=8.0)  # products of bfloat16 are added up in float32
    np.testing.assert_allclose(got, wanted, rtol=rtol)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, jnp.float32)
    off = rounding.of_sum(V, magnitude=8.0) if dtype == jnp.float32 else 2**-8
    for one, other in zip(ours, theirs, strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=off * scale)
