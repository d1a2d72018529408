"""Our model configuration as a Hugging Face `config.json`, and back: lossless or an error.

One decoder serves several of their families; a flag or two of ours tells them apart (FAMILIES). Fields that
we do not read stay in a copy of the original config.json beside the run, and come out again on export.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from maxllm.config.model import ModelConfig
from maxllm.config.section import Effect
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError, listed
from maxllm.hf.mapping import Head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
"""Ours -> Hugging Face's, where the value is the same; head_dim, rotary fields and families are apart."""

LLAMA3_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
YARN_FIELDS = {
    "factor": "factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": LLAMA3_FIELDS,
    "yarn": YARN_FIELDS,
}
"""rope_type -> the fields of `RopeScaling` and what `rope_parameters` calls them."""

ROPE_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor", "truncate"}
"""Entries that have the same default on both sides."""

LOCAL_FIELDS = tuple(
    name
    for name, effect in ModelConfig.effects().items()
    if name in ModelConfig.model_fields and effect is not Effect.MODEL and name not in FIELDS
)
"""How we train and compute, not what the model is: Hugging Face has no place for them."""


# --- families ----------------------------------------------------------------------------------------------


def llama_flags(config: PreTrainedConfig) -> dict[str, Any]:
    """LLaMA 1 to 3, and everything with model_type llama."""
    return {"attention_bias": "qkvo" if config.attention_bias else "none", "mlp_bias": config.mlp_bias}


def mistral_flags(config: PreTrainedConfig) -> dict[str, Any]:
    """Mistral: a sliding window, in its first version."""
    return {"sliding_window": config.sliding_window}


def qwen2_flags(config: PreTrainedConfig) -> dict[str, Any]:
    """Qwen2 and 2.5: biases on queries, keys and values."""
    return {"attention_bias": "qkv", "sliding_window": one_window(config)}


def qwen3_flags(config: PreTrainedConfig) -> dict[str, Any]:
    """Qwen3: normalized queries and keys."""
    bias = "qkvo" if config.attention_bias else "none"
    return {"qk_norm": True, "attention_bias": bias, "sliding_window": one_window(config)}


def one_window(config: PreTrainedConfig) -> int | None:
    """The window of every layer.

    Raises:
      UserError: some layers have one and others do not.
    """
    kinds = set(config.layer_types)
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return config.sliding_window
    raise UserError(
        f"the Hugging Face configuration mixes {' and '.join(sorted(kinds))} layers "
        f"(max_window_layers={config.max_window_layers}); ours are all alike"
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": llama_flags,
    "mistral": mistral_flags,
    "qwen2": qwen2_flags,
    "qwen3": qwen3_flags,
}
"""model_type -> what our flags are, read from its configuration."""


def family_name(family: str, head: Head) -> str:
    """The class in `transformers`: LlamaForCausalLM, Qwen2ForSequenceClassification."""
    return f"{family.capitalize()}For{'CausalLM' if head == 'lm' else 'SequenceClassification'}"


def family_of(config: ModelConfig) -> str:
    """The model_type that computes what a configuration says.

    Raises:
      UserError: none does.
    """
    if config.position != "rope":
        raise UserError(f"no Hugging Face architecture has position={config.position} and the rest of ours")
    windowed = config.sliding_window is not None
    candidates = {
        "llama": not config.qk_norm and config.attention_bias != "qkv" and not windowed,
        "mistral": not config.qk_norm and config.attention_bias == "none" and not config.mlp_bias,
        "qwen2": not config.qk_norm and config.attention_bias == "qkv" and not config.mlp_bias,
        "qwen3": config.qk_norm and config.attention_bias != "qkv" and not config.mlp_bias,
    }
    for family, fits in candidates.items():
        if fits and not (family == "qwen2" and config.head_dim is not None):
            return family
    flags = ("attention_bias", "mlp_bias", "qk_norm", "sliding_window", "head_dim")
    chosen = ", ".join(f"{name}={getattr(config, name)}" for name in flags)
    raise UserError(f"no Hugging Face architecture has {chosen}")


# --- ours to theirs ----------------------------------------------------------------------------------------


def hf_config_of(
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    base: Mapping[str, Any] | None = None,
    head: Head = "lm",
) -> dict[str, Any]:
    """config.json of a model, as a dict.

    Args:
      config: the model; LOCAL_FIELDS have no place in config.json.
      tokenizer: names the special ids.
      dtype: of the weights.
      base: the config.json the model came with: what we do not set stays as it was.
      head: "score" for a reward model, sequence classification with one label.

    Raises:
      UserError: Hugging Face refuses the values (n_heads must divide d_model even when head_dim is given).
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    family = family_of(config)
    fields: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= family_fields(family, config)
    if family != "qwen2":
        fields["head_dim"] = config.k_dim
    # A configuration names the type of its weights once: as `dtype`, or `torch_dtype` in older ones.
    dtype_name = "torch_dtype" if base is not None and "torch_dtype" in base else "dtype"
    fields |= {"hidden_act": "silu", "rope_parameters": rope_parameters(config), dtype_name: dtype}
    fields |= {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad}
    fields |= {"eos_token_id": list(tokenizer.stop_tokens), "architectures": [family_name(family, head)]}
    if head == "score":
        fields["num_labels"] = 1
    try:
        made = AutoConfig.for_model(family, **fields).to_dict()
    except StrictDataclassError as error:
        raise UserError(
            f"Hugging Face's configuration refuses the model: {' '.join(str(error).split())}"
        ) from None
    if base is None:
        return with_old_rope(made)
    made.pop("dtype")
    own = {name: value for name, value in base.items() if name not in ("dtype", "torch_dtype")}
    own |= {dtype_name: dtype, "pad_token_id": tokenizer.pad}
    if carried(config_of(base, "config.json")) == carried(config):
        kept = {"architectures": fields["architectures"]}
        kept |= {name: made[name] for name in ("id2label", "label2id") if head == "score"}
        return with_old_rope(made) | own | kept
    if base.get("model_type") == family:
        special = {"bos_token_id", "eos_token_id"}  # the model came with its own
        ours = {name: value for name, value in fields.items() if name not in special}
        return made | own | with_old_rope(ours)
    return with_old_rope(made) | {dtype_name: dtype}


def carried(config: ModelConfig) -> dict[str, Any]:
    """What both sides have a place for."""
    return config.model_dump(exclude=set(LOCAL_FIELDS))


def family_fields(family: str, config: ModelConfig) -> dict[str, Any]:
    """What a family's configuration has besides FIELDS."""
    windowed = config.sliding_window is not None
    layer_type = "sliding_attention" if windowed else "full_attention"
    windows = {
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if windowed else config.n_layers,
        "layer_types": [layer_type] * config.n_layers,
    }
    match family:
        case "llama":
            return {"attention_bias": config.attention_bias == "qkvo", "mlp_bias": config.mlp_bias}
        case "mistral":
            return {"sliding_window": config.sliding_window}
        case "qwen2":
            return windows
        case _:
            return windows | {"attention_bias": config.attention_bias == "qkvo"}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The rotary entry of transformers 5."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    fields = {theirs: getattr(scaling, ours) for ours, theirs in ROPE_FIELDS[scaling.type].items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    return {"rope_type": scaling.type, "rope_theta": config.rope_theta, **fields}


def with_old_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Adds the rotary fields also where transformers 4.x looks for them.

    4.x ignores rope_parameters, and would silently take theta 10000 and no scaling.
    """
    rope = dict(fields["rope_parameters"])
    theta = rope.pop("rope_theta")
    return fields | {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}


# --- theirs to ours ----------------------------------------------------------------------------------------


def config_of(fields: Mapping[str, Any], origin: str) -> ModelConfig:
    """Our configuration of a config.json.

    Raises:
      UserError: it is no configuration of a model that ours can be.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{origin} cannot be read: it names no model_type")
    check_family(model_type)
    try:
        hf_config = AutoConfig.for_model(**{**fields})
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(f"{origin} cannot be read: {' '.join(str(error).split())}") from None
    return model_config_from_hf(hf_config)


def model_config_from_hf(hf_config: PreTrainedConfig, like: ModelConfig | None = None) -> ModelConfig:
    """Our configuration of a Hugging Face one.

    A head_dim equal to d_model / n_heads comes back as None, which means the same.

    Args:
      hf_config: as `transformers.AutoConfig` reads it.
      like: supplies LOCAL_FIELDS; their defaults are used without it.

    Raises:
      UserError: naming every field, with its value, that our model does not have, or that is impossible.
    """
    check_carried(hf_config)
    flags = FAMILIES[hf_config.model_type](hf_config)
    rope = hf_config.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        names = ROPE_FIELDS[rope["rope_type"]].items()
        given = {ours: rope[theirs] for ours, theirs in names if rope.get(theirs) is not None}
        scaling = {"type": rope["rope_type"], **given}  # validated with the rest
    d_model, n_heads = hf_config.hidden_size, hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or d_model // n_heads  # Qwen2 has no such field
    local = {name: getattr(like, name) for name in LOCAL_FIELDS} if like else {}
    try:
        return ModelConfig.model_validate(
            {ours: getattr(hf_config, theirs) for ours, theirs in FIELDS.items()}
            | {"head_dim": None if head_dim * n_heads == d_model else head_dim}
            | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
            | flags
            | local
        )
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()]
        raise UserError(
            f"the Hugging Face configuration is not one of our models: {listed(reasons, between='; ')}"
        ) from None


def check_carried(hf_config: PreTrainedConfig) -> None:
    """Refuses what our model would compute differently.

    Raises:
      UserError: naming every such field and its value.
    """
    check_family(hf_config.model_type)
    problems = []
    if hf_config.hidden_act != "silu":
        problems.append(f"hidden_act={hf_config.hidden_act!r}")
    if getattr(hf_config, "quantization_config", None):  # present only on quantized models
        problems.append(f"quantization_config={hf_config.quantization_config!r}")
    rope = hf_config.rope_parameters
    if rope["rope_type"] not in ROPE_FIELDS:
        problems.append(f"rope_type={rope['rope_type']!r}")
    else:
        known = set(ROPE_FIELDS[rope["rope_type"]].values())
        carried = known | {"rope_type", "rope_theta", "type"}  # `type` is 4.x's older spelling of rope_type
        if rope["rope_type"] == "dynamic":
            carried.add("original_max_position_embeddings")  # transformers fills it in, and does not read it
        problems += [
            f"rope_parameters.{name}={rope[name]!r}"
            for name in sorted(rope.keys() - carried)
            if rope[name] is not None and not (name == "partial_rotary_factor" and rope[name] == 1)
        ]
        required = known - ROPE_OPTIONAL
        problems += [f"rope_parameters.{name} missing" for name in sorted(required - rope.keys())]
    if problems:
        raise UserError(f"the Hugging Face configuration has what our model does not: {listed(problems)}")


def check_family(model_type: str) -> None:
    """Refuses an architecture that is not one of ours.

    Raises:
      UserError: naming it and the closest one of ours.
    """
    if model_type not in FAMILIES:
        closest = [*difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.5), "llama"][0]
        raise UserError(
            f"a Hugging Face model with model_type={model_type!r} is not supported "
            f"(supported: {', '.join(FAMILIES)}; the closest is {closest})"
        )
