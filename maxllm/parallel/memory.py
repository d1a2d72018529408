"""Where an array of the state lies between its uses: on the device, or in the memory of the host beside it
(ZeRO-Offload, Ren et al. 2021).

An array's type says which of the two, so a step needs no setting: it fetches what lies in the host's memory
when it reads it, and puts the new one back where the old one was. Everything is computed on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxllm.config.mesh import MeshConfig
from maxllm.errors import UserError

PARAMS = jax.tree_util.SequenceKey(0)
"""Where parameters are in a pair of them and a state."""

HOST = "pinned_host"
"""The memory kind of what is offloaded: the device reads and writes it by itself."""


def check_offload(mesh: jax.sharding.Mesh, config: MeshConfig) -> None:
    """The devices must be able to reach the host's memory.

    Raises:
      UserError: they are not.
    """
    device = mesh.devices.flat[0]
    if config.offload != "none" and HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"mesh.offload={config.offload} needs memory of the kind {HOST}, which {device.platform} devices "
            "do not have here; give mesh.offload=none"
        )


def fetched(tree: Any) -> Any:
    """The tree on the device; what is there already is left alone."""
    return jax.tree.map(lambda leaf: moved(leaf, jax.memory.Space.Device), tree)


def moved(leaf: jax.Array, space: Any) -> jax.Array:
    """The array in a memory, a `jax.memory.Space`."""
    return leaf if space_of(leaf) == space else jax.device_put(leaf, space)


def space_of(leaf: jax.Array) -> Any:
    """The memory that an array is in, a `jax.memory.Space`."""
    return jax.typeof(leaf).memory_space


def in_host(tree: Any) -> bool:
    """Whether any of it lies in the host's memory."""
    return any(space_of(leaf) == jax.memory.Space.Host for leaf in jax.tree.leaves(tree))


def in_turns(function: Callable[[Any, Any], Any], params: Any, state: Any, after: jax.Array) -> Any:
    """`function(params, state)`, with the arrays of one parameter on the device at a time.

    The function is called once for each parameter. It then sees zeros for all others, and what it says of
    these is not used, so the compiler leaves it out. A barrier between two turns keeps it from fetching all
    arrays at once, which it would do to save time where it sees memory to spare.

    Args:
      function: (params, state) -> (new params, new state, notes), where notes are a tree like params of small
        arrays; what it says of a parameter depends on no other's arrays.
      params: the parameters.
      state: the arrays of a parameter are those whose path ends in its names; what has no name, such as a
        count of steps, is there at every turn.
      after: nothing of the state is fetched before this is computed.

    Returns:
      The new parameters and state, each array in the memory where the old one was, and the notes.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path((params, state))
    owners, leaves = [names_of(path) for path, _ in paths], [leaf for _, leaf in paths]
    results, previous = list(leaves), [after]
    notes: dict[tuple[str, ...], jax.Array] = {}
    for owner in sorted(set(owners) - {()}):
        turn = [i for i, name in enumerate(owners) if name in (owner, ())]
        # Parameters wait at no barrier: the layers read them too, and TPU's compiler would fetch them whole
        # before the layers, instead of layer by layer.
        waiting = [i for i in turn if paths[i][0][0] != PARAMS]
        waited, _ = jax.lax.optimization_barrier(([leaves[i] for i in waiting], previous))
        now = dict(zip(waiting, waited, strict=True))
        seen = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        for i in turn:
            seen[i] = moved(now.get(i, leaves[i]), jax.memory.Space.Device)
        *arrays, returned = function(*jax.tree.unflatten(structure, seen))
        new = jax.tree.leaves(arrays)
        for i in turn:
            results[i] = moved(new[i], space_of(leaves[i]))
        notes |= {name: note for name, note in by_name(returned) if name == owner}
        previous = [results[i] for i in turn]
    returned = jax.tree.unflatten(jax.tree.structure(params), [notes[name] for name, _ in by_name(params)])
    return (*jax.tree.unflatten(structure, results), returned)


def by_name(params: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(names, leaf) of a tree of parameters, or of one like it."""
    return [(names_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of dictionaries that a path ends in: those of a parameter."""
    run = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return tuple(key.key for key in run)[::-1]
