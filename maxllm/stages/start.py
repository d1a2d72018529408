"""Where a run begins: the weights it starts from, which of them stay, and its first state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.config.stages import TRAINED
from maxllm.config.tuning import Tuning
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.model.adapters import plain
from maxllm.model.forward import declarations_of
from maxllm.model.fresh import first_adapters
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import Optimizer
from maxllm.parallel import sharding
from maxllm.records import Params
from maxllm.run.parents import parent_of
from maxllm.run.restore import check_params, load_params
from maxllm.run.session import Session, say
from maxllm.stages.program import Trainer, frozen_type
from maxllm.steps.state import TrainState, abstract, init_params, partition_of
from maxllm.weights import Weights

Kind = type[Llama] | type[ScalarModel]


@dataclass(frozen=True)
class Start:
    """What a run that trains one model begins with."""

    frozen: tuple[Weights, ...]
    """What its program keeps beside the state: see `Trainer`."""
    fresh: Callable[[], TrainState]
    """Step 0."""


def start_of(session: Session, program: Trainer, read: Callable[[], Weights]) -> Start:
    """Everything a run begins with.

    Args:
      session: the run.
      program: what it compiles.
      read: reads all weights that it begins from.
    """
    frozen = frozen_of(program, read)

    def fresh() -> TrainState:
        weights = frozen[0] if program.references else frozen_as(program.model, read())
        trained = first_trained(program.model, weights, session.config.run.seed)
        return start_from(trained, program.optimizer, program.abstract_state)

    return Start(frozen, fresh)


def frozen_of(program: Trainer, read: Callable[[], Weights]) -> tuple[Weights, ...]:
    """All weights that training began from, where the loss compares with them; else those that are not
    trained, if there are any; in the type in which they are kept."""
    if not program.references and not program.partition.keeps:
        return ()
    kept = read() if program.references else program.partition.split(read())[1]
    assert kept is not None, "something is kept"
    return (frozen_as(program.model, kept, program.frozen[0]),)


def frozen_as(model: Llama | ScalarModel, weights: Weights, abstract_weights: Any = None) -> Weights:
    """Weights that stay, in the type in which they are kept, and in the shardings of abstract ones."""
    if model.tuning is None or model.tuning.frozen_dtype == "float32":
        return weights
    out = None if abstract_weights is None else sharding.shardings_of(abstract_weights)
    return jax.jit(partial(frozen_type, model), out_shardings=out)(weights)


def first_trained(model: Llama | ScalarModel, start: Weights, seed: int) -> Params:
    """The trained part of a model's weights at step 0: what training begins from has of it, and fresh
    adapters besides."""
    partition = partition_of(model)
    if model.tuning is not None and model.tuning.adapters and start.adapters is None:
        start = start.replace(adapters=first_adapters(model, start, jax.random.key(seed)))
    return partition.split(start)[0]


def start_from(params: Params, optimizer: Optimizer, abstract_state: TrainState) -> TrainState:
    """Step 0 with given parameters and a fresh optimizer state, in the shardings of the abstract one."""

    def begin(params: Params) -> TrainState:
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(begin, out_shardings=sharding.shardings_of(abstract_state))(params)


# --- weights of runs ---------------------------------------------------------------------------------------


def abstract_params(session: Session, model: Any) -> Params:
    """Shapes and shardings of what a checkpoint holds of a model: the trained part."""
    return abstract(partial(init_params, model), session.mesh)


def start_policy(session: Session) -> Callable[[], Weights]:
    """Reads the weights that a run starts from, when called; now their shapes are looked at, and told.

    Raises:
      UserError: there is no checkpoint, or one of another model, or of other adapters.
    """
    checkpoint, config = session.parent("policy"), session.config
    folder = RunFolder.of_checkpoint(checkpoint)
    parent = recipe.of_run(folder)
    check_tuning(config, parent, folder)
    check_start(session, checkpoint, abstract_params(session, Llama(session.model, parent.tuning)))
    if config.start.adapters == "continue":
        return lambda: checkpoint_weights(session, checkpoint)
    return lambda: policy_weights(session, checkpoint)


def check_tuning(config: Config, parent: Config, folder: RunFolder) -> None:
    """Whether a run can go on from what another one trained.

    Raises:
      UserError: it cannot, with the settings that would.
    """
    former = parent.tuning or Tuning()
    if config.start.adapters == "continue":
        if not former.adapters:
            raise UserError(f"{folder} trained no adapters to continue: leave start.adapters away")
        if former != config.tuning:
            raise UserError(
                f"start.adapters=continue trains the adapters of {folder} on: give this recipe the settings "
                f"that it had, {former.words()}, in place of {(config.tuning or Tuning()).words() or 'none'}"
            )
    elif former.beside is not None:
        raise UserError(
            f"{folder} trained {former.beside.named()}, which no weight of the model can take up: train them "
            f"on with start.adapters=continue {former.words()}"
        )


def policy_weights(
    session: Session, checkpoint: Path, kind: Kind = Llama, beside: Weights | None = None
) -> Weights:
    """A checkpoint's weights on this session's mesh, `plain`.

    Args:
      session: has the mesh.
      checkpoint: what is read.
      kind: of the model.
      beside: the model that adapters were trained beside, where it is here already.

    Raises:
      UserError: the model that a part was trained beside is gone, or another one now.
    """
    tuning = recipe.of_run(RunFolder.of_checkpoint(checkpoint)).tuning
    return plainly(tuning)(checkpoint_weights(session, checkpoint, kind, beside))


def whole_params(session: Session, checkpoint: Path, kind: Kind = Llama) -> Params:
    """A checkpoint's model without anything beside it, on this session's mesh.

    Raises:
      UserError: adapters were trained that have no place in its weights; or see `policy_weights`.
    """
    folder = RunFolder.of_checkpoint(checkpoint)
    tuning = recipe.of_run(folder).tuning
    if tuning is not None and tuning.beside is not None:
        raise UserError(
            f"{folder} trained {tuning.beside.named()}, which no weight of the model can take up: `maxllm "
            "export --base MODEL` writes prefix, prompt and LoRA for PEFT"
        )
    return policy_weights(session, checkpoint, kind).base


def checkpoint_weights(
    session: Session, checkpoint: Path, kind: Kind = Llama, beside: Weights | None = None
) -> Weights:
    """A checkpoint's weights as they were trained: what stayed is read from where the run began, unless it is
    here already."""
    folder = RunFolder.of_checkpoint(checkpoint)
    config = recipe.of_run(folder)
    model = kind(session.model, config.tuning)
    trained = load_params(checkpoint, abstract_params(session, model))
    partition = partition_of(model)
    if not partition.keeps:
        return Weights(trained)
    kept = policy_weights(session, model_beside(checkpoint)) if beside is None else beside
    return partition.joined(trained, frozen_as(model, of_kind(kind(session.model), kept)))


def model_beside(checkpoint: Path) -> Path:
    """The checkpoint of the model that what a run trained lies beside, whatever runs trained it before.

    Raises:
      UserError: what the run began from is gone.
    """
    folder = RunFolder.of_checkpoint(checkpoint)
    config = recipe.of_run(folder)
    parent = parent_of(folder, config, "policy")
    return model_beside(parent) if config.start.adapters == "continue" else parent


def of_kind(model: Llama | ScalarModel, weights: Weights) -> Weights:
    """What a model has of another one's weights: of a language model's, a scalar model has the decoder."""
    has = flatten_dict(declarations_of(model).base)
    return Weights(
        unflatten_dict({path: leaf for path, leaf in flatten_dict(weights.base).items() if path in has})
    )


def plainly(tuning: Tuning | None) -> Callable[[Weights], Weights]:
    """`plain`, compiled; arrays that it leaves as they are are not copied."""
    if tuning is None:
        return lambda weights: weights

    @jax.jit
    def changed(weights: Weights) -> Weights:
        made, before = plain(weights, tuning), flatten_dict(weights.base)
        base = {path: leaf for path, leaf in flatten_dict(made.base).items() if leaf is not before.get(path)}
        return made.replace(base=unflatten_dict(base))

    def together(weights: Weights) -> Weights:
        made = changed(weights)
        base = flatten_dict(weights.base) | flatten_dict(made.base)
        return made.replace(base=unflatten_dict(base))

    return together


def plain_policy(session: Session) -> Llama:
    """The model that computes with what `plain` makes of a run's weights."""
    tuning = session.config.tuning
    return Llama(session.model, tuning.beside if tuning else None)


def check_start(session: Session, checkpoint: Path, wanted: Params) -> None:
    """Looks at a checkpoint that a run starts from, and names it on the console; nothing is read yet.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged.
    """
    check_params(checkpoint, wanted)
    folder = RunFolder.of_checkpoint(checkpoint)
    parent = recipe.of_run(folder)
    unfinished = parent.stage in TRAINED and folder.summary() is None
    more = f" of {parent.run.steps}: that run is not finished" if unfinished else ""
    say(session, f"starts from {folder.shown()}, step {checkpoint.name}{more}")
