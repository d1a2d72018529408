"""The proof of a conversion: the same bytes, and `transformers` saying the same on the same tokens."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxllm.config.model import ModelConfig
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import RunFailed, listed
from maxllm.hf.mapping import Head
from maxllm.hf.source import Source
from maxllm.hf.write import hf_tensors
from maxllm.records import Params

TOLERANCE = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 5e-1}
"""Largest |logit difference| by the type that weights were rounded to (float32: not rounded). Logits are of
order 10; both sides compute in float32, whose error over some dozens of layers stays below 1e-3, and rounding
weights to 11 or 8 bits moves a logit by about 10 x 2^-11 or 10 x 2^-8, times sqrt(layers)."""


def has_torch() -> bool:
    """Whether verification is possible here."""
    return importlib.util.find_spec("torch") is not None


def check_tensors(
    source: Source, params: Params, config: ModelConfig, dtype: np.dtype | None = None, head: Head = "lm"
) -> int:
    """Compares every tensor of a source with ours, bit for bit, one at a time.

    Args:
      source: the weights under Hugging Face's names.
      params: ours.
      config: the model.
      dtype: the type both are compared in; that of each array of ours when absent.
      head: "score" for the parameters of a `ScalarModel`.

    Returns:
      How many tensors there are, all the same.

    Raises:
      RunFailed: naming tensors that differ, or hold NaN or infinity.
    """
    different, broken, count = [], [], 0
    for name, ours in hf_tensors(params, config, dtype, head):
        theirs = source.read(name).astype(ours.dtype, copy=False)
        count += 1
        bits = np.dtype(f"u{ours.dtype.itemsize}")
        if not np.array_equal(theirs.view(bits), ours.view(bits)):
            different.append(name)
        elif not np.isfinite(ours).all():
            broken.append(name)
    if different:
        raise RunFailed(
            f"{len(different)} of {count} tensors are not those of {source.origin}: {listed(different)}"
        )
    if broken:
        raise RunFailed(f"the weights in {source.origin} hold NaN or infinity: in {listed(broken)}")
    return count


def compare_logits(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> dict[str, float]:
    """How two implementations differ on the same tokens.

    Returns:
      {"max_abs_logit_diff"; "mean_kl": KL(theirs || ours), nats per position; "top1_agreement": 0..1}
    """
    difference = np.abs(ours_BTV - theirs_BTV).max()
    ours, theirs = log_softmax(ours_BTV), log_softmax(theirs_BTV)
    kl = np.sum(np.exp(theirs) * (theirs - ours), axis=-1).mean()
    top1 = np.mean(ours_BTV.argmax(-1) == theirs_BTV.argmax(-1))
    return {"max_abs_logit_diff": float(difference), "mean_kl": float(kl), "top1_agreement": float(top1)}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64: a KL of 1e-9 is to be seen."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def hf_logits(folder: str | os.PathLike[str], tokens_BT: np.ndarray, gguf: str | None = None) -> np.ndarray:
    """Logits [B, T, V] of `transformers` in float32; `gguf` names a file in the folder to read instead."""
    import torch
    from transformers import AutoModelForCausalLM

    model = hf_model(AutoModelForCausalLM, folder, **({"gguf_file": gguf} if gguf else {}))
    with torch.no_grad():
        return model(torch.tensor(tokens_BT)).logits.numpy()


def hf_scores(folder: str | os.PathLike[str], sequences: Sequence[Sequence[int]]) -> list[float]:
    """What `transformers` scores each sequence with, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = hf_model(AutoModelForSequenceClassification, folder)
    with torch.no_grad():
        return [float(model(torch.tensor([list(ids)])).logits[0, 0]) for ids in sequences]


def hf_model(auto: Any, folder: str | os.PathLike[str], **more: Any) -> Any:
    """A model of one of the auto classes in float32, from this machine and without its progress bar."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    return auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **more).eval()


def verify_greedy(
    out_dir: str | os.PathLike[str],
    prompts_ids: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer,
    never: Sequence[int] = (),
) -> dict[str, Any] | None:
    """Greedy decoding by `transformers` from the folder, in float32, against our own tokens.

    Args:
      out_dir: an exported folder.
      prompts_ids: token ids of each prompt, unpadded.
      ours: generated ids of each prompt, ending with the stop token if one came.
      max_new_tokens: the limit under which `ours` was generated.
      tokenizer: knows the ids that stop.
      never: ids that ours does not generate.

    Returns:
      {"identical", "prompts", "tokens", "first_difference"}: tokens compared, and a sentence or None. The
      sentence has the logit gap between the two tokens: under 1e-4 it is a tie that rounding decides, more
      is a wrong export. None when torch is not installed: nothing was checked.
    """
    if not has_torch():
        return None
    from transformers import AutoModelForCausalLM

    model = hf_model(AutoModelForCausalLM, out_dir)
    first_difference, tokens = None, 0
    for number, (prompt, expected) in enumerate(zip(prompts_ids, ours, strict=True)):
        found = greedy(model, list(prompt), max_new_tokens, tokenizer, never)
        tokens += len(found)
        if first_difference is None and found != list(expected):
            first_difference = difference(model, number, list(prompt), list(expected), found)
    return {
        "identical": first_difference is None,
        "prompts": len(prompts_ids),
        "tokens": tokens,
        "first_difference": first_difference,
    }


def greedy(
    model: Any, prompt: list[int], max_new_tokens: int, tokenizer: Tokenizer, never: Sequence[int] = ()
) -> list[int]:
    """The ids `transformers` generates after a prompt, whatever sampling the folder's defaults ask for."""
    import torch
    from transformers import GenerationConfig as HfGenerationConfig

    settings = HfGenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos,
        eos_token_id=list(tokenizer.stop_tokens),
        pad_token_id=tokenizer.pad,
        suppress_tokens=list(never) or None,
    )
    # generate() takes what `settings` leaves open from the model's defaults: those must not sample either.
    model.generation_config = settings
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, len(prompt) :].tolist()


def difference(model: Any, number: int, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """A sentence on the first token in which two generations differ, with the logits' verdict."""
    import torch

    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None:
        return f"prompt {number}: ours has {len(ours)} tokens, Hugging Face {len(theirs)}, equal up to there"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + theirs[:same]])).logits[0, -1]
    gap = float(logits[theirs[same]] - logits[ours[same]])
    return (
        f"prompt {number}, generated token {same}: ours {ours[same]}, Hugging Face {theirs[same]} "
        f"(its logit is {gap:.3g} higher there)"
    )
