"""Adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors, which `peft` loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import LoraConfig, Tuning
from maxllm.errors import UserError
from maxllm.files import whole_folder, write_json
from maxllm.hf import mapping
from maxllm.hf.config import family_of
from maxllm.records import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LETTERS = {"_a": "lora_A.weight", "_b": "lora_B.weight", "_m": "lora_magnitude_vector"}
"""What our names of a low-rank adapter's parts end in, and PEFT's."""

VIRTUAL = "prompt_embeddings"
"""PEFT's name for what a prefix or a prompt is made of."""


def export_adapters(
    adapters: Params, config: ModelConfig, tuning: Tuning, base: str, out_dir: Path
) -> dict[str, Any]:
    """Writes the folder, whole or not at all.

    Args:
      adapters: the `adapters` collection of a `Llama`.
      config: the model that they adapt.
      tuning: what they are.
      base: what PEFT should load the adapters onto: a folder or a hub name.
      out_dir: absent, empty, or a former export of adapters.

    Returns:
      {"path", "tensors", "parameters", "bytes"}

    Raises:
      UserError: no architecture of Hugging Face is the model, so that there can be no base; or PEFT does not
        have such adapters.
    """
    from safetensors.numpy import save_file

    family_of(config)
    fields = adapter_config(config, tuning) | {"base_model_name_or_path": base}
    tensors = dict(peft_tensors(adapters, config))
    with whole_folder(out_dir, lambda folder: (folder / CONFIG).is_file()) as folder:
        write_json(folder / CONFIG, fields)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return {
        "path": str(out_dir),
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def peft_tensors(adapters: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's name and array of every adapter.

    A is [r, in] and B [out, r]; ours are [L, in, r] and [L, r, out]. A prefix is [P, L 2 G K], the keys of a
    layer before its values; ours are [L, P, G, K] each. A prompt is [P, D] in both.
    """
    flat = {path: np.asarray(array) for path, array in flatten_dict(adapters, sep="/").items()}
    for row in mapping.rows(config):
        for suffix, part in LETTERS.items():
            for layer, array in enumerate(flat.get(row.path + suffix, ())):
                name = row.hf_name.format(layer).removesuffix(".weight")
                yield f"base_model.model.{name}.{part}", np.ascontiguousarray(array.T)
    pair = [flat.get(f"{mapping.LAYERS}attention/prefix_{letter}") for letter in "kv"]
    if pair[0] is not None and pair[1] is not None:
        both_L2PGK = np.stack([pair[0], pair[1]], axis=1)
        P = both_L2PGK.shape[2]
        yield VIRTUAL, np.ascontiguousarray(np.moveaxis(both_L2PGK, 2, 0).reshape(P, -1))
    if "decoder/prompt" in flat:
        yield VIRTUAL, flat["decoder/prompt"]


def adapter_config(config: ModelConfig, tuning: Tuning) -> dict[str, Any]:
    """adapter_config.json, without the name of the base.

    Raises:
      UserError: PEFT has no such adapters, or not together.
    """
    if tuning.bottleneck is not None:
        raise UserError("PEFT has no bottleneck adapters")
    found = [
        lora_fields(tuning.lora) if tuning.lora else None,
        virtual_fields("PREFIX_TUNING", tuning.prefix.length, config) if tuning.prefix else None,
        virtual_fields("PROMPT_TUNING", tuning.prompt.length, config) if tuning.prompt else None,
    ]
    fields = [each for each in found if each is not None]
    if len(fields) != 1:
        raise UserError(f"{tuning.named()}: PEFT's folders have adapters of one kind")
    return {"task_type": "CAUSAL_LM", "inference_mode": True} | fields[0]


def lora_fields(lora: LoraConfig) -> dict[str, Any]:
    """Of low-rank adapters."""
    modules = {row.path.rpartition("/")[2]: row.hf_name.split(".")[-2] for row in mapping.TABLE}
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules[target] for target in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
    }


def virtual_fields(kind: str, length: int, config: ModelConfig) -> dict[str, Any]:
    """Of a prefix or a prompt; a prefix has the heads of keys and values, a prompt the model's width."""
    prefix = kind == "PREFIX_TUNING"
    heads = config.n_kv_heads if prefix else config.n_heads
    own = {"prefix_projection": False, "encoder_hidden_size": config.d_model}
    return {
        "peft_type": kind,
        "num_virtual_tokens": length,
        "num_layers": config.n_layers,
        "num_attention_heads": heads,
        "token_dim": heads * config.k_dim if prefix else config.d_model,
        "num_transformer_submodules": 1,
    } | (own if prefix else {"prompt_tuning_init": "RANDOM"})
