"""PPO: improve the policy against the reward model, held near where it began by a KL penalty.

    maxllm ppo configs/ppo/tiny_tasks_cpu.yaml

Four models: actor (trained, starts as the SFT model), critic (trained, starts as the reward model), reference
(the frozen SFT model), reward (frozen). `iterate` in ppo_program.py is the whole algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from maxllm import recipe
from maxllm.data import loader
from maxllm.data.instruct import Question, RowReader, question_of
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.shown import ShownRow, shown_row
from maxllm.data.store import read_record
from maxllm.data.tally import Tally
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.generate.decode import decoder_of
from maxllm.losses.policy import kl_k1
from maxllm.model.adapters import plain
from maxllm.model.heads import ScalarModel
from maxllm.parallel.mesh import check_batch_divides, platform_of
from maxllm.records import Params, PromptBatch
from maxllm.run.heldout import Evaluate, Measured
from maxllm.run.loop import Job
from maxllm.run.program import Program, compile_reader
from maxllm.run.restore import restore
from maxllm.run.session import Session, check_same_model, in_epochs
from maxllm.stages.ppo_program import (
    algorithm_with,
    check_sampling,
    init_state,
    program,
    program_of,
    prompt_length,
    respond,
)
from maxllm.stages.ppo_report import REPORT
from maxllm.stages.scoring import best_of, exact_match, samples, scorer_of, told
from maxllm.stages.shared import (
    prompts_of,
    reply_text,
    say_sources,
)
from maxllm.stages.stage import Stage
from maxllm.stages.start import (
    abstract_params,
    check_start,
    first_trained,
    frozen_as,
    start_from,
    start_policy,
    whole_params,
)
from maxllm.steps import ppo as algorithm
from maxllm.steps.ppo import Frozen, Ppo, PpoState
from maxllm.steps.state import abstract
from maxllm.weights import Weights

LEAST_ADVANTAGE_STD = 1e-4
"""Below it the 1e-8 that whitening adds to the variance is what it divides by."""


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    check_sampling(config.generation)
    read_frozen = frozen_models(session)
    check_batch_divides(session.mesh, config.batch, session.model, config.ppo.minibatches)
    # 1. Data: prompts. Answers, where rows have them, are for the held-out check; training never sees them.
    train_questions, heldout_questions, tallies = read_questions(session)
    rows, heldout = padded(session, train_questions), heldout_of(session, heldout_questions)
    session = in_epochs(session, len(train_questions))
    config = session.config
    # 2. The algorithm and its four models.
    ppo = algorithm_with(session)
    compiled = program_of(config, session.model, session.mesh, ppo)
    frozen = read_frozen(ppo, compiled)
    # 3. Train; the best checkpoint is the one with the highest held-out score.
    return Job(
        session=session,
        program=compiled,
        fresh=lambda: fresh_state(ppo, frozen, compiled.abstract_state, config.run.seed),
        batches=loader.PromptBatches(rows, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=figures_of(session, ppo, frozen, heldout),
        best=best_of(session, ("score", "max")),
        store_heldout=True,
        frozen=(frozen,),
        facts={"heldout_items": len(heldout.answers), "sources": say_sources(session, tallies)},
        warning=nothing_to_learn,
    )


def frozen_models(session: Session) -> Callable[[Ppo, Program], Frozen]:
    """Reads the reference and the reward model, when called; now they are looked at, and told.

    Raises:
      UserError: one of them is gone, or does not fit the policy.
    """
    start, judge = start_policy(session), session.parent("reward")
    tuning = recipe.of_run(RunFolder.of_checkpoint(judge)).tuning
    check_start(session, judge, abstract_params(session, ScalarModel(session.model, tuning)))
    check_reward_fits(session)

    def read(ppo: Ppo, program: Program) -> Frozen:
        reward, wanted = Weights(whole_params(session, judge, ScalarModel)), program.frozen[0]
        return Frozen(
            frozen_as(ppo.actor.model, start(), wanted.reference),
            frozen_as(ppo.critic.model, reward, wanted.reward),
        )

    return read


class Heldout(struct.PyTreeNode):
    """What is measured."""

    prompts: PromptBatch
    answers: list[str | None]
    """The right reply to each prompt, where it is known."""
    told: list[str] | None = None
    """What a scorer is told of each prompt, where the recipe has one."""


def read_questions(
    session: Session, training: bool = True
) -> tuple[list[Question], list[Question], list[Tally]]:
    """(training prompts, held-out ones, counts by source)."""
    length = prompt_length(session.config)
    return RowReader(
        session.config.data,
        "prompt",
        session.config.run.seed,
        lambda row: question_of(session.tokenizer, row, length, session.config.evaluation.scorer is not None),
        lambda question: question.ids,
    ).split(training)


def padded(session: Session, questions: Sequence[Question]) -> PromptBatch:
    """Prompts as arrays."""
    return prompts_of(questions, prompt_length(session.config), session.tokenizer.pad)


def heldout_of(session: Session, questions: Sequence[Question]) -> Heldout:
    """Held-out prompts as they are measured."""
    answers = [question.answer for question in questions]
    return Heldout(padded(session, questions), answers, told(session, questions))


def nothing_to_learn(means: dict[str, float]) -> str | None:
    """A sentence where all advantages are alike, as those of a single reply of one token are."""
    if means.get("advantage_std", 1.0) > LEAST_ADVANTAGE_STD:
        return None
    return (
        f"all advantages are alike (replies of {means['response_tokens']:.3g} tokens), so that whitening "
        "leaves nothing to learn from; give more batch.rows, or longer or less certain replies"
    )


def critic_params(session: Session, checkpoint: Path) -> Params:
    """The critic in a checkpoint of a run of PPO, for export.

    Raises:
      UserError: it is a checkpoint of another stage.
    """
    if session.config.stage != "ppo":
        stage = session.config.stage
        raise UserError(f"{session.folder} is a {stage} run: only ppo trains a critic")
    ppo = algorithm_with(session)
    params = restore(checkpoint, abstract(partial(init_state, ppo), session.mesh)).critic.params
    tuning = session.config.tuning
    if tuning is None:
        return params
    if tuning.beside is not None:
        raise UserError(f"the critic of {session.folder} has {tuning.beside.named()}: it cannot be exported")
    reward = Weights(whole_params(session, session.parent("reward"), ScalarModel))
    return plain(ppo.critic.weights(params, frozen_as(ppo.critic.model, reward)), tuning).base


def fresh_state(ppo: Ppo, frozen: Frozen, abstract_state: PpoState, seed: int) -> PpoState:
    """Step 0: the actor begins as the reference, the critic as the reward model."""
    actor = first_trained(ppo.actor.model, frozen.reference, seed)
    critic = first_trained(ppo.critic.model, frozen.reward, seed)
    return PpoState(
        step=jnp.int32(0),
        actor=start_from(actor, ppo.actor.optimizer, abstract_state.actor),
        critic=start_from(critic, ppo.critic.optimizer, abstract_state.critic),
    )


def check_reward_fits(session: Session) -> None:
    """The reward model must read the same token ids, and be the same kind of model, as the policy.

    Raises:
      UserError: it was trained with another tokenizer, or with other settings that shapes do not show.
    """
    reward = RunFolder.of_checkpoint(session.parent("reward"))
    if load_tokenizer(reward.path).fingerprint != session.tokenizer.fingerprint:
        raise UserError(f"{reward} was trained with another tokenizer than {session.config.start.policy}")
    check_same_model(session.model, reward)


def shown_rows(session: Session, count: int) -> list[ShownRow]:
    """Prompts; the replies that are trained on are sampled."""
    questions, _, tallies = read_questions(session)
    say_sources(session, tallies)
    return [shown_row(session.tokenizer, each.ids, [0] * len(each.ids)) for each in questions[:count]]


def evaluator(session: Session, stored: Path | None = None) -> Evaluate:
    """Held-out figures over stored rows, or over those of the data."""
    read_frozen = frozen_models(session)
    if stored is None:
        heldout = heldout_of(session, read_questions(session, training=False)[1])
    else:
        heldout = read_record(stored, Heldout)
    ppo = algorithm_with(session)
    frozen = read_frozen(ppo, program_of(session.config, session.model, session.mesh, ppo))
    return figures_of(session, ppo, frozen, heldout)


def figures_of(session: Session, ppo: Ppo, frozen: Frozen, heldout: Heldout) -> Evaluate:
    """Held-out prompts answered by sampling as in training, and greedily.

    Figures: `score` of the reward model, `kl` to the reference in nats per response (k1), `finished` share;
    where every prompt has its answer, `exact_match` with it (which no model was shown), and the same for
    greedy replies.
    """
    config = session.config
    greedy = config.generation.model_copy(update={"temperature": 0.0})
    sampler = decoder_of(ppo.actor.model, platform_of(session.mesh))

    def judge(weights: Weights, prompts: PromptBatch, frozen: Frozen, key: jax.Array) -> tuple[Any, ...]:
        sampled, best = (
            respond(ppo, sampler, weights, prompts, key, how) for how in (config.generation, greedy)
        )
        logps_BR, ref_logps_BR = (
            algorithm.response_logps(ppo.actor.model, ppo.shaping, w, sampled)
            for w in (weights, frozen.reference)
        )
        kl_B = jnp.sum(kl_k1(logps_BR, ref_logps_BR) * sampled.mask_BR, axis=1)
        return sampled, best, algorithm.scores(ppo, frozen.reward, sampled), kl_B

    reader = compile_reader(session.mesh, judge)

    scorer = scorer_of(session)

    def evaluate(params: Params) -> Measured:
        texts: list[str] = []
        greedy_texts: list[str] = []
        sums = {"score": 0.0, "kl": 0.0, "finished": 0.0}
        for part, (batch, real) in enumerate(loader.in_order(heldout.prompts, config.batch.rows)):
            key = jax.random.fold_in(jax.random.key(config.run.seed), part)
            sampled, best, scores_B, kl_B = jax.device_get(
                reader(ppo.actor.weights(params, frozen.reference), batch, frozen, key)
            )
            texts += [reply_text(session.tokenizer, sampled, row) for row in range(real)]
            greedy_texts += [reply_text(session.tokenizer, best, row) for row in range(real)]
            for name, values in (("score", scores_B), ("kl", kl_B), ("finished", sampled.finished_B)):
                sums[name] += float(values[:real].sum())
        means = {name: total / len(heldout.answers) for name, total in sums.items()}
        if scorer:
            means |= scorer.mean(texts, heldout.told)
        if None not in heldout.answers:
            means["exact_match"] = exact_match(texts, heldout.answers)
            means["exact_match_greedy"] = exact_match(greedy_texts, heldout.answers)
        return Measured(means, samples(session.tokenizer, heldout.prompts, texts, heldout.answers))

    return evaluate


STAGE = Stage(
    program=program,
    job=job,
    shown=shown_rows,
    evaluator=evaluator,
    replies=lambda session: "turns",
    report=REPORT,
)
