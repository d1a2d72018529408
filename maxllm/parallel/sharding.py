"""Logical axis -> mesh axis: the one table that says how everything is laid out.

DP, FSDP and TP are sizes of mesh axes, not code: an axis of size 1 leaves its dimension whole.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # parameters
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("norm", None),
)


def abstract_tree(boxed: Any, mesh: Mesh) -> Any:
    """Shapes with shardings, from the output of `jax.eval_shape` on an initializer.

    Args:
      boxed: tree of ShapeDtypeStruct whose parameters still carry their logical axis names.
      mesh: the device mesh.

    Returns:
      The unboxed tree of `jax.ShapeDtypeStruct(shape, dtype, sharding)`: feed it to `jit`'s shardings, to
      Orbax's restore, to shape checks.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings inside an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
