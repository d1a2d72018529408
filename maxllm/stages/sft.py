"""SFT: fine-tune a model on instructions and replies; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
maxllm sft configs/sft/tiny_tasks_cpu.yaml lora.rank=8 run.dir=runs/tiny/sft-lora
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from maxllm.data.chat import Message, messages_of
from maxllm.data.instruct import (
    Question,
    before_first_reply,
    conversation_piece,
    read_split,
)
from maxllm.data.pack import Piece, pack
from maxllm.data.render import render_prompt
from maxllm.data.sources import Tally
from maxllm.errors import UserError
from maxllm.report.charts import Chart, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, share_row
from maxllm.report.runs import Run
from maxllm.report.stage import StageReport
from maxllm.run.loop import Job
from maxllm.run.session import Session, say
from maxllm.stages.program import language_program
from maxllm.stages.shared import (
    exact_match,
    heldout_language,
    language_job,
    merging,
    prompts_of,
    replies,
    responder,
    start_from,
    start_policy,
    told,
)
from maxllm.stages.stage import Stage
from maxllm.steps.state import TrainState, create
from maxllm.weights import Weights


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    # 1. Data: conversations packed with their loss masks.
    train_talks, heldout_talks, tallies = read_conversations(session)
    length, pad = config.batch.sequence_length, session.tokenizer.pad
    rows = pack([talk.piece for talk in train_talks], length, pad)
    heldout = pack([talk.piece for talk in heldout_talks], length, pad)
    # 2. State: all parameters, or adapters beside parameters that stay.
    program = language_program(config, session.model, session.mesh)
    start, partition = start_policy(session), program.partition
    frozen = (Weights(start()),) if partition.keeps else ()
    # 3. Held-out figures: loss on the replies, and greedy exact match.
    loss_of = heldout_language(session, heldout)
    respond = responder(session, config.generation)
    room = length - config.generation.max_new_tokens
    questions = last_questions(session, heldout_talks, room)
    prompts = prompts_of(questions, room, pad)

    def fresh() -> TrainState:
        if frozen:
            return create(program.init, program.abstract_state, jax.random.key(config.run.seed))
        return start_from(start(), program.optimizer, program.abstract_state)

    merged = merging(config.lora)

    def evaluate(state: TrainState) -> dict[str, float]:
        weights = merged(partition.joined(state.params, *frozen))
        texts = replies(respond, session.tokenizer, weights, prompts, config.batch.rows)
        return loss_of(weights) | {"exact_match": exact_match(texts, questions)}

    return language_job(
        session,
        program,
        fresh=fresh,
        frozen=frozen,
        rows=rows,
        heldout=(heldout, prompts, [question.answer for question in questions]),
        evaluate=evaluate,
        best=("loss", "min"),
        facts={
            "heldout_items": len(questions),
            "heldout_conversations": len(heldout_talks),
            "sources": told(session, tallies),
        },
    )


@dataclass(frozen=True)
class Talk:
    """A conversation, as it is said and as it is packed."""

    messages: list[Message]
    piece: Piece


def read_conversations(session: Session) -> tuple[list[Talk], list[Talk], list[Tally]]:
    """(training conversations, held-out ones, counts by source)."""
    length = session.config.batch.sequence_length

    def parse(row: dict[str, Any]) -> Talk:
        messages = messages_of(row)
        return Talk(messages, conversation_piece(session.tokenizer, messages, length))

    return read_split(
        session.config.data,
        "instruction",
        session.config.run.seed,
        session.tokenizer,
        parse,
        lambda talk: before_first_reply(talk.messages),
    )


def last_questions(session: Session, talks: Sequence[Talk], room: int) -> list[Question]:
    """Each conversation up to its last reply, which is the right answer; prompts over `room` are left out.

    Raises:
      UserError: none is short enough.
    """
    questions = []
    for talk in talks:
        ids = render_prompt(session.tokenizer, talk.messages[:-1])
        if len(ids) <= room:
            questions.append(Question(talk.messages[:-1], talk.messages[-1]["content"], ids))
    reply = session.config.generation.max_new_tokens
    if not questions:
        raise UserError(
            f"no held-out prompt fits into the {room} tokens that generation.max_new_tokens={reply} leaves "
            f"of batch.sequence_length={room + reply}"
        )
    if len(questions) < len(talks):
        say(
            session,
            f"exact match over {len(questions):,} of {len(talks):,} held-out conversations: the prompts of "
            f"the others leave no room for a reply of {reply} tokens",
        )
    return questions


# --- what a report tells ----------------------------------------------------------------------------------


def facts(run: Run) -> Facts:
    """Right answers before and after."""
    items = {"sft_exact_match": run.summary.get("heldout_items")}
    return both(run, {"exact_match": "sft_exact_match"}) | {"heldout_items": items}


def rows(facts: Facts) -> list[Row]:
    """Right answers."""
    meaning = "Share of held-out questions whose reply is exactly the known answer."
    items = facts.get("heldout_items", {}).get("sft_exact_match")
    return [share_row("Right answers after SFT", meaning, facts, "sft_exact_match", items)]


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Loss and right answers."""
    return [
        training_and_heldout(run, "Loss", "nats per token", "loss"),
        shares("Right answers", Line("exact match", run.heldout_curve("exact_match"))),
    ]


STAGE = Stage(
    program=language_program,
    job=job,
    replies=lambda session: "turns",
    report=StageReport(
        title="Supervised fine-tuning (SFT)",
        meaning="The pretrained model is shown questions with their answers and learns to reply.",
        facts=facts,
        rows=rows,
        charts=charts,
    ),
)
