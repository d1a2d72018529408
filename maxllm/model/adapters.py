"""What is trained beside a model that stays: LoRA, DoRA, bottlenecks, prefixes, prompts.

All of them live in the `adapters` collection, beside `params`; `Weights` carries both. Without the collection
they are off, which leaves the model that they were trained beside. Fresh ones change nothing, or as little as
there is to change: a prefix or prompt is at first that of some tokens of the vocabulary.

    LoRA     y = x W + s x A B, A Gaussian and B zero at first (Hu et al. 2021, section 4.1)
    DoRA     y = m (x W + s x A B) / |W + s A B|, each output's m at first |W| (Liu et al. 2024, equation 5)
    bottleneck   y + gelu(y W1 + b1) W2 + b2 of a block's output y, W2 zero at first (Houlsby et al. 2019)
    prefix   keys and values of every layer that all tokens see (Li & Liang 2021)
    prompt   embeddings before every text (Lester et al. 2021)
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config.tuning import LoraConfig, Tuning
from maxllm.model.compressed import Compressed, made_whole
from maxllm.weights import Kind, Weights, declared

COLLECTION = "adapters"


def on(module: nn.Module, name: str) -> bool:
    """Whether an adapter of that name is there to be used, or is to be made."""
    return module.is_initializing() or module.has_variable(COLLECTION, name)


def declare(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    kind: Kind = Kind.ADAPTER,
) -> jax.Array:
    """An adapter's float32 weight: its shape, logical axes and initializer on one line."""
    make = declared(init, kind, axes)
    variable = module.variable(COLLECTION, name, lambda: make(module.make_rng("params"), shape, jnp.float32))
    return cast(jax.Array, variable.value)  # unboxed by Flax


# --- low-rank ----------------------------------------------------------------------------------------------


def adapted(
    module: nn.Module,
    tuning: Tuning | None,
    name: str,
    x_BTD: jax.Array,
    y: jax.Array,
    w: jax.Array | Compressed,
    axes: tuple[str, str],
    deterministic: bool,
) -> jax.Array:
    """y, what the weight `name` makes of x, with its low-rank adapter, if it has one.

    Args:
      module: where the weight is declared.
      tuning: None, or which weights have adapters.
      name: of the weight.
      x_BTD: the weight's input.
      y: [B, T, ...], its output.
      w: the weight, [D, ...] or what has as many numbers.
      axes: logical names of the input axis and of the (first) output axis.
      deterministic: False draws a dropout mask on the adapter's input.
    """
    lora = tuning.lora if tuning else None
    if lora is None or name not in lora.targets or not on(module, f"{name}_a"):
        return y
    B, T, D = x_BTD.shape
    width = y[0, 0].size
    gaussian, zeros, ones = nn.initializers.normal(D**-0.5), nn.initializers.zeros, nn.initializers.ones
    # Both are split over the devices that split the base, and whole but for tensor parallelism where used.
    a_DR = declare(module, f"{name}_a", gaussian, (D, lora.rank), (split_of(axes[0]), None))
    b_RO = declare(module, f"{name}_b", zeros, (lora.rank, width), (None, split_of(axes[1])))
    x_BTD = nn.Dropout(lora.dropout, deterministic=deterministic)(x_BTD)
    a_DR = nn.with_logical_constraint(a_DR.astype(x_BTD.dtype), (whole_of(axes[0]), None))
    b_RO = nn.with_logical_constraint(b_RO.astype(x_BTD.dtype), (None, whole_of(axes[1])))
    delta = (x_BTD.reshape(B * T, D) @ a_DR) @ b_RO
    y = y + (lora.scale * delta).reshape(y.shape).astype(y.dtype)
    if lora.dora:
        m_O = declare(module, f"{name}_m", ones, (width,), (axes[1],), Kind.NORM)
        delta_DO = jnp.matmul(a_DR, b_RO, preferred_element_type=jnp.float32)
        w_DO = (w.whole() if isinstance(w, Compressed) else w).reshape(D, width)
        length_O = lengths(w_DO.astype(jnp.float32) + lora.scale * delta_DO)
        share_O = m_O / jax.lax.stop_gradient(length_O)  # a constant of the backward pass: section 4.3
        y = (y * share_O.reshape(y.shape[2:])).astype(y.dtype)
    return y


def split_of(axis: str) -> str:
    """The logical name of an adapter's axis where it is kept."""
    return axis if axis == "embed" else "wide"


def whole_of(axis: str) -> str | None:
    """The logical name of an adapter's axis where it is used."""
    return None if axis == "embed" else axis


def lengths(w_DO: jax.Array) -> jax.Array:
    """Of the weights of each output, [..., D, O] -> [..., O]."""
    return jnp.sqrt(jnp.sum(jnp.square(w_DO), axis=-2))


def plain(weights: Weights, tuning: Tuning | None) -> Weights:
    """Weights that compute the same with `tuning.beside` in place of `tuning`.

    Low-rank adapters are merged in float32, W + s A B and for DoRA its columns at length m, the layers that
    were trained apart from frozen ones are put on top of these, and matrices in few bits are made whole.
    """
    if tuning is None:
        return weights
    weights = made_whole(in_one_stack(weights, tuning.frozen_layers))
    flat = flatten_dict(weights.base, sep="/")
    low = flatten_dict(weights.adapters or {}, sep="/")
    if tuning.lora is not None:
        for path in [path.removesuffix("_a") for path in low if path.endswith("_a")]:
            a_LDR, b_LRO, m_LO = (low.pop(f"{path}_{letter}", None) for letter in "abm")
            flat[path] = merged(flat[path], a_LDR, b_LRO, m_LO, tuning.lora)
    return Weights(unflatten_dict(flat, sep="/"), unflatten_dict(low, sep="/") if low else None)


def in_one_stack(weights: Weights, frozen_layers: int) -> Weights:
    """With the layers that are trained apart from frozen ones on top of these."""
    if weights.upper is None:
        return weights
    flat = flatten_dict(weights.base)
    for path, upper in flatten_dict(weights.upper).items():
        flat[path] = jnp.concatenate([flat[path][:frozen_layers], upper])
    return weights.replace(base=unflatten_dict(flat), upper=None)


def merged(
    w: jax.Array, a_LDR: jax.Array, b_LRO: jax.Array, m_LO: jax.Array | None, lora: LoraConfig
) -> jax.Array:
    """All layers' matrices of one name with their adapters in them, float32."""
    delta = lora.scale * jnp.einsum("ldr,lro->ldo", a_LDR, b_LRO)
    whole = w.astype(jnp.float32).reshape(delta.shape) + delta
    if m_LO is not None:
        whole *= (m_LO / lengths(whole))[:, None]
    return whole.reshape(w.shape)


# --- bottlenecks, prefixes, prompts ------------------------------------------------------------------------


def bottleneck(module: nn.Module, tuning: Tuning | None, name: str, y_BTD: jax.Array) -> jax.Array:
    """What a block adds to the residual stream, after its bottleneck, if it has one."""
    config = tuning.bottleneck if tuning else None
    if config is None or not on(module, f"{name}_down"):
        return y_BTD
    D, W = y_BTD.shape[-1], config.width
    gaussian, zeros = nn.initializers.normal(D**-0.5), nn.initializers.zeros
    down_DW = declare(module, f"{name}_down", gaussian, (D, W), ("embed", None))
    down_bias_W = declare(module, f"{name}_down_bias", zeros, (W,), (None,), Kind.BIAS)
    up_WD = declare(module, f"{name}_up", zeros, (W, D), (None, "embed"))
    up_bias_D = declare(module, f"{name}_up_bias", zeros, (D,), ("embed",), Kind.BIAS)
    kind = y_BTD.dtype
    h_BTW = jax.nn.gelu(y_BTD @ down_DW.astype(kind) + down_bias_W.astype(kind))
    return y_BTD + h_BTW @ up_WD.astype(kind) + up_bias_D.astype(kind)


def prefix(
    module: nn.Module, tuning: Tuning | None, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array] | None:
    """A layer's keys and values that every token sees, [P, G, K] each; keys are not rotated any more."""
    config = tuning.prefix if tuning else None
    if config is None or not on(module, "prefix_k"):
        return None
    axes, init = (None, "kv_heads", "head_dim"), nn.initializers.zeros
    k_PGK, v_PGK = (
        declare(module, f"prefix_{letter}", init, (config.length, *shape), axes) for letter in "kv"
    )
    return k_PGK, v_PGK


def prompt(module: nn.Module, tuning: Tuning | None, D: int) -> jax.Array | None:
    """Embeddings that stand before every text, [P, D]."""
    config = tuning.prompt if tuning else None
    if config is None or not on(module, "prompt"):
        return None
    return declare(module, "prompt", nn.initializers.zeros, (config.length, D), (None, "table"))
