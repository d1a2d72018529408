"""The one table between Hugging Face's decoder tensors and our parameter tree, in both directions.

A Hugging Face linear layer is [out, in], ours is [in, out...] with heads and head width apart, and our layers
are stacked on a leading axis L. Rotary pairs are half-split in both, so no row is permuted. `load.py` and
`write.py` move tensors one by one by this table; `to_hf` and `from_hf` do it in memory, for small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config.model import ModelConfig
from maxllm.errors import UserError, listed
from maxllm.records import Params

Shape = tuple[int, ...]

Head = Literal["lm", "score"]
"""What stands on the decoder: a language-model head (`Llama`), or one number per position (`ScalarModel`; for
Hugging Face, sequence classification with one label)."""


class Row(NamedTuple):
    """One kind of tensor. Dims are the legend's letters; HK is H and K flattened into one axis."""

    hf_name: str
    """With {} for the layer."""
    path: str
    """Ours, under `params`."""
    hf_dims: str
    """Axes of the Hugging Face tensor, separated by spaces."""
    dims: str
    """Axes of our array, of one layer where `path` is under LAYERS."""
    present: Callable[[ModelConfig], bool] = lambda config: True
    """Which models have it."""
    head: Head | None = None
    """The head it belongs to; None for the decoder under it."""


LAYERS = "decoder/layers/"


def has_qkv_bias(config: ModelConfig) -> bool:
    """Biases on queries, keys and values."""
    return config.attention_bias != "none"


def has_o_bias(config: ModelConfig) -> bool:
    """A bias on the attention's output."""
    return config.attention_bias == "qkvo"


def has_qk_norm(config: ModelConfig) -> bool:
    """Norms on query and key heads."""
    return config.qk_norm


def has_mlp_bias(config: ModelConfig) -> bool:
    """Biases in the feed-forward."""
    return config.mlp_bias


TABLE = (
    Row("model.embed_tokens.weight", "decoder/embedding", "V D", "V D"),
    Row("model.layers.{}.input_layernorm.weight", LAYERS + "attention_norm/scale", "D", "D"),
    Row("model.layers.{}.self_attn.q_proj.weight", LAYERS + "attention/wq", "HK D", "D H K"),
    Row("model.layers.{}.self_attn.k_proj.weight", LAYERS + "attention/wk", "GK D", "D G K"),
    Row("model.layers.{}.self_attn.v_proj.weight", LAYERS + "attention/wv", "GK D", "D G K"),
    Row("model.layers.{}.self_attn.o_proj.weight", LAYERS + "attention/wo", "D HK", "H K D"),
    Row("model.layers.{}.post_attention_layernorm.weight", LAYERS + "mlp_norm/scale", "D", "D"),
    Row("model.layers.{}.mlp.gate_proj.weight", LAYERS + "mlp/w_gate", "F D", "D F"),
    Row("model.layers.{}.mlp.up_proj.weight", LAYERS + "mlp/w_up", "F D", "D F"),
    Row("model.layers.{}.mlp.down_proj.weight", LAYERS + "mlp/w_down", "D F", "F D"),
    Row("model.norm.weight", "decoder/final_norm/scale", "D", "D"),
    Row("lm_head.weight", "lm_head", "V D", "D V", lambda c: not c.tie_embeddings, "lm"),
    Row("score.weight", "head", "1 D", "D 1", head="score"),
    Row("model.layers.{}.self_attn.q_proj.bias", LAYERS + "attention/q_bias", "HK", "H K", has_qkv_bias),
    Row("model.layers.{}.self_attn.k_proj.bias", LAYERS + "attention/k_bias", "GK", "G K", has_qkv_bias),
    Row("model.layers.{}.self_attn.v_proj.bias", LAYERS + "attention/v_bias", "GK", "G K", has_qkv_bias),
    Row("model.layers.{}.self_attn.o_proj.bias", LAYERS + "attention/o_bias", "D", "D", has_o_bias),
    Row("model.layers.{}.self_attn.q_norm.weight", LAYERS + "attention/q_norm/scale", "K", "K", has_qk_norm),
    Row("model.layers.{}.self_attn.k_norm.weight", LAYERS + "attention/k_norm/scale", "K", "K", has_qk_norm),
    Row("model.layers.{}.mlp.gate_proj.bias", LAYERS + "mlp/gate_bias", "F", "F", has_mlp_bias),
    Row("model.layers.{}.mlp.up_proj.bias", LAYERS + "mlp/up_bias", "F", "F", has_mlp_bias),
    Row("model.layers.{}.mlp.down_proj.bias", LAYERS + "mlp/down_bias", "D", "D", has_mlp_bias),
)


def rows(config: ModelConfig, head: Head = "lm") -> Iterator[Row]:
    """The rows of TABLE that a model has."""
    return (row for row in TABLE if row.present(config) and row.head in (None, head))


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each dim letter."""
    c = config
    heads = {"H": c.n_heads, "G": c.n_kv_heads, "K": c.k_dim}
    return heads | {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff, "L": c.n_layers, "1": 1}


def hf_names(row: Row, config: ModelConfig) -> list[str]:
    """A row's Hugging Face tensors: one per layer, or one."""
    if row.path.startswith(LAYERS):
        return [row.hf_name.format(layer) for layer in range(config.n_layers)]
    return [row.hf_name]


def hf_shapes(config: ModelConfig, head: Head = "lm") -> dict[str, Shape]:
    """Name -> shape of every Hugging Face tensor of a model."""
    size = sizes(config)
    return {
        name: tuple(math.prod(size[letter] for letter in axis) for axis in row.hf_dims.split())
        for row in rows(config, head)
        for name in hf_names(row, config)
    }


def our_shapes(config: ModelConfig, head: Head = "lm") -> dict[str, Shape]:
    """Path -> shape of every array of ours, the stacked layers' axis included."""
    size = sizes(config)
    return {
        row.path: tuple(size[d] for d in ["L"] * row.path.startswith(LAYERS) + row.dims.split())
        for row in rows(config, head)
    }


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], origin: str) -> None:
    """Compares the whole set before anything moves.

    Raises:
      UserError: naming the missing, extra and misshapen tensors.
    """
    problems = (
        [f"{name} is missing" for name in wanted if name not in found],
        [f"{name} is not part of the model" for name in found if name not in wanted],
        [
            f"{name} is {tuple(found[name])}, {wanted[name]} expected"
            for name in wanted
            if name in found and tuple(found[name]) != wanted[name]
        ],
    )
    if any(problems):
        reasons = "; ".join(listed(kind, between="; ") for kind in problems if kind)
        raise UserError(f"{origin} does not match the model's configuration: {reasons}")


def hf_layout(row: Row, ours: Any, size: Mapping[str, int]) -> Any:
    """One of our arrays (of one layer) as the Hugging Face tensor; NumPy or traced."""
    shape = [math.prod(size[letter] for letter in axis) for axis in row.hf_dims.split()]
    return ours.transpose(permutation(row)).reshape(shape)


def our_layout(row: Row, theirs: Any, size: Mapping[str, int]) -> Any:
    """A Hugging Face tensor as our array (of one layer); NumPy or traced."""
    unflattened = [size[letter] for letter in row.hf_dims.replace(" ", "")]
    return theirs.reshape(unflattened).transpose(np.argsort(permutation(row)))


def permutation(row: Row) -> list[int]:
    """Where each axis of the unflattened Hugging Face tensor stands among ours."""
    return [row.dims.split().index(letter) for letter in row.hf_dims.replace(" ", "")]


def flat_params(params: Params, config: ModelConfig, head: Head = "lm") -> dict[str, Any]:
    """Path -> array of a parameter tree, boxed or not, looked at whole.

    Raises:
      UserError: it is not the tree of the configuration.
    """
    arrays = flatten_dict(nn.unbox(params), sep="/")
    shapes = {path: array.shape for path, array in arrays.items()}
    check_shapes(shapes, our_shapes(config, head), "the parameter tree")
    return arrays


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every Hugging Face tensor by name, in the type of `params`, all in memory at once.

    Raises:
      UserError: params are not those of the configuration.
    """
    arrays, size = flat_params(params, config), sizes(config)
    tensors = {}
    for row in rows(config):
        array = np.asarray(arrays[row.path])
        parts = array if row.path.startswith(LAYERS) else [array]
        for name, part in zip(hf_names(row, config), parts, strict=True):
            tensors[name] = np.ascontiguousarray(hf_layout(row, part, size))
    return tensors


def from_hf(tensors: Mapping[str, Any], config: ModelConfig) -> Params:
    """Our parameters, a nested dict of float32 NumPy arrays, from Hugging Face tensors by name.

    Raises:
      UserError: naming every missing, extra and misshapen tensor.
    """
    check_shapes({name: t.shape for name, t in tensors.items()}, hf_shapes(config), "the set of tensors")
    size = sizes(config)

    def ours(row: Row) -> np.ndarray:
        parts = [our_layout(row, np.asarray(tensors[n], np.float32), size) for n in hf_names(row, config)]
        return np.stack(parts) if row.path.startswith(LAYERS) else np.ascontiguousarray(parts[0])

    return nest((row.path, ours(row)) for row in rows(config))


def nest(arrays: Iterable[tuple[str, Any]]) -> Params:
    """The parameter tree from (path, array) pairs."""
    return unflatten_dict(dict(arrays), sep="/")
