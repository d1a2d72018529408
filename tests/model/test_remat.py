"""What the backward pass keeps and what it computes again changes no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllm.model.llama import Llama
from maxllm.records import LmBatch
from maxllm.steps.language import language_loss


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_gradients_do_not_depend_on_remat(tiny_model, params_of, remat):
    """The same operations in the same types, fused otherwise: float32's rounding of sums of 48 terms."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, 64, (2, 9)), jnp.int32)
    ones, positions = jnp.ones((2, 8), jnp.int32), jnp.tile(jnp.arange(8), (2, 1))
    batch = LmBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(jnp.float32), ones, positions)
    params = params_of(Llama(tiny_model()))

    def gradients(kind):
        model = Llama(tiny_model(remat=kind))
        return jax.jit(jax.grad(lambda params: language_loss(model, params, batch, None).total))(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, gradients(remat), gradients("none"))
