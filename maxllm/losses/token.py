"""Token-level log-probabilities and entropy; everything in float32."""

import jax
import jax.numpy as jnp
import numpy as np

IMPOSSIBLE = -1e30
"""The logit of an id that stands for nothing: of probability 0, and finite where the two are multiplied."""


def without(logits_BTV: jax.Array, never: tuple[int, ...]) -> jax.Array:
    """Logits in which the ids `never`, of which no token exists, are impossible; [..., V]."""
    if not never:
        return logits_BTV
    impossible_V = np.isin(np.arange(logits_BTV.shape[-1]), never)
    return jnp.where(impossible_V, IMPOSSIBLE, logits_BTV)


def token_logps(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[target] per position, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """H = logsumexp(z) - sum softmax(z) z per position, nats, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_BTV, -1) - jnp.sum(jax.nn.softmax(logits_BTV, -1) * logits_BTV, -1)
