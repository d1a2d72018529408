"""Export: the policy in a run folder as a Hugging Face folder, checked against `transformers`.

maxllm export runs/tiny/ppo runs/tiny/hf
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from maxllm.errors import RunFailed, UserError
from maxllm.hf import export as hf
from maxllm.hf.verify import verify_greedy
from maxllm.run.session import reopen
from maxllm.stages.chat import Speaker
from maxllm.stages.shared import policy_params

CHECK_TOKENS = 32
"""Greedy tokens compared per prompt."""

CHECK_PROMPTS = ("Hello", "To be, or not to be", "春眠不觉晓", "What is the largest digit?\n4711")


def run(
    run_dir: Path,
    out_dir: Path,
    prompts: Sequence[str] = CHECK_PROMPTS,
    verify: bool = True,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the folder, after comparing greedy decoding of ours and of `transformers` token for token.

    Returns:
      What `hf.export` returns, and `greedy_identical`: True, or None where it was not checked because torch
      is missing or `verify` is False.

    Raises:
      RunFailed: the two do not agree; nothing is left at out_dir.
    """
    session = reopen(run_dir, overrides)
    if session.config.stage == "reward":
        raise UserError(f"{run_dir} holds a reward model; exporting it is not there yet")
    params = jax.device_get(policy_params(session, run_dir))
    check: dict[str, Any] | None = None

    def compare(folder: Path) -> None:
        nonlocal check
        check = greedy_check(run_dir, folder, prompts, overrides) if verify else None
        if check is not None and not check["identical"]:
            raise RunFailed(f"{run_dir} does not decode in transformers as here: {check['first_difference']}")

    written = hf.export(
        params,
        session.model,
        session.tokenizer,
        out_dir,
        description=f"Trained with `maxllm {session.config.stage}`.",
        base=session.hf_config,
        verify=compare,
    )
    return written | {
        "greedy_identical": None if check is None else True,
        "greedy_prompts": 0 if check is None else check["prompts"],
        "greedy_tokens": 0 if check is None else check["tokens"],
    }


def greedy_check(
    run_dir: Path, folder: Path, prompts: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any] | None:
    """Greedy replies of the checkpoint against those of the exported folder; None where torch is missing.

    Both compute in float32: in bfloat16 two right implementations differ by more than many a tie is wide.
    """
    session = reopen(run_dir, overrides)
    tokens = min(CHECK_TOKENS, session.model.max_seq_len // 2)
    settings = ["model.dtype=float32", "generation.temperature=0", f"generation.max_new_tokens={tokens}"]
    speaker = Speaker(run_dir, [*overrides, *settings])
    # A model of short context is asked the beginnings of the prompts.
    ids = [speaker.prompt_ids(prompt)[: speaker.room] for prompt in prompts]
    ours = [speaker.reply(prompt)["tokens"] for prompt in ids]
    return verify_greedy(folder, ids, ours, tokens, speaker.session.tokenizer)
