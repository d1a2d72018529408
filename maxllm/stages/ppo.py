"""PPO: the SFT policy learns from the reward model, held near where it began by a KL penalty.

    maxllm ppo configs/ppo/tiny_tasks_cpu.yaml

Four models: actor (trained, starts as the SFT model), critic (trained, starts as the reward model), reference
(the frozen SFT model), reward (frozen). `iteration` below is the whole algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxllm.config import Config, GenerationConfig, ModelConfig
from maxllm.data import loader
from maxllm.data.instruct import Question, question_of, read_split
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.tokenizer import without_piece
from maxllm.errors import UserError
from maxllm.generate.decode import decoder_of, generate
from maxllm.losses.policy import kl_k1
from maxllm.losses.token import token_logps
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import Metrics, Params, PromptBatch
from maxllm.run.checkpoint import find, load_params, restore
from maxllm.run.loop import Job, finished, train
from maxllm.run.session import Session, check_same_model, compile_reader, open_session
from maxllm.stages.program import Program, abstract_base
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
from maxllm.steps import ppo as algorithm
from maxllm.steps.ppo import Frozen, Ppo, PpoState
from maxllm.steps.state import abstract, initializer, partition_of
from maxllm.weights import Weights

LEAST_ADVANTAGE_STD = 1e-4
"""Below it the 1e-8 that whitening adds to the variance is what it divides by."""


def iteration(
    state: PpoState,
    prompts: PromptBatch,
    frozen: Frozen,
    *,
    ppo: Ppo,
    sampler: Llama,
    generation: GenerationConfig,
    seed: int,
) -> tuple[PpoState, Metrics]:
    """One step of PPO: respond, judge, improve. Pure; jitted and sharded by the loop like every step.

    `sampler` is the policy's model in the layout that it decodes in.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    rollout_key, update_key = jax.random.split(key)
    rollout = generate(
        sampler,
        Weights(state.actor.params),
        prompts,
        rollout_key,
        generation,
        ppo.stop_tokens,
        ppo.pad,
        ppo.never,
    )
    experience, rollout_metrics = algorithm.experience(ppo, state, frozen, rollout)
    state, update_metrics = algorithm.update_epochs(ppo, state, experience, update_key)
    return state.replace(step=state.step + 1), rollout_metrics | update_metrics


def run(config: Config) -> dict[str, Any]:
    """Trains from start.policy and start.reward, or continues; returns summary.json's content."""
    session = open_session(config)
    return finished(session) or train(session, job(session))


def job(session: Session) -> Job:
    """Everything the loop needs for this stage."""
    config = session.config
    check_sampling(config.generation)
    start = start_policy(session)
    reward = abstract_params(session, ScalarModel(session.model))
    judge = session.parent("reward")
    check_start(session, judge, reward)
    check_reward_fits(session)
    check_minibatches_divide(session)
    # 1. Data: prompts. Answers, where rows have them, are for the held-out check; training never sees them.
    length = config.batch.sequence_length - config.generation.max_new_tokens
    train_questions, heldout, tallies = read_split(
        config.data,
        "prompt",
        config.run.seed,
        session.tokenizer,
        lambda row: question_of(session.tokenizer, row, length),
        lambda question: question.messages,
    )
    # 2. The algorithm and its four models.
    ppo = algorithm_with(session)
    program = program_of(config, session.model, session.mesh, ppo)
    frozen = Frozen(
        reference=Weights(start()),
        reward=Weights(load_params(judge, reward)),
    )
    # 3. Train; the best checkpoint is the one with the highest held-out score.
    per_pass = config.batch.rows * config.batch.sequence_length
    return Job(
        abstract_state=program.abstract_state,
        fresh=lambda: fresh_state(ppo, frozen, program.abstract_state),
        step=program.step,
        batches=loader.Batches(
            prompts_of(train_questions, length, ppo.pad), config.batch.rows, config.run.seed
        ),
        heldout=(prompts_of(heldout, length, ppo.pad), [question.answer for question in heldout]),
        evaluate=heldout_evaluator(session, ppo, frozen, heldout, length),
        best=("score", "max"),
        tokens_per_step=per_pass,
        flops_per_step=iteration_flops(session, per_pass),
        frozen=(frozen,),
        facts={"heldout_items": len(heldout), "sources": told(session, tallies)},
        warning=nothing_to_learn,
    )


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
    critic = config.optimizer.model_copy(update={"learning_rate": config.ppo.critic_learning_rate})
    policy, scalar = Llama(model), ScalarModel(model)
    return Ppo(
        config=config.ppo,
        policy_model=policy,
        scalar_model=scalar,
        actor_optimizer=make_optimizer(config.optimizer, config.updates, partition_of(policy).declared),
        critic_optimizer=make_optimizer(critic, config.updates, partition_of(scalar).declared),
        temperature=config.generation.temperature,
        stop_tokens=stop_tokens,
        pad=pad,
        microbatches=config.batch.microbatches,
        never=never,
    )


def program_of(config: Config, model: ModelConfig, mesh: Mesh, ppo: Ppo) -> Program:
    """Rollout, scores and updates: four models in one program."""
    init = partial(init_state, ppo)
    sampler = decoder_of(ppo.policy_model, mesh.devices.flat[0].platform)
    prompt = config.batch.sequence_length - config.generation.max_new_tokens
    reference, reward = (abstract_base(m, mesh) for m in (ppo.policy_model, ppo.scalar_model))
    return Program(
        init=init,
        abstract_state=abstract(init, mesh, config.mesh.zero, config.mesh.offload),
        step=partial(iteration, ppo=ppo, sampler=sampler, generation=config.generation, seed=config.run.seed),
        abstract_batch=PromptBatch(
            jax.ShapeDtypeStruct((config.batch.rows, prompt), jnp.int32),
            jax.ShapeDtypeStruct((config.batch.rows,), jnp.int32),
        ),
        frozen=(Frozen(reference=reference, reward=reward),),
    )


def critic_params(session: Session, run_dir: Path) -> Params:
    """The critic of a run's newest checkpoint, for export.

    Raises:
      UserError: it is not a run of PPO, or has no checkpoint.
    """
    if session.config.stage != "ppo":
        raise UserError(f"{run_dir} is a {session.config.stage} run: only ppo trains a critic")
    ppo = algorithm_with(session)
    init = partial(init_state, ppo)
    return restore(find(run_dir), abstract(init, session.mesh)).critic.params


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


def check_minibatches_divide(session: Session) -> None:
    """The rows of an update must split evenly over the devices.

    Raises:
      UserError: naming the numbers.
    """
    batch, minibatches = session.config.batch, session.config.ppo.minibatches
    rows = batch.rows // (minibatches * batch.microbatches)
    split = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"batch.rows={batch.rows} in ppo.minibatches={minibatches} x batch.microbatches="
            f"{batch.microbatches} is {rows} rows at a time, which mesh data x fsdp = {split} does not divide"
        )


def init_state(ppo: Ppo, key: jax.Array) -> PpoState:
    """A fresh state (boxed parameters); it describes the shapes."""
    return PpoState(
        step=jnp.int32(0),
        actor=initializer(ppo.policy_model, ppo.actor_optimizer)(key),
        critic=initializer(ppo.scalar_model, ppo.critic_optimizer)(key),
    )


def fresh_state(ppo: Ppo, frozen: Frozen, abstract_state: PpoState) -> PpoState:
    """Step 0: the actor is a copy of the reference, the critic of the reward model."""
    return PpoState(
        step=jnp.int32(0),
        actor=start_from(frozen.reference.base, ppo.actor_optimizer, abstract_state.actor),
        critic=start_from(frozen.reward.base, ppo.critic_optimizer, abstract_state.critic),
    )


def iteration_flops(session: Session, tokens: int) -> float:
    """Model FLOPs of an iteration: a backward pass costs two forwards; decoding counts as one forward.

    Forwards of the policy: rollout, actor, reference; of the scalar model: critic, reward. Each epoch trains
    one of each, 3 forwards.
    """
    length, epochs = session.config.batch.sequence_length, session.config.ppo.epochs
    policy = train_flops_per_token(session.model, length) / 3
    scalar = train_flops_per_token(session.model, length, head=1) / 3
    return tokens * (policy * (3 + 3 * epochs) + scalar * (2 + 3 * epochs))


def check_reward_fits(session: Session) -> None:
    """The reward model must read the same token ids, and be the same kind of model, as the policy.

    Raises:
      UserError: it was trained with another tokenizer, or with other settings that shapes do not show.
    """
    reward_dir = Path(session.config.start.reward or "")
    if load_tokenizer(reward_dir).fingerprint != session.tokenizer.fingerprint:
        raise UserError(f"{reward_dir} was trained with another tokenizer than {session.config.start.policy}")
    check_same_model(session.model, reward_dir)


def heldout_evaluator(
    session: Session, ppo: Ppo, frozen: Frozen, questions: list[Question], length: int
) -> Callable[[PpoState], dict[str, float]]:
    """Held-out prompts answered by sampling as in training, and greedily.

    Figures: `score` of the reward model, `kl` to the reference in nats per response (k1), `finished` share;
    where every question has its answer, `exact_match` with it (which no model was shown), and the same for
    greedy replies.
    """
    config = session.config
    greedy = config.generation.model_copy(update={"temperature": 0.0})
    sampler = decoder_of(ppo.policy_model, session.mesh.devices.flat[0].platform)

    def judge(weights: Weights, prompts: PromptBatch, frozen: Frozen, key: jax.Array) -> tuple[Any, ...]:
        sampled, best = (
            generate(sampler, weights, prompts, key, how, ppo.stop_tokens, ppo.pad, ppo.never)
            for how in (config.generation, greedy)
        )
        targets_BR = algorithm.response_tokens(sampled)
        logps_BR, ref_logps_BR = (
            token_logps(algorithm.response_logits(ppo, w, sampled), targets_BR)
            for w in (weights, frozen.reference)
        )
        kl_B = jnp.sum(kl_k1(logps_BR, ref_logps_BR) * sampled.mask_BR, axis=1)
        return sampled, best, algorithm.scores(ppo, frozen.reward, sampled), kl_B

    reader = compile_reader(session.mesh, judge)

    def evaluate(state: PpoState) -> dict[str, float]:
        texts: list[str] = []
        greedy_texts: list[str] = []
        sums = {"score": 0.0, "kl": 0.0, "finished": 0.0}
        for number, (batch, real) in enumerate(
            loader.in_order(prompts_of(questions, length, ppo.pad), config.batch.rows)
        ):
            key = jax.random.fold_in(jax.random.key(config.run.seed), number)
            sampled, best, scores_B, kl_B = jax.device_get(
                reader(Weights(state.actor.params), batch, frozen, key)
            )
            texts += [reply_text(session.tokenizer, sampled, row) for row in range(real)]
            greedy_texts += [reply_text(session.tokenizer, best, row) for row in range(real)]
            for name, values in (("score", scores_B), ("kl", kl_B), ("finished", sampled.finished_B)):
                sums[name] += float(values[:real].sum())
        means = {name: total / len(questions) for name, total in sums.items()}
        if any(question.answer is None for question in questions):
            return means
        return means | {
            "exact_match": exact_match(texts, questions),
            "exact_match_greedy": exact_match(greedy_texts, questions),
        }

    return evaluate
