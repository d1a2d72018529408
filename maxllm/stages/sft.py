"""SFT: the pretrained model learns to answer; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
maxllm sft configs/sft/tiny_tasks_cpu.yaml lora.rank=8 run.dir=runs/tiny/sft-lora
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from maxllm.config import Config
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
from maxllm.model.adapters import merge
from maxllm.records import Params
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, open_session, say
from maxllm.stages.program import Trainer, language_program
from maxllm.stages.shared import (
    exact_match,
    heldout_language,
    language_job,
    prompts_of,
    replies,
    responder,
    start_from,
    start_policy,
    told,
)
from maxllm.steps.state import TrainState, create


def run(config: Config) -> dict[str, Any]:
    """Fine-tunes from start.policy, or continues; returns summary.json's content."""
    session = open_session(config)
    return finished(session) or train(session, job(session))


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
    trained = all_parameters(session, program) if config.lora is None else adapters(session, program)
    # 3. Held-out figures: loss on the replies, and greedy exact match.
    loss_of = heldout_language(session, heldout)
    respond = responder(session, config.generation)
    room = length - config.generation.max_new_tokens
    questions = last_questions(session, heldout_talks, room)
    prompts = prompts_of(questions, room, pad)

    def evaluate(state: TrainState) -> dict[str, float]:
        params = trained.whole(state.params)
        texts = replies(respond, session.tokenizer, params, prompts, config.batch.rows)
        return loss_of(params) | {"exact_match": exact_match(texts, questions)}

    return language_job(
        session,
        program,
        fresh=trained.fresh,
        frozen=trained.frozen,
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
class Trained:
    """What of the model is trained."""

    fresh: Callable[[], TrainState]
    frozen: tuple[Params, ...]
    """What the step reads besides."""
    whole: Callable[[Params], Params]
    """All parameters of the model, from the trained ones."""


def all_parameters(session: Session, program: Trainer) -> Trained:
    """The whole model."""
    start = start_policy(session)
    return Trained(
        fresh=lambda: start_from(start(), program.optimizer, program.abstract_state),
        frozen=(),
        whole=lambda params: params,
    )


def adapters(session: Session, program: Trainer) -> Trained:
    """LoRA: fresh adapters; the model itself stays as it is."""
    config = session.config
    assert config.lora is not None, "the recipe asks for adapters"
    base = start_policy(session)()
    return Trained(
        fresh=lambda: create(program.init, program.abstract_state, jax.random.key(config.run.seed)),
        frozen=(base,),
        whole=partial(jax.jit(partial(merge, lora=config.lora)), base),
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
