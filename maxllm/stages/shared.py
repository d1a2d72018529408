"""What stages share around the loop: jobs, held-out losses, and replies to prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from maxllm.config.generation import GenerationConfig
from maxllm.data import loader
from maxllm.data.ahead import Ahead
from maxllm.data.instruct import Question, pad_prompts
from maxllm.data.remote import RemoteArray
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import Tokenizer, without_piece
from maxllm.generate.decode import decoder_of, generate
from maxllm.parallel.mesh import platform_of
from maxllm.records import LmBatch, Metrics, Params, PromptBatch, Rollout
from maxllm.run.heldout import Evaluate, Measured, mean_over
from maxllm.run.loop import Job
from maxllm.run.program import compile_reader
from maxllm.run.session import Session, say
from maxllm.stages.program import Trainer
from maxllm.stages.start import plain_policy
from maxllm.steps.state import TrainState
from maxllm.steps.update import eval_step
from maxllm.weights import Weights


def say_sources(session: Session, tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """Says what became of the rows of every source, and returns it as plain data."""
    for tally in tallies:
        say(session, tally.line())
    return [tally.report() for tally in tallies]


def language_job(
    session: Session,
    program: Trainer,
    *,
    fresh: Callable[[], TrainState],
    rows: LmBatch,
    heldout: Any,
    evaluate: Evaluate,
    best: tuple[str, Any],
    facts: dict[str, Any],
    store_heldout: bool = False,
    frozen: tuple[Weights, ...] = (),
) -> Job:
    """The loop's job for next-token prediction, in pretraining and SFT."""
    config = session.config
    batches: loader.Batches[LmBatch] = loader.ArrayBatches(rows, config.batch.rows, config.run.seed)
    return Job(
        session=session,
        program=program,
        fresh=fresh,
        batches=Ahead(batches) if isinstance(rows.tokens_BT, RemoteArray) else batches,
        heldout=heldout,
        evaluate=evaluate,
        best=best,
        store_heldout=store_heldout,
        frozen=frozen,
        facts=facts,
    )


def heldout_loss(
    session: Session,
    program: Trainer,
    rows: Any,
    frozen: tuple[Weights, ...],
    step: Callable[..., Metrics] | None = None,
) -> Evaluate:
    """The program's loss over held-out rows, without dropout, and the metrics that come with it.

    Args:
      session: the run.
      program: what is trained.
      rows: what is measured, in the order in which it stands.
      frozen: what the program keeps beside what it trains.
      step: (weights, batch) -> metrics, in place of the loss.
    """
    reader = compile_reader(session.mesh, step or partial(eval_step, loss_fn=program.loss_fn))
    batches = partial(loader.in_order, rows, session.config.batch.rows)
    others = frozen if program.references else ()

    def figures(params: Params) -> Measured:
        weights = program.partition.joined(params, *frozen)
        return Measured(mean_over(batches(), lambda batch: reader(weights, batch, *others)))

    return figures


def responder(session: Session, config: GenerationConfig) -> Callable[..., Rollout]:
    """Compiled `(plain weights, PromptBatch, key or one a row) -> Rollout` for this session's policy."""
    model = decoder_of(plain_policy(session), platform_of(session.mesh))
    stop_tokens, pad = session.tokenizer.stop_tokens, session.tokenizer.pad
    never = without_piece(session.tokenizer, session.model.vocab_size)

    def respond(weights: Weights, prompts: Any, key: jax.Array) -> Rollout:
        return generate(model, weights, prompts, key, config, stop_tokens, pad, never)

    return compile_reader(session.mesh, respond)


def prompts_of(questions: Sequence[Question], length: int, pad: int) -> PromptBatch:
    """All questions as left-padded prompts [N, length]."""
    return pad_prompts([question.ids for question in questions], length, pad)


def replies(
    respond: Callable[..., Rollout],
    tokenizer: Tokenizer,
    weights: Weights,
    prompts: Any,
    rows: int,
    seed: int = 0,
) -> list[str]:
    """Replies as text to all prompts (a PromptBatch [N, P]), `rows` at a time."""
    texts: list[str] = []
    for number, (batch, real) in enumerate(loader.in_order(prompts, rows)):
        rollout = jax.device_get(respond(weights, batch, jax.random.fold_in(jax.random.key(seed), number)))
        texts += [reply_text(tokenizer, rollout, row) for row in range(real)]
    return texts


def reply_text(tokenizer: Tokenizer, rollout: Rollout, row: int) -> str:
    """The response of one row as text, without its stop token."""
    return tokenizer.decode([i for i in response_ids(rollout, row) if i not in tokenizer.stop_tokens])


def response_ids(rollout: Rollout, row: int) -> list[int]:
    """The response of one row as token ids, its stop token included."""
    mask_R = np.asarray(rollout.mask_BR[row])
    return [int(i) for i in np.asarray(rollout.tokens_BT[row, -len(mask_R) :])[mask_R > 0]]
