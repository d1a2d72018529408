"""What a stage compiles, and the one place where that is jitted, sharded and donated.

An iteration is made of parts: compiled functions, with whatever code of the host stands between them. Most
stages have one part, their step; PPO's rollout, judgement and learning are three.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from maxllm.config.launch import NO_SETTINGS, LaunchConfig
from maxllm.parallel import processes, sharding
from maxllm.parallel.memory import fetched
from maxllm.parallel.mesh import platform_of
from maxllm.parallel.settings import compile_lowered
from maxllm.records import Metrics, Params

STEP = "step"
"""The name of the part where there is only one."""

Compiled = Mapping[str, Callable[..., Any]]
"""The compiled parts of a program by name."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One function of an iteration, pure and blind to the mesh, as the compiler gets it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Abstract trees. What has a sharding lies as it says; any other array has rows first, split over the
    devices."""
    updates: bool = False
    """Whether the first argument is the state: it is donated, and the result is (state, metrics). Without,
    every array of the result has rows first."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one stage compiles, without its data."""

    init: Callable[[jax.Array], Any]
    """key -> a fresh state, boxed."""
    abstract_state: Any
    """Shapes, types and shardings of the state."""
    abstract_batch: Any
    """Shapes and types of a batch."""
    parts: Mapping[str, Part]
    """In the order in which an iteration calls them."""
    iterate: Callable[..., tuple[Any, Metrics]]
    """(compiled parts, state, batch, *frozen) -> (state, metrics): one iteration, called on the host."""
    frozen: tuple[Params, ...] = ()
    """Abstract trees that are read besides, and stay."""
    tokens_per_step: int
    """Positions computed by a training pass, padding included: what tokens/s counts."""
    flops_per_step: float
    """Model FLOPs of an iteration: what MFU counts."""
    declared: Any = None
    """What each exported parameter is to the model: a tree of `Declaration`."""
    kept_parameters: int = 0
    """Parameters of the model that are not trained."""
    trained: int = 1
    """Models with an optimizer."""
    references: int = 0
    """Models that are only run."""
    head: int | None = None
    """Width of the trained model's output; None for the vocabulary."""
    decodes: bool = False
    """Whether an iteration writes text, whose time no bound of this project covers."""

    @property
    def trained_parameters(self) -> int:
        """Parameters that a step changes of the model that is exported."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.detach()[0]))

    @property
    def parameters(self) -> int:
        """All parameters of that model, adapters included."""
        return self.trained_parameters + self.kept_parameters

    def told_parameters(self) -> str:
        """How many they are, and what is trained, if that is not all of them."""
        if not self.kept_parameters:
            return f"{self.parameters:,} parameters"
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_state))
        share = self.trained_parameters / self.parameters
        return (
            f"{self.parameters:,} parameters, of which {self.trained_parameters:,} are trained ({share:.2%}; "
            f"{size / 1e6:,.1f} MB with the optimizer's state)"
        )


def step_alone(
    step: Callable[..., Any], abstract_state: Any, abstract_batch: Any, frozen: tuple[Params, ...] = ()
) -> dict[str, Any]:
    """`parts` and `iterate` of a program that is one step `(state, batch, *frozen) -> (state, metrics)`."""
    arguments = (abstract_state, abstract_batch, *frozen)

    def iterate(compiled: Compiled, *arguments: Any) -> tuple[Any, Metrics]:
        return compiled[STEP](*arguments)

    return {
        "parts": {STEP: Part(function=step, arguments=arguments, updates=True)},
        "iterate": iterate,
    }


def compile_program(
    mesh: Mesh, program: Program, zero: int = 3, launch: LaunchConfig = NO_SETTINGS
) -> tuple[Callable[..., Any], float]:
    """Compiles all parts for the mesh.

    Args:
      mesh: the device mesh, of devices that are here.
      program: what to compile.
      zero: the stage of ZeRO that the abstract state was made for.
      launch: what a recipe tells the compiler beside our own options.

    Returns:
      An iteration as a function (state, batch, *frozen) -> (state, metrics), and the seconds that compiling
      took.

    Raises:
      UserError: much of the state is not split where ZeRO-3 should.
    """
    started = time.perf_counter()
    parts = {name: compile_part(mesh, part, zero, launch) for name, part in program.parts.items()}
    return partial(program.iterate, parts), time.perf_counter() - started


def compile_part(
    mesh: Mesh, part: Part, zero: int = 3, launch: LaunchConfig = NO_SETTINGS
) -> Callable[..., Any]:
    """One part, compiled; `compile_program` says the rest."""
    compiled: Callable[..., Any] = compile_lowered(lower_part(mesh, part, zero), platform_of(mesh), launch)
    return compiled


def lower_part(mesh: Mesh, part: Part, zero: int = 3) -> Any:
    """A part before the compiler; the devices of the mesh may be of a machine that is not here.

    Raises:
      UserError: much of the state is not split where ZeRO-3 should.
    """
    rows = sharding.batch_sharding(mesh)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf if leaf.sharding else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)

    if zero == 3:
        sharding.check_split(part.arguments, mesh)
    out: Any = rows
    if part.updates:
        out = sharding.shardings_of(part.arguments[0]), sharding.replicated(mesh)
    jitted = jax.jit(part.function, donate_argnums=0 if part.updates else (), out_shardings=out)
    # The abstract mesh: constants that are made while tracing must not go to devices that are not here.
    rules = sharding.rules_of(zero)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        return jitted.lower(*jax.tree.map(placed, part.arguments))


def compile_reader(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Jits a pure function `(params, batch, …) -> result` that changes nothing; results go to every device.

    Parameters in the host's memory are fetched at once: only a training step has no room for that. The
    returned function takes numpy batches as its second argument.
    """
    jitted = jax.jit(
        lambda params, *rest: function(fetched(params), *rest), out_shardings=sharding.replicated(mesh)
    )
    to_devices = partial(processes.to_global, sharding=sharding.batch_sharding(mesh))

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            return jitted(params, to_devices(batch), *rest)

    return call
