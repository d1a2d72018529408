"""Rotary position embeddings (Su et al. 2021), half-split order as in Hugging Face, and their stretching."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maxllm.config.model import ModelConfig, RopeScaling


def angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position x frequency, each [B, T, K/2] float32."""
    theta = positions_BT[..., None].astype(jnp.float32) * frequencies(config, positions_BT)
    scale = attention_scale(config.rope_scaling)
    return jnp.cos(theta) * scale, jnp.sin(theta) * scale


def frequencies(config: ModelConfig, positions_BT: jax.Array) -> np.ndarray | jax.Array:
    """Angular frequency of each rotated pair, radians per token, [K/2] float32.

    Only the dynamic rule looks at the positions.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return unscaled(config)
    match scaling.type:
        case "linear":
            return unscaled(config) / np.float32(scaling.factor)
        case "dynamic":
            return dynamic(config, scaling, jnp.max(positions_BT) + 1)
        case "llama3":
            return llama3(config, scaling)
        case "yarn":
            return yarn(config, scaling)


def unscaled(config: ModelConfig) -> np.ndarray:
    """theta^(-2i/K) for pair i."""
    exponents = np.arange(0, config.k_dim, 2, dtype=np.float32) / config.k_dim
    return (1.0 / config.rope_theta**exponents).astype(np.float32)


def dynamic(config: ModelConfig, scaling: RopeScaling, length: jax.Array) -> jax.Array:
    """NTK-aware scaling of the base, growing with the sequence once it is longer than max_seq_len."""
    stretch = jnp.maximum(length, config.max_seq_len).astype(jnp.float32) / config.max_seq_len
    grown = (scaling.factor * stretch - (scaling.factor - 1.0)) ** (config.k_dim / (config.k_dim - 2))
    return (config.rope_theta * grown) ** -(np.arange(0, config.k_dim, 2, dtype=np.float32) / config.k_dim)


def llama3(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, a linear blend between."""
    inverse = unscaled(config)
    turns = scaling.original_max_seq_len * inverse / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)


def yarn(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """YaRN (Peng et al. 2023): like `llama3`, but the blend is linear in the pair's index."""

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        length = scaling.original_max_seq_len / (times * 2 * math.pi)
        return config.k_dim * math.log(length) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.k_dim - 1)
    width = max(last - first, 1e-3)
    pairs = np.arange(config.k_dim // 2, dtype=np.float32)
    scaled = np.clip((pairs - np.float32(first)) / np.float32(width), 0, 1)
    inverse = unscaled(config)
    return (inverse / np.float32(scaling.factor) * scaled + inverse * (1 - scaled)).astype(np.float32)


def attention_scale(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied with: YaRN sharpens the attention of a stretched context."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + K/2}) of every head by its position's angle."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
