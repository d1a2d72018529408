"""The pairwise loss against numbers worked out by hand (6 digits, so 1e-6; float32 has 7)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllm.losses.preference import pairwise


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
    np.testing.assert_allclose(loss([[1.2, 0.5]], **settings), [expected], rtol=0, atol=1e-6)


def test_equal_scores_cost_log_2():
    np.testing.assert_allclose(loss([[3.0, 3.0]]), [np.log(2)], rtol=1e-6)


def test_four_ranked_completions_are_the_mean_of_six_pairs():
    np.testing.assert_allclose(loss([[1, 0.5, 0, -1]]), [0.317170], rtol=0, atol=1e-6)


def test_one_number_per_prompt_whatever_k():
    """A prompt with more completions does not weigh more: each is its own mean."""
    scores = np.random.default_rng(0).normal(0, 2, (5, 3))
    pairs = list(itertools.combinations(range(3), 2))
    expected = [np.mean([np.log1p(np.exp(row[b] - row[a])) for a, b in pairs]) for row in scores]
    np.testing.assert_allclose(loss(scores), expected, rtol=1e-5)


def test_gradient_is_the_probability_of_the_wrong_order():
    """d loss / d r_w = -sigmoid(r_l - r_w) = -.331812 at (1.2, .5), and the opposite for r_l."""
    gradient = jax.grad(lambda s: pairwise(s).sum())(jnp.array([[1.2, 0.5]]))
    np.testing.assert_allclose(gradient, [[-0.331812, 0.331812]], rtol=0, atol=1e-6)


def test_hopeless_pairs_stay_finite():
    """-log sigmoid(-2e4) = 2e4, where log(sigmoid) would be -inf."""
    value, gradient = jax.value_and_grad(lambda s: pairwise(s).sum())(jnp.array([[-1e4, 1e4]]))
    np.testing.assert_allclose(value, 2e4)
    np.testing.assert_allclose(gradient, [[-1, 1]])
