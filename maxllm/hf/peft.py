"""Adapters as a PEFT folder, adapter_config.json and adapter_model.safetensors, in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import LoraConfig, PrefixConfig, PromptConfig, Tuning
from maxllm.errors import UserError
from maxllm.files import read_json, whole_folder, write_json
from maxllm.hf import mapping
from maxllm.hf.config import family_of
from maxllm.model.forward import init_weights
from maxllm.model.llama import Llama
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


# --- and back ----------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "prefix_projection": False,
}
"""Fields that give adapters something ours do not have -> the value that does not."""


def read_adapters(folder: Path, config: ModelConfig) -> tuple[Tuning, Params]:
    """What a folder of PEFT holds, for a model: (what they are, the `adapters` collection in float32).

    Raises:
      UserError: it is no such folder, or the adapters are of another kind or for another model.
    """
    from safetensors.numpy import load_file

    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is no folder of PEFT's adapters")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; adapters in a pickle file are not read")
    fields = read_json(folder / CONFIG)
    for name, plain in PLAIN.items():
        if fields.get(name, plain) not in (plain, None, [], {}):
            raise UserError(f"{folder / CONFIG}: {name}={fields[name]} is not what adapters can have here")
    tensors = {name: array.astype(np.float32) for name, array in load_file(folder / WEIGHTS).items()}
    match fields.get("peft_type"):
        case "LORA":
            return low_rank(folder, fields, tensors, config)
        case "PREFIX_TUNING" | "PROMPT_TUNING" as kind:
            return virtual(folder, kind, fields["num_virtual_tokens"], tensors, config)
        case kind:
            raise UserError(f"{folder / CONFIG}: adapters of peft_type={kind} are none of ours")


def virtual(
    folder: Path, kind: str, P: int, tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[Tuning, Params]:
    """`read_adapters` of P keys and values, or embeddings."""
    whole, prefix = tensors.get(VIRTUAL), kind == "PREFIX_TUNING"
    L, heads = config.n_layers, (config.n_kv_heads, config.k_dim)
    wanted = (P, L * 2 * math.prod(heads) if prefix else config.d_model)
    if whole is None or whole.shape != wanted:
        has = "missing" if whole is None else f"{whole.shape}"
        raise UserError(f"{folder / WEIGHTS} is not of this model: {VIRTUAL} is {has}, not {wanted}")
    if not prefix:
        return Tuning(prompt=PromptConfig(length=P)), {"decoder": {"prompt": whole}}
    both_L2PGK = np.moveaxis(whole.reshape(P, L, 2, *heads), 0, 2)
    attention = {"prefix_k": both_L2PGK[:, 0].copy(), "prefix_v": both_L2PGK[:, 1].copy()}
    return Tuning(prefix=PrefixConfig(length=P)), {"decoder": {"layers": {"attention": attention}}}


def low_rank(
    folder: Path, fields: Mapping[str, Any], tensors: dict[str, np.ndarray], config: ModelConfig
) -> tuple[Tuning, Params]:
    """`read_adapters` of LoRA, in every layer alike; `tensors` is emptied."""
    found: dict[str, np.ndarray] = {}
    for row in mapping.rows(config):
        for suffix, part in LETTERS.items():
            module = row.hf_name.removesuffix(".weight")
            names = [f"base_model.model.{module.format(layer)}.{part}" for layer in range(config.n_layers)]
            if all(name in tensors for name in names):
                found[row.path + suffix] = np.stack([tensors.pop(name).T for name in names])
    if tensors or not found:
        some = f"{min(tensors)} has no place in it" if tensors else "there is no low-rank adapter"
        raise UserError(f"{folder / WEIGHTS} is not of this model: {some}")
    targets = tuple(path.rpartition("/")[2].removesuffix("_a") for path in found if path.endswith("_a"))
    lora = LoraConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout", 0.0),
        rank_stabilized=fields.get("use_rslora", False),
        dora=fields.get("use_dora", False),
        targets=targets,
    )
    check_shapes(folder, found, Llama(config.computed_in("float32"), Tuning(lora)))
    return Tuning(lora), mapping.nest(found.items())


def check_shapes(folder: Path, found: Mapping[str, np.ndarray], model: Llama) -> None:
    """Whether adapters are as wide as a model.

    Raises:
      UserError: naming one that is not.
    """
    adapters = jax.eval_shape(lambda key: nn.unbox(init_weights(model, key)).adapters, jax.random.key(0))
    wanted = {path: leaf.shape for path, leaf in flatten_dict(adapters, sep="/").items()}
    for path in sorted(wanted.keys() | found.keys()):
        has = found[path].shape if path in found else "missing"
        if has != wanted.get(path):
            wants = wanted.get(path)
            raise UserError(f"{folder / WEIGHTS} is not of this model: {path} is {has}, not {wants}")
