"""Logical axis -> mesh axis: the one table that says how everything is laid out.

DP, FSDP, context and tensor parallelism are sizes of mesh axes, not code: an axis of size 1 leaves its
dimension whole.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxllm.config.mesh import Offload
from maxllm.config.model import ModelConfig
from maxllm.errors import UserError, listed
from maxllm.parallel.memory import HOST
from maxllm.weights import LAYERS, Box, Kind

STAGE, CONTEXT, TENSOR = "stage", "context", "tensor"
"""Mesh axes of layers, of a row's positions, and of heads, feed-forward and vocabulary."""
FSDP = "fsdp"
"""Mesh axis of rows, and of each weight's parts."""
MICROBATCH = ("data", FSDP)
"""Mesh axes of the rows of a microbatch inside the layers: every stage of a pipeline sees all of them."""
BATCH = (STAGE, *MICROBATCH)
"""Mesh axes of the rows of a batch everywhere else, so that no stage repeats another's embedding and head."""
PARAMETERS = (FSDP, CONTEXT)
"""Mesh axes that split a layer's weights besides: devices that share a row share its weights too."""
TABLES = (STAGE, *PARAMETERS)
"""Mesh axes that split the embedding table and the head, which belong to no stage of a pipeline."""

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

WHOLE_SHARE = 0.02
"""Of a state's bytes that ZeRO-3 may leave on every device, in arrays of SMALL bytes or more."""
SMALL = 1 << 16

RULES: Rules = (
    # activations
    ("batch", BATCH),
    ("length", CONTEXT),
    ("residual_length", (CONTEXT, TENSOR)),
    ("keys", None),
    ("act_embed", None),
    ("act_heads", TENSOR),
    ("act_mlp", TENSOR),
    ("act_vocab", TENSOR),
    # parameters
    (LAYERS, STAGE),
    ("vocab", TENSOR),
    ("embed", PARAMETERS),
    ("gradient_embed", PARAMETERS),
    ("table", TABLES),
    ("gradient_table", TABLES),
    ("heads", TENSOR),
    ("kv_heads", TENSOR),
    ("head_dim", None),
    ("mlp", TENSOR),
    ("wide", (TENSOR, *PARAMETERS)),  # heads or feed-forward of an adapter, beside which there is no embed
    ("norm", None),
)


def rules_of(zero: int) -> Rules:
    """RULES for a stage of ZeRO (Rajbhandari et al. 2020): parameters whole below 3, gradients below 2."""
    whole = dict.fromkeys(("embed", "table"), zero < 3) | dict.fromkeys(
        ("gradient_embed", "gradient_table"), zero < 2
    )
    return tuple((name, None if whole.get(name) else axes) for name, axes in RULES)


@contextmanager
def decoding(model: ModelConfig) -> Iterator[None]:
    """Rules for decoding, where a device reads all of its weights for each token: none is gathered for one.

    The devices of `fsdp` split heads, feed-forward and vocabulary, as those of `tensor` do, and each has all
    rows of their batch; where a dimension of the model does not divide by both, each has its own rows and
    whole weights. The rules in force outside keep their say of everything else; without any there are none
    inside.
    """
    split: tuple[str, ...] = (TENSOR, FSDP)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (model.n_heads, model.n_kv_heads, model.d_ff, model.vocab_size)
    if not mesh.empty and any(size % math.prod(mesh.shape[axis] for axis in split) for size in sizes):
        split = (TENSOR,)
    rows = tuple(axis for axis in BATCH if axis not in split)
    changed = dict.fromkeys((LAYERS, "embed", "table"), None) | {"batch": rows}
    rules: Any = [
        (name, changed.get(name, split if axes == TENSOR else axes))
        for name, axes in nn.get_logical_axis_rules()
    ]
    with nn.logical_axis_rules(rules):
        yield


def abstract_weights(boxed: Any, mesh: Mesh, zero: int = 3, offload: Offload = "none") -> Any:
    """Shapes with shardings of weights, and of what else a state has besides its optimizer's arrays.

    Args:
      boxed: tree of ShapeDtypeStruct, from `jax.eval_shape` on an initializer; what has no box is whole.
      mesh: the device mesh.
      zero: stage of ZeRO: parameters are split at 3.
      offload: the layers' matrices lie in the host's memory, or do not.

    Returns:
      The unboxed tree of `jax.ShapeDtypeStruct(shape, dtype, sharding)`: feed it to `jit`'s shardings, to
      Orbax's restore, to shape checks.
    """
    return described(
        boxed,
        mesh,
        rules_of(zero),
        lambda node, _: offload == "parameters" and isinstance(node, Box) and node.kind is Kind.MATRIX,
    )


def abstract_moments(boxed: Any, mesh: Mesh, zero: int = 3, offload: Offload = "none") -> Any:
    """Shapes with shardings of an optimizer's state, as `abstract_weights` has them of weights.

    It is split from ZeRO 1 on, and lies in the host's memory wherever anything does; its counts do not.
    """
    rules = rules_of(3 if zero >= 1 else 0)
    return described(boxed, mesh, rules, lambda _, leaf: offload != "none" and leaf.ndim > 0)


def described(boxed: Any, mesh: Mesh, rules: Rules, in_host: Callable[[Any, Any], bool]) -> Any:
    """Shapes with shardings by the rules; `in_host(box, array)` says what lies in the host's memory."""

    def describe(node: Any) -> Any:
        axes = node.get_partition_spec() if is_boxed(node) else PartitionSpec()
        sharding = nn.logical_to_mesh_sharding(axes, mesh, rules)

        def of(leaf: Any) -> jax.ShapeDtypeStruct:
            here = dividing(sharding, leaf.shape)
            here = here.with_memory_kind(HOST) if in_host(node, leaf) else here
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

        # An optimizer that leaves a parameter to another keeps an empty node in its box.
        return jax.tree.map(of, node.value if is_boxed(node) else node)

    return jax.tree.map(describe, boxed, is_leaf=is_boxed)


def dividing(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without the mesh axes that do not divide their dimension, which then is whole."""
    mesh = sharding.mesh

    def parts(axes: Any) -> int:
        return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))

    pairs = zip(sharding.spec, shape, strict=False)  # a spec may be shorter
    spec = PartitionSpec(*(axes if size % parts(axes) == 0 else None for axes, size in pairs))
    return NamedSharding(mesh, spec)


def is_boxed(node: Any) -> bool:
    """Whether a node of a tree carries the logical names of its axes."""
    return isinstance(node, nn.meta.AxisMetadata)


def check_split(abstract: Any, mesh: Mesh) -> None:
    """Under ZeRO-3 nearly everything must be split, or a device holds far more than its share.

    Args:
      abstract: tree of shapes; those with shardings are looked at.
      mesh: the device mesh.

    Raises:
      UserError: with the largest arrays that are not, where they are more than WHOLE_SHARE of the bytes.
    """
    axes = {axis for axis in PARAMETERS if mesh.shape[axis] > 1}
    if not axes:
        return
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    leaves = [(path, leaf) for path, leaf in leaves if leaf.sharding is not None]
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size * leaf.dtype.itemsize
        for path, leaf in leaves
        if leaf.size * leaf.dtype.itemsize >= SMALL
        and not axes & set(jax.tree.leaves(tuple(leaf.sharding.spec)))
    }
    share = sum(sizes.values()) / sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    if share > WHOLE_SHARE:
        largest = sorted(sizes, key=lambda name: -sizes[name])
        raise UserError(
            f"{share:.1%} of the state would be on every device, not split over mesh "
            f"{' x '.join(sorted(axes))}: {listed(f'{name} ({sizes[name]:,} bytes)' for name in largest)}; "
            "mesh.zero below 3 permits it"
        )


def shardings_of(abstract: Any) -> Any:
    """The shardings inside an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over BATCH, every other dimension whole: the model splits positions where it needs to."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_shards(mesh: Mesh) -> int:
    """Parts that `batch_sharding` splits the rows of a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
