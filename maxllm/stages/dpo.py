"""DPO: the SFT model learns to prefer the better of two replies, held near where it began; no reward model.

maxllm dpo configs/dpo/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from maxllm.config import Config
from maxllm.data import loader
from maxllm.data.instruct import Question, ReplyPair, answer_of, pad_reply_pairs, read_split, reply_pair
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import ReplyPairBatch
from maxllm.run.loop import Job, finished, mean_over, train
from maxllm.run.session import Session, compile_reader, open_session
from maxllm.stages.program import dpo_program
from maxllm.stages.shared import (
    exact_match,
    prompts_of,
    replies,
    responder,
    start_from,
    start_policy,
    told,
)
from maxllm.steps.state import TrainState
from maxllm.steps.update import Loss, eval_step
from maxllm.weights import Weights


def run(config: Config) -> dict[str, Any]:
    """Trains from start.policy, or continues; returns summary.json's content."""
    session = open_session(config)
    return finished(session) or train(session, job(session))


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
    program = dpo_program(config, session.model, session.mesh)
    reference = Weights(start_policy(session)())
    # 3. Held-out figures: the loss's, and right answers, where rows say which these are.
    heldout = pad_reply_pairs([pair for pair, _ in heldout_rows], length, pad)
    figures = heldout_pairs(session, program.loss_fn, heldout, reference)
    room = length - config.generation.max_new_tokens
    questions = [q for _, q in heldout_rows if q.answer is not None and len(q.ids) <= room]
    answers = heldout_answers(session, questions, room)
    tokens = 2 * config.batch.rows * length
    return Job(
        abstract_state=program.abstract_state,
        fresh=lambda: start_from(reference.base, program.optimizer, program.abstract_state),
        step=program.step,
        batches=loader.Batches(pairs, config.batch.rows, config.run.seed),
        heldout=(heldout, [question.answer for question in questions]),
        evaluate=lambda state: figures(state) | answers(state),
        best=("loss", "min"),
        tokens_per_step=tokens,
        flops_per_step=tokens * train_flops_per_token(session.model, length, references=1),
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


def heldout_pairs(
    session: Session, loss_fn: Callable[..., Loss], rows: ReplyPairBatch, reference: Weights
) -> Callable[[TrainState], dict[str, float]]:
    """Loss, share of pairs in the right order, implicit rewards and log-probabilities over held-out pairs."""
    reader = compile_reader(session.mesh, partial(eval_step, loss_fn=loss_fn))
    batches = partial(loader.in_order, rows, session.config.batch.rows)
    return lambda state: mean_over(batches(), lambda batch: reader(Weights(state.params), batch, reference))


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
