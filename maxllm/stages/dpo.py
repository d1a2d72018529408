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
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, open_session
from maxllm.stages.program import dpo_program
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
from maxllm.steps.state import TrainState


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
    reference = start_policy(session)()
    # 3. Held-out figures: the loss's (order of the pairs, implicit rewards, log-probabilities), and right
    #    answers, where rows say which these are.
    heldout = pad_reply_pairs([pair for pair, _ in heldout_rows], length, pad)
    figures = heldout_loss(session, program.loss_fn, heldout, reference)
    room = length - config.generation.max_new_tokens
    questions = [q for _, q in heldout_rows if q.answer is not None and len(q.ids) <= room]
    answers = heldout_answers(session, questions, room)
    tokens = 2 * config.batch.rows * length
    return Job(
        abstract_state=program.abstract_state,
        fresh=lambda: start_from(reference, program.optimizer, program.abstract_state),
        step=program.step,
        batches=loader.Batches(pairs, config.batch.rows, config.run.seed),
        heldout=(heldout, [question.answer for question in questions]),
        evaluate=lambda state: figures(state.params) | answers(state),
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


def heldout_answers(
    session: Session, questions: Sequence[Question], room: int
) -> Callable[[TrainState], dict[str, float]]:
    """Share of replies that are the known answer, decoded as `generation` says; nothing without questions."""
    if not questions:
        return lambda state: {}
    respond = responder(session, session.config.generation)
    prompts = prompts_of(questions, room, session.tokenizer.pad)

    def evaluate(state: TrainState) -> dict[str, float]:
        texts = replies(respond, session.tokenizer, state.params, prompts, session.config.batch.rows)
        return {"exact_match": exact_match(texts, questions)}

    return evaluate
