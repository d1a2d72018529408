"""LoRA (Hu et al. 2021): y = x W + (alpha / r) x A B, with W frozen and A, B trained.

A is Gaussian and B zero at first, so a fresh adapter changes nothing. The two live in the `lora` collection,
beside `params`; `Weights` carries both. Without the collection adapters are off: that is the model which they
were trained beside.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config.lora import LoraConfig
from maxllm.weights import Kind, Weights, declared


def adapted(
    module: nn.Module,
    lora: LoraConfig | None,
    name: str,
    x_BTD: jax.Array,
    y: jax.Array,
    axes: tuple[str, str],
    deterministic: bool,
) -> jax.Array:
    """y, what the weight `name` makes of x, with its adapter added.

    Args:
      module: where the weight is declared.
      lora: None, or which weights have adapters.
      name: of the weight.
      x_BTD: the weight's input.
      y: [B, T, ...], its output.
      axes: logical names of the input axis and of the (first) output axis.
      deterministic: False draws a dropout mask on the adapter's input.
    """
    if lora is None or name not in lora.targets:
        return y
    if not module.is_initializing() and not module.has_variable("lora", f"{name}_a"):
        return y
    B, T, D = x_BTD.shape
    width = y[0, 0].size

    def declare(suffix: str, init: Any, shape: tuple[int, int], names: tuple[str | None, ...]) -> jax.Array:
        make = declared(init, Kind.ADAPTER, names)
        variable = module.variable(
            "lora", f"{name}_{suffix}", lambda: make(module.make_rng("params"), shape, jnp.float32)
        )
        return cast(jax.Array, variable.value)  # unboxed by Flax

    a_DA = declare("a", nn.initializers.normal(D**-0.5), (D, lora.rank), (axes[0], None))
    b_AO = declare("b", nn.initializers.zeros, (lora.rank, width), (None, axes[1]))
    x_BTD = nn.Dropout(lora.dropout, deterministic=deterministic)(x_BTD)
    delta = (x_BTD.reshape(B * T, D) @ a_DA.astype(x_BTD.dtype)) @ b_AO.astype(x_BTD.dtype)
    return y + (lora.scale * delta).reshape(y.shape).astype(y.dtype)


def merge(weights: Weights, lora: LoraConfig) -> Weights:
    """Weights without adapters that compute the same: W + (alpha / r) A B."""
    flat, low = flatten_dict(weights.base, sep="/"), flatten_dict(weights.adapters, sep="/")
    for path, a_LDA in low.items():
        if path.endswith("_a"):
            weight = path.removesuffix("_a")
            delta = lora.scale * jnp.einsum("lda,lao->ldo", a_LDA, low[weight + "_b"])
            flat[weight] = flat[weight] + delta.reshape(flat[weight].shape).astype(flat[weight].dtype)
    return Weights(unflatten_dict(flat, sep="/"))
