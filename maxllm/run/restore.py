"""Checkpoints are read by functions that never touch the folder, and compare every file with its hash.

What each of them takes is one checkpoint's folder, as `RunFolder.find` gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.errors import RunFailed, UserError
from maxllm.parallel import processes
from maxllm.records import Params
from maxllm.run.hashes import array_of, is_description, read_hashes, verify, verify_beside
from maxllm.run.orbax_s3 import teach_orbax
from maxllm.storage import kvstore


class State(Protocol):
    """A training state whose exported parameters can be taken out and put back."""

    def detach(self) -> tuple[Params, Self]:
        """(the parameters other stages read, the state without them)."""

    def attach(self, params: Params) -> Self:
        """The state with parameters put back."""


AnyState = TypeVar("AnyState", bound=State)


def restore(checkpoint: Path, abstract_state: AnyState) -> AnyState:
    """A whole training state from one checkpoint's folder, in the shardings of `abstract_state`.

    Raises:
      RunFailed: it is damaged or cannot be read.
    """
    params, rest = abstract_state.detach()
    restored = read_items(checkpoint, params=params, rest=rest)
    return restored["rest"].attach(restored["params"])


def read_items(checkpoint: Path, **abstract: Any) -> Any:
    """Some items of a checkpoint, each in the shardings and types of its abstract tree."""
    return {name: read_item(checkpoint, name, tree) for name, tree in abstract.items()}


def read_item(checkpoint: Path, name: str, abstract: Any) -> Any:
    """An item of a checkpoint, read while its files are hashed."""
    item = checkpoint / name
    verify(item, wanted=is_description)  # first, for room is made as it says

    def read(_: int) -> Any:
        with readable(checkpoint):
            # The handler, not a Checkpointer: an item of a checkpoint is not a checkpoint of its own.
            return ocp.StandardCheckpointHandler().restore(item, args=ocp.args.StandardRestore(abstract))

    expected = read_hashes(item)
    return verify_beside(item, [list(expected)], expected, read)[0]


def check_params(checkpoint: Path, abstract_params: Params) -> None:
    """Looks at a checkpoint's shapes without reading it.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged.
    """
    saved = stored_tree(checkpoint)
    problems = differences(saved, abstract_params)
    if problems:
        raise UserError(f"{checkpoint} is a checkpoint of another model: {'; '.join(problems[:5])}")


def stored_tree(checkpoint: Path) -> Any:
    """Shapes and types of the parameters in a checkpoint.

    Raises:
      RunFailed: it is damaged.
    """
    verify(checkpoint / "params", wanted=is_description)
    with readable(checkpoint):
        return ocp.StandardCheckpointHandler().metadata(checkpoint / "params").tree


def stored_dtypes(checkpoint: Path, abstract_params: Params) -> Params:
    """The abstract parameters in the types that a checkpoint has.

    Raises:
      UserError: it is of another model.
    """
    check_params(checkpoint, abstract_params)
    saved = stored_tree(checkpoint)
    return jax.tree.map(lambda leaf, kind: leaf.update(dtype=kind.dtype), abstract_params, saved)


def load_params(checkpoint: Path, abstract_params: Params) -> Params:
    """The parameters in a checkpoint's folder, in the shardings and types of `abstract_params`.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged or cannot be read.
    """
    check_params(checkpoint, abstract_params)
    flat = flatten_dict(nn.unbox(abstract_params), sep="/")
    # The largest first, while there is room: what Orbax has under way is in memory up to three times.
    order = sorted(flat, key=lambda path: -flat[path].size)
    hashes = read_hashes(checkpoint / "params")
    files: dict[str, list[str]] = {path.replace("/", "."): [] for path in order}
    for name in hashes:
        files.get(array_of(name), []).append(name)

    def load(number: int) -> jax.Array:
        return load_array(checkpoint, order[number], flat[order[number]])

    arrays = verify_beside(checkpoint / "params", list(files.values()), hashes, load)
    return unflatten_dict(dict(zip(order, arrays, strict=True)), sep="/")


def load_array(checkpoint: Path, path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """One array of the parameters, its files unverified; its path has slashes.

    Raises:
      RunFailed: it cannot be read.
    """
    wanted = unflatten_dict({path: abstract}, sep="/")
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with readable(checkpoint):
        restored = ocp.PyTreeCheckpointHandler().restore(
            checkpoint / "params",
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True),
        )
    return flatten_dict(restored, sep="/")[path]


def open_array(checkpoint: Path, path: str) -> Any:
    """One array of the parameters on disk, without devices: `np.asarray(array[3])` reads its third layer.

    What was saved in pieces larger than a layer is read whole at once, because each layer would read all.

    Raises:
      RunFailed: it is damaged or cannot be read.
    """
    import tensorstore

    name = path.replace("/", ".")
    verify(checkpoint / "params", wanted=lambda file: array_of(file) == name)
    store = kvstore(checkpoint / "params" / name)
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    with readable(checkpoint):
        array = tensorstore.open(spec, open=True, read=True).result()
        layers_apart = (array.chunk_layout.read_chunk.shape or ())[:1] == (1,)
        return array if layers_apart else np.asarray(array)


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turns what Orbax raises while reading files that are as they were written into one sentence."""
    teach_orbax(checkpoint)
    try:
        yield
    except Exception as error:
        if processes.peer_lost(error):
            raise
        full = is_out_of_memory(error)
        why = "there is not enough memory" if full else "its files are as they were written, but"
        raise RunFailed(f"checkpoint {checkpoint} cannot be restored: {why} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An error of a library in a phrase."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:300]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or a device has no room left, which is no fault of a checkpoint."""
    return (
        isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    )


def differences(saved: Any, wanted: Any) -> list[str]:
    """Parameters that are missing, extra or of another shape, one phrase each."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
        }

    have, want = shapes(saved), shapes(wanted)
    found = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
    found += [f"{name} is extra" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if have[name] != want[name]:
            found.append(f"{name} is {have[name]}, not {want[name]}")
    return found
