"""Frozen matrices in few bits (QLoRA; Dettmers et al. 2023): kept so, and made whole where they are used.

A matrix is cut into blocks along the last of its axes that meet activations. Each block has a scale of its
own: of int8, or of NormalFloat's 16 levels (ibid., appendix E), two of which share a byte. `qwix` knows the
levels. Norms, biases, tables and heads stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config.tuning import FrozenType
from maxllm.errors import UserError
from maxllm.weights import Box, Declaration, Kind, Weights

BLOCK = 64
"""Weights that share a scale, as in QLoRA; fewer where an axis is no multiple of it."""

COLLECTION = "compressed"


class Blocks(struct.PyTreeNode):
    """A matrix in blocks."""

    values: Any
    """int8, or uint8 with two levels of nf4, of neighbours along `axis`."""
    scales: Any
    """float32; one for each block along `axis`."""
    kind: str = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    """Counted from the last, which is -1."""

    def whole(self) -> jax.Array:
        """The matrix, float32."""
        import qwix

        values = self.values
        if self.kind == "nf4":
            pairs = jnp.stack([values & 15, values >> 4], axis=self.axis)
            shape = list(values.shape)
            shape[self.axis] *= 2
            # A pair's axis comes behind that along which they are neighbours.
            values = jnp.moveaxis(pairs, self.axis - (self.axis == -1), self.axis).reshape(shape)
            values = values.astype(jnp.uint4)
        whole: jax.Array = qwix.dequantize(qwix.QArray(values, self.scales, qtype=qtype_of(self.kind)))
        return whole


def qtype_of(kind: str) -> Any:
    """What qwix calls it."""
    return "nf4" if kind == "nf4" else jnp.int8


class Compressed(struct.PyTreeNode):
    """A matrix in few bits that takes the place of one in `matmul`."""

    blocks: Blocks
    dtype: Any = struct.field(pytree_node=False)
    """The type in which it is multiplied."""
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def reshape(self, *shape: int) -> Compressed:
        """The same matrix seen in another shape."""
        known = math.prod(side for side in shape if side != -1)
        left = math.prod(self.shape) // known
        return self.replace(shape=tuple(left if side == -1 else side for side in shape))

    def whole(self) -> jax.Array:
        """The matrix in the type in which it is multiplied."""
        return self.blocks.whole().astype(self.dtype).reshape(self.shape)


@jax.custom_vjp
def times(x: jax.Array, w: Compressed) -> jax.Array:
    """x [..., D] times w [D, O]. The backward pass makes w whole again, so that no whole one is kept for it;
    w has no gradient."""
    return x @ w.whole()


def times_forward(x: jax.Array, w: Compressed) -> tuple[jax.Array, Compressed]:
    """The product, and what its gradient needs."""
    return times(x, w), w


def times_backward(w: Compressed, gradient: jax.Array) -> tuple[jax.Array, None]:
    """Of x alone."""
    return gradient @ w.whole().T, None


times.defvjp(times_forward, times_backward)


def compress(weights: Weights, declared: Any, dtype: FrozenType) -> Weights:
    """Weights whose layers' matrices are of another type.

    Args:
      weights: as they are trained; in boxes, or not.
      declared: a `Declaration` of each weight of the base.
      dtype: of the matrices.

    Raises:
      UserError: an axis is odd, so that two levels of nf4 have no byte to share.
    """
    if dtype == "float32":
        return weights
    base, declarations, few = flatten_dict(weights.base), flatten_dict(declared), {}
    for path, leaf in list(base.items()):
        if declarations[path].kind is not Kind.MATRIX:
            continue
        if dtype == "bfloat16":
            base[path] = jax.tree.map(lambda w: w.astype(jnp.bfloat16), leaf)
        else:
            few[path] = in_blocks(base.pop(path), declarations[path], dtype)
    # Weights that are so already stay as they are.
    return weights.replace(
        base=unflatten_dict(base), compressed=unflatten_dict(few) if few else weights.compressed
    )


def in_blocks(leaf: Any, declaration: Declaration, kind: FrozenType) -> Blocks:
    """A stacked matrix [L, ...] in blocks; of one in a box, the parts are in boxes."""
    import qwix

    axis = declaration.inputs  # the last that is contracted; the first is L
    w = leaf.value if isinstance(leaf, Box) else leaf
    array = qwix.quantize(
        w,
        qtype_of(kind),
        channelwise_axes=[other for other in range(w.ndim) if other != axis],
        tiled_axes={axis: math.gcd(w.shape[axis], BLOCK)},
    )
    values, scales = array.qvalue, array.scale
    if kind == "nf4":
        if w.shape[axis] % 2:
            raise UserError(f"freeze.dtype=nf4 needs even axes, and one of the matrices has {w.shape[axis]}")
        values = values.astype(jnp.uint8)
        first, second = (jax.lax.slice_in_dim(values, start, None, 2, axis) for start in (0, 1))
        values = first | (second << 4)
    if isinstance(leaf, Box):
        values, scales = leaf.replace_boxed(values), leaf.replace_boxed(scales)
    return Blocks(values, scales, kind=kind, axis=axis - w.ndim)


def made_whole(weights: Weights) -> Weights:
    """With float32 matrices again, of the values that they have in few bits."""
    base = flatten_dict(weights.base)
    few = jax.tree.leaves_with_path(weights.compressed, is_leaf=lambda node: isinstance(node, Blocks))
    for path, blocks in few:
        base[tuple(key.key for key in path)] = blocks.whole()
    return weights.replace(base=cast(dict[str, Any], unflatten_dict(base)), compressed=None)
