"""What stages share around the loop: states that start from parameters, and replies to prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxllm import recipe
from maxllm.config.generation import GenerationConfig
from maxllm.config.lora import LoraConfig
from maxllm.config.stages import TRAINED
from maxllm.data import loader
from maxllm.data.ahead import Ahead
from maxllm.data.instruct import Question, pad_prompts
from maxllm.data.remote import RemoteArray
from maxllm.data.sources import Tally
from maxllm.data.tokenizer import Tokenizer, without_piece
from maxllm.folder import RunFolder
from maxllm.generate.decode import decoder_of, generate
from maxllm.model.adapters import merge
from maxllm.model.llama import Llama
from maxllm.optim import Optimizer
from maxllm.parallel import sharding
from maxllm.parallel.mesh import platform_of
from maxllm.records import LmBatch, Params, PromptBatch, Rollout
from maxllm.run.loop import Job, mean_over
from maxllm.run.parents import parent_of
from maxllm.run.program import compile_reader
from maxllm.run.restore import check_params, load_params
from maxllm.run.session import Session, say
from maxllm.stages.program import Trainer
from maxllm.steps.language import language_loss
from maxllm.steps.state import TrainState, abstract, init_params
from maxllm.steps.update import Loss, eval_step
from maxllm.weights import Weights


def say_sources(session: Session, tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """Says what became of the rows of every source, and returns it as plain data."""
    for tally in tallies:
        say(session, tally.line())
    return [tally.report() for tally in tallies]


def start_from(params: Params, optimizer: Optimizer, abstract_state: TrainState) -> TrainState:
    """Step 0 with given parameters and a fresh optimizer state, in the shardings of the abstract one."""

    def begin(params: Params) -> TrainState:
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(begin, out_shardings=sharding.shardings_of(abstract_state))(params)


def abstract_params(session: Session, model: Any) -> Params:
    """Shapes and shardings of what a checkpoint holds of a model: its adapters, if it has any."""
    return abstract(partial(init_params, model), session.mesh)


def policy_params(session: Session, checkpoint: Path) -> Params:
    """A checkpoint's language-model parameters on this session's mesh, its adapters merged into their model.

    Raises:
      UserError: the model that adapters were trained beside is gone, or another one now.
    """
    folder = RunFolder.of_checkpoint(checkpoint)
    config = recipe.of_run(folder)
    if config.lora is None:
        return load_params(checkpoint, abstract_params(session, Llama(session.model)))
    base = policy_params(session, parent_of(folder, config, "policy"))
    adapters = load_params(checkpoint, abstract_params(session, Llama(session.model, config.lora)))
    return merging(config.lora)(Weights(base, adapters)).base


def merging(lora: LoraConfig | None) -> Callable[[Weights], Weights]:
    """A compiled function that gives weights without adapters that compute the same."""
    return (lambda weights: weights) if lora is None else jax.jit(partial(merge, lora=lora))


def start_policy(session: Session) -> Callable[[], Params]:
    """Reads the parameters that a run starts from, when called; now their shapes are looked at, and told.

    Raises:
      UserError: there is no checkpoint, or one of another model.
    """
    checkpoint = session.parent("policy")
    lora = recipe.of_run(RunFolder.of_checkpoint(checkpoint)).lora
    check_start(session, checkpoint, abstract_params(session, Llama(session.model, lora)))
    return partial(policy_params, session, checkpoint)


def check_start(session: Session, checkpoint: Path, wanted: Params) -> None:
    """Looks at a checkpoint that a run starts from, and names it on the console; nothing is read yet.

    Raises:
      UserError: it is of another model.
      RunFailed: it is damaged.
    """
    check_params(checkpoint, wanted)
    folder = RunFolder.of_checkpoint(checkpoint)
    parent = recipe.of_run(folder)
    unfinished = parent.stage in TRAINED and folder.summary() is None
    more = f" of {parent.run.steps}: that run is not finished" if unfinished else ""
    say(session, f"starts from {folder.shown()}, step {checkpoint.name}{more}")


def language_job(
    session: Session,
    program: Trainer,
    *,
    fresh: Callable[[], TrainState],
    rows: LmBatch,
    heldout: Any,
    evaluate: Callable[[Params], dict[str, float]],
    best: tuple[str, Any],
    facts: dict[str, Any],
    store_heldout: bool = False,
    frozen: tuple[Weights, ...] = (),
) -> Job:
    """The loop's job for next-token prediction, in pretraining and SFT."""
    config = session.config
    batches: loader.Batches[LmBatch] = loader.ArrayBatches(rows, config.batch.rows, config.run.seed)
    return Job(
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


def heldout_language(session: Session, rows: LmBatch) -> Callable[[Weights], dict[str, float]]:
    """Loss (nats per weighted target) and next-token accuracy over held-out rows."""
    return heldout_loss(session, partial(language_loss, Llama(session.model)), rows)


def heldout_loss(
    session: Session, loss_fn: Callable[..., Loss], rows: Any, *frozen: Weights
) -> Callable[[Weights], dict[str, float]]:
    """A loss over held-out rows, and the metrics that come with it; `frozen` is what it reads besides."""
    reader = compile_reader(session.mesh, partial(eval_step, loss_fn=loss_fn))
    batches = partial(loader.in_order, rows, session.config.batch.rows)
    return lambda weights: mean_over(batches(), lambda batch: reader(weights, batch, *frozen))


def responder(session: Session, config: GenerationConfig) -> Callable[..., Rollout]:
    """Compiled `(weights, PromptBatch, key) -> Rollout` for this session's policy."""
    model = decoder_of(Llama(session.model), platform_of(session.mesh))
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


def exact_match(texts: Sequence[str], answers: Sequence[str | None]) -> float:
    """Share of replies equal to the known answer, white space around both ignored."""
    right = 0
    for text, answer in zip(texts, answers, strict=True):
        assert answer is not None, "whoever asks knows the answers"
        right += text.strip() == answer.strip()
    return right / len(answers)
