"""SFT: fine-tune a model on instructions and replies; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
maxllm sft configs/sft/tiny_tasks_cpu.yaml lora.rank=8 run.dir=runs/tiny/sft-lora
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from flax import struct

from maxllm.data.chat import Message
from maxllm.data.conversation import Conversation, read_conversation
from maxllm.data.fields import Fields
from maxllm.data.instruct import Question, RowReader
from maxllm.data.pack import Piece, pack
from maxllm.data.render import render_prompt
from maxllm.data.shown import ShownRow, shown_packed
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.data.weigh import numbered, weighed
from maxllm.errors import UserError
from maxllm.model.llama import Llama
from maxllm.records import Array, LmBatch, Params, PromptBatch
from maxllm.report.charts import Chart, Line, shares, training_and_heldout
from maxllm.report.figures import Facts, Row, both, share_row
from maxllm.report.runs import Run
from maxllm.report.stage import StageReport
from maxllm.run.heldout import Evaluate, Measured
from maxllm.run.loop import Job
from maxllm.run.session import Session, in_epochs, say
from maxllm.stages.program import Trainer, language_program
from maxllm.stages.scoring import (
    after_system,
    best_of,
    exact_match,
    perplexity,
    samples,
    scorer_of,
    shots_of,
    told,
)
from maxllm.stages.shared import (
    heldout_loss,
    language_job,
    prompts_of,
    replies,
    responder,
    say_sources,
)
from maxllm.stages.stage import Stage
from maxllm.stages.start import frozen_of, plainly, start_of, start_policy
from maxllm.steps.language import origin_losses
from maxllm.weights import Weights


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


LAST_TURN = 5
"""Replies of a conversation from here on are measured together."""


class Heldout(struct.PyTreeNode):
    """What is measured."""

    rows: LmBatch
    """The held-out conversations, packed."""
    prompts: PromptBatch
    """Those of them whose last prompt leaves room for a reply, up to that prompt's end."""
    answers: list[str]
    """The right reply to each prompt."""
    sources_BT: Array | None = None
    """int32; the number of the source, in the recipe's list, that each target of `rows` came from."""
    turns_BT: Array | None = None
    """int32; which reply of its conversation each trained target belongs to, from 1; LAST_TURN and later are
    one."""
    told: list[str] | None = None
    """What a scorer is told of each prompt, where the recipe has one."""


def heldout_of(
    session: Session, conversations: Sequence[Conversation], examples: Sequence[Conversation] = ()
) -> Heldout:
    """Held-out conversations as they are measured, their questions after some of the examples."""
    config = session.config
    limit = config.batch.sequence_length - config.generation.max_new_tokens
    questions = last_questions(session, conversations, limit, shots_of(session, examples))
    names = sources_of(session)
    return Heldout(
        rows=packed(session, [piece for each in conversations for piece in each.pieces]),
        prompts=prompts_of(questions, limit, session.tokenizer.pad),
        answers=[question.answer or "" for question in questions],
        sources_BT=origins(
            session,
            [
                replace(piece, weights=np.full(len(piece.ids), names.index(each.source)))
                for each in conversations
                for piece in each.pieces
            ],
        ),
        turns_BT=origins(
            session,
            [
                numbered(piece, first)
                for each in conversations
                for piece, first in zip(each.pieces, each.turns, strict=True)
            ],
        ).clip(max=LAST_TURN),
        told=told(session, questions),
    )


def sources_of(session: Session) -> tuple[str, ...]:
    """The sources of held-out rows, in the recipe's order."""
    data = session.config.data
    return data.heldout_sources or data.sources


def packed(session: Session, pieces: Sequence[Piece]) -> LmBatch:
    """Pieces of conversations as rows with their loss weights."""
    return pack(pieces, session.config.batch.sequence_length, session.tokenizer.pad)


def origins(session: Session, pieces: Sequence[Piece]) -> np.ndarray:
    """Numbers of the pieces' tokens, in place of weights, where packing puts them; [N, T] int32."""
    return np.asarray(packed(session, pieces).loss_weights_BT, np.int32)


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


def figures_of(session: Session, program: Trainer, heldout: Heldout, frozen: tuple[Weights, ...]) -> Evaluate:
    """Loss on the replies; greedy exact match where answers are known, and what the recipe's scorer says."""
    config = session.config
    loss_of, made_plain = loss_by_origin(session, program, heldout, frozen), plainly(config.tuning)
    respond, scorer = responder(session, config.generation), scorer_of(session)

    def evaluate(params: Params) -> Measured:
        figures = loss_of(params).figures
        if not heldout.answers:
            return Measured(figures)
        weights = made_plain(program.partition.joined(params, *frozen))
        texts = replies(respond, session.tokenizer, weights, heldout.prompts, config.batch.rows)
        right = {"exact_match": exact_match(texts, heldout.answers)}
        judged = scorer.mean(texts, heldout.told) if scorer else {}
        shown = samples(session.tokenizer, heldout.prompts, texts, heldout.answers)
        return Measured(figures | right | judged, shown)

    return evaluate


def loss_by_origin(
    session: Session, program: Trainer, heldout: Heldout, frozen: tuple[Weights, ...]
) -> Evaluate:
    """Held-out loss and perplexity; the loss for each source too, and for each reply of conversations, where
    there are several. A run's folder of an earlier version does not say which is which."""
    kinds = {"source": heldout.sources_BT, "turn": heldout.turns_BT}
    trained = np.asarray(heldout.rows.loss_weights_BT) > 0
    found = {
        kind: np.unique(np.asarray(numbers_BT)[trained]).tolist()
        for kind, numbers_BT in kinds.items()
        if numbers_BT is not None
    }
    present = {kind: numbers for kind, numbers in found.items() if len(numbers) > 1}
    rows = heldout.rows, {kind: kinds[kind] for kind in present}
    names = {f"loss/source {n}": f"loss/{name}" for n, name in enumerate(sources_of(session))}
    names[f"loss/turn {LAST_TURN}"] = f"loss/turn {LAST_TURN}+"
    assert isinstance(program.model, Llama), "SFT trains language models"
    step = partial(origin_losses, program.model, present)
    loss_of = heldout_loss(session, program, rows, frozen, step)

    def evaluate(params: Params) -> Measured:
        figures = {names.get(name, name): value for name, value in loss_of(params).figures.items()}
        return Measured(figures | {"perplexity": perplexity(figures["loss"])})

    return evaluate


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


def last_questions(
    session: Session, conversations: Sequence[Conversation], limit: int, shots: Sequence[Message] = ()
) -> list[Question]:
    """Each conversation up to its last reply, which is the right answer.

    Texts, and conversations that end with a call of a function, have none. Prompts over `limit` are left out.
    The turns of `shots` stand before each question, behind its system's turn.

    Raises:
      UserError: there are answers, and no prompt is short enough.
    """
    answered = [each for each in conversations if each.messages and each.messages[-1]["content"]]
    questions = []
    for conversation in answered:
        *messages, last = conversation.messages
        messages = after_system(messages, shots)
        ids = render_prompt(session.tokenizer, messages)
        if len(ids) <= limit:
            questions.append(Question(messages, last["content"], ids, conversation.row))
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
