"""Pretrain: train a language model on the prepared corpus, from scratch or from a model (start.policy).

maxllm prepare  configs/pretrain/tiny_slice_cpu.yaml
maxllm pretrain configs/pretrain/tiny_slice_cpu.yaml
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from maxllm.data.corpus import check_settings, read_manifest, read_rows
from maxllm.data.shown import ShownRow, shown_packed
from maxllm.errors import UserError
from maxllm.records import LmBatch, Params
from maxllm.report.charts import Chart, Level, Line, training_and_heldout
from maxllm.report.figures import NO_VERDICT, NOT_YET, Facts, Row, compared, shown
from maxllm.report.runs import Run, number
from maxllm.report.stage import StageReport, Verdicts
from maxllm.report.wording import bits, count
from maxllm.run.heldout import Evaluate, Measured
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs
from maxllm.stages.program import Trainer, language_program
from maxllm.stages.shared import (
    heldout_loss,
    language_job,
)
from maxllm.stages.stage import Stage
from maxllm.stages.start import Start, frozen_of, start_of, start_policy
from maxllm.steps.state import create
from maxllm.storage import path_of
from maxllm.weights import Weights

BITS = "Bits per byte of unseen text"


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    # 1. Data: packed rows, made with this tokenizer and this row length.
    prepared, manifest = open_corpus(session)
    rows = read_rows(prepared, "train", config.data.cache_gb)
    session = in_epochs(session, len(rows.tokens_BT))
    config = session.config
    # 2. State: initialized, or read, straight into its shardings.
    program = language_program(config, session.model, session.mesh)
    if config.start.policy:
        start = start_of(session, program, start_policy(session))
    else:
        key = jax.random.key(config.run.seed)
        start = Start((), lambda: create(program.init, program.abstract_state, key))
    heldout = read_rows(prepared, "heldout", config.data.cache_gb)
    # 3. Train; the best checkpoint is the one with the fewest held-out bits per byte.
    return language_job(
        session,
        program,
        fresh=start.fresh,
        frozen=start.frozen,
        rows=rows,
        heldout=heldout,
        evaluate=bits_per_byte(session, program, heldout, manifest, start.frozen),
        best=("bits_per_byte", "min"),
        facts={
            "bits_per_byte_unigram": manifest["bits_per_byte_unigram"],
            "bits_per_byte_bigram": manifest["bits_per_byte_bigram"],
            "heldout_bytes": manifest["heldout"]["bytes"],
            "heldout_documents": manifest["heldout"]["documents"],
        },
    )


def shown_rows(session: Session, count: int) -> list[ShownRow]:
    """Packed rows of the corpus."""
    rows = read_rows(open_corpus(session)[0], "train", session.config.data.cache_gb)
    return [shown_packed(session.tokenizer, rows, n) for n in range(min(count, len(rows.tokens_BT)))]


def evaluator(session: Session, stored: Path | None = None) -> Evaluate:
    """Held-out figures; the rows are the corpus's, which a run does not keep a second time."""
    assert stored is None, "job stores none"
    prepared, manifest = open_corpus(session)
    heldout = read_rows(prepared, "heldout", session.config.data.cache_gb)
    program = language_program(session.config, session.model, session.mesh)
    frozen = frozen_of(program, lambda: start_policy(session)())
    return bits_per_byte(session, program, heldout, manifest, frozen)


def bits_per_byte(
    session: Session,
    program: Trainer,
    rows: LmBatch,
    manifest: dict[str, Any],
    frozen: tuple[Weights, ...],
) -> Evaluate:
    """Held-out loss, accuracy and bits per byte of text.

    Bits are counted over every token of every held-out document, its end-of-text token included, and divided
    by the documents' UTF-8 bytes: a figure that does not depend on the tokenizer.
    """
    measure = heldout_loss(session, program, rows, frozen)
    tokens, size = manifest["heldout"]["tokens"], manifest["heldout"]["bytes"]

    def evaluate(params: Params) -> Measured:
        figures = measure(params).figures
        return Measured(figures | {"bits_per_byte": figures["loss"] * tokens / math.log(2) / size})

    return evaluate


def open_corpus(session: Session) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of the prepared corpus, which must fit the session.

    Raises:
      UserError: it was made with another tokenizer, from other data or with another row length.
    """
    prepared = path_of(session.config.data.prepared_dir or "")
    manifest = read_manifest(prepared)
    if manifest["tokenizer_sha256"] != session.tokenizer.fingerprint:
        raise UserError(f"{prepared} was prepared with another tokenizer than {session.config.tokenizer}")
    check_settings(session.config, prepared, manifest, read=False)
    return prepared, manifest


# --- what a report shows -----------------------------------------------------------------------------------


def facts(run: Run) -> Facts:
    """Bits per byte, and what they are held against."""
    heldout = {f"bits_per_byte_{name}": run.summary.get(f"heldout_{name}") for name in ("bytes", "documents")}
    baselines = ("bits_per_byte_unigram", "bits_per_byte_bigram")
    return {
        "bits_per_byte": run.after("bits_per_byte"),
        **{name: run.summary.get(name) for name in baselines},
        "heldout_items": heldout,
    }


def baselines_of(facts: Facts) -> list[tuple[str, float]]:
    """(name, bits per byte) of the byte counts that the model is held against."""
    return [
        (name, value)
        for name in ("unigram", "bigram")
        if (value := number(facts.get(f"bits_per_byte_{name}"))) is not None
    ]


def rows(facts: Facts) -> list[Row]:
    """Bits per byte against byte counts."""
    after, baselines, items = (
        number(facts.get("bits_per_byte")),
        baselines_of(facts),
        facts.get("heldout_items", {}),
    )
    verdict = NO_VERDICT
    if after is not None and baselines:
        name, best = min(baselines, key=lambda baseline: baseline[1])
        verdict = compared(best, after, bits, lower_is_better=True, against=f"than the {name} baseline")
    behind = [
        count(value, noun)
        for noun in ("document", "byte")
        if (value := number(items.get(f"bits_per_byte_{noun}s"))) is not None
    ]
    row = Row(
        BITS,
        tuple(f"{name} {bits(value)}" for name, value in baselines) or (NOT_YET,),
        shown(after, bits),
        ", ".join(behind),
        "How many bits the model needs for each byte of text it has never seen: fewer is better. The "
        "baselines guess a byte from how often it occurs (unigram), or occurs after the one before (bigram).",
        verdict,
    )
    return [row]


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Loss and bits per byte."""
    baselines = tuple(Level(name, value) for name, value in baselines_of(facts))
    line = Line("held out", run.heldout_curve("bits_per_byte"))
    return [
        training_and_heldout(run, "Loss", "nats per token", "loss"),
        Chart(BITS, "fewer is better", (line,), baselines),
    ]


def remarks(verdicts: Verdicts) -> list[str]:
    """A model that has learned nothing."""
    if verdicts.get(BITS) not in ("worse", "same"):
        return []
    return ["The language model does not beat counting bytes: it needs more steps or more text."]


STAGE = Stage(
    program=language_program,
    job=job,
    shown=shown_rows,
    evaluator=evaluator,
    replies=lambda session: "text",
    heldout="data.prepared_dir",
    report=StageReport(
        title="Pretraining",
        meaning="The model reads text and learns to predict the next token; it has not seen a question yet.",
        facts=facts,
        rows=rows,
        charts=charts,
        remarks=remarks,
    ),
)
