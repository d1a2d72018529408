"""generation_config.json: how `transformers` decodes by default, to our settings and back.

What we follow of it becomes the section `generation` of a run; the file itself is kept beside the run, and on
export comes out again as it was, but for the stop tokens that the model has besides, and for the pad token,
which is none of these where the vocabulary has another, and the same in all files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxllm.config.generation import GenerationConfig
from maxllm.data.tokenizer import Tokenizer
from maxllm.hf.tokenizer_read import ids_of

NO_EFFECT: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "stop_strings": None,
}
"""Fields that change what is decoded, which ours does not have -> the value that changes nothing."""


def settings_of(fields: Mapping[str, Any] | None, context: int) -> dict[str, Any]:
    """The section `generation` of a run with an imported model.

    Args:
      fields: generation_config.json, where there is one.
      context: tokens that the model reads.
    """
    fields = fields or {}
    longest = fields.get("max_new_tokens")
    fits = isinstance(longest, int) and 0 < longest < context
    settings: dict[str, Any] = {"max_new_tokens": longest if fits else min(256, max(1, context // 2))}
    if fields.get("do_sample"):
        # Defaults are those of transformers, whose top_k is 50.
        defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
        given = {name: fields[name] for name in defaults if fields.get(name) is not None}
        settings |= defaults | given
    return settings


def not_followed(fields: Mapping[str, Any] | None) -> list[str]:
    """`name=value` of what the file asks for and our decoding does not do."""
    given = {name: value for name, value in (fields or {}).items() if name in NO_EFFECT}
    return [f"{name}={value}" for name, value in given.items() if value not in (None, NO_EFFECT[name])]


def fields_of(
    tokenizer: Tokenizer,
    generation: GenerationConfig | None = None,
    base: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """generation_config.json. Sampling fields are there only when sampling: transformers warns otherwise.

    Args:
      tokenizer: names the special ids.
      generation: decoding defaults; those of `base`, or else greedy, when absent.
      base: the generation_config.json that the model came with: what we do not set stays as it was.
      model: config.json, whose stop tokens are the model's too.
    """
    base, named = dict(base or {}), ids_of((base or {}).get("eos_token_id"))
    stops = list(dict.fromkeys([*named, *ids_of((model or {}).get("eos_token_id")), *tokenizer.stop_tokens]))
    special = {"bos_token_id": base.get("bos_token_id", tokenizer.bos), "pad_token_id": tokenizer.pad}
    special["eos_token_id"] = base["eos_token_id"] if stops == named else stops
    if generation is None and base:
        return base | special
    return base | special | decoding(generation or GenerationConfig())


def decoding(generation: GenerationConfig) -> dict[str, Any]:
    """Our decoding defaults in Hugging Face's words."""
    sampling = {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    return {
        "max_new_tokens": generation.max_new_tokens,
        "do_sample": generation.temperature > 0,
        **(sampling if generation.temperature > 0 else {}),
    }
