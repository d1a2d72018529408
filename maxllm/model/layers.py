"""What every block of the model is made of: declared weights, flat matmuls, RMSNorm, SwiGLU."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.config import LoraConfig, ModelConfig
from maxllm.model.adapters import adapted


def dtype_of(config: ModelConfig) -> jnp.dtype:
    """The compute type of matmuls."""
    return jnp.dtype(config.dtype)


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float
) -> jax.Array:
    """Declares a float32 parameter: its shape, logical axes and normal initializer on one line."""
    initializer = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return cast(jax.Array, module.param(name, initializer, shape, jnp.float32))


def bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """Declares a float32 bias, 0 at first; its name ends in _bias, which keeps weight decay from it."""
    assert name.endswith("_bias")
    initializer = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    return cast(jax.Array, module.param(name, initializer, shape, jnp.float32))


def matmul(x_BTD: jax.Array, w: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """Contracts x's last axis with w's first, in x's type: [B, T, D] x [D, ...] -> [B, T, ...].

    The result has x's type, or `out`: products are summed in float32 anyway, so asking for float32 costs no
    rounding on the way.

    Rows are flattened to [B * T, D] first: the weight gradient then contracts one dimension, which XLA's CPU
    backend turns into one large matmul (a third off the backward pass).
    """
    B, T, D = x_BTD.shape
    shape = w.shape[1:]
    w = w.reshape(D, -1).astype(x_BTD.dtype)
    y = jnp.matmul(x_BTD.reshape(B * T, D), w, preferred_element_type=out)
    return y.reshape(B, T, *shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the compute type; D is whatever the last axis is."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = cast(jax.Array, self.param("scale", ones, x_BTD.shape[-1:], jnp.float32))
        x_BTD = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), -1, keepdims=True) + self.config.norm_eps)
        return (x_BTD * inverse * scale_D).astype(dtype_of(self.config))


class SwiGLU(nn.Module):
    """(silu(x w_gate) * x w_up) w_down (Shazeer 2020)."""

    config: ModelConfig
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        D, F = c.d_model, c.d_ff
        gate_DF = weight(self, "w_gate", (D, F), ("embed", "mlp"), c.init_std)
        up_DF = weight(self, "w_up", (D, F), ("embed", "mlp"), c.init_std)
        # Residual outputs start smaller with depth (GPT-2): wo and w_down, not w_up.
        down_FD = weight(self, "w_down", (F, D), ("mlp", "embed"), c.init_std / (2 * c.n_layers) ** 0.5)
        gate_BTF, up_BTF = matmul(x_BTD, gate_DF), matmul(x_BTD, up_DF)
        gate_BTF = adapted(self, self.lora, "w_gate", x_BTD, gate_BTF, ("embed", "mlp"), deterministic)
        up_BTF = adapted(self, self.lora, "w_up", x_BTD, up_BTF, ("embed", "mlp"), deterministic)
        if c.mlp_bias:
            gate_BTF += bias(self, "gate_bias", (F,), ("mlp",)).astype(gate_BTF.dtype)
            up_BTF += bias(self, "up_bias", (F,), ("mlp",)).astype(up_BTF.dtype)
        h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        h_BTF = nn.with_logical_constraint(h_BTF, ("batch", "length", "act_mlp"))
        y_BTD = matmul(h_BTF, down_FD)
        y_BTD = adapted(self, self.lora, "w_down", h_BTF, y_BTD, ("mlp", "embed"), deterministic)
        if c.mlp_bias:
            y_BTD += bias(self, "down_bias", (D,), ("embed",)).astype(y_BTD.dtype)
        return y_BTD
