"""DPO: improve the policy on preferred and rejected replies, without a reward model.

maxllm dpo configs/dpo/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.data import loader
from maxllm.data.instruct import Question, ReplyPair, answer_of, pad_reply_pairs, read_split, reply_pair
from maxllm.model.llama import Llama
from maxllm.records import ReplyPairBatch
from maxllm.report.charts import COIN, Chart, Level, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, pairs_row, share_row
from maxllm.report.runs import Run, number
from maxllm.report.stage import StageReport
from maxllm.run.loop import Job
from maxllm.run.session import Session
from maxllm.stages.program import Trainer, abstract_base, pair_batch, trainer
from maxllm.stages.shared import (
    exact_match,
    heldout_loss,
    prompts_of,
    replies,
    responder,
    start_from,
    start_policy,
    told,
)
from maxllm.stages.stage import Stage
from maxllm.steps.dpo import dpo_loss
from maxllm.steps.state import TrainState
from maxllm.weights import Weights


def program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """The policy, on pairs, beside the frozen reference."""
    llama = Llama(model)
    B, T = config.batch.rows, config.batch.sequence_length
    batch = ReplyPairBatch(pair_batch(B, T), jax.ShapeDtypeStruct((B, 2), jnp.int32))
    loss = partial(dpo_loss, llama, config.dpo)
    return trainer(
        config,
        model,
        mesh,
        llama,
        loss,
        batch,
        sequences=2,
        references=1,
        frozen=(abstract_base(llama, mesh),),
    )


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    # 1. Data: prompt + chosen and prompt + rejected, right-padded.
    length, pad = config.batch.sequence_length, session.tokenizer.pad
    train_rows, heldout_rows, tallies = read_split(
        config.data,
        "preference",
        config.run.seed,
        session.tokenizer,
        partial(pair_and_question, session),
        lambda row: row[0].prompt,
    )
    pairs = pad_reply_pairs([pair for pair, _ in train_rows], length, pad)
    # 2. State: the policy; where it begins is also the reference, which stays.
    compiled = program(config, session.model, session.mesh)
    reference = Weights(start_policy(session)())
    # 3. Held-out figures: the loss's (order of the pairs, implicit rewards, log-probabilities), and right
    #    answers, where rows say which these are.
    heldout = pad_reply_pairs([pair for pair, _ in heldout_rows], length, pad)
    figures = heldout_loss(session, compiled.loss_fn, heldout, reference)
    room = length - config.generation.max_new_tokens
    questions = [q for _, q in heldout_rows if q.answer is not None and len(q.ids) <= room]
    answers = heldout_answers(session, questions, room)
    return Job(
        program=compiled,
        fresh=lambda: start_from(reference.base, compiled.optimizer, compiled.abstract_state),
        batches=loader.ArrayBatches(pairs, config.batch.rows, config.run.seed),
        heldout=(heldout, [question.answer for question in questions]),
        evaluate=lambda state: figures(Weights(state.params)) | answers(state),
        best=("loss", "min"),
        frozen=(reference,),
        facts={
            "heldout_items": len(heldout_rows),
            "heldout_questions": len(questions),
            "sources": told(session, tallies),
        },
    )


def pair_and_question(session: Session, row: dict[str, Any]) -> tuple[ReplyPair, Question]:
    """A row of preferences: its two replies, and its prompt with the right answer, if the row has one."""
    pair = reply_pair(session.tokenizer, row, session.config.batch.sequence_length)
    return pair, Question(pair.prompt, answer_of(row), pair.ids[0][: pair.starts[0]])


def heldout_answers(
    session: Session, questions: Sequence[Question], room: int
) -> Callable[[TrainState], dict[str, float]]:
    """Share of replies that are the known answer, decoded as `generation` says; nothing without questions."""
    if not questions:
        return lambda state: {}
    respond = responder(session, session.config.generation)
    prompts = prompts_of(questions, room, session.tokenizer.pad)

    def evaluate(state: TrainState) -> dict[str, float]:
        weights = Weights(state.params)
        texts = replies(respond, session.tokenizer, weights, prompts, session.config.batch.rows)
        return {"exact_match": exact_match(texts, questions)}

    return evaluate


# --- what a report tells ----------------------------------------------------------------------------------


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
