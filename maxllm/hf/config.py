"""Our model configuration as `transformers.LlamaConfig`, and back: lossless or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from maxllm.config import ModelConfig
from maxllm.data.tokenizer import BOS, EOS, IM_END, PAD
from maxllm.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig

STOP_IDS = [EOS, IM_END]
"""Generation ends at the end of a document or of a turn."""

FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "attention_dropout": "attention_dropout",
}
"""Ours -> Hugging Face's, where the value is the same; head_dim and the rotary fields are apart."""

ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
"""`RopeScaling` -> the llama3 entries of `rope_parameters`."""

LOCAL_FIELDS = ("embedding_dropout", "residual_dropout", "dtype", "remat", "scan_unroll")
"""How we compute, not what the model is: Hugging Face has no place for them."""

FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""What every model of ours is."""


def model_config_to_hf(config: ModelConfig) -> LlamaConfig:
    """The `LlamaConfig` of a model that uses our special tokens, weights in float32.

    LOCAL_FIELDS have no place in it; see `model_config_from_hf`.

    Raises:
      UserError: Hugging Face refuses the values (n_heads must divide d_model even when head_dim is given).
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    try:
        return LlamaConfig(
            **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
            head_dim=config.k_dim,
            hidden_act=FIXED["hidden_act"],
            attention_bias=FIXED["attention_bias"],
            mlp_bias=FIXED["mlp_bias"],
            rope_parameters=rope_parameters(config),
            bos_token_id=BOS,
            eos_token_id=STOP_IDS,
            pad_token_id=PAD,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
        )
    except StrictDataclassError as error:
        raise UserError(
            f"Hugging Face's LlamaConfig refuses the model: {' '.join(str(error).split())}"
        ) from None


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The rotary entry of transformers 5."""
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in ROPE_FIELDS.items()}
    return {"rope_type": "llama3", "rope_theta": config.rope_theta, **scaling}


def model_config_from_hf(hf_config: PreTrainedConfig, like: ModelConfig | None = None) -> ModelConfig:
    """Our configuration of a Hugging Face one.

    A head_dim equal to d_model / n_heads comes back as None, which means the same.

    Args:
      hf_config: as `transformers.AutoConfig` reads it.
      like: supplies LOCAL_FIELDS; their defaults are used without it (dtype bfloat16).

    Raises:
      UserError: naming every field, with its value, that our model does not have, or that is impossible.
    """
    check_carried(hf_config)
    rope = hf_config.rope_parameters
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = {ours: rope[theirs] for ours, theirs in ROPE_FIELDS.items()}  # validated with the rest
    d_model, n_heads, head_dim = hf_config.hidden_size, hf_config.num_attention_heads, hf_config.head_dim
    local = {name: getattr(like, name) for name in LOCAL_FIELDS} if like else {}
    try:
        return ModelConfig.model_validate(
            {ours: getattr(hf_config, theirs) for ours, theirs in FIELDS.items()}
            | {"head_dim": None if head_dim * n_heads == d_model else head_dim}
            | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
            | local
        )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise UserError(f"the Hugging Face configuration is not one of our LLaMA: {reasons}") from None


def check_carried(hf_config: PreTrainedConfig) -> None:
    """Refuses what our model would compute differently.

    Raises:
      UserError: naming every such field and its value.
    """
    if hf_config.model_type != FIXED["model_type"]:  # another model has other fields: stop here
        raise UserError(f"a Hugging Face model with model_type={hf_config.model_type!r} is not a LLaMA")
    found = {name: getattr(hf_config, name) for name in FIXED}
    problems = [f"{name}={value!r}" for name, value in found.items() if value != FIXED[name]]
    if getattr(hf_config, "quantization_config", None):  # present only on quantized models
        problems.append(f"quantization_config={hf_config.quantization_config!r}")
    rope = hf_config.rope_parameters
    carried = {"rope_type", "rope_theta", "type"}  # `type` is 4.x's older spelling of rope_type
    if rope["rope_type"] == "llama3":
        carried |= set(ROPE_FIELDS.values())
    if rope["rope_type"] not in ("default", "llama3"):
        problems.append(f"rope_type={rope['rope_type']!r}")
    else:
        problems += [f"rope_parameters.{name}={rope[name]!r}" for name in sorted(rope.keys() - carried)]
        problems += [f"rope_parameters.{name} missing" for name in sorted(carried - rope.keys() - {"type"})]
    if problems:
        raise UserError(f"the Hugging Face configuration has what our LLaMA does not: {', '.join(problems)}")
