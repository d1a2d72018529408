"""Token-level log-probabilities, cross-entropy and entropy; everything in float32."""

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


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target) in nats, and the sum of weights: divide once, over the global batch."""
    return -jnp.sum(token_logps(logits_BTV, targets_BT) * weights_BT), jnp.sum(weights_BT)
