"""DPO: improve the policy on preferred and rejected replies, without a reward model.

maxllm dpo configs/dpo/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.data import loader
from maxllm.data.instruct import Question, ReplyPair, RowReader, answer_of, pad_reply_pairs, reply_pair
from maxllm.data.render import render_prompt
from maxllm.data.shown import ShownRow, shown_row
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.model.llama import Llama
from maxllm.records import Params, PromptBatch, ReplyPairBatch
from maxllm.report.charts import COIN, Chart, Level, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, pairs_row, share_row
from maxllm.report.runs import Run, number
from maxllm.report.stage import StageReport
from maxllm.run.heldout import Evaluate, Measured
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs
from maxllm.stages.program import Trainer, pair_batch, trainer
from maxllm.stages.scoring import best_of, exact_match, samples, scorer_of, told
from maxllm.stages.shared import (
    heldout_loss,
    prompts_of,
    replies,
    responder,
    say_sources,
)
from maxllm.stages.stage import Stage
from maxllm.stages.start import frozen_of, plainly, start_of, start_policy
from maxllm.steps.dpo import dpo_loss
from maxllm.weights import Weights


def program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """The policy, on pairs, beside the frozen reference."""
    llama = Llama(model, config.tuning)
    B, T = config.batch.rows, config.batch.sequence_length
    batch = ReplyPairBatch(pair_batch(B, T), jax.ShapeDtypeStruct((B, 2), jnp.int32))
    loss = partial(dpo_loss, llama, config.dpo)
    return trainer(config, model, mesh, llama, loss, batch, sequences=2, references=1)


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    # 1. Data: prompt + chosen and prompt + rejected, right-padded.
    train_rows, heldout_rows, tallies = read_preferences(session)
    pairs, heldout = padded(session, train_rows), heldout_of(session, heldout_rows)
    session = in_epochs(session, len(train_rows))
    config = session.config
    # 2. State: what is trained of the policy; where it begins is the reference, and all that is not trained.
    compiled = program(config, session.model, session.mesh)
    start = start_of(session, compiled, start_policy(session))
    return Job(
        session=session,
        program=compiled,
        fresh=start.fresh,
        batches=loader.ArrayBatches(pairs, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=figures_of(session, compiled, heldout, start.frozen),
        best=best_of(session, ("loss", "min")),
        store_heldout=True,
        frozen=start.frozen,
        facts={
            "heldout_items": len(heldout_rows),
            "heldout_questions": len(heldout.answers),
            "sources": say_sources(session, tallies),
        },
    )


class Heldout(struct.PyTreeNode):
    """What is measured."""

    pairs: ReplyPairBatch
    answers: list[str | None]
    """The right replies to the prompts of the rows that say which these are; with a scorer, of all rows."""
    prompts: PromptBatch = struct.field(pytree_node=False)
    """These prompts. They stand in `pairs` too, and are left out of the data's fingerprint."""
    told: list[str] | None = None
    """What a scorer is told of each prompt, where the recipe has one."""


Preference = tuple[ReplyPair, Question]


def read_preferences(
    session: Session, training: bool = True
) -> tuple[list[Preference], list[Preference], list[Tally]]:
    """(training rows, held-out ones, counts by source)."""
    return RowReader(
        session.config.data,
        "preference",
        session.config.run.seed,
        partial(pair_and_question, session),
        lambda row: render_prompt(session.tokenizer, row[0].prompt),
    ).split(training)


def padded(session: Session, rows: Sequence[Preference]) -> ReplyPairBatch:
    """The pairs of rows as arrays."""
    length, pad = session.config.batch.sequence_length, session.tokenizer.pad
    return pad_reply_pairs([pair for pair, _ in rows], length, pad)


def heldout_of(session: Session, rows: Sequence[Preference]) -> Heldout:
    """Held-out rows as they are measured."""
    config = session.config
    limit = config.batch.sequence_length - config.generation.max_new_tokens
    scored = config.evaluation.scorer is not None
    asked = [q for _, q in rows if (scored or q.answer is not None) and len(q.ids) <= limit]
    prompts = prompts_of(asked, limit, session.tokenizer.pad)
    return Heldout(padded(session, rows), [q.answer for q in asked], prompts, told(session, asked))


def pair_and_question(session: Session, row: Mapping[str, Any]) -> Preference:
    """A row of preferences: its two replies, and its prompt with the right answer, if the row has one."""
    pair = reply_pair(session.tokenizer, row, session.config.batch.sequence_length)
    whole = session.config.evaluation.scorer is not None
    prompt = pair.ids[0][: pair.starts[0]]
    return pair, Question(pair.prompt, answer_of(row), prompt, dict(row) if whole else {})


def shown_rows(session: Session, count: int) -> list[ShownRow]:
    """Both replies of a pair as a row each, the better one first."""
    rows, _, tallies = read_preferences(session)
    say_sources(session, tallies)
    return [
        shown_row(session.tokenizer, ids, [0] * start + [1] * (len(ids) - start))
        for pair, _ in rows[:count]
        for ids, start in zip(pair.ids, pair.starts, strict=True)
    ]


def evaluator(session: Session, stored: Path | None = None) -> Evaluate:
    """Held-out figures over stored rows, or over those of the data."""
    if stored is None:
        heldout = heldout_of(session, read_preferences(session, training=False)[1])
    else:
        heldout = read_record(stored, Heldout)
    compiled = program(session.config, session.model, session.mesh)
    return figures_of(session, compiled, heldout, frozen_of(compiled, start_policy(session)))


def figures_of(
    session: Session, compiled: Trainer, heldout: Heldout, frozen: tuple[Weights, ...]
) -> Evaluate:
    """The loss's figures (order of the pairs, implicit rewards, log-probabilities), and the share of replies
    that are the known answer, decoded as `generation` says; that one only where answers are known."""
    figures = heldout_loss(session, compiled, heldout.pairs, frozen)
    if not heldout.answers:
        return figures
    made_plain = plainly(session.config.tuning)
    respond, scorer = responder(session, session.config.generation), scorer_of(session)

    def evaluate(params: Params) -> Measured:
        weights = made_plain(compiled.partition.joined(params, *frozen))
        texts = replies(respond, session.tokenizer, weights, heldout.prompts, session.config.batch.rows)
        right = {} if None in heldout.answers else {"exact_match": exact_match(texts, heldout.answers)}
        judged = scorer.mean(texts, heldout.told) if scorer else {}
        shown = samples(session.tokenizer, heldout.prompts, texts, heldout.answers)
        return Measured(figures(params).figures | right | judged, shown)

    return evaluate


# --- what a report shows -----------------------------------------------------------------------------------


def facts(run: Run) -> Facts:
    """Pair accuracy, and right answers before and after."""
    items = {name: run.summary.get(f"heldout_{name}") for name in ("items", "questions")}
    return both(run, {"exact_match": "dpo_exact_match"}) | {
        "dpo_pair_accuracy": run.after("accuracy"),
        "heldout_items": {"dpo_pair_accuracy": items["items"], "dpo_exact_match": items["questions"]},
    }


def rows(facts: Facts) -> list[Row]:
    """Pair accuracy, and right answers where the held-out rows have them."""
    items = facts.get("heldout_items", {})
    meaning = "How often the better reply has gained more probability since DPO began than the other one."
    pairs = pairs_row("Pairs the policy orders right, DPO", meaning, facts, "dpo_pair_accuracy", items)
    if number(facts.get("dpo_exact_match_after")) is None:
        return [pairs]
    meaning = "Share of held-out questions whose reply is exactly the known answer."
    questions = items.get("dpo_exact_match")
    return [pairs, share_row("Right answers after DPO", meaning, facts, "dpo_exact_match", questions)]


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Loss, margin and held-out figures."""
    pairs, right = (Line(of, run.heldout_curve(of)) for of in ("accuracy", "exact_match"))
    return [
        training_and_heldout(run, "Loss", "of a pair", "loss"),
        training_and_heldout(run, "Margin", "β log(π / reference), chosen minus rejected", "margin"),
        shares("Held-out figures", pairs, right, levels=(Level("coin", COIN),)),
    ]


STAGE = Stage(
    program=program,
    job=job,
    shown=shown_rows,
    evaluator=evaluator,
    replies=lambda session: "turns",
    report=StageReport(
        title="DPO",
        meaning="The SFT model learns to give the better of two replies more probability than it did at "
        "first, and the other one less.",
        facts=facts,
        rows=rows,
        charts=charts,
    ),
)
