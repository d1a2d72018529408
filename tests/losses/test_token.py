"""Log-probabilities, cross-entropy and entropy against PyTorch.

Logits are of size up to 20: a handful of operations on such numbers, and a sum of 97 exponentials, whose
relative error is that of its logarithm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.losses import token

torch = pytest.importorskip("torch")

B, T, V = 3, 5, 97
LARGEST = 20.0
TOLERANCE = rounding.of_operations(6, LARGEST) + rounding.of_sum(V)


def logits_and_targets(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 4, (B, T, V)).astype(np.float32), rng.integers(0, V, (B, T))


def test_token_logps_equal_torch():
    logits, targets = logits_and_targets()
    expected = torch.log_softmax(torch.tensor(logits), -1).gather(-1, torch.tensor(targets)[..., None])[
        ..., 0
    ]
    np.testing.assert_allclose(
        token.token_logps(jnp.array(logits), jnp.array(targets)), expected.numpy(), rtol=0, atol=TOLERANCE
    )


def test_cross_entropy_and_its_gradient_equal_torch():
    logits, targets = logits_and_targets(1)
    weights = np.array([[1, 1, 0, 0, 0], [0] * 5, [1, 0.5, 1, 1, 1]], np.float32)
    z = torch.tensor(logits, requires_grad=True)
    each = torch.nn.functional.cross_entropy(
        z.reshape(-1, V), torch.tensor(targets).reshape(-1), reduction="none"
    )
    expected = (each * torch.tensor(weights).reshape(-1)).sum()
    expected.backward()

    def total(logits):
        return -jnp.sum(token.token_logps(logits, jnp.array(targets)) * weights)

    value, gradient = jax.value_and_grad(total)(jnp.array(logits))
    np.testing.assert_allclose(float(value), expected.item(), rtol=0, atol=B * T * TOLERANCE)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=0, atol=TOLERANCE)
    assert not np.any(np.asarray(gradient)[weights == 0])


def test_cross_entropy_of_uniform_logits_is_log_v():
    logps_BT = token.token_logps(jnp.zeros((2, 3, 64)), jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_allclose(logps_BT, np.full((2, 3), -np.log(64)), rtol=1e-6)  # -4.158883


def test_everything_is_computed_in_float32():
    """bfloat16 logits are rounded once, on the way in, and never again: 8 bits could not tell 1e-3 apart."""
    logits, targets = logits_and_targets(2)
    rounded = jnp.array(logits, jnp.bfloat16)
    got = token.token_logps(rounded, jnp.array(targets))
    expected = token.token_logps(rounded.astype(jnp.float32), jnp.array(targets))
    assert got.dtype == token.entropy(rounded).dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    np.testing.assert_allclose(token.token_logps(logits, jnp.array([[2]])), [[-2e4]])
    np.testing.assert_allclose(token.entropy(logits), [[0.0]], atol=1e-6)
    gradient = jax.grad(lambda z: token.token_logps(z, jnp.array([[2]])).sum())(logits)
    np.testing.assert_allclose(gradient, [[[-1, 0, 1]]], atol=1e-6)


def test_entropy_equals_torch():
    logits, _ = logits_and_targets(3)
    expected = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy()
    atol = TOLERANCE + rounding.of_sum(V, LARGEST)  # of probabilities times logits
    np.testing.assert_allclose(token.entropy(jnp.array(logits)), expected.numpy(), rtol=0, atol=atol)


def test_entropy_of_known_distributions():
    """Uniform over 8: log 8. (1/2, 1/4, 1/4): 1.5 log 2."""
    probs = jnp.array([[[0.5, 0.25, 0.25]]])
    np.testing.assert_allclose(token.entropy(jnp.zeros((1, 1, 8))), [[np.log(8)]], rtol=1e-6)
    np.testing.assert_allclose(token.entropy(jnp.log(probs)), [[1.5 * np.log(2)]], rtol=1e-6)
