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
from maxllm.records import Params
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, open_session
from maxllm.stages.program import reward_program
from maxllm.stages.shared import heldout_loss, start_from, start_policy, told
from maxllm.steps.state import abstract, create, init_params


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
    # 3. Held-out figures: loss, pair accuracy and mean scores.
    figures = heldout_loss(session, program.loss_fn, heldout)
    tokens = 2 * config.batch.rows * length
    # 4. Train; the best checkpoint is the one that orders most held-out pairs right.
    return Job(
        abstract_state=program.abstract_state,
        fresh=lambda: start_from(with_new_head(session, start), program.optimizer, program.abstract_state),
        step=program.step,
        batches=loader.Batches(rows, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=lambda state: figures(state.params),
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
