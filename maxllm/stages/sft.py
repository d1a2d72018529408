"""SFT: fine-tune a model on instructions and replies; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
maxllm sft configs/sft/tiny_tasks_cpu.yaml lora.rank=8 run.dir=runs/tiny/sft-lora
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from maxllm.data.conversation import Conversation, read_conversation
from maxllm.data.fields import Fields
from maxllm.data.instruct import RowReader
from maxllm.data.shown import ShownRow, shown_packed
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.data.weigh import weighed
from maxllm.records import LmBatch
from maxllm.report.charts import Chart, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, share_row
from maxllm.report.runs import Run
from maxllm.report.stage import StageReport
from maxllm.run.heldout import Evaluate
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs, say
from maxllm.stages.program import language_program
from maxllm.stages.scoring import best_of
from maxllm.stages.sft_heldout import Heldout, figures_of, heldout_of, packed
from maxllm.stages.shared import language_job, say_sources
from maxllm.stages.stage import Stage
from maxllm.stages.start import frozen_of, start_of, start_policy


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    # 1. Data: conversations packed with their loss masks.
    train_conversations, heldout_conversations, tallies = read_conversations(session)
    rows = trained_rows(session, train_conversations)
    heldout = heldout_of(session, heldout_conversations, train_conversations)
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
        best=best_of(session, ("loss", "min")),
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
    rows = trained_rows(session, conversations)
    return [shown_packed(session.tokenizer, rows, n) for n in range(min(count, len(rows.tokens_BT)))]


def trained_rows(session: Session, conversations: Sequence[Conversation]) -> LmBatch:
    """Conversations as rows with the weights that the recipe's loss gives them."""
    config, tokenizer = session.config.loss, session.tokenizer
    return packed(session, [weighed(tokenizer, p, config) for each in conversations for p in each.pieces])


def evaluator(session: Session, stored: Path | None = None) -> Evaluate:
    """Held-out figures over stored rows, or over those of the data."""
    if stored is None:
        train, heldout_rows, _ = read_conversations(session, training=session.config.evaluation.shots > 0)
        heldout = heldout_of(session, heldout_rows, train)
    else:
        heldout = read_record(stored, Heldout)
    program = language_program(session.config, session.model, session.mesh)
    return figures_of(session, program, heldout, frozen_of(program, lambda: start_policy(session)()))


def read_conversations(
    session: Session, training: bool = True
) -> tuple[list[Conversation], list[Conversation], list[Tally]]:
    """(training conversations, held-out ones, counts by source)."""
    data, length = session.config.data, session.config.batch.sequence_length
    scored = session.config.evaluation.scorer is not None

    def read(row: Fields) -> Conversation:
        found = read_conversation(session.tokenizer, row, length, data.turns)
        return replace(found, source=row.source, row=dict(row) if scored else {})

    train, heldout, tallies = RowReader(
        data,
        "instruction",
        session.config.run.seed,
        read,
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
