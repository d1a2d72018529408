"""What PPO compiles: rollout, judgement and learning, and the iteration that calls them.

`iterate` is the whole algorithm; the arithmetic of learning is in steps/ppo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxllm.config.generation import GenerationConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.root import Config
from maxllm.data.tokenizer import without_piece
from maxllm.errors import UserError
from maxllm.generate.decode import decoder_of, generate
from maxllm.losses.token import Shaping
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.parallel.mesh import check_batch_divides, platform_of
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import Metrics, Params, PromptBatch, Rollout
from maxllm.run.program import Compiled, Part, Program
from maxllm.run.session import Session
from maxllm.stages.program import abstract_start, kept_parameters
from maxllm.steps import ppo as algorithm
from maxllm.steps.ppo import Frozen, Learner, Model, Ppo, PpoState
from maxllm.steps.state import abstract, initializer, partition_of
from maxllm.weights import Weights


def iterate(
    parts: Compiled, state: PpoState, prompts: PromptBatch, frozen: Frozen
) -> tuple[PpoState, Metrics]:
    """One iteration of PPO: respond, judge, learn. Called on the host: what judges may be anything."""
    rollout = parts["rollout"](state.actor.params, state.step, prompts, frozen.reference)
    scores_B = parts["judge"](frozen.reward, rollout)
    return parts["learn"](state, rollout, scores_B, frozen)


def parts_of(
    ppo: Ppo, sampler: Llama, generation: GenerationConfig, seed: int
) -> dict[str, Callable[..., Any]]:
    """The pure functions that an iteration is made of; randomness is a function of the seed and the step.

    `sampler` is the policy's model in the layout that it decodes in.
    """

    def keys(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        rollout_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        return rollout_key, update_key

    def rollout(policy: Params, step: jax.Array, prompts: PromptBatch, reference: Weights) -> Rollout:
        weights = ppo.actor.weights(policy, reference)
        return respond(ppo, sampler, weights, prompts, keys(step)[0], generation)

    def judge(reward: Weights, rollout: Rollout) -> jax.Array:
        return algorithm.scores(ppo, reward, rollout)

    def learn(
        state: PpoState, rollout: Rollout, scores_B: jax.Array, frozen: Frozen
    ) -> tuple[PpoState, Metrics]:
        return algorithm.learn(ppo, state, rollout, scores_B, frozen, keys(state.step)[1])

    return {"rollout": rollout, "judge": judge, "learn": learn}


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
    # The critic's adapters are always fresh, so that the reward model has none.
    reference = abstract_start(config, ppo.actor.model, mesh)
    reward = abstract_start(config, ppo.critic.model, mesh).replace(adapters=None)
    frozen = Frozen(reference=reference, reward=reward)
    state = abstract(init, mesh, config.mesh.zero, config.mesh.offload)
    batch = PromptBatch(
        jax.ShapeDtypeStruct((config.batch.rows, prompt_length(config)), jnp.int32),
        jax.ShapeDtypeStruct((config.batch.rows,), jnp.int32),
        jax.ShapeDtypeStruct((config.batch.rows,), jnp.int32),
    )
    sampler = decoder_of(ppo.actor.model, platform_of(mesh))
    functions = parts_of(ppo, sampler, config.generation, config.run.seed)
    policy = (state.actor.params, state.step, batch, reference)
    rollout = jax.eval_shape(functions["rollout"], *policy)
    scores_B = jax.ShapeDtypeStruct((config.batch.rows,), jnp.float32)
    arguments = {
        "rollout": policy,
        "judge": (frozen.reward, rollout),
        "learn": (state, rollout, scores_B, frozen),
    }
    tokens = config.batch.rows * config.batch.sequence_length
    return Program(
        init=init,
        abstract_state=state,
        abstract_batch=batch,
        frozen=(frozen,),
        parts={
            name: Part(function=function, arguments=arguments[name], updates=name == "learn")
            for name, function in functions.items()
        },
        iterate=iterate,
        tokens_per_step=tokens,
        flops_per_step=iteration_flops(config, model, tokens),
        declared=partition_of(ppo.actor.model).declared,
        kept_parameters=kept_parameters(ppo.actor.model),
        trained=2,
        references=2,
        decodes=True,
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
        actor=learner(Llama(model, config.tuning), config.optimizer),
        critic=learner(ScalarModel(model, config.tuning), critic),
        shaping=Shaping(config.generation.temperature, never),
        stop_tokens=stop_tokens,
        pad=pad,
    )


def prompt_length(config: Config) -> int:
    """Positions of a row that a prompt may take."""
    return config.batch.sequence_length - config.generation.max_new_tokens


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


def iteration_flops(config: Config, model: ModelConfig, tokens: int) -> float:
    """Model FLOPs of an iteration: a backward pass costs two forwards; decoding counts as one forward.

    Forwards of the policy: rollout, actor, reference; of the scalar model: critic, reward. Each epoch trains
    one of each, 3 forwards.
    """
    length, epochs = config.batch.sequence_length, config.ppo.epochs
    policy = train_flops_per_token(model, length) / 3
    scalar = train_flops_per_token(model, length, head=1) / 3
    return tokens * (policy * (3 + 3 * epochs) + scalar * (2 + 3 * epochs))
