"""Weights from a source straight into their shardings: one tensor in flight, each device its part.

Every array of ours is made once, in its final place; a layer's tensor is read from the file (only the slices
that this host's devices hold), put beside it, and written into it by a donated, compiled step. What a host
needs besides the destination is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config import ModelConfig
from maxllm.hf import mapping
from maxllm.hf.mapping import LAYERS, Row
from maxllm.hf.source import Source
from maxllm.records import Params


def load(
    source: Source, config: ModelConfig, abstract: Params, tick: Callable[[int], None] = lambda size: None
) -> Params:
    """The parameters of a `Llama`.

    Args:
      source: the weights, under Hugging Face's names.
      config: the model.
      abstract: tree of `jax.ShapeDtypeStruct` with shardings; its types are those of the result.
      tick: told the bytes of each tensor that has been placed, for progress.

    Raises:
      UserError: naming every missing, extra and misshapen tensor; before a byte of one is read.
    """
    mapping.check_shapes(source.shapes, mapping.hf_shapes(config), source.origin)
    wanted = flatten_dict(abstract, sep="/")
    arrays: dict[str, jax.Array] = {}
    for row in mapping.rows(config):
        arrays[row.path] = load_row(source, row, config, wanted[row.path], tick)
    return mapping.nest(arrays.items())


def load_row(
    source: Source, row: Row, config: ModelConfig, target: jax.ShapeDtypeStruct, tick: Callable[[int], None]
) -> jax.Array:
    """One array of ours from its Hugging Face tensor, or from one per layer."""
    size, stacked = mapping.sizes(config), row.path.startswith(LAYERS)
    names = mapping.hf_names(row, config)
    their_sharding = hf_sharding(row, target.sharding, stacked)

    def put(name: str) -> jax.Array:
        shape = source.tensors[name].shape
        array = jax.make_array_from_callback(shape, their_sharding, lambda index: source.read(name, index))
        tick(array.nbytes)
        return array

    def ours(theirs: jax.Array) -> jax.Array:
        return mapping.our_layout(row, theirs, size).astype(target.dtype)

    if not stacked:
        return jax.jit(ours, out_shardings=target.sharding)(put(names[0]))
    place = jax.jit(
        lambda whole, theirs, layer: jax.lax.dynamic_update_index_in_dim(whole, ours(theirs), layer, 0),
        donate_argnums=0,
        out_shardings=target.sharding,
    )
    whole = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)()
    for layer, name in enumerate(names):
        whole = place(whole, put(name), layer)
        whole.block_until_ready()  # one tensor in flight
    return whole


def hf_sharding(row: Row, sharding: Any, stacked: bool) -> Any:
    """How a Hugging Face tensor is split so that every device gets what it will hold of ours.

    A flattened axis such as HK is split as its first letter is: whole heads go together.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = dict(zip(["L"] * stacked + row.dims.split(), sharding.spec, strict=False))
    theirs = PartitionSpec(*(spec.get(axis[0]) for axis in row.hf_dims.split()))
    return NamedSharding(sharding.mesh, theirs)
