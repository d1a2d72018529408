"""A model's weights as one value, what each of them is, and which of them a stage trains.

A weight says what it is where the model declares it: its `Kind` is in the box that carries the logical names
of its axes. `jax.eval_shape` of an initializer gives a tree of such boxes, so optimizer, memory and update
read `declarations` of it instead of comparing names.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.records import Params

LAYERS = "layers"
"""Logical name of the axis L on which the layers' weights are stacked."""


class Weights(struct.PyTreeNode):
    """Everything that a model computes with, as `forward`, `generate` and losses take it."""

    base: Params
    """The model's own parameters."""
    adapters: Params | None = None
    """What model/adapters.py puts beside them; None switches it off, which leaves the model that it was
    trained beside."""
    upper: Params | None = None
    """Trained weights of the last layers, [L - k, ...], where the first k are frozen; the `base` then has the
    first k layers, or more, which are not read."""
    compressed: Params | None = None
    """Frozen matrices in few bits, in place of those of `base`; see model/compressed.py."""
    slots: Params | None = None
    """Zeros for some parameters of `base`, whose gradients are the parameters', in a type of their own.

    A gradient has the type of what it is a gradient of, and is in the same memory. Float32 parameters have
    bfloat16 gradients this way, and those in the host's memory have gradients on the device; slots are never
    read, so XLA does not make them.
    """

    def collections(self) -> dict[str, Params]:
        """The collections of variables that `model.apply` reads."""
        named = {
            "params": self.base,
            "adapters": self.adapters,
            "upper": self.upper,
            "compressed": self.compressed,
            "slots": self.slots,
        }
        return {name: tree for name, tree in named.items() if tree is not None}


# --- what a weight is --------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """What a weight is to the model: what optimizer, memory and update go by."""

    MATRIX = "matrix"
    """A layer's matrix. Nearly all of a model's parameters are in these, so they alone can wait in the host's
    memory and have gradients of another type."""
    NORM = "norm"
    """The scales of a norm."""
    BIAS = "bias"
    TABLE = "table"
    """The embedding table and the output projection."""
    HEAD = "head"
    """A head that starts afresh in the stage that trains it, so it is trained even where adapters are."""
    ADAPTER = "adapter"

    @property
    def decayed(self) -> bool:
        """Whether weight decay pulls it towards zero."""
        return self not in (Kind.NORM, Kind.BIAS)


class Box(nn.LogicallyPartitioned):
    """A fresh weight with the logical names of its axes and its kind, as initializers return it."""

    kind: Kind = struct.field(pytree_node=False, kw_only=True)
    inputs: int = struct.field(pytree_node=False, kw_only=True)


@dataclass(frozen=True)
class Declaration:
    """What a box says of its weight besides the numbers."""

    kind: Kind
    axes: tuple[str | None, ...]
    """Logical names."""
    inputs: int = 1
    """How many of a layer's axes are contracted with activations; the others are made."""

    @property
    def stacked(self) -> bool:
        """Whether the first axis is L."""
        return LAYERS in self.axes

    @property
    def is_embedding(self) -> bool:
        """Whether tokens are looked up in it: a row for each."""
        return self.kind is Kind.TABLE and self.axes[:1] == ("vocab",)


def declared(
    init: Callable[..., jax.Array], kind: Kind, axes: tuple[str | None, ...], inputs: int = 1
) -> Callable[..., Box]:
    """An initializer whose weights say what they are."""
    return lambda *args: Box(init(*args), axes, kind=kind, inputs=inputs)


def declarations(boxed: Any) -> Any:
    """A tree of boxed weights with a `Declaration` in place of every box."""
    return jax.tree.map(
        lambda box: Declaration(box.kind, box.names, box.inputs),
        boxed,
        is_leaf=lambda node: isinstance(node, Box),
    )


# --- what is trained ---------------------------------------------------------------------------------------


Path = tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """What of a model's weights a stage trains: all of them, those that are not frozen, or adapters and new
    heads beside a base that stays.

    The trained part is one tree of parameters: gradients, optimizer and checkpoints have its structure.
    """

    declared: Any = None
    """Declarations of the trained part; None where nobody asks what its weights are."""
    base: frozenset[Path] | None = None
    """Paths of what is trained of the base; None for all of it."""
    layers: frozenset[Path] = frozenset()
    """Those of them that are stacked layers of which the first `frozen` stay."""
    frozen: int = 0

    @classmethod
    def of(cls, declared: Weights, frozen_layers: int = 0, frozen_table: bool = False) -> Partition:
        """Decides it for the declarations of a model's weights: where there are adapters, the base stays.

        Args:
          declared: a `Declaration` of each weight.
          frozen_layers: the first so many layers stay.
          frozen_table: the embedding table stays.
        """
        flat = flatten_dict(declared.base)
        if declared.adapters is not None:
            partition = cls(base=frozenset(path for path, leaf in flat.items() if leaf.kind is Kind.HEAD))
        elif frozen_layers or frozen_table:
            layers = {path for path, leaf in flat.items() if leaf.stacked} if frozen_layers else set()
            base = flat.keys() - ({("decoder", "embedding")} if frozen_table else set())
            partition = cls(None, frozenset(base), frozenset(layers), frozen_layers)
        else:
            return cls(declared.base)
        return replace(partition, declared=partition.split(declared)[0])

    @property
    def keeps(self) -> bool:
        """Whether some of the weights stay."""
        return self.base is not None

    def split(self, weights: Weights) -> tuple[Params, Weights | None]:
        """(what is trained, what stays)."""
        if self.base is None:
            return weights.base, None
        base, trained = flatten_dict(weights.base), flatten_dict(weights.adapters or {})
        for path in self.base - self.layers:
            trained[path] = base.pop(path)
        for path in self.layers:
            base[path], trained[path] = (
                layers_of(base[path], part) for part in (slice(self.frozen), slice(self.frozen, None))
            )
        return unflatten_dict(trained), Weights(unflatten_dict(base), compressed=weights.compressed)

    def joined(self, trained: Params, kept: Weights | None = None) -> Weights:
        """All weights again, from what is trained and what stays, or all weights that training began from:
        what is trained takes their place."""
        if self.base is None:
            return Weights(trained)
        assert kept is not None, "a part is trained beside weights that stay"
        base, left = flatten_dict(kept.base), flatten_dict(trained)
        upper = {path: left.pop(path) for path in self.layers}
        base |= {path: left.pop(path) for path in self.base - self.layers}
        adapters, layers = (unflatten_dict(tree) if tree else None for tree in (left, upper))
        return Weights(unflatten_dict(base), adapters, layers, kept.compressed)


def layers_of(leaf: Any, part: slice) -> Any:
    """Some layers of a stacked weight, in its box if it has one; what a weight is does not change."""
    return leaf if isinstance(leaf, Declaration) else jax.tree.map(lambda stacked: stacked[part], leaf)


EVERYTHING = Partition()
"""All weights are trained, in float32 and on the device."""
