"""Losses on preferences against numbers worked out by hand (6 digits, so 1e-6; float32 has 7)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.losses.preference import dpo, ipo, pairwise

EXACT = 5e-7 + rounding.of_operations(12)
"""Numbers of order 1 given to six decimals, after about a dozen operations."""


def loss(scores, **settings):
    return np.asarray(pairwise(jnp.array(scores, jnp.float32), **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.403186),  # log(1 + e^-.7)
        ({"margin": 0.5}, 0.598139),  # log(1 + e^-.2)
        ({"centering": 1e-2}, 0.403186 + 0.0289),  # + .01 (1.2 + .5)^2
        ({"margin": 0.5, "centering": 1e-2}, 0.598139 + 0.0289),
    ],
)
def test_a_pair(settings, expected):
    np.testing.assert_allclose(loss([[1.2, 0.5]], **settings), [expected], rtol=0, atol=EXACT)


def test_equal_scores_cost_log_2():
    np.testing.assert_allclose(loss([[3.0, 3.0]]), [np.log(2)], rtol=1e-6)


def test_four_ranked_completions_are_the_mean_of_six_pairs():
    np.testing.assert_allclose(loss([[1, 0.5, 0, -1]]), [0.317170], rtol=0, atol=EXACT)


def test_one_number_per_prompt_whatever_k():
    """A prompt with more completions does not weigh more: each is its own mean."""
    scores = np.random.default_rng(0).normal(0, 2, (5, 3))
    pairs = list(itertools.combinations(range(3), 2))
    expected = [np.mean([np.log1p(np.exp(row[b] - row[a])) for a, b in pairs]) for row in scores]
    np.testing.assert_allclose(loss(scores), expected, rtol=1e-5)


def test_gradient_is_the_probability_of_the_wrong_order():
    """d loss / d r_w = -sigmoid(r_l - r_w) = -.331812 at (1.2, .5), and the opposite for r_l."""
    gradient = jax.grad(lambda s: pairwise(s).sum())(jnp.array([[1.2, 0.5]]))
    np.testing.assert_allclose(gradient, [[-0.331812, 0.331812]], rtol=0, atol=EXACT)


def test_hopeless_pairs_stay_finite():
    """-log sigmoid(-2e4) = 2e4, where log(sigmoid) would be -inf."""
    value, gradient = jax.value_and_grad(lambda s: pairwise(s).sum())(jnp.array([[-1e4, 1e4]]))
    np.testing.assert_allclose(value, 2e4)
    np.testing.assert_allclose(gradient, [[-1, 1]])


# DPO and IPO


@pytest.mark.parametrize(("delta", "expected"), [(0, 0.693147), (10, 0.313262), (20, 0.126928)])
def test_dpo(delta, expected):
    """log(1 + e^(-beta delta)) at beta = 0.1."""
    np.testing.assert_allclose(dpo(jnp.array([delta], jnp.float32), 0.1), [expected], rtol=0, atol=EXACT)


def test_dpo_with_smoothed_labels():
    """0.9 x 0.313262 + 0.1 x 1.313262: the other label costs log(1 + e^1)."""
    loss = dpo(jnp.array([10.0]), 0.1, label_smoothing=0.1)
    np.testing.assert_allclose(loss, [0.413262], rtol=0, atol=EXACT)


def test_gradient_of_smoothed_dpo_is_0_at_the_margin_of_the_labels():
    """beta delta = log(0.9 / 0.1): one label in ten is wrong, so the odds are nine to one and no more."""
    gradient = jax.grad(lambda delta: dpo(delta, 0.1, label_smoothing=0.1))
    np.testing.assert_allclose(gradient(10 * np.log(9.0)), 0, atol=1e-7)
    assert gradient(10 * np.log(8.0)) < 0 < gradient(10 * np.log(10.0))
    np.testing.assert_allclose(jax.grad(lambda delta: dpo(delta, 0.1))(0.0), -0.05, rtol=1e-6)


def test_ipo():
    """(delta - 5)^2 at beta = 0.1: least at 5, and as dear beyond it."""
    np.testing.assert_allclose(ipo(jnp.array([0.0, 5.0, 7.0, 3.0]), 0.1), [25, 0, 4, 4], rtol=1e-6)


def test_a_hopeless_pair_of_dpo_stays_finite():
    value, gradient = jax.value_and_grad(lambda delta: dpo(delta, 0.1))(-1e5)
    np.testing.assert_allclose([value, gradient], [1e4, -0.1], rtol=1e-6)
