"""What SFT measures on held-out conversations: losses, right answers, a scorer's word, replies to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from flax import struct

from maxllm.data.chat import Message
from maxllm.data.conversation import Conversation
from maxllm.data.instruct import Question
from maxllm.data.pack import Piece, pack
from maxllm.data.render import render_prompt
from maxllm.data.weigh import numbered
from maxllm.errors import UserError
from maxllm.model.llama import Llama
from maxllm.records import Array, LmBatch, Params, PromptBatch
from maxllm.run.heldout import Evaluate, Measured
from maxllm.run.session import Session, say
from maxllm.stages.program import Trainer
from maxllm.stages.scoring import (
    after_system,
    exact_match,
    perplexity,
    samples,
    scorer_of,
    shots_of,
    told,
)
from maxllm.stages.shared import heldout_loss, prompts_of, replies, responder
from maxllm.stages.start import plainly
from maxllm.steps.language import origin_losses
from maxllm.weights import Weights

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
