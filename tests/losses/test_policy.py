"""PPO's arithmetic against numbers worked out elsewhere.

`torchtune` marks the numbers of its rlhf tests, `verl` those of its masked-GAE test; the rest follow by hand
from the formula in the test. Published numbers carry 4 to 6 digits: half of the last one is the tolerance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.losses import policy
from maxllm.losses.token import token_logps

EXACT = 5e-7 + rounding.of_operations(12)
"""Numbers of order 1 given to six decimals, after about a dozen operations."""


def close(actual, expected, atol=EXACT):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, np.float64), rtol=0, atol=atol)


def rows(*values):
    return jnp.array(values, jnp.float32)


# KL


def test_k1_and_k3_of_two_tokens():
    logps, ref = rows([-1, -2]), rows([-1.5, -1])
    close(policy.kl_k1(logps, ref), [[0.5, -1.0]])
    close(policy.kl_k3(logps, ref), [[0.106531, 0.718282]])  # e^-.5 - .5 and e - 2


def test_k1_is_bounded_and_k3_stays_finite():
    logps, ref = rows([-1e4, 0]), rows([0, -1e4])
    close(policy.kl_k1(logps, ref), [[-20, 20]])
    close(policy.kl_k3(logps, ref) / np.array([[np.exp(20) - 21, 19 + np.exp(-20)]]), [[1, 1]])


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    logps, ref = jnp.log(rows(p)), jnp.log(rows(q))
    assert float(policy.kl_k3(logps, ref).min()) >= 0
    kl = float(np.sum(p * np.log(p / q)))
    close(jnp.sum(rows(p) * policy.kl_k1(logps, ref)), kl)
    close(jnp.sum(rows(p) * policy.kl_k3(logps, ref)), kl)  # sum p e^-k1 = sum q = 1


# Rewards


def test_shaped_rewards_of_full_rows():  # torchtune
    gap = jnp.array([[-0.1] * 3, [-0.2] * 3, [-0.3] * 3])
    rewards = policy.shaped_rewards(rows(1, 2, 3), gap, jnp.zeros((3, 3)), jnp.ones((3, 3)), 0.5)
    close(rewards, [[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]])


def test_score_stands_on_the_last_response_token():
    """L = 3 of 4, 1, 4 and 0: index L - 1, and for the empty row nowhere at all."""
    mask = rows([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    rewards = policy.shaped_rewards(rows(5, 6, 7, 8), jnp.zeros((4, 4)), jnp.zeros((4, 4)), mask, 0.1)
    close(rewards, [[0, 0, 5, 0], [6, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]])


def test_kl_outside_the_mask_costs_nothing():
    mask = rows([1, 1, 0, 0])
    rewards = policy.shaped_rewards(rows(1), rows([-1, -1, -9, 3]), rows([-2, -1, 0, 0]), mask, 0.25)
    close(rewards, [[-0.25, 1, 0, 0]])


def test_fractional_score_survives():
    """With integer arrays anywhere on the way 0.7 becomes 0 and -1.9 becomes -1."""
    rewards = policy.shaped_rewards(
        rows(0.7, -1.9), jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones((2, 2)), 0
    )
    close(rewards, [[0, 0.7], [0, -1.9]])
    assert rewards.dtype == jnp.float32


# Whitening


def test_whitening_has_population_variance():
    """x = 1.2 … 2.0 step .1: mean 1.6, population variance .06667, so (x - 1.6) / .258199. Bessel's variance
    would give 1.46059."""
    x, mask = rows(*np.arange(1.2, 2.05, 0.1).reshape(3, 3)), jnp.ones((3, 3))
    shifted = np.asarray(policy.whiten(x, mask))
    close(
        [shifted.min(), shifted.max(), shifted.mean(), (shifted**2).mean()], [-1.54919, 1.54919, 0, 1], 1e-5
    )


def test_whitening_sees_the_mask_only():
    x = rows([1, 2, 900], [3, -900, 4])
    mask = rows([1, 1, 0], [1, 0, 1])
    white = policy.whiten(x, mask)
    expected = (np.array([1, 2, 3, 4]) - 2.5) / np.sqrt(1.25)
    close(white, [[expected[0], expected[1], 0], [expected[2], 0, expected[3]]])


@pytest.mark.parametrize("mask", [[0.0, 0, 0], [0, 1, 0]])
def test_whitening_of_at_most_one_token_is_zero(mask):
    close(policy.whiten(rows([3, -2, 7]), rows(mask)), [[0, 0, 0]])


# GAE


def test_gae_of_torchtune():
    r = rows([0, 0, 0, 1])
    advantages, returns = policy.gae(r, r, jnp.ones((1, 4)), 0.9, 0.95)
    close(returns, [[0.657922, 0.7695, 0.9, 1]])
    close(advantages, [[0.657922, 0.7695, 0.9, 0]])


R, V = [-0.1, 0.2, -0.05, 1], [0.5, 0.4, 0.3, 0.2]
A, RETURNS = [0.445525, 0.6795, 0.61, 0.8], [0.945525, 1.0795, 0.91, 1.0]


def test_gae_of_verl():
    advantages, returns = policy.gae(rows(R), rows(V), jnp.ones((1, 4)), 1.0, 0.95)
    close(advantages, [A])
    close(returns, [RETURNS])


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("length", [1, 3])
def test_a_gap_in_the_mask_is_invisible_to_gae(place, length):
    """Slots with value 9 outside the mask, wherever they stand, change nothing inside it."""

    def insert(values, filler):
        return rows(values[:place] + [filler] * length + values[place:])

    mask = insert([1.0] * 4, 0)
    advantages, returns = policy.gae(insert(R, 0), insert(V, 9), mask, 1.0, 0.95)
    inside = np.asarray(mask[0]) > 0
    close(advantages[0][inside], A)
    close(returns[0][inside], RETURNS)
    assert not np.any(advantages[0][~inside]) and not np.any(returns[0][~inside])


def test_gae_of_an_empty_row_is_zero():
    advantages, returns = policy.gae(rows([0, 0]), rows([9, 9]), rows([0, 0]), 1.0, 0.95)
    assert not np.any(advantages) and not np.any(returns)


def test_gae_with_lambda_1_and_0():
    """lambda 1: discounted rewards to go - V; lambda 0: the one-step error."""
    mask = jnp.ones((1, 4))
    _, monte_carlo = policy.gae(rows(R), rows(V), mask, 0.5, 1.0)
    close(monte_carlo, [[-0.1 + 0.1 - 0.0125 + 0.125, 0.2 - 0.025 + 0.25, -0.05 + 0.5, 1]])
    one_step, _ = policy.gae(rows(R), rows(V), mask, 0.5, 0.0)
    close(one_step, [[-0.1 + 0.2 - 0.5, 0.2 + 0.15 - 0.4, -0.05 + 0.1 - 0.3, 0.8]])


# Policy loss


def test_policy_loss_clips_on_the_pessimistic_side():
    ratio, advantages = rows([1.4, 1.1, 0.6, 1.4]), rows([1, 1, -1, -1])
    old = rows([-2, -1, -0.5, -3])
    loss, clipped, got_ratio = policy.policy_loss(old + jnp.log(ratio), old, advantages, 0.2)
    close(loss, [[-1.2, -1.1, 0.8, 1.4]])
    close(clipped, [[1, 0, 1, 0]])
    close(got_ratio, ratio)
    close(jnp.mean(loss), -0.025)
    close(jnp.mean(clipped), 0.5)


def test_policy_gradient_at_ratio_1_is_reinforce():
    """d(-A log pi(a)) / dz = -A (1[a] - softmax(z)); softmax(1, 2, 1, 1) = .1749, .4754, .1749, .1749."""
    logits, action = rows([1, 2, 1, 1])[None], jnp.array([[1]])
    old = token_logps(logits, action)

    def loss(logits):
        return jnp.sum(policy.policy_loss(token_logps(logits, action), old, jnp.ones((1, 1)), 0.2)[0])

    close(-jax.grad(loss)(logits)[0, 0], [-0.1749, 0.5246, -0.1749, -0.1749], 5e-5)


def test_no_gradient_where_the_clip_binds():
    old = rows([0, 0, 0, 0])
    logps, advantages = jnp.log(rows([1.4, 1.1, 0.6, 1.4])), rows([1, 1, -1, -1])
    gradient = jax.grad(lambda x: jnp.sum(policy.policy_loss(x, old, advantages, 0.2)[0]))(logps)
    close(gradient, [[0, -1.1, 0, 1.4]])  # -A rho where it does not


@pytest.mark.parametrize("outside", [1e4, -1e4])
def test_gradients_are_finite_under_the_mask(outside):
    """Whatever stands outside the mask, the masked loss and its gradient do not notice."""
    mask, old, advantages = rows([1, 0]), rows([-1, 0]), rows([1, -1])

    def loss(logps):
        return policy.masked_mean(policy.policy_loss(logps, old, advantages, 0.2)[0], mask)

    value, gradient = jax.value_and_grad(loss)(rows([-1, outside]))
    close(value, -1)
    close(gradient, [[-1, 0]])


def test_an_empty_mask_gives_zero_and_zero_gradient():
    def loss(x):
        return policy.masked_mean(policy.policy_loss(x, x * 0, jnp.ones((1, 2)), 0.2)[0], jnp.zeros((1, 2)))

    value, gradient = jax.value_and_grad(loss)(rows([1, 2]))
    assert float(value) == 0 and not np.any(gradient)


def test_masked_mean_weighs_tokens_not_rows():
    """[[1, 2, .], [3, 4, 5], [7, ., .]]: 22 / 6, where the mean of row means is 4.1667."""
    losses, mask = rows([1, 2, 50], [3, 4, 5], [7, 50, 50]), rows([1, 1, 0], [1, 1, 1], [1, 0, 0])
    close(policy.masked_mean(losses, mask), 22 / 6)


# Value loss


def test_value_loss_takes_the_larger_of_plain_and_clipped():
    loss = policy.value_loss(rows([0.9, 0.1, 0.5]), rows([0.5] * 3), rows([1, 0, 0.55]), 0.2)
    close(loss, [[0.045, 0.045, 0.00125]])
    close(jnp.mean(loss), 0.0304167)


def test_value_gradient_is_zero_where_the_clipped_term_is_larger():
    def loss(v):
        return jnp.sum(policy.value_loss(v, rows([0.5] * 3), rows([1, 0, 0.55]), 0.2))

    close(jax.grad(loss)(rows([0.9, 0.1, 0.45])), [[0, 0, -0.1]])  # V - R where unclipped
