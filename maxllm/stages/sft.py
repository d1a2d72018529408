"""SFT: the pretrained model learns to answer; the loss counts the assistants' tokens only.

maxllm sft configs/sft/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from typing import Any

from maxllm.config import Config
from maxllm.data.instruct import Question, conversation_piece, pack_conversations, question_of, read_split
from maxllm.data.pack import Piece
from maxllm.data.sources import Tally
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, open_session
from maxllm.stages.shared import (
    exact_match,
    heldout_language,
    language_job,
    policy_params,
    prompts_of,
    replies,
    responder,
    start_from,
    told,
)
from maxllm.steps.state import TrainState, abstract, initializer


def run(config: Config) -> dict[str, Any]:
    """Fine-tunes from start.policy, or continues; returns summary.json's content."""
    session = open_session(config)
    return finished(session) or train(session, job(session))


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    # 1. Data: conversations packed with their loss masks.
    train_rows, heldout_rows, tallies = read_conversations(session)
    questions = [question for _, question in heldout_rows]
    length = config.batch.sequence_length
    pad = session.tokenizer.pad
    rows = pack_conversations([piece for piece, _ in train_rows], length, pad)
    heldout = pack_conversations([piece for piece, _ in heldout_rows], length, pad)
    # 2. State: the pretrained parameters, a fresh optimizer.
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    abstract_state = abstract(initializer(Llama(session.model), optimizer), session.mesh)
    # 3. Held-out figures: loss on the replies, and greedy exact match.
    loss_of = heldout_language(session, heldout)
    respond = responder(session, config.generation)
    prompts = prompts_of(questions, length - config.generation.max_new_tokens, pad)

    def evaluate(state: TrainState) -> dict[str, float]:
        texts = replies(respond, session.tokenizer, state.params, prompts, config.batch.rows)
        return loss_of(state.params) | {"exact_match": exact_match(texts, questions)}

    return language_job(
        session,
        abstract_state=abstract_state,
        fresh=lambda: start_from(
            policy_params(session, config.start.policy or ""), optimizer, abstract_state
        ),
        optimizer=optimizer,
        rows=rows,
        evaluate=evaluate,
        best=("loss", "min"),
        facts={"heldout_items": len(questions), "sources": told(session, tallies)},
    )


def read_conversations(
    session: Session,
) -> tuple[list[tuple[Piece, Question]], list[tuple[Piece, Question]], list[Tally]]:
    """(training, held-out) conversations: each as a piece to pack, and as a question with its answer."""
    config = session.config
    length = config.batch.sequence_length
    prompt_length = length - config.generation.max_new_tokens

    def parse(row: dict[str, Any]) -> tuple[Piece, Question]:
        piece = conversation_piece(session.tokenizer, row, length)
        return piece, question_of(session.tokenizer, row, prompt_length)

    return read_split(config.data, "instruction", config.run.seed, parse)
