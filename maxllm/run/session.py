"""Opening a run: processes, mesh, model, tokenizer, folder."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from maxllm import recipe
from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.config.section import Effect
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.hf.layout import laid_out
from maxllm.model.attend import resolve
from maxllm.parallel import processes
from maxllm.parallel.memory import check_offload
from maxllm.parallel.mesh import (
    AXES,
    check_batch_divides,
    check_layers_unrolled,
    check_model_divides,
    compute_type,
    make_mesh,
    platform_of,
)
from maxllm.recipe import flat
from maxllm.run.changes import is_of, record_changes
from maxllm.run.console import console
from maxllm.run.longer import check_may_go_on_longer
from maxllm.run.parents import Role, parent_of
from maxllm.storage import children, is_remote, path_of, reachable
from maxllm.storage import resolved as place_of

EFFECTS = Config.effects()
"""What each setting changes, by its dotted name."""

PATHS = {"start.policy", "start.reward", "tokenizer.path", "data.prepared_dir"}
"""Settings that may be spelled differently, as long as they mean the same place."""


STEPS = "run.steps"
"""May grow where the schedule allows it (run/longer.py)."""


@dataclass(frozen=True)
class Session:
    """One run of one stage, opened."""

    config: Config
    """The resolved recipe: model and tokenizer filled in."""
    model: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    folder: RunFolder
    hf_config: dict[str, Any] | None = None
    """config.json of the Hugging Face model that this one descends from, whose other fields export keeps."""
    hf_generation: dict[str, Any] | None = None
    """Its generation_config.json, of which the same holds."""
    _parents: dict[Role, Path] = field(default_factory=dict, repr=False)

    def parent(self, role: Role) -> Path:
        """The checkpoint that this run began from, or will; found once, so that what is read is recorded.

        Raises:
          UserError: it is gone, or not what it was.
        """
        if role not in self._parents:
            self._parents[role] = parent_of(self.folder, self.config, role)
        return self._parents[role]


def open_session(config: Config) -> Session:
    """Checks everything that can be checked before work begins; writes nothing.

    Raises:
      UserError: a missing run folder or file, a vocabulary that does not match, a mesh that does not divide
        the model or batch, a run folder that holds another recipe.
    """
    processes.initialize(config.launch)
    check_reachable(config)
    tokenizer_path, model = inherited(config)
    day = day_of(config)
    found = load_tokenizer(tokenizer_path, day)
    tokenizer = laid_out(found, config.data.template, day)
    # An imported model may have more rows than its tokenizer has pieces; a new one has no reason to.
    if tokenizer.vocab_size > model.vocab_size or (
        config.start.policy is None and tokenizer.vocab_size != model.vocab_size
    ):
        raise UserError(
            f"the vocabulary does not match: tokenizer {tokenizer_path} has {tokenizer.vocab_size} pieces, "
            f"model.vocab_size is {model.vocab_size}"
        )
    if config.batch.sequence_length > model.context:
        stretched = f", stretched to {model.context}" if model.context != model.max_seq_len else ""
        raise UserError(
            f"batch.sequence_length={config.batch.sequence_length} is longer than "
            f"model.max_seq_len={model.max_seq_len}{stretched}"
        )
    check_replies_fit(config)
    mesh = make_mesh(config.mesh)
    computed = model.computed_in(compute_type(mesh))
    resolve(model.attention, jax.default_backend(), computed.dtype)
    check_offload(mesh, config.mesh)
    check_few_bits(mesh, config)
    check_model_divides(mesh, model)
    check_layers_unrolled(mesh, model)
    check_batch_divides(mesh, config.batch, model)
    folder = RunFolder(config.run.dir)
    run = config.run.model_copy(update={"day": day})
    resolved = config.model_copy(update={"model": model, "run": run})
    check_same_recipe(folder, resolved)
    parents = RunFolder(config.start.policy).read_hf() if config.start.policy else (None, None)
    session = Session(resolved, computed, mesh, tokenizer, folder, *parents)
    if config.start.policy is not None:
        say(
            session,
            f"takes from {config.start.policy} a tokenizer of {tokenizer.vocab_size:,} pieces, and a context "
            f"of {model.context:,} tokens, of which rows have {config.batch.sequence_length:,}",
        )
    if model.dtype == "auto":
        kind = mesh.devices.flat[0].device_kind
        say(session, f"computes in {computed.dtype}, as fits {kind}; model.dtype=… names another type")
    if tokenizer.chat_template != found.chat_template:
        instead = "" if found.chat_template is None else f", not as by {tokenizer_path}"
        say(session, f"conversations are laid out as by data.template={config.data.template}{instead}")
    return session


def check_few_bits(mesh: Mesh, config: Config) -> None:
    """Simulated devices share the host's threads, and two collectives at once can take all of them.

    Raises:
      UserError: values and scales of matrices in few bits would be gathered from several of them.
    """
    few = config.tuning is not None and config.tuning.frozen_dtype in ("int8", "nf4")
    simulated = platform_of(mesh) == "cpu" and len(mesh.local_devices) > 1
    if few and simulated and mesh.shape["fsdp"] * mesh.shape["context"] > 1:
        raise UserError(
            "freeze.dtype=int8 and nf4 over mesh.fsdp or mesh.context can wait for ever on simulated CPU "
            "devices; give mesh.fsdp=1 mesh.context=1, or one device to each process"
        )


def in_epochs(session: Session, rows: int) -> Session:
    """The session with the steps that its epochs take, where its recipe gives these.

    Args:
      session: the run.
      rows: that it trains on, as they are dealt into batches.

    Raises:
      UserError: they are too few for the schedule.
    """
    config, epochs = session.config, session.config.run.epochs
    if epochs is None:
        return session
    steps = math.ceil(epochs * rows / config.batch.rows)
    say(
        session,
        f"{epochs:g} epochs of {rows:,} rows, {config.batch.rows:,} in a batch, are run.steps={steps:,}",
    )
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
    try:
        config.check_schedule()
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(session, config=config)


def check_reachable(config: Config) -> None:
    """Asks the buckets that a recipe names whether they answer.

    Raises:
      UserError: one does not, for want of credentials.
    """
    for name in (config.run.dir, config.start.policy, config.start.reward, config.data.prepared_dir):
        if name and is_remote(name):
            with reachable(path := path_of(name)):
                children(path)


def day_of(config: Config) -> datetime.date | None:
    """The day that this run's chat templates tell: recorded when the run began, so that its data stays.

    None in a run that began before there was such a record.
    """
    folder, day = RunFolder(config.run.dir), config.run.day
    if day is None:
        day = recipe.of_run(folder).run.day if folder.has_config else datetime.date.today()
    ordinal = processes.agreed(0 if day is None else day.toordinal())
    return datetime.date.fromordinal(ordinal) if ordinal else None


def check_replies_fit(config: Config) -> None:
    """Stages that let the model reply share a row between prompt and reply; whoever only chats does not.

    Raises:
      UserError: the reply would take the whole row.
    """
    reply, row = config.generation.max_new_tokens, config.batch.sequence_length
    if config.rules.replies and reply >= row:
        raise UserError(
            f"generation.max_new_tokens={reply} leaves no room for a prompt in batch.sequence_length={row}"
        )


def resolved(config: Config) -> Config:
    """The recipe with the model it will train: its own, or that of start.policy if that run is there."""
    if config.model is None and config.start.policy and RunFolder(config.start.policy).has_config:
        return config.model_copy(update={"model": recipe.of_run(RunFolder(config.start.policy)).model})
    return config


def say(session: Session, line: str) -> None:
    """One console line before the loop begins."""
    console(processes.is_main()).print(f"{session.config.stage}: {line}", markup=False, soft_wrap=True)


def inherited(config: Config) -> tuple[Path, ModelConfig]:
    """Where the tokenizer is, and the model of this run: the recipe's, or those of the run it starts from."""
    if config.start.policy is None:
        assert config.model is not None and config.tokenizer is not None, "Config checks this"
        return path_of(config.tokenizer.path), config.model
    parent = RunFolder(config.start.policy)
    model = recipe.of_run(parent).model
    assert model is not None, "a run folder's config is resolved"
    if config.model is not None:
        check_same_model(config.model, parent)
        model = config.model
    if config.tokenizer is not None:
        given, used = load_tokenizer(config.tokenizer.path), load_tokenizer(parent.path)
        if given.fingerprint != used.fingerprint:
            raise UserError(
                f"tokenizer.path={config.tokenizer.path} is not the tokenizer that {parent} was trained with"
            )
    return parent.path, model


def check_same_model(model: ModelConfig, folder: RunFolder) -> None:
    """How a model computes may differ between stages; what its shapes and function rest on may not.

    Raises:
      UserError: naming the first setting in which the model of `folder` is another.
    """
    other = recipe.of_run(folder).model
    assert other is not None, "a run folder's config is resolved"
    ours, theirs = model.model_dump(), other.model_dump()
    for name in sorted(ours):
        if EFFECTS[f"model.{name}"] is Effect.MODEL and ours[name] != theirs[name]:
            raise UserError(
                f"model.{name}={ours[name]}, but the checkpoint in {folder} is of a model with {theirs[name]}"
            )


def check_same_recipe(folder: RunFolder, config: Config) -> dict[str, tuple[Any, Any]]:
    """A folder that holds a run already must hold one of the same recipe.

    Returns:
      {setting: (former value, value now)} of those that differ and may: how the run computes, and its length.

    Raises:
      UserError: naming the first other setting that differs.
    """
    if not folder.has_config:
        return {}
    # Read as a recipe: a setting that is newer than the run has its default.
    begun = recipe.of_run(folder)
    former, now = (flat(yaml.safe_load(recipe.dump(each))) for each in (begun, config))
    for key in sorted(former.keys() | now.keys()):
        fixed = EFFECTS[key] in (Effect.MODEL, Effect.TRAINING) and key != STEPS
        if key in PATHS and former.get(key) and now.get(key):
            fixed = not same_place(former, now, key)
        if fixed and former.get(key) != now.get(key):
            raise UserError(
                f"{folder} holds a run with {key}={former.get(key)}, not {now.get(key)}; "
                "give another run.dir, or remove that folder"
            )
    if config.run.epochs is not None:
        now[STEPS] = former[STEPS]  # as many as the rows make, which are looked at when they are read
    elif former[STEPS] != now[STEPS]:
        check_may_go_on_longer(folder, begun, config)
    return {
        key: (former.get(key), now.get(key))
        for key in sorted(former.keys() | now.keys())
        if (EFFECTS[key] is Effect.COMPUTATION or key == STEPS) and former.get(key) != now.get(key)
    }


@contextmanager
def open_folder(session: Session) -> Iterator[None]:
    """Creates the run folder with its config and tokenizer, and keeps other processes out while it is open.

    Raises:
      UserError: another process is training in it.
    """
    if not processes.is_main():
        yield
        return
    folder = session.folder
    with folder.locked(partial(say, session)):
        # Looked at again: the folder may have been filled since the session was opened.
        changes = check_same_recipe(folder, session.config)
        folder.remove_unfinished()  # first of all: it may be what fills the disk
        folder.write_tokenizer(session.tokenizer.files)
        folder.write_hf(session.hf_config, session.hf_generation)
        record_changes(folder, folder.latest_step(), changes, partial(say, session))
        if STEPS in changes:
            folder.remove_summary()
        folder.write_config(recipe.dump(session.config))
        yield


def same_place(former: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    """Whether two spellings of a path mean one place, or one that moved together with the run folder."""
    if place_of(path_of(former[key])) == place_of(path_of(now[key])):
        return True
    if any(is_remote(each[name]) for each in (former, now) for name in (key, "run.dir")):
        return False
    return os.path.relpath(former[key], former["run.dir"]) == os.path.relpath(now[key], now["run.dir"])


def reopen(folder: RunFolder, overrides: Sequence[str] = (), may_change: Sequence[str] = ()) -> Session:
    """An existing run, for reading: nothing in its folder changes.

    A run that was trained on another number of devices is read with as many as are here, each with the whole
    model, unless `mesh.…` says otherwise.

    Args:
      folder: the run folder, wherever it has been moved to.
      overrides: `key=value` words on top of its configuration.
      may_change: the sections or fields that overrides may touch, besides mesh.

    Raises:
      UserError: an override would make it another run.
    """
    begun = recipe.of_run(folder)  # says clearly when this is no run folder
    saved = begun.mesh.sizes
    allowed = ("mesh", *may_change)
    for word in overrides:
        key = word.partition("=")[0]
        if not is_of(key, allowed):
            raise UserError(f"{key} is part of what {folder} is; here one may set {', '.join(allowed)}")
    words = [*overrides, f"run.dir={folder}"]
    processes.initialize(begun.launch)
    if not any(word.startswith("mesh") for word in overrides):
        fixed = math.prod(size for size in saved if size != -1)
        if jax.device_count() % fixed or (-1 not in saved and fixed != jax.device_count()):
            words += ["mesh.data=-1", *(f"mesh.{axis}=1" for axis in AXES[1:])]
    config = recipe.of_run(folder, words)
    assert config.model is not None, "a run folder's config is resolved"
    mesh = make_mesh(config.mesh)
    check_model_divides(mesh, config.model)
    tokenizer = load_tokenizer(folder.path, config.run.day)
    model = config.model.computed_in(compute_type(mesh))
    return Session(config, model, mesh, tokenizer, folder, *folder.read_hf())
