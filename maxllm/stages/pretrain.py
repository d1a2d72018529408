"""Pretrain: next-token prediction on the packed corpus, from scratch or from a model (start.policy).

maxllm prepare  configs/pretrain/tiny_slice_cpu.yaml
maxllm pretrain configs/pretrain/tiny_slice_cpu.yaml
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from maxllm.config import Config
from maxllm.data.rows import read_rows
from maxllm.errors import UserError
from maxllm.records import LmBatch
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, open_session
from maxllm.stages import prepare
from maxllm.stages.program import language_program
from maxllm.stages.shared import (
    heldout_language,
    language_job,
    start_from,
    start_policy,
)
from maxllm.steps.state import TrainState, create
from maxllm.weights import Weights


def run(config: Config) -> dict[str, Any]:
    """Trains to the last step, or continues; returns summary.json's content."""
    session = open_session(config)
    return finished(session) or train(session, job(session))


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    # 1. Data: packed rows, made with this tokenizer and this row length.
    prepared = Path(config.data.prepared_dir or "")
    manifest = prepare.read_manifest(prepared)
    check_prepared(session, prepared, manifest)
    # 2. State: initialized, or read, straight into its shardings.
    program = language_program(config, session.model, session.mesh)
    start = start_policy(session) if config.start.policy else None

    def fresh() -> TrainState:
        if start is None:
            return create(program.init, program.abstract_state, jax.random.key(config.run.seed))
        return start_from(start(), program.optimizer, program.abstract_state)

    heldout = read_rows(prepared, "heldout")
    # 3. Train; the best checkpoint is the one with the fewest held-out bits per byte.
    return language_job(
        session,
        program,
        fresh=fresh,
        rows=read_rows(prepared, "train"),
        heldout=heldout,
        evaluate=bits_per_byte(session, heldout, manifest),
        best=("bits_per_byte", "min"),
        facts={
            "bits_per_byte_unigram": manifest["bits_per_byte_unigram"],
            "bits_per_byte_bigram": manifest["bits_per_byte_bigram"],
            "heldout_bytes": manifest["heldout"]["bytes"],
            "heldout_documents": manifest["heldout"]["documents"],
        },
    )


def bits_per_byte(
    session: Session, rows: LmBatch, manifest: dict[str, Any]
) -> Callable[[TrainState], dict[str, float]]:
    """Held-out loss, accuracy and bits per byte of text.

    Bits are counted over every token of every held-out document, its end-of-text token included, and divided
    by the documents' UTF-8 bytes: a figure that does not depend on the tokenizer.
    """
    measure = heldout_language(session, rows)
    tokens, size = manifest["heldout"]["tokens"], manifest["heldout"]["bytes"]

    def evaluate(state: TrainState) -> dict[str, float]:
        figures = measure(Weights(state.params))
        return figures | {"bits_per_byte": figures["loss"] * tokens / math.log(2) / size}

    return evaluate


def check_prepared(session: Session, prepared: Path, manifest: dict[str, Any]) -> None:
    """The rows must fit the session.

    Raises:
      UserError: they were made with another tokenizer, from other data or with another row length.
    """
    if manifest["tokenizer_sha256"] != session.tokenizer.fingerprint:
        raise UserError(f"{prepared} was prepared with another tokenizer than {session.config.tokenizer}")
    prepare.check_settings(session.config, prepared, manifest, read=False)
