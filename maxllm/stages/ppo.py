"""PPO: improve the policy against the reward model, held near where it began by a KL penalty.

    maxllm ppo configs/ppo/tiny_tasks_cpu.yaml

Four models: actor (trained, starts as the SFT model), critic (trained, starts as the reward model), reference
(the frozen SFT model), reward (frozen). `iterate` below is the whole algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from maxllm.config.generation import GenerationConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.root import Config
from maxllm.data import loader
from maxllm.data.instruct import Question, question_of, read_split
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.sources import Tally
from maxllm.data.store import read_record
from maxllm.data.tokenizer import without_piece
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.generate.decode import decoder_of, generate
from maxllm.losses.policy import kl_k1
from maxllm.losses.token import Shaping
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.parallel.mesh import check_batch_divides, platform_of
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import Metrics, Params, PromptBatch, Rollout
from maxllm.run.loop import Job
from maxllm.run.program import Compiled, Part, Program, compile_reader
from maxllm.run.restore import load_params, restore
from maxllm.run.session import Session, check_same_model
from maxllm.stages.ppo_report import REPORT
from maxllm.stages.program import abstract_base
from maxllm.stages.shared import (
    abstract_params,
    check_start,
    exact_match,
    prompts_of,
    reply_text,
    start_from,
    start_policy,
    told,
)
from maxllm.stages.stage import Stage
from maxllm.steps import ppo as algorithm
from maxllm.steps.ppo import Frozen, Learner, Model, Ppo, PpoState
from maxllm.steps.state import abstract, initializer, partition_of
from maxllm.weights import Weights

LEAST_ADVANTAGE_STD = 1e-4
"""Below it the 1e-8 that whitening adds to the variance is what it divides by."""


def parts_of(
    ppo: Ppo, sampler: Llama, generation: GenerationConfig, seed: int
) -> dict[str, Callable[..., Any]]:
    """The pure functions that an iteration is made of; randomness is a function of the seed and the step.

    `sampler` is the policy's model in the layout that it decodes in.
    """

    def keys(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        rollout_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        return rollout_key, update_key

    def rollout(policy: Params, step: jax.Array, prompts: PromptBatch) -> Rollout:
        return respond(ppo, sampler, Weights(policy), prompts, keys(step)[0], generation)

    def judge(reward: Weights, rollout: Rollout) -> jax.Array:
        return algorithm.scores(ppo, reward, rollout)

    def learn(
        state: PpoState, rollout: Rollout, scores_B: jax.Array, reference: Weights
    ) -> tuple[PpoState, Metrics]:
        return algorithm.learn(ppo, state, rollout, scores_B, reference, keys(state.step)[1])

    return {"rollout": rollout, "judge": judge, "learn": learn}


def iterate(
    parts: Compiled, state: PpoState, prompts: PromptBatch, frozen: Frozen
) -> tuple[PpoState, Metrics]:
    """One iteration of PPO: respond, judge, learn. Called on the host: what judges may be anything."""
    rollout = parts["rollout"](state.actor.params, state.step, prompts)
    scores_B = parts["judge"](frozen.reward, rollout)
    return parts["learn"](state, rollout, scores_B, frozen.reference)


def respond(
    ppo: Ppo,
    sampler: Llama,
    weights: Weights,
    prompts: PromptBatch,
    key: jax.Array,
    generation: GenerationConfig,
) -> Rollout:
    """The policy's responses to prompts."""
    never = ppo.shaping.never
    return generate(sampler, weights, prompts, key, generation, ppo.stop_tokens, ppo.pad, never)


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    check_sampling(config.generation)
    read_frozen = frozen_models(session)
    check_batch_divides(session.mesh, config.batch, session.model, config.ppo.minibatches)
    # 1. Data: prompts. Answers, where rows have them, are for the held-out check; training never sees them.
    train_questions, heldout_questions, tallies = read_questions(session)
    rows, heldout = padded(session, train_questions), heldout_of(session, heldout_questions)
    # 2. The algorithm and its four models.
    ppo = algorithm_with(session)
    compiled = program_of(config, session.model, session.mesh, ppo)
    frozen = read_frozen()
    # 3. Train; the best checkpoint is the one with the highest held-out score.
    return Job(
        program=compiled,
        fresh=lambda: fresh_state(ppo, frozen, compiled.abstract_state),
        batches=loader.PromptBatches(rows, config.batch.rows, config.run.seed),
        heldout=heldout,
        evaluate=figures_of(session, ppo, frozen, heldout),
        best=("score", "max"),
        store_heldout=True,
        frozen=(frozen,),
        facts={"heldout_items": len(heldout.answers), "sources": told(session, tallies)},
        warning=nothing_to_learn,
    )


def frozen_models(session: Session) -> Callable[[], Frozen]:
    """Reads the reference and the reward model, when called; now they are looked at, and told.

    Raises:
      UserError: one of them is gone, or does not fit the policy.
    """
    start = start_policy(session)
    reward = abstract_params(session, ScalarModel(session.model))
    judge = session.parent("reward")
    check_start(session, judge, reward)
    check_reward_fits(session)
    return lambda: Frozen(reference=Weights(start()), reward=Weights(load_params(judge, reward)))


class Heldout(struct.PyTreeNode):
    """What is measured."""

    prompts: PromptBatch
    answers: list[str | None]
    """The right reply to each prompt, where it is known."""


def read_questions(
    session: Session, training: bool = True
) -> tuple[list[Question], list[Question], list[Tally]]:
    """(training prompts, held-out ones, counts by source)."""
    length = prompt_length(session.config)
    return read_split(
        session.config.data,
        "prompt",
        session.config.run.seed,
        session.tokenizer,
        lambda row: question_of(session.tokenizer, row, length),
        lambda question: question.messages,
        training,
    )


def prompt_length(config: Config) -> int:
    """Positions of a row that a prompt may take."""
    return config.batch.sequence_length - config.generation.max_new_tokens


def padded(session: Session, questions: Sequence[Question]) -> PromptBatch:
    """Prompts as arrays."""
    return prompts_of(questions, prompt_length(session.config), session.tokenizer.pad)


def heldout_of(session: Session, questions: Sequence[Question]) -> Heldout:
    """Held-out prompts as they are measured."""
    return Heldout(padded(session, questions), [question.answer for question in questions])


def nothing_to_learn(means: dict[str, float]) -> str | None:
    """A sentence where all advantages are alike, as those of a single reply of one token are."""
    if means.get("advantage_std", 1.0) > LEAST_ADVANTAGE_STD:
        return None
    return (
        f"all advantages are alike (replies of {means['response_tokens']:.3g} tokens), so that whitening "
        "leaves nothing to learn from; give more batch.rows, or longer or less certain replies"
    )


def algorithm_with(session: Session) -> Ppo:
    """The algorithm as a session's recipe has it, with what its tokenizer knows."""
    tokenizer = session.tokenizer
    never = without_piece(tokenizer, session.model.vocab_size)
    return algorithm_of(session.config, session.model, tokenizer.stop_tokens, tokenizer.pad, never)


def algorithm_of(
    config: Config,
    model: ModelConfig,
    stop_tokens: tuple[int, ...],
    pad: int,
    never: tuple[int, ...] = (),
) -> Ppo:
    """The algorithm as a recipe has it."""

    def learner(model: Model, optimizer: OptimizerConfig) -> Learner[Model]:
        return Learner(
            model,
            make_optimizer(optimizer, config.updates, partition_of(model).declared),
            config.batch.microbatches,
            jnp.dtype(config.optimizer.gradient_dtype),
        )

    critic = config.optimizer.model_copy(update={"learning_rate": config.ppo.critic_learning_rate})
    return Ppo(
        config=config.ppo,
        actor=learner(Llama(model), config.optimizer),
        critic=learner(ScalarModel(model), critic),
        shaping=Shaping(config.generation.temperature, never),
        stop_tokens=stop_tokens,
        pad=pad,
    )


STOP, PAD = (2,), 0
"""Stand-ins for the tokenizer's, where there is none: any ids compile to the same program."""


def program(config: Config, model: ModelConfig, mesh: Mesh) -> Program:
    """The program of a recipe, whatever its tokenizer.

    Raises:
      UserError: its sampling is not one that PPO can learn from.
    """
    check_sampling(config.generation)
    check_batch_divides(mesh, config.batch, model, config.ppo.minibatches)
    return program_of(config, model, mesh, algorithm_of(config, model, STOP, PAD))


def program_of(config: Config, model: ModelConfig, mesh: Mesh, ppo: Ppo) -> Program:
    """Rollout, judgement and learning: four models, of which each part holds those that it reads."""
    init = partial(init_state, ppo)
    reference, reward = (abstract_base(learner.model, mesh) for learner in (ppo.actor, ppo.critic))
    state = abstract(init, mesh, config.mesh.zero, config.mesh.offload)
    batch = PromptBatch(
        jax.ShapeDtypeStruct((config.batch.rows, prompt_length(config)), jnp.int32),
        jax.ShapeDtypeStruct((config.batch.rows,), jnp.int32),
        jax.ShapeDtypeStruct((config.batch.rows,), jnp.int32),
    )
    sampler = decoder_of(ppo.actor.model, platform_of(mesh))
    functions = parts_of(ppo, sampler, config.generation, config.run.seed)
    policy = (state.actor.params, state.step, batch)
    rollout = jax.eval_shape(functions["rollout"], *policy)
    scores_B = jax.ShapeDtypeStruct((config.batch.rows,), jnp.float32)
    arguments = {
        "rollout": policy,
        "judge": (reward, rollout),
        "learn": (state, rollout, scores_B, reference),
    }
    tokens = config.batch.rows * config.batch.sequence_length
    return Program(
        init=init,
        abstract_state=state,
        abstract_batch=batch,
        frozen=(Frozen(reference=reference, reward=reward),),
        parts={
            name: Part(function=function, arguments=arguments[name], updates=name == "learn")
            for name, function in functions.items()
        },
        iterate=iterate,
        tokens_per_step=tokens,
        flops_per_step=iteration_flops(config, model, tokens),
        declared=partition_of(ppo.actor.model).declared,
        trained=2,
        references=2,
        decodes=True,
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
    init = partial(init_state, ppo)
    return restore(checkpoint, abstract(init, session.mesh)).critic.params


def check_sampling(generation: GenerationConfig) -> None:
    """The policy that samples must be the policy that is updated, and it must explore.

    Raises:
      UserError: it would be greedy, or cut off.
    """
    if generation.temperature == 0:
        raise UserError("generation.temperature=0 is greedy; PPO learns from sampled responses: give 1.0")
    if generation.top_k or generation.top_p < 1:
        raise UserError(
            "generation.top_k and generation.top_p would sample from another distribution than the one PPO "
            "updates; leave them at 0 and 1"
        )


def init_state(ppo: Ppo, key: jax.Array) -> PpoState:
    """A fresh state (boxed parameters); it describes the shapes."""
    return PpoState(
        step=jnp.int32(0),
        actor=initializer(ppo.actor.model, ppo.actor.optimizer)(key),
        critic=initializer(ppo.critic.model, ppo.critic.optimizer)(key),
    )


def fresh_state(ppo: Ppo, frozen: Frozen, abstract_state: PpoState) -> PpoState:
    """Step 0: the actor is a copy of the reference, the critic of the reward model."""
    return PpoState(
        step=jnp.int32(0),
        actor=start_from(frozen.reference.base, ppo.actor.optimizer, abstract_state.actor),
        critic=start_from(frozen.reward.base, ppo.critic.optimizer, abstract_state.critic),
    )


def iteration_flops(config: Config, model: ModelConfig, tokens: int) -> float:
    """Model FLOPs of an iteration: a backward pass costs two forwards; decoding counts as one forward.

    Forwards of the policy: rollout, actor, reference; of the scalar model: critic, reward. Each epoch trains
    one of each, 3 forwards.
    """
    length, epochs = config.batch.sequence_length, config.ppo.epochs
    policy = train_flops_per_token(model, length) / 3
    scalar = train_flops_per_token(model, length, head=1) / 3
    return tokens * (policy * (3 + 3 * epochs) + scalar * (2 + 3 * epochs))


def check_reward_fits(session: Session) -> None:
    """The reward model must read the same token ids, and be the same kind of model, as the policy.

    Raises:
      UserError: it was trained with another tokenizer, or with other settings that shapes do not show.
    """
    reward = RunFolder.of_checkpoint(session.parent("reward"))
    if load_tokenizer(reward.path).fingerprint != session.tokenizer.fingerprint:
        raise UserError(f"{reward} was trained with another tokenizer than {session.config.start.policy}")
    check_same_model(session.model, reward)


def evaluator(session: Session, stored: Path | None = None) -> Callable[[Params], dict[str, float]]:
    """Held-out figures over stored rows, or over those of the data."""
    read_frozen = frozen_models(session)
    if stored is None:
        heldout = heldout_of(session, read_questions(session, training=False)[1])
    else:
        heldout = read_record(stored, Heldout)
    return figures_of(session, algorithm_with(session), read_frozen(), heldout)


def figures_of(
    session: Session, ppo: Ppo, frozen: Frozen, heldout: Heldout
) -> Callable[[Params], dict[str, float]]:
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

    def evaluate(params: Params) -> dict[str, float]:
        texts: list[str] = []
        greedy_texts: list[str] = []
        sums = {"score": 0.0, "kl": 0.0, "finished": 0.0}
        for part, (batch, real) in enumerate(loader.in_order(heldout.prompts, config.batch.rows)):
            key = jax.random.fold_in(jax.random.key(config.run.seed), part)
            sampled, best, scores_B, kl_B = jax.device_get(reader(Weights(params), batch, frozen, key))
            texts += [reply_text(session.tokenizer, sampled, row) for row in range(real)]
            greedy_texts += [reply_text(session.tokenizer, best, row) for row in range(real)]
            for name, values in (("score", scores_B), ("kl", kl_B), ("finished", sampled.finished_B)):
                sums[name] += float(values[:real].sum())
        means = {name: total / len(heldout.answers) for name, total in sums.items()}
        if None in heldout.answers:
            return means
        return means | {
            "exact_match": exact_match(texts, heldout.answers),
            "exact_match_greedy": exact_match(greedy_texts, heldout.answers),
        }

    return evaluate


STAGE = Stage(
    program=program,
    job=job,
    evaluator=evaluator,
    replies=lambda session: "turns",
    report=REPORT,
)
