"""Rotary position embeddings (Su et al. 2021), half-split order as in Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np

from maxllm.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each rotated pair, radians per token, [K/2] float32."""
    inverse = 1.0 / config.rope_theta ** (np.arange(0, config.k_dim, 2, dtype=np.float32) / config.k_dim)
    inverse = inverse.astype(np.float32)
    return inverse if config.rope_scaling is None else llama3_scaled(inverse, config.rope_scaling)


def llama3_scaled(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, a linear blend between."""
    wavelength = 2 * np.pi / inverse
    turns = scaling.original_max_seq_len / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)


def angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position x frequency, each [B, T, K/2] float32."""
    theta = positions_BT[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(theta), jnp.sin(theta)


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + K/2}) of every head by its position's angle."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
