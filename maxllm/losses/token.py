"""Token-level log-probabilities and entropy; everything in float32."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Shaping:
    """How a policy's distribution is made of its logits: what is sampled from, and what is trained, alike."""

    temperature: float = 1.0
    """Logits are divided by it."""
    never: tuple[int, ...] = ()
    """Ids that have no token; the policy is a distribution over the others."""

    def __call__(self, logits_NV: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        """Shaped logits [..., V]; where the vocabulary is split, V is the share of it from `first` on."""
        if self.never:
            ids_V = first + jnp.arange(logits_NV.shape[-1])
            logits_NV = jnp.where(jnp.isin(ids_V, jnp.array(self.never)), IMPOSSIBLE, logits_NV)
        return logits_NV if self.temperature == 1 else logits_NV / self.temperature


PLAIN = Shaping()
"""The model's own distribution."""


@dataclass(frozen=True)
class Regularization:
    """What training adds to a token's loss so that the distribution keeps its bounds."""

    label_smoothing: float = 0.0
    """ε: the target is worth 1 - ε, and all V tokens share ε equally (Szegedy et al. 2016, section 7)."""
    z: float = 0.0
    """Weight of (log Σ exp logits)², which keeps logits near 0 (Chowdhery et al. 2022, PaLM, section 5)."""


UNREGULARIZED = Regularization()
"""Cross-entropy and nothing else."""


def token_logps(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[target] per position, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """H = logsumexp(z) - sum softmax(z) z per position, nats, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_BTV, -1) - jnp.sum(jax.nn.softmax(logits_BTV, -1) * logits_BTV, -1)
