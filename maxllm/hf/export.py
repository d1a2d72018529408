"""A model as a Hugging Face folder, the reading of one, and the proof that both say the same.

export(params, config, tokenizer, out_dir)      config.json, model.safetensors, tokenizer, model card
load_hf_folder(path)                            any local LLaMA folder, one safetensors file or sharded
verify_greedy(out_dir, prompts, ours, n)        transformers' greedy tokens against ours
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxllm import __version__
from maxllm.config import GenerationConfig, ModelConfig
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError
from maxllm.files import whole_folder, write_json
from maxllm.hf import mapping
from maxllm.hf.config import hf_config_of, model_config_from_hf
from maxllm.hf.tokenizer import save_tokenizer
from maxllm.records import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MARK = "maxllm_version"
"""The key of config.json that tells our exports from other folders."""

DERIVED_SUFFIX = ".rotary_emb.inv_freq"
"""Old LLaMA folders store the rotary frequencies of each layer; they follow from the configuration."""


# --- writing ----------------------------------------------------------------------------------------------


def export(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    generation: GenerationConfig | None = None,
    description: str = "",
    base: Mapping[str, Any] | None = None,
    verify: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Writes a folder that `transformers` loads, and returns its numbers.

    Everything goes to a hidden sibling folder that is renamed at the end: a killed export leaves nothing at
    `out_dir`, or the former export as it was. In one process only; weights are float32, as trained.

    Args:
      params: the tree of `Llama`.
      config: its configuration.
      tokenizer: of at most as many pieces as the model's vocabulary.
      out_dir: absent, empty, or a former export.
      generation: decoding defaults of the folder; `GenerationConfig()`, greedy, when absent.
      description: a paragraph of Markdown for the model card.
      base: config.json of the model that this one descends from, whose other fields stay.
      verify: looks at the finished folder before it takes its place; what it raises, nothing is left of.

    Returns:
      {"path", "parameters", "tensors", "bytes"}: bytes are those of the weights' file.

    Raises:
      UserError: parameters or tokenizer do not fit the configuration, or out_dir holds something else.
    """
    from safetensors.numpy import save_file

    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocab_size is {config.vocab_size}"
        )
    out_dir = Path(out_dir).absolute()
    with whole_folder(out_dir, is_replaceable) as folder:
        write_json(folder / "config.json", hf_config_of(config, tokenizer, base=base) | {MARK: __version__})
        tensors = {name: t.astype(np.float32, copy=False) for name, t in mapping.hf_tensors(params, config)}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        save_tokenizer(tokenizer, folder)
        defaults = generation_config(generation or GenerationConfig(), tokenizer)
        write_json(folder / "generation_config.json", defaults)
        parameters = sum(tensor.size for tensor in tensors.values())
        card = model_card(out_dir.name, config, parameters, description)
        (folder / "README.md").write_text(card, encoding="utf-8")
        verify(folder)
    size = (out_dir / WEIGHTS).stat().st_size
    return {"path": str(out_dir), "parameters": parameters, "tensors": len(tensors), "bytes": size}


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is a former export: another program's model is not ours to remove."""
    config = folder / "config.json"
    return config.is_file() and f'"{MARK}"' in config.read_text(encoding="utf-8")


def generation_config(generation: GenerationConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json. Sampling fields are there only when sampling: transformers warns otherwise."""
    sampling = {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.stop_tokens),
        "pad_token_id": tokenizer.pad,
        "max_new_tokens": generation.max_new_tokens,
        "do_sample": generation.temperature > 0,
        **(sampling if generation.temperature > 0 else {}),
    }


def model_card(name: str, config: ModelConfig, parameters: int, description: str) -> str:
    """README.md: what the model is, how to load it, how it expects a conversation."""
    c = config
    scaling = f", Llama-3 scaling x{c.rope_scaling.factor:g}" if c.rope_scaling else ""
    table = {
        "Parameters": f"{parameters:,}",
        "Layers": c.n_layers,
        "Width": c.d_model,
        "Feed-forward width": c.d_ff,
        "Query / key-value heads": f"{c.n_heads} / {c.n_kv_heads}, width {c.k_dim}",
        "Vocabulary": f"{c.vocab_size:,} (SentencePiece, byte fallback)",
        "Context": f"{c.max_seq_len:,} tokens",
        "Rotary base": f"{c.rope_theta:g}{scaling}",
        "Embeddings": "tied" if c.tie_embeddings else "untied",
    }
    lines = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    about = f"{description.strip()}\n\n" if description.strip() else ""
    return MODEL_CARD.format(name=name, about=about, table=lines)


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, maxllm, jax]
---

# {name}

{about}A LLaMA-architecture decoder trained with maxllm (JAX), weights in float32.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Conversations follow ChatML, `<s><|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n`;
a document is `<s>…</s>`. `tokenizer(text)` adds neither. Encode text from outside with
`split_special_tokens=True`, so that it cannot spell a control token.
"""


# --- reading ----------------------------------------------------------------------------------------------


def load_hf_folder(path: str | os.PathLike[str]) -> tuple[Params, ModelConfig]:
    """Parameters (float32 NumPy) and configuration of a local LLaMA folder in safetensors.

    Names and shapes are checked from the files' headers before a tensor is read, and tensors are read one at
    a time; bfloat16 and float16 weights become float32. The configuration's LOCAL_FIELDS have their defaults.

    Raises:
      UserError: no such folder or files, a model that is not ours, or tensors that do not match.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face folder")
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from None
    config = model_config_from_hf(hf_config)
    with contextlib.ExitStack() as stack:
        files = [open_safetensors(file, stack) for file in weight_files(folder)]
        names = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118 (it has no __iter__)
        where = {name: file for name, file in names if not name.endswith(DERIVED_SUFFIX)}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        mapping.check_shapes(shapes, mapping.hf_shapes(config), str(folder))
        return mapping.nest(mapping.our_arrays(lambda name: where[name].get_tensor(name), config)), config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or the single one.

    Raises:
      UserError: the index has no weight_map.
    """
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / INDEX} is not an index of safetensors files") from None


def open_safetensors(file: Path, stack: contextlib.ExitStack) -> Any:
    """An open file, its tensors unread.

    Raises:
      UserError: it is absent or cut short.
    """
    import safetensors

    if not file.is_file():
        raise UserError(f"{file} does not exist; only safetensors folders can be read")
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None


# --- proof ------------------------------------------------------------------------------------------------


def verify_greedy(
    out_dir: str | os.PathLike[str],
    prompts_ids: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokenizer: Tokenizer,
) -> dict[str, Any] | None:
    """Greedy decoding by `transformers` from the folder, in float32, against our own tokens.

    Args:
      out_dir: an exported folder.
      prompts_ids: token ids of each prompt, unpadded.
      ours: generated ids of each prompt, ending with the stop token if one came.
      max_new_tokens: the limit under which `ours` was generated.
      tokenizer: knows the ids that stop.

    Returns:
      {"identical", "prompts", "tokens", "first_difference"}: tokens compared, and a sentence or None. The
      sentence has the logit gap between the two tokens: under 1e-4 it is a tie that rounding decides, more
      is a wrong export. None when torch is not installed: nothing was checked.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32, local_files_only=True).eval()
    first_difference, tokens = None, 0
    for number, (prompt, expected) in enumerate(zip(prompts_ids, ours, strict=True)):
        found = greedy(model, list(prompt), max_new_tokens, tokenizer)
        tokens += len(found)
        if first_difference is None and found != list(expected):
            first_difference = difference(model, number, list(prompt), list(expected), found)
    return {
        "identical": first_difference is None,
        "prompts": len(prompts_ids),
        "tokens": tokens,
        "first_difference": first_difference,
    }


def greedy(model: Any, prompt: list[int], max_new_tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The ids `transformers` generates after a prompt, whatever sampling the folder's defaults ask for."""
    import torch
    from transformers import GenerationConfig as HfGenerationConfig

    settings = HfGenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos,
        eos_token_id=list(tokenizer.stop_tokens),
        pad_token_id=tokenizer.pad,
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
