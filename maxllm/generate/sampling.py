"""From logits to a token: greedy, temperature, top-k, top-p."""

import jax
import jax.numpy as jnp

from maxllm.config.generation import GenerationConfig
from maxllm.losses.token import token_logps, without


def restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits with everything outside the top k, and outside the nucleus of mass top_p, at -inf.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al.
    2020); the likeliest token always stays.
    """
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        last_kept_B1 = jnp.min(jnp.where(mass_before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < last_kept_B1, -jnp.inf, logits_BV)
    return logits_BV


def key_at(key: jax.Array, slot: jax.Array) -> jax.Array:
    """The key of a slot, from one key or from one a row, [B]."""
    return jax.vmap(jax.random.fold_in, (0, None))(key, slot) if key.ndim else jax.random.fold_in(key, slot)


def sample(
    logits_BV: jax.Array, key: jax.Array, config: GenerationConfig, never: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row, none of the ids in `never`; temperature 0 takes the likeliest.

    Args:
      logits_BV: of each row's next token.
      key: one for all rows, or one a row, [B]: then what is drawn does not depend on the other rows.
      config: the rule.
      never: ids without a token.

    Returns:
      token_B int32, and its log-probability under softmax(logits / temperature) over all ids but `never`,
      before top-k and top-p (with temperature 0: under softmax(logits)), float32.
    """
    logits_BV = without(logits_BV, never)
    if config.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = logits_BV / config.temperature
        draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        token_B = draw(key, restrict(logits_BV, config.top_k, config.top_p))
    return token_B.astype(jnp.int32), token_logps(logits_BV, token_B)
