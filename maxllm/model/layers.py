"""What every block of the model is made of: declared weights, flat matmuls, RMSNorm, SwiGLU."""

from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import Tuning
from maxllm.model.adapters import adapted
from maxllm.model.compressed import COLLECTION as COMPRESSED
from maxllm.model.compressed import Compressed, times
from maxllm.parallel import residual
from maxllm.parallel.memory import fetched
from maxllm.weights import Kind, declared

Matrix = jax.Array | Compressed
"""A layer's matrix as `matmul` takes it."""


def dtype_of(config: ModelConfig) -> jnp.dtype:
    """The compute type of matmuls."""
    assert config.dtype != "auto", "whoever knows the machine has chosen"
    return jnp.dtype(config.dtype)


def weight(
    module: nn.Module,
    name: str,
    kind: Kind,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    inputs: int = 1,
) -> jax.Array:
    """Declares a float32 parameter: its kind, shape, logical axes and normal initializer on one line."""
    initializer = declared(nn.initializers.normal(std), kind, axes, inputs)
    return cast(jax.Array, module.param(name, initializer, shape, jnp.float32))


def matrix(
    module: nn.Module,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    inputs: int = 1,
    residual: bool = False,
) -> Matrix:
    """Declares a layer's matrix, and returns it ready to multiply: in the compute type, or in few bits, and
    whole but for tensor parallelism.

    Args:
      module: the layer, or a part of it.
      config: the model's.
      name: of the parameter.
      shape: without the axis L.
      axes: their logical names, one of them "embed".
      inputs: how many of them, from the first on, are contracted with activations.
      residual: it is the last of its branch, and its output is added to the residual stream: these start
        smaller with depth (GPT-2).
    """
    std = config.init_std / (2 * config.n_layers) ** 0.5 if residual else config.init_std
    if module.has_variable(COMPRESSED, name):
        whole = tuple(None if axis == "embed" else axis for axis in axes)
        few = jax.tree.map(
            lambda part: nn.with_logical_constraint(part, whole), module.get_variable(COMPRESSED, name)
        )
        return Compressed(few, dtype_of(config), shape)
    w = weight(module, name, Kind.MATRIX, shape, axes, std, inputs)
    slot = module.get_variable("slots", name) if module.has_variable("slots", name) else None
    return gathered(w, slot, axes, dtype_of(config))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gathered(w: jax.Array, slot: jax.Array | None, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    """The all-gather of FSDP: a shard of a float32 parameter is cast, then collected from all devices.

    Its gradient crosses the network in the compute type too, as a reduce-scatter, and becomes float32 then,
    or is that of `slot`, in its type. Said here once, because the partitioner, left alone, collects a weight
    again for each use of it.
    """
    return collect(w, slot, axes, dtype)[0]


def collect(
    w: jax.Array, slot: jax.Array | None, axes: tuple[str, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """Forward: only the slot is kept, which has nothing in it. A layer's shard in the host's memory is
    fetched here, and again where the layer is computed again."""
    whole = tuple(None if axis == "embed" else axis for axis in axes)
    return nn.with_logical_constraint(in_type(fetched(w), dtype), whole), slot


def scatter(
    axes: tuple[str, ...], dtype: jnp.dtype, slot: jax.Array | None, gradient: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Backward.

    The gradient is scattered over its first dimension, whichever of the weight's that is: over the last one
    (wo, w_down), where a shard is as wide as a TPU's vector (128: 8192 over 64 chips), its compiler makes an
    all-reduce of which each device keeps a slice, twice the bytes.
    """
    split = tuple("gradient_embed" if axis == "embed" else axis for axis in axes)
    at = axes.index("embed")
    first = (split[at], *split[:at], *split[at + 1 :])
    gradient = jnp.moveaxis(nn.with_logical_constraint(jnp.moveaxis(gradient, at, 0), first), 0, at)
    if slot is None:
        return gradient.astype(jnp.float32), None
    return None, gradient.astype(slot.dtype)


gathered.defvjp(collect, scatter)


def in_type(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A weight in the compute type, which decoding has it in already."""
    return bfloat16_of(w) if dtype == jnp.bfloat16 and w.dtype != dtype else w


def bfloat16_of(w: jax.Array) -> jax.Array:
    """A float32 array rounded to the nearest bfloat16, ties to even, as a cast does.

    By its bits, because XLA takes a cast of a layer's slice out of the loop over layers and keeps a second
    copy of all parameters, 2 bytes each, through the step.
    """
    bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding would carry a NaN into the sign bit; it stays a NaN.
    rounded = jnp.where(jnp.isnan(w), jnp.uint32(0x7FC0), rounded)
    return jax.lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


def bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """Declares a float32 bias, 0 at first."""
    initializer = declared(nn.initializers.zeros, Kind.BIAS, axes)
    return cast(jax.Array, module.param(name, initializer, shape, jnp.float32))


def matmul(x_BTD: jax.Array, w: Matrix, out: jnp.dtype | None = None) -> jax.Array:
    """Contracts x's last axis with w's first, in x's type: [B, T, D] x [D, ...] -> [B, T, ...].

    The result has x's type, or `out`: products are summed in float32 anyway, so asking for float32 costs no
    rounding on the way.

    Rows are flattened to [B * T, D] first: the weight gradient then contracts one dimension, which XLA's CPU
    backend turns into one large matmul (a third off the backward pass). Not where positions are split: every
    device would collect whole rows for it.
    """
    B, T, D = x_BTD.shape
    x = x_BTD if residual.shards_here() > 1 else x_BTD.reshape(B * T, D)
    if isinstance(w, Compressed):
        y = times(x, w.reshape(D, -1))
    else:
        y = jnp.matmul(x, w.reshape(D, -1).astype(x.dtype), preferred_element_type=out)
    return y.reshape(B, T, *w.shape[1:])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the compute type; D is whatever the last axis is."""
        ones = declared(nn.initializers.ones, Kind.NORM, ("norm",))
        scale_D = cast(jax.Array, self.param("scale", ones, x_BTD.shape[-1:], jnp.float32))
        x_BTD = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), -1, keepdims=True) + self.config.norm_eps)
        return (x_BTD * inverse * scale_D).astype(dtype_of(self.config))


@jax.checkpoint
def gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) up; of what lies between, nothing is kept for the backward pass."""
    return jax.nn.silu(gate_BTF) * up_BTF


class SwiGLU(nn.Module):
    """(silu(x w_gate) * x w_up) w_down (Shazeer 2020)."""

    config: ModelConfig
    tuning: Tuning | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        D, F = c.d_model, c.d_ff
        gate_DF = matrix(self, c, "w_gate", (D, F), ("embed", "mlp"))
        up_DF = matrix(self, c, "w_up", (D, F), ("embed", "mlp"))
        down_FD = matrix(self, c, "w_down", (F, D), ("mlp", "embed"), residual=True)
        gate_BTF, up_BTF = matmul(x_BTD, gate_DF), matmul(x_BTD, up_DF)
        gate_BTF = adapted(
            self, self.tuning, "w_gate", x_BTD, gate_BTF, gate_DF, ("embed", "mlp"), deterministic
        )
        up_BTF = adapted(self, self.tuning, "w_up", x_BTD, up_BTF, up_DF, ("embed", "mlp"), deterministic)
        if c.mlp_bias:
            gate_BTF += bias(self, "gate_bias", (F,), ("mlp",)).astype(gate_BTF.dtype)
            up_BTF += bias(self, "up_bias", (F,), ("mlp",)).astype(up_BTF.dtype)
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        h_BTF = gated(gate_BTF, up_BTF)
        h_BTF = nn.with_logical_constraint(h_BTF, ("batch", "length", "act_mlp"))
        y_BTD = matmul(h_BTF, down_FD)
        y_BTD = adapted(self, self.tuning, "w_down", h_BTF, y_BTD, down_FD, ("mlp", "embed"), deterministic)
        if c.mlp_bias:
            y_BTD += bias(self, "down_bias", (D,), ("embed",)).astype(y_BTD.dtype)
        return y_BTD
