"""What XLA is told on CPU changes what it makes."""

import jax
import jax.numpy as jnp

from maxllm.config.launch import NO_SETTINGS
from maxllm.parallel.settings import compiler_options


def test_barriers_hold_on_cpu():
    """What is computed before one is not computed again in each use, as XLA's own options have had it."""

    def uses(x_TK):
        cos_TK = jax.lax.optimization_barrier(jnp.cos(x_TK))
        return cos_TK[:, None] * jnp.arange(8.0)[:, None], cos_TK[None] + jnp.arange(4.0)[:, None, None]

    lowered = jax.jit(uses).lower(jnp.ones((16, 32)))
    compiled = lowered.compile(compiler_options=compiler_options("cpu", NO_SETTINGS))
    assert compiled.as_text().count(" cosine(") == 1
