"""Export: the model in a run folder as a Hugging Face folder, checked against `transformers`.

maxllm export runs/tiny/ppo runs/tiny/hf
maxllm export runs/tiny/ppo runs/tiny/critic --critic
maxllm export runs/tiny/reward runs/tiny/judge --push me/judge
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from maxllm.data.chat import Message
from maxllm.data.render import render_to_reply
from maxllm.data.tokenizer import without_piece
from maxllm.errors import RunFailed, UserError
from maxllm.folder import RunFolder, Which
from maxllm.hf import export as hf
from maxllm.hf.hub import upload
from maxllm.hf.peft import export_adapters
from maxllm.hf.verify import TOLERANCE, has_torch, hf_scores, verify_greedy
from maxllm.hf.verify_tokenizer import check_tokenization
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.records import Params
from maxllm.run.restore import load_params
from maxllm.run.session import Session, reopen
from maxllm.stages import ppo
from maxllm.stages.chat import Policy
from maxllm.stages.registry import stage_of
from maxllm.stages.start import abstract_params, whole_params
from maxllm.steps.reward import score
from maxllm.weights import Weights

CHECK_TOKENS = 32
"""Greedy tokens compared per prompt."""

CHECK_PROMPTS = ("Hello", "To be, or not to be", "春眠不觉晓", "What is the largest digit?\n4711")


def run(
    folder: RunFolder,
    out_dir: Path,
    prompts: Sequence[str] = CHECK_PROMPTS,
    verify: bool = True,
    overrides: Sequence[str] = (),
    base: str | None = None,
    critic: bool = False,
    push: str | None = None,
    which: Which = "latest",
) -> dict[str, Any]:
    """Writes what a run trained, in its newest checkpoint or another one, as a folder, and where `push` names
    a repository of the hub, puts it there.

    A policy is written by `export_policy`; a reward model, or with `critic` the value model of a PPO run, by
    `export_scorer`. LoRA's adapters are merged into the model, unless `base` names what PEFT shall
    load them onto: then they are written alone.

    Returns:
      What the three return; `pushed`: the address of the hub's commit.

    Raises:
      UserError: the run has no adapters, critic or checkpoint, or the hub does not take the folder.
      RunFailed: ours and `transformers` do not agree; nothing is left at out_dir.
    """
    session = reopen(folder, overrides)
    if base is not None and critic:
        raise UserError("--base writes adapters, --critic a value model: give one of them")
    checkpoint = folder.find(which)
    if base is not None:
        written = export_tuned(session, checkpoint, out_dir, base)
    elif critic or stage_of(session.config.stage).replies(session) == "score":
        written = export_scorer(session, checkpoint, out_dir, prompts, verify, critic=critic)
    else:
        written = export_policy(session, checkpoint, out_dir, prompts, verify, overrides)
    return written | ({"pushed": upload(out_dir, push)} if push else {})


def export_policy(
    session: Session,
    checkpoint: Path,
    out_dir: Path,
    prompts: Sequence[str],
    verify: bool,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """A language model, after comparing greedy decoding of ours and of `transformers` token for token.

    Returns:
      What `hf.export` returns, and `greedy_identical`: True, or None where it was not checked because torch
      is missing or `verify` is False.

    Raises:
      RunFailed: the two do not agree; nothing is left at out_dir.
    """
    params = whole_params(session, checkpoint)
    check: dict[str, Any] | None = None

    def compare(folder: Path) -> None:
        nonlocal check
        if verify:
            check_tokenization(session.tokenizer, folder)
        check = greedy_check(checkpoint, folder, prompts, overrides) if verify else None
        if check is not None and not check["identical"]:
            first = check["first_difference"]
            raise RunFailed(f"{session.folder} does not decode in transformers as here: {first}")

    written = hf.export(
        params,
        session.model,
        session.tokenizer,
        out_dir,
        description=f"Trained with `maxllm {session.config.stage}`.",
        base=session.hf_config,
        base_generation=session.hf_generation,
        verify=compare,
    )
    return written | {
        "greedy_identical": None if check is None else True,
        "greedy_prompts": 0 if check is None else check["prompts"],
        "greedy_tokens": 0 if check is None else check["tokens"],
    }


def export_tuned(session: Session, checkpoint: Path, out_dir: Path, base: str) -> dict[str, Any]:
    """The adapters of a run as a PEFT folder.

    Raises:
      UserError: the run trained no adapters.
    """
    tuning = session.config.tuning
    if tuning is None or not tuning.adapters:
        raise UserError(f"{session.folder} trained no adapters: leave --base away to export the model")
    adapters = load_params(checkpoint, abstract_params(session, Llama(session.model, tuning)))
    return export_adapters(adapters, session.model, tuning, base, out_dir)


def export_scorer(
    session: Session,
    checkpoint: Path,
    out_dir: Path,
    prompts: Sequence[str],
    verify: bool,
    *,
    critic: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A reward model or critic as sequence classification with one label; `transformers` gives its scores.

    Returns:
      What `hf.export` returns, and `max_abs_score_diff`: None where it was not checked.

    Raises:
      UserError: the run has no critic.
      RunFailed: the scores differ; nothing is left at out_dir.
    """
    model = ScalarModel(session.model.model_copy(update={"dtype": "float32"}))
    if critic:
        params, what = ppo.critic_params(session, checkpoint), "The critic (value model) of `maxllm ppo`."
    else:
        params = whole_params(session, checkpoint, ScalarModel)
        what = "A reward model trained with `maxllm reward`."
    difference: float | None = None

    def compare(folder: Path) -> None:
        nonlocal difference
        if verify:
            check_tokenization(session.tokenizer, folder)
        if not (verify and has_torch()):
            return
        talks = [render_to_reply(session.tokenizer, conversation(prompt, "42")) for prompt in prompts]
        talks = [ids[: session.model.context] for ids in talks]
        scores = zip((score_of(model, params, ids) for ids in talks), hf_scores(folder, talks), strict=True)
        difference = max(abs(ours - theirs) for ours, theirs in scores)
        if not difference <= TOLERANCE[dtype]:
            raise RunFailed(f"{session.folder} scores otherwise in transformers: by up to {difference:.3g}")

    written = hf.export(
        params,
        session.model,
        session.tokenizer,
        out_dir,
        dtype=dtype,
        description=what,
        base=session.hf_config,
        head="score",
        verify=compare,
    )
    return written | {"max_abs_score_diff": difference}


def conversation(prompt: str, reply: str) -> list[Message]:
    """One question and its answer."""
    return [Message(role="user", content=prompt), Message(role="assistant", content=reply)]


def score_of(model: ScalarModel, params: Params, ids: Sequence[int]) -> float:
    """Our score of a whole conversation."""
    return float(score(model, Weights(params), jnp.array([ids]), jnp.array([len(ids)]))[0])


def greedy_check(
    checkpoint: Path, folder: Path, prompts: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any] | None:
    """Greedy replies of the checkpoint against those of the exported folder; None where torch is missing.

    Both compute in float32: in bfloat16 two right implementations differ by more than many a tie is wide.
    """
    run = RunFolder.of_checkpoint(checkpoint)
    session = reopen(run, overrides)
    tokens = min(CHECK_TOKENS, session.model.context // 2)
    settings = ["model.dtype=float32", "generation.temperature=0", f"generation.max_new_tokens={tokens}"]
    policy = Policy(run, [*overrides, *settings], int(checkpoint.name))
    # A model of short context is asked the beginnings of the prompts.
    ids = [policy.prompt_ids(prompt)[: policy.prompt_limit] for prompt in prompts]
    ours = [policy.reply(prompt)["tokens"] for prompt in ids]
    never = without_piece(session.tokenizer, session.model.vocab_size)
    return verify_greedy(folder, ids, ours, tokens, policy.session.tokenizer, never)
