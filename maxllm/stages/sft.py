"""SFT: fine-tune a model on instructions and replies; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
maxllm sft configs/sft/tiny_tasks_cpu.yaml lora.rank=8 run.dir=runs/tiny/sft-lora
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flax import struct

from maxllm.data.conversation import Conversation, read_conversation
from maxllm.data.instruct import Question, RowReader
from maxllm.data.pack import pack
from maxllm.data.render import render_prompt
from maxllm.data.shown import ShownRow, shown_packed
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.errors import UserError
from maxllm.records import LmBatch, Params, PromptBatch
from maxllm.report.charts import Chart, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, share_row
from maxllm.report.runs import Run
from maxllm.report.stage import StageReport
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs, say
from maxllm.stages.program import Trainer, language_program
from maxllm.stages.shared import (
    exact_match,
    heldout_loss,
    language_job,
    prompts_of,
    replies,
    responder,
    say_sources,
)
from maxllm.stages.stage import Stage
from maxllm.stages.start import frozen_of, plainly, start_of, start_policy
from maxllm.weights import Weights


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    # 1. Data: conversations packed with their loss masks.
    train_conversations, heldout_conversations, tallies = read_conversations(session)
    rows, heldout = packed(session, train_conversations), heldout_of(session, heldout_conversations)
    session = in_epochs(session, len(rows.tokens_BT))
    config = session.config
    # 2. State: what is trained, beside what stays.
    program = language_program(config, session.model, session.mesh)
    start = start_of(session, program, start_policy(session))
    return language_job(
        session,
        program,
        fresh=start.fresh,
        frozen=start.frozen,
        rows=rows,
        heldout=heldout,
        evaluate=figures_of(session, program, heldout, start.frozen),
        best=("loss", "min"),
        store_heldout=True,
        facts={
            "heldout_items": len(heldout.answers),
            "heldout_conversations": len(heldout_conversations),
            "sources": say_sources(session, tallies),
        },
    )


def shown_rows(session: Session, count: int) -> list[ShownRow]:
    """Packed conversations."""
    conversations, _, tallies = read_conversations(session)
    say_sources(session, tallies)
    rows = packed(session, conversations)
    return [shown_packed(session.tokenizer, rows, n) for n in range(min(count, len(rows.tokens_BT)))]


class Heldout(struct.PyTreeNode):
    """What is measured."""

    rows: LmBatch
    """The held-out conversations, packed."""
    prompts: PromptBatch
    """Those of them whose last prompt leaves room for a reply, up to that prompt's end."""
    answers: list[str]
    """The right reply to each prompt."""


def heldout_of(session: Session, conversations: Sequence[Conversation]) -> Heldout:
    """Held-out conversations as they are measured."""
    config = session.config
    limit = config.batch.sequence_length - config.generation.max_new_tokens
    rows, questions = packed(session, conversations), last_questions(session, conversations, limit)
    prompts = prompts_of(questions, limit, session.tokenizer.pad)
    return Heldout(rows, prompts, [question.answer or "" for question in questions])


def packed(session: Session, conversations: Sequence[Conversation]) -> LmBatch:
    """Conversations as rows with their loss masks."""
    length, pad = session.config.batch.sequence_length, session.tokenizer.pad
    return pack([piece for each in conversations for piece in each.pieces], length, pad)


def evaluator(session: Session, stored: Path | None = None) -> Callable[[Params], dict[str, float]]:
    """Held-out figures over stored rows, or over those of the data."""
    if stored is None:
        heldout = heldout_of(session, read_conversations(session, training=False)[1])
    else:
        heldout = read_record(stored, Heldout)
    program = language_program(session.config, session.model, session.mesh)
    return figures_of(session, program, heldout, frozen_of(program, lambda: start_policy(session)()))


def figures_of(
    session: Session, program: Trainer, heldout: Heldout, frozen: tuple[Weights, ...]
) -> Callable[[Params], dict[str, float]]:
    """Loss on the replies, and greedy exact match where answers are known."""
    config = session.config
    loss_of, made_plain = heldout_loss(session, program, heldout.rows, frozen), plainly(config.tuning)
    respond = responder(session, config.generation)

    def evaluate(params: Params) -> dict[str, float]:
        if not heldout.answers:
            return loss_of(params)
        weights = made_plain(program.partition.joined(params, *frozen))
        texts = replies(respond, session.tokenizer, weights, heldout.prompts, config.batch.rows)
        return loss_of(params) | {"exact_match": exact_match(texts, heldout.answers)}

    return evaluate


def read_conversations(
    session: Session, training: bool = True
) -> tuple[list[Conversation], list[Conversation], list[Tally]]:
    """(training conversations, held-out ones, counts by source)."""
    data, length = session.config.data, session.config.batch.sequence_length
    train, heldout, tallies = RowReader(
        data,
        "instruction",
        session.config.run.seed,
        lambda row: read_conversation(session.tokenizer, row, length, data.turns),
        lambda conversation: conversation.prompt,
    ).split(training)
    cut = [conversation for conversation in (*train, *heldout) if conversation.cut]
    if cut:
        say(
            session,
            f"{len(cut):,} conversations become {sum(len(each.pieces) for each in cut):,} samples, one for "
            "each reply: the chat template renders earlier turns differently once a conversation goes on "
            "(data.turns=last takes the last reply alone)",
        )
    return train, heldout, tallies


def last_questions(session: Session, conversations: Sequence[Conversation], limit: int) -> list[Question]:
    """Each conversation up to its last reply, which is the right answer.

    Texts, and conversations that end with a call of a function, have none. Prompts over `limit` are left out.

    Raises:
      UserError: there are answers, and no prompt is short enough.
    """
    answered = [each.messages for each in conversations if each.messages and each.messages[-1]["content"]]
    questions = []
    for *messages, last in answered:
        ids = render_prompt(session.tokenizer, messages)
        if len(ids) <= limit:
            questions.append(Question(messages, last["content"], ids))
    reply = session.config.generation.max_new_tokens
    if answered and not questions:
        raise UserError(
            f"no held-out prompt fits into the {limit} tokens that generation.max_new_tokens={reply} leaves "
            f"of batch.sequence_length={limit + reply}"
        )
    if len(questions) < len(answered):
        say(
            session,
            f"exact match over {len(questions):,} of {len(answered):,} held-out conversations: the "
            f"prompts of the others leave no room for a reply of {reply} tokens",
        )
    return questions


# --- what a report shows -----------------------------------------------------------------------------------


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
    shown=shown_rows,
    evaluator=evaluator,
    replies=lambda session: "turns",
    report=StageReport(
        title="Supervised fine-tuning (SFT)",
        meaning="The pretrained model is shown questions with their answers and learns to reply.",
        facts=facts,
        rows=rows,
        charts=charts,
    ),
)
