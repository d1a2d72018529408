"""Logical axis -> mesh axis: the one table that says how everything is laid out.

DP, FSDP, context and tensor parallelism are sizes of mesh axes, not code: an axis of size 1 leaves its
dimension whole.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH, CONTEXT, TENSOR = ("data", "fsdp"), "context", "tensor"
"""Mesh axes of a batch's rows, of their positions, and of heads, feed-forward and vocabulary."""
PARAMETERS = ("fsdp", "context")
"""Mesh axes over which every parameter is split besides: devices that share a row share its weights too."""

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", BATCH),
    ("length", CONTEXT),
    ("keys", None),
    ("act_embed", None),
    ("act_heads", TENSOR),
    ("act_mlp", TENSOR),
    ("act_vocab", TENSOR),
    # parameters
    ("layers", None),
    ("vocab", TENSOR),
    ("embed", PARAMETERS),
    ("heads", TENSOR),
    ("kv_heads", TENSOR),
    ("head_dim", None),
    ("mlp", TENSOR),
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
    """Rows over data and fsdp, every other dimension whole: the model splits positions where it needs to."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
