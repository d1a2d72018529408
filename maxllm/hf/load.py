"""Weights from a source straight into their shardings: two tensors in flight, each device its part.

Every array of ours is made once, in its final place; a layer's tensor is read from the file (only the slices
that this host's devices hold), put beside it, and written into it by a donated, compiled step. What a host
needs besides the destination is these tensors.

The change of layout is a NumPy view, made real by the transfer to the device: PJRT transposes in blocks, at
2 GB/s on one core where a compiled transposition reaches 0.2 and NumPy 0.3. On CPU an array's bits are
integers until it is complete: XLA copies those at 10 GB/s, and bfloat16, which it converts, at 0.7.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config.model import ModelConfig
from maxllm.hf import mapping
from maxllm.hf.mapping import LAYERS, Row
from maxllm.hf.source import Index, Source
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
    rows = list(mapping.rows(config))
    # Reading and transposing leave Python free, so two rows go on at once; hosts must all do one thing after
    # another, in the same order.
    with ThreadPoolExecutor(2 if jax.process_count() == 1 else 1) as pool:
        arrays = pool.map(lambda row: load_row(source, row, config, wanted[row.path], tick), rows)
        return mapping.nest(zip((row.path for row in rows), arrays, strict=True))


def load_row(
    source: Source, row: Row, config: ModelConfig, target: jax.ShapeDtypeStruct, tick: Callable[[int], None]
) -> jax.Array:
    """One array of ours from its Hugging Face tensor, or from one per layer."""
    names = mapping.hf_names(row, config)
    stacked = row.path.startswith(LAYERS)
    shape, sharding = target.shape, target.sharding
    if stacked:
        shape, sharding = shape[1:], of_one_layer(sharding)
    carrier = np.dtype(f"u{target.dtype.itemsize}") if on_cpu() else target.dtype

    def put(name: str) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            array = read_part(source, row, name, config, index)
            return array.astype(target.dtype, copy=False).view(carrier)

        array = jax.make_array_from_callback(shape, sharding, part)
        tick(array.nbytes)
        return array

    if not stacked:
        return typed(put(names[0]), target)
    place, whole = placing(target.sharding), jnp.zeros(target.shape, carrier, device=target.sharding)
    for number, name in enumerate(names):
        whole = place(whole, put(name), number)
        whole.block_until_ready()  # one tensor in flight
    return typed(whole, target)


@cache
def placing(sharding: Any) -> Callable[..., jax.Array]:
    """A compiled (whole, layer, its number) -> whole, in place."""
    return jax.jit(
        lambda whole, layer, number: jax.lax.dynamic_update_index_in_dim(whole, layer, number, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def on_cpu() -> bool:
    """Whether arrays live in host memory, where XLA copies bfloat16 slowly."""
    return jax.default_backend() == "cpu"


def typed(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Bits as numbers. A compiled bitcast would be a copy; on CPU a NumPy view is none."""
    if array.dtype == target.dtype:
        return array
    parts = [
        jax.device_put(np.asarray(shard.data).view(target.dtype), shard.device)
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, parts)


def of_one_layer(sharding: Any) -> Any:
    """The sharding of an array without its leading axis L."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def read_part(source: Source, row: Row, name: str, config: ModelConfig, index: Index) -> np.ndarray:
    """The part of our array (of one layer) that `index` names, a view of what was read for it.

    A flattened axis such as HK is read by its first letter: whole heads, of which K takes its part.
    """
    size = mapping.sizes(config)
    wanted = dict(zip(row.dims.split(), index, strict=True))
    first = {letter: slice(*wanted[letter].indices(size[letter])[:2]) for letter in wanted}
    theirs = []
    for axis in row.hf_dims.split():
        width = int(np.prod([size[letter] for letter in axis[1:]]))
        theirs.append(slice(first[axis[0]].start * width, first[axis[0]].stop * width))
        first |= {letter: slice(0, size[letter]) for letter in axis[1:]}
    read = {letter: part.stop - part.start for letter, part in first.items()}
    ours = mapping.our_layout(row, source.read(name, tuple(theirs)), size | read)
    rest = (wanted[d] if read[d] == size[d] else slice(None) for d in row.dims.split())
    return ours[tuple(rest)]
