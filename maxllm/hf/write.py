"""safetensors files written tensor by tensor: the header is known before the first byte of weights.

safetensors' own writer wants a whole shard in memory; a shard may have five gigabytes, a tensor has less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from maxllm.config.model import ModelConfig
from maxllm.files import write_json
from maxllm.hf import mapping
from maxllm.hf.mapping import LAYERS, Head
from maxllm.hf.source import DTYPES, INDEX, WEIGHTS
from maxllm.records import Params

MAX_SHARD_BYTES = 5 * 10**9
"""As in transformers: larger files are split."""

Read = Callable[[str, Any], Any]
"""(path, leaf) -> array, perhaps still on disk: what `array[layer]` and `np.asarray` make NumPy of. Leaves of
parameters that lie in a checkpoint are their shapes and types."""

Item = TypeVar("Item")

NAME_OF = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    params: Params,
    config: ModelConfig,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    head: Head = "lm",
    tick: Callable[[int], None] = lambda size: None,
    read: Read = lambda path, leaf: leaf,
) -> dict[str, int]:
    """Writes the weights of a `Llama` as `model.safetensors`, or as shards with their index.

    Args:
      folder: where; nothing of these names is there yet.
      params: the parameter tree, boxed or not, of NumPy or (sharded) JAX arrays.
      config: the model.
      dtype: of the file; that of each array when absent.
      max_shard_bytes: largest file, one tensor at least.
      head: "score" for the parameters of a `ScalarModel`.
      tick: told the bytes of each tensor that has been written, for progress.
      read: makes an array of a leaf of `params`, when its turn comes.

    Returns:
      {"tensors", "parameters", "bytes"}: bytes of all tensors.

    Raises:
      UserError: params are not those of the configuration; before anything is written.
    """
    arrays = mapping.flat_params(params, config, head)
    shapes = mapping.hf_shapes(config, head)
    slots = [
        Slot(name, shapes[name], np.dtype(dtype or arrays[row.path].dtype))
        for row in mapping.rows(config, head)
        for name in mapping.hf_names(row, config)
    ]
    shards = split(slots, max_shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else shard_names(len(shards))
    tensors = ahead(hf_tensors(params, config, dtype, head, read))
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, tensors, tick)
    total = sum(slot.nbytes for slot in slots)
    if len(shards) > 1:
        weight_map = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    parameters = sum(math.prod(slot.shape) for slot in slots)
    return {"tensors": len(slots), "parameters": parameters, "bytes": total}


def split(slots: list[Slot], max_bytes: int) -> list[list[Slot]]:
    """Slots in order, cut into files."""
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """model-00001-of-00003.safetensors and so on."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_file(
    path: Path, slots: list[Slot], tensors: Iterator[tuple[str, np.ndarray]], tick: Callable[[int], None]
) -> None:
    """One file: 8 bytes of header length, the header as JSON, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in slots:
        begin, end = end, end + slot.nbytes
        entry = {"dtype": NAME_OF[slot.dtype], "shape": list(slot.shape), "data_offsets": [begin, end]}
        header[slot.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for slot in slots:
            name, array = next(tensors)
            assert (name, array.shape, array.dtype) == (slot.name, slot.shape, slot.dtype)
            stream.write(np.ascontiguousarray(array).view(np.uint8).data)
            tick(array.nbytes)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items, with the next one under way while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def hf_tensors(
    params: Params,
    config: ModelConfig,
    dtype: np.dtype | None = None,
    head: Head = "lm",
    read: Read = lambda path, leaf: leaf,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every Hugging Face tensor, in the table's order, on the host one at a time.

    Args:
      params: as in `write_weights`.
      config: the model.
      dtype: that of each array of ours when absent.
      head: as in `write_weights`.
      read: as in `write_weights`.

    Raises:
      UserError: params are not those of the configuration; before the first.
    """
    leaves, size = mapping.flat_params(params, config, head), mapping.sizes(config)
    for row in mapping.rows(config, head):
        array, stacked = read(row.path, leaves[row.path]), row.path.startswith(LAYERS)
        for layer, name in enumerate(mapping.hf_names(row, config)):
            ours = on_host(array, layer if stacked else None)
            yield name, contiguous(mapping.hf_layout(row, ours.astype(dtype or ours.dtype, copy=False), size))


def on_host(array: Any, layer: int | None) -> np.ndarray:
    """An array, or one layer of it, as NumPy; a view where it lies whole in host memory."""
    if layer is None:
        return np.asarray(array)
    if not isinstance(array, jax.Array):
        return np.asarray(array[layer])  # NumPy, or still on disk
    if array.is_fully_replicated and jax.default_backend() == "cpu":
        return np.asarray(array)[layer]
    return np.asarray(layer_of(array, layer))  # only this layer leaves the devices


@jax.jit
def layer_of(array: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of a sharded array."""
    return array[layer]


def contiguous(view: np.ndarray) -> np.ndarray:
    """An array's copy in row-major order. PJRT transposes in blocks, at ten times NumPy's speed."""
    if view.flags.c_contiguous:
        return view
    bits = view.view(np.dtype(f"u{view.dtype.itemsize}"))
    return np.asarray(jax.device_put(bits, jax.local_devices(backend="cpu")[0])).view(view.dtype)
