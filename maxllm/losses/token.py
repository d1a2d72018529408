"""Token-level log-probabilities and entropy; everything in float32."""

import jax
import jax.numpy as jnp


def token_logps(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[target] per position, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """H = logsumexp(z) - sum softmax(z) z per position, nats, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_BTV, -1) - jnp.sum(jax.nn.softmax(logits_BTV, -1) * logits_BTV, -1)
