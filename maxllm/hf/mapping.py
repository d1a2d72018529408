"""The one table between Hugging Face's `LlamaForCausalLM` tensors and our parameter tree, in both directions.

A Hugging Face linear layer is [out, in], ours is [in, out...] with heads and head width apart, and our layers
are stacked on a leading axis L. Rotary pairs are half-split in both, so no row is permuted. Everything moves
tensor by tensor (`hf_tensors`, `our_arrays`); `to_hf` and `from_hf` only collect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config import ModelConfig
from maxllm.errors import UserError
from maxllm.records import Params

Shape = tuple[int, ...]


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
    Row("lm_head.weight", "lm_head", "V D", "D V", lambda c: not c.tie_embeddings),
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


def rows(config: ModelConfig) -> Iterator[Row]:
    """The rows of TABLE that a model has."""
    return (row for row in TABLE if row.present(config))


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each dim letter."""
    c = config
    heads = {"H": c.n_heads, "G": c.n_kv_heads, "K": c.k_dim}
    return heads | {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff, "L": c.n_layers}


def hf_names(row: Row, config: ModelConfig) -> list[str]:
    """A row's Hugging Face tensors: one per layer, or one."""
    if row.path.startswith(LAYERS):
        return [row.hf_name.format(layer) for layer in range(config.n_layers)]
    return [row.hf_name]


def hf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every Hugging Face tensor of a model."""
    size = sizes(config)
    return {
        name: tuple(math.prod(size[letter] for letter in axis) for axis in row.hf_dims.split())
        for row in rows(config)
        for name in hf_names(row, config)
    }


def our_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Path -> shape of every array of ours, the stacked layers' axis included."""
    size = sizes(config)
    return {
        row.path: tuple(size[d] for d in ["L"] * row.path.startswith(LAYERS) + row.dims.split())
        for row in rows(config)
    }


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], origin: str) -> None:
    """Compares the whole set before anything moves.

    Raises:
      UserError: naming every missing, extra and misshapen tensor.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name])}, {wanted[name]} expected"
        for name in wanted
        if name in found and tuple(found[name]) != wanted[name]
    ]
    if problems:
        raise UserError(f"{origin} does not match the model's configuration: {'; '.join(problems)}")


def hf_tensors(params: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name, contiguous array) of every Hugging Face tensor, copied one at a time, in the type of `params`.

    Args:
      params: the tree of `Llama`, boxed or not, of NumPy or JAX arrays.

    Raises:
      UserError: params are not those of the configuration; before the first tensor.
    """
    arrays = flatten_dict(nn.unbox(params), sep="/")
    shapes = {path: array.shape for path, array in arrays.items()}
    check_shapes(shapes, our_shapes(config), "the parameter tree")
    wanted = hf_shapes(config)
    for row in rows(config):
        names, array = hf_names(row, config), arrays[row.path]
        for name, part in zip(names, array if row.path.startswith(LAYERS) else [array], strict=True):
            moved = np.asarray(part).transpose(permutation(row))
            yield name, np.ascontiguousarray(moved).reshape(wanted[name])


def our_arrays(read: Callable[[str], np.ndarray], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(path, float32 array) of every array of ours; `read` is asked for one Hugging Face tensor at a time.

    The caller has checked the shapes.
    """
    size, shapes = sizes(config), our_shapes(config)
    for row in rows(config):
        array = np.empty(shapes[row.path], np.float32)
        names = hf_names(row, config)
        unflattened = [size[letter] for letter in row.hf_dims.replace(" ", "")]
        for name, part in zip(names, array if row.path.startswith(LAYERS) else [array], strict=True):
            part[...] = read(name).reshape(unflattened).transpose(np.argsort(permutation(row)))
        yield row.path, array


def permutation(row: Row) -> list[int]:
    """Where each axis of the unflattened Hugging Face tensor stands among ours."""
    return [row.dims.split().index(letter) for letter in row.hf_dims.replace(" ", "")]


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every Hugging Face tensor by name; see `hf_tensors`."""
    return dict(hf_tensors(params, config))


def from_hf(tensors: Mapping[str, Any], config: ModelConfig) -> Params:
    """Our parameters, a nested dict of float32 NumPy arrays, from Hugging Face tensors by name.

    Raises:
      UserError: naming every missing, extra and misshapen tensor.
    """
    check_shapes({name: t.shape for name, t in tensors.items()}, hf_shapes(config), "the set of tensors")
    return nest(our_arrays(lambda name: np.asarray(tensors[name]), config))


def nest(arrays: Iterator[tuple[str, np.ndarray]]) -> Params:
    """The parameter tree from (path, array) pairs."""
    return unflatten_dict(dict(arrays), sep="/")
