"""Reward model: the SFT model with a scalar head learns which of two replies is better.

maxllm reward configs/reward/tiny_tasks_cpu.yaml
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from maxllm.config import Config
from maxllm.data import loader
from maxllm.data.instruct import pad_pairs, read_split, reply_pair
from maxllm.model.heads import ScalarModel
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import PairBatch, Params
from maxllm.run.loop import Job, finished, mean_over, train
from maxllm.run.session import Session, compile_reader, open_session
from maxllm.stages.program import reward_program
from maxllm.stages.shared import start_from, start_policy, told
from maxllm.steps.state import TrainState, abstract, create, init_params
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
    length = config.batch.sequence_length
    train_pairs, heldout_pairs, tallies = read_split(
        config.data,
        "preference",
        config.run.seed,
        session.tokenizer,
        lambda row: reply_pair(session.tokenizer, row, length),
        lambda pair: pair.prompt,
    )
    pad = session.tokenizer.pad
    # 2. State: the policy's decoder under a new head.
    rows = pad_pairs([pair.ids for pair in train_pairs], length, pad)
    heldout = pad_pairs([pair.ids for pair in heldout_pairs], length, pad)
    program = reward_program(config, session.model, session.mesh)
    start = start_policy(session)
    tokens = 2 * config.batch.rows * length
    # 3. Train; the best checkpoint is the one that orders most held-out pairs right.
    return Job(
        abstract_state=program.abstract_state,
        fresh=lambda: start_from(with_new_head(session, start), program.optimizer, program.abstract_state),
        step=program.step,
        batches=loader.Batches(rows, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=heldout_pairs_evaluator(session, program.loss_fn, heldout),
        best=("accuracy", "max"),
        tokens_per_step=tokens,
        flops_per_step=tokens * train_flops_per_token(session.model, length, head=1),
        facts={"heldout_items": len(heldout_pairs), "sources": told(session, tallies)},
    )


def with_new_head(session: Session, start: Callable[[], Params]) -> Params:
    """Scalar-model parameters whose decoder is the policy's."""
    init = partial(init_params, ScalarModel(session.model))
    params = create(init, abstract(init, session.mesh), jax.random.key(session.config.run.seed))
    return params | {"decoder": start()["decoder"]}


def heldout_pairs_evaluator(
    session: Session, loss_fn: Callable[..., Loss], pairs: PairBatch
) -> Callable[[TrainState], dict[str, float]]:
    """Loss, pair accuracy and mean scores over held-out pairs."""
    reader = compile_reader(session.mesh, partial(eval_step, loss_fn=loss_fn))
    batches = partial(loader.in_order, pairs, session.config.batch.rows)
    return lambda state: mean_over(batches(), lambda batch: reader(Weights(state.params), batch))
