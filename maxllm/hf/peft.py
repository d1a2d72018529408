"""LoRA adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors, which `peft` loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from maxllm.config.lora import LoraConfig
from maxllm.config.model import ModelConfig
from maxllm.files import whole_folder, write_json
from maxllm.hf import mapping
from maxllm.hf.config import family_of
from maxllm.records import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapters(
    adapters: Params, config: ModelConfig, lora: LoraConfig, base: str, out_dir: Path
) -> dict[str, Any]:
    """Writes the folder, whole or not at all.

    Args:
      adapters: the `lora` collection of a `Llama`.
      config: the model that they adapt.
      lora: their rank, scale and places.
      base: what PEFT should load the adapters onto: a folder or a hub name.
      out_dir: absent, empty, or a former export of adapters.

    Returns:
      {"path", "tensors", "parameters", "bytes"}

    Raises:
      UserError: no architecture of Hugging Face is the model, so that there can be no base.
    """
    from safetensors.numpy import save_file

    family_of(config)
    tensors = dict(peft_tensors(adapters, config))
    with whole_folder(out_dir, lambda folder: (folder / CONFIG).is_file()) as folder:
        write_json(folder / CONFIG, adapter_config(lora, base))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return {
        "path": str(out_dir),
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def peft_tensors(adapters: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's name and array of every adapter: A [r, in], B [out, r]; ours are [L, in, r] and [L, r, out]."""
    flat = flatten_dict(adapters, sep="/")
    for row in mapping.rows(config):
        for suffix, letter in (("_a", "A"), ("_b", "B")):
            stacked = flat.get(row.path + suffix)
            if stacked is None:
                continue
            for layer, array in enumerate(np.asarray(stacked)):
                name = row.hf_name.format(layer).removesuffix(".weight")
                yield f"base_model.model.{name}.lora_{letter}.weight", np.ascontiguousarray(array.T)


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """adapter_config.json."""
    modules = {row.path.rpartition("/")[2]: row.hf_name.split(".")[-2] for row in mapping.TABLE}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules[target] for target in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
