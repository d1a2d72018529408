"""Reward: train a reward model, the SFT model with a scalar head, on preferred and rejected replies.

maxllm reward configs/reward/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.data import loader
from maxllm.data.instruct import ReplyPair, RowReader, pad_pairs, reply_pair
from maxllm.data.render import render_prompt
from maxllm.data.shown import ShownRow, shown_row
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.model.heads import ScalarModel
from maxllm.records import PairBatch
from maxllm.report.charts import COIN, Chart, Level, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, pairs_row
from maxllm.report.runs import Run
from maxllm.report.stage import StageReport, Verdicts
from maxllm.run.heldout import Evaluate
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs
from maxllm.stages.program import Trainer, pair_batch, trainer
from maxllm.stages.shared import heldout_loss, say_sources
from maxllm.stages.stage import Stage
from maxllm.stages.start import frozen_of, start_of, start_policy
from maxllm.steps.reward import reward_loss
from maxllm.steps.state import abstract, create, init_params
from maxllm.weights import Weights


def program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """The reward model, on pairs."""
    batch = pair_batch(config.batch.rows, config.batch.sequence_length)
    scalar = ScalarModel(model, config.tuning)
    return trainer(
        config, model, mesh, scalar, partial(reward_loss, scalar, config.reward), batch, sequences=2, head=1
    )


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    # 1. Data: prompt + chosen and prompt + rejected, right-padded.
    train_pairs, heldout_pairs, tallies = read_pairs(session)
    rows, heldout = (padded(session, pairs) for pairs in (train_pairs, heldout_pairs))
    session = in_epochs(session, len(train_pairs))
    config = session.config
    # 2. State: the policy's decoder under a new head.
    compiled = program(config, session.model, session.mesh)
    start = start_of(session, compiled, with_new_head(session))
    # 3. Train; the best checkpoint is the one that orders most held-out pairs right.
    return Job(
        session=session,
        program=compiled,
        fresh=start.fresh,
        batches=loader.ArrayBatches(rows, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=heldout_loss(session, compiled, heldout, start.frozen),
        best=("accuracy", "max"),
        store_heldout=True,
        frozen=start.frozen,
        facts={"heldout_items": len(heldout_pairs), "sources": say_sources(session, tallies)},
    )


def read_pairs(
    session: Session, training: bool = True
) -> tuple[list[ReplyPair], list[ReplyPair], list[Tally]]:
    """(training pairs, held-out ones, counts by source)."""
    return RowReader(
        session.config.data,
        "preference",
        session.config.run.seed,
        lambda row: reply_pair(session.tokenizer, row, session.config.batch.sequence_length),
        lambda pair: render_prompt(session.tokenizer, pair.prompt),
    ).split(training)


def padded(session: Session, pairs: Sequence[ReplyPair]) -> PairBatch:
    """Pairs as arrays."""
    length, pad = session.config.batch.sequence_length, session.tokenizer.pad
    return pad_pairs([pair.ids for pair in pairs], length, pad)


def shown_rows(session: Session, count: int) -> list[ShownRow]:
    """Both replies of a pair as a row each, the better one first; the score is read at the last token."""
    pairs, _, tallies = read_pairs(session)
    say_sources(session, tallies)
    return [
        shown_row(session.tokenizer, ids, [0] * (len(ids) - 1) + [1])
        for pair in pairs[:count]
        for ids in pair.ids
    ]


def evaluator(session: Session, stored: Path | None = None) -> Evaluate:
    """Loss, pair accuracy and mean scores over stored rows, or over those of the data."""
    if stored is not None:
        heldout = read_record(stored, PairBatch)
    else:
        heldout = padded(session, read_pairs(session, training=False)[1])
    compiled = program(session.config, session.model, session.mesh)
    return heldout_loss(session, compiled, heldout, frozen_of(compiled, lambda: with_new_head(session)()))


def with_new_head(session: Session) -> Callable[[], Weights]:
    """Reads the policy's decoder, under a new head."""
    start, init = start_policy(session), partial(init_params, ScalarModel(session.model))

    def read() -> Weights:
        params = create(init, abstract(init, session.mesh), jax.random.key(session.config.run.seed))
        weights = start()
        return weights.replace(base=params | {"decoder": weights.base["decoder"]})

    return read


# --- what a report shows -----------------------------------------------------------------------------------

PAIRS = "Pairs the reward model orders right"


def facts(run: Run) -> Facts:
    """Pair accuracy."""
    items = {"reward_pair_accuracy": run.summary.get("heldout_items")}
    return {"reward_pair_accuracy": run.after("accuracy"), "heldout_items": items}


def rows(facts: Facts) -> list[Row]:
    """Pair accuracy against a coin."""
    meaning = "How often the right reply gets a higher score than a wrong one."
    return [pairs_row(PAIRS, meaning, facts, "reward_pair_accuracy", facts.get("heldout_items", {}))]


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Loss and pair accuracy."""
    pairs = Line("held out", run.heldout_curve("accuracy"))
    return [
        training_and_heldout(run, "Loss", "−log σ(difference of scores)", "loss"),
        shares("Pairs ordered right", pairs, levels=(Level("coin", COIN),)),
    ]


def remarks(verdicts: Verdicts) -> list[str]:
    """A judge that guesses."""
    if verdicts.get(PAIRS) not in ("worse", "same"):
        return []
    return ["The reward model is no better than a coin, so its scores say little about PPO."]


STAGE = Stage(
    program=program,
    job=job,
    shown=shown_rows,
    evaluator=evaluator,
    replies=lambda session: "score",
    report=StageReport(
        title="Reward model",
        meaning="A copy of the SFT model learns to give the better of two replies the higher score.",
        facts=facts,
        rows=rows,
        charts=charts,
        remarks=remarks,
    ),
)
