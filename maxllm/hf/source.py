"""Where weights come from: named tensors of a folder, read one slice at a time.

    source = open_folder("Llama-3.2-1B")     config.json, safetensors (single or sharded, with index)
    source.shapes["model.norm.weight"]       known before a byte of a tensor is read
    source.read(name, (slice(0, 128),))      only these rows, straight from the file

Reading goes through plain file reads, not a memory map: mapped pages would count towards the process's
memory, and a converter promises to stay small. safetensors' own library still checks every file first. Pickle
files are refused unless asked for, and then go through torch's loader that runs no code (weights_only).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from maxllm.errors import UserError, listed
from maxllm.files import read_json

Index = tuple[slice, ...]
Shape = tuple[int, ...]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "*.pth", "*.pt", "pytorch_model-*.bin")

DERIVED_SUFFIX = ".rotary_emb.inv_freq"
"""Old LLaMA folders store the rotary frequencies of each layer; they follow from the configuration."""

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""safetensors' names of the types that weights may have."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read."""

    shape: Shape
    dtype: np.dtype
    load: Callable[[Index], np.ndarray] = field(repr=False)
    """Reads a part; one slice per axis."""


@dataclass(frozen=True)
class Source:
    """All tensors of a model, by Hugging Face's names."""

    origin: str
    """What errors call it."""
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the part of it that one slice per axis names."""
        tensor = self.tensors[name]
        return tensor.load(tuple(slice(0, size) for size in tensor.shape) if index is None else index)


def open_folder(folder: Path, allow_pickle: bool = False) -> Source:
    """The weights of a folder; only names and shapes are read now.

    Raises:
      UserError: no weights, only pickle files that were not allowed, or a file that is not whole.
    """
    tensors = safetensors_in(folder) or pickled_tensors(folder, allow_pickle)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED_SUFFIX)}
    return Source(str(folder), kept)


# --- safetensors -------------------------------------------------------------------------------------------


def safetensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder's safetensors files: those that its index names, or those of the single file.

    Raises:
      UserError: the index is broken, or beside a single file that it does not name.
    """
    if not (folder / INDEX).is_file():
        return safetensors_of(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    weight_map = read_weight_map(folder)
    names = sorted(set(weight_map.values()))
    if (folder / WEIGHTS).is_file() and WEIGHTS not in names:
        raise UserError(
            f"{folder} holds two sets of weights, {WEIGHTS} and {listed(names, 2)} of {INDEX}; remove one"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}, which {INDEX} names")
    tensors: dict[str, Tensor] = {}
    for file in names:
        found = safetensors_of(folder / file)
        # The index decides: a tensor may lie in several files, and what it does not name is not the model's.
        tensors |= {name: tensor for name, tensor in found.items() if weight_map.get(name) == file}
    named = {name: file for name, file in weight_map.items() if not name.endswith(DERIVED_SUFFIX)}
    lost = [f"{name} in {file}" for name, file in named.items() if name not in tensors]
    if lost:
        raise UserError(f"{folder} has no {listed(lost, 3)}, where {INDEX} says it is")
    return tensors


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index has it.

    Raises:
      UserError: it is no index, or names files outside the folder.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} is not an index of safetensors files")
    files = {name: str(file) for name, file in weight_map.items()}
    paths = map(PurePath, sorted(set(files.values())))
    outside = [str(path) for path in paths if path.is_absolute() or ".." in path.parts]
    if outside:
        raise UserError(f"{folder / INDEX} names files outside its folder: {listed(outside)}")
    return files


def safetensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
      UserError: it is not whole, or has a tensor of a type that no weights have.
    """
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass  # opening checks the header against the file's size
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    unknown = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
    if unknown:
        found = ", ".join(f"{name} {dtype}" for name, dtype in sorted(unknown.items())[:3])
        raise UserError(f"{file} has {len(unknown)} tensors of types that are not weights: {found}")
    return {name: stored(file, 8 + size, entry) for name, entry in header.items()}


def stored(file: Path, data: int, entry: dict[str, Any]) -> Tensor:
    """One tensor of a safetensors file whose data begins at byte `data`."""
    shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    begin = data + entry["data_offsets"][0]

    def load(index: Index) -> np.ndarray:
        rows = index[0] if index else slice(0, 1)
        first, last, _ = rows.indices(shape[0] if shape else 1)
        row = math.prod(shape[1:])
        array = np.empty((last - first) * row, dtype)
        with file.open("rb") as stream:
            stream.seek(begin + first * row * dtype.itemsize)
            if stream.readinto(array.view(np.uint8).data) != array.nbytes:
                raise UserError(f"{file} was cut short while it was read")
        return array.reshape(((last - first), *shape[1:]) if shape else ())[(slice(None), *index[1:])]

    return Tensor(shape, dtype, load)


# --- pickle ------------------------------------------------------------------------------------------------


def pickled_tensors(folder: Path, allow: bool) -> dict[str, Tensor]:
    """The tensors of a folder's .bin or .pth files.

    Raises:
      UserError: there are none, they were not allowed, torch is missing, or one holds more than tensors.
    """
    files = sorted({file for pattern in PICKLES for file in folder.glob(pattern)})
    if not files:
        raise UserError(f"{folder} holds no {WEIGHTS} and no {INDEX}: it has no weights")
    names = listed(file.name for file in files)
    if not allow:
        raise UserError(
            f"{folder} holds its weights as pickle ({names}), which can carry code; "
            "give --allow-pickle to read them with torch's loader that runs none"
        )
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {names} needs torch: pip install torch") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever a broken or hostile pickle makes of it
            raise UserError(f"{file} cannot be read safely: {' '.join(str(error).split())[:300]}") from None
        state = state.get("model", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise UserError(f"{file} is not a dictionary of tensors")
        found = {unwrapped(name): of_torch(value) for name, value in state.items()}
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise UserError(f"{folder} holds two sets of weights in {names}: {listed(twice, 3)} in both")
        tensors |= found
    return tensors


def unwrapped(name: str) -> str:
    """A name without what DataParallel and torch.compile put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def of_torch(value: Any) -> Tensor:
    """A torch tensor, read when asked; NumPy has no bfloat16 of its own, so its bits go over."""
    import torch

    if value.dtype == torch.bfloat16:
        return Tensor(
            tuple(value.shape),
            np.dtype(ml_dtypes.bfloat16),
            lambda index: value[index].contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16),
        )
    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return Tensor(tuple(value.shape), dtype, lambda index: value[index].numpy())
