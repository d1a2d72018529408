"""How every parameter is split: the names of its axes, the mesh axes that these go to, a device's share."""

from __future__ import annotations

import math
from typing import Any

import jax

from maxllm.weights import Declaration


def layout(params: Any, declared: Any) -> list[dict[str, Any]]:
    """A row for each parameter, in the order of their paths.

    Args:
      params: abstract, with shardings.
      declared: the same tree of what each parameter is.

    Returns:
      {"path", "axes": logical names, "mesh": for each axis the mesh axes that split it, "shape",
      "device_shape", "device_bytes", "memory": where it lies} of each.
    """
    kinds = jax.tree.leaves(declared, is_leaf=lambda node: isinstance(node, Declaration))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [row(path, leaf, kind) for (path, leaf), kind in zip(leaves, kinds, strict=True)]


def row(path: Any, leaf: jax.ShapeDtypeStruct, declared: Declaration) -> dict[str, Any]:
    """One parameter; mesh axes of size 1 split nothing and are left out."""
    sharding: Any = leaf.sharding
    split = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    device_shape = sharding.shard_shape(leaf.shape)
    return {
        "path": jax.tree_util.keystr(path, simple=True, separator="/"),
        "axes": list(declared.axes),
        "mesh": [[name for name in jax.tree.leaves(axes) if sharding.mesh.shape[name] > 1] for axes in split],
        "shape": list(leaf.shape),
        "device_shape": list(device_shape),
        "device_bytes": math.prod(device_shape) * leaf.dtype.itemsize,
        "memory": sharding.memory_kind or "device",
    }
