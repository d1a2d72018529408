"""A model as a Hugging Face folder: config.json, safetensors, tokenizer, generation defaults, model card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maxllm import __version__
from maxllm.config.generation import GenerationConfig
from maxllm.config.model import ModelConfig
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError
from maxllm.files import whole_folder, write_json, write_text
from maxllm.hf.config import hf_config_of
from maxllm.hf.generation import fields_of
from maxllm.hf.mapping import Head
from maxllm.hf.source import DTYPES
from maxllm.hf.tokenizer import padding, save_tokenizer
from maxllm.hf.tokenizer_read import GENERATION_CONFIG
from maxllm.hf.write import MAX_SHARD_BYTES, Read, write_weights
from maxllm.records import Params

MARK = "maxllm_version"
"""The key of config.json that tells our exports from other folders."""

DTYPE_OF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Types that weights are exported in -> safetensors' names of them."""


def export(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    generation: GenerationConfig | None = None,
    description: str = "",
    base: Mapping[str, Any] | None = None,
    base_generation: Mapping[str, Any] | None = None,
    head: Head = "lm",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tick: Callable[[int], None] = lambda size: None,
    read: Read = lambda path, leaf: leaf,
    verify: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Writes a folder that `transformers` loads, and returns its numbers.

    Everything goes to a hidden sibling folder that is renamed at the end: a killed export leaves nothing at
    `out_dir`, or the former export as it was. Weights leave the devices one tensor at a time.

    Args:
      params: the tree of `Llama`.
      config: its configuration.
      tokenizer: of at most as many pieces as the model's vocabulary.
      out_dir: absent, empty, or a former export.
      dtype: of the weights in the file.
      generation: decoding defaults of the folder; those of `base_generation`, or else greedy, when absent.
      description: a paragraph of Markdown for the model card.
      base: config.json of the model that this one descends from, whose other fields stay.
      base_generation: its generation_config.json, of which the same holds.
      head: "score" for a reward model; then params are those of `ScalarModel`.
      max_shard_bytes: larger weights are split into several files with an index.
      tick: told the bytes of each tensor that has been written, for progress.
      read: makes an array of a leaf of `params`, when its turn comes: not all of a checkpoint is in memory.
      verify: looks at the finished folder before it takes its place; what it raises, nothing is left of.

    Returns:
      {"path", "parameters", "tensors", "bytes"}: bytes are those of the weights; {"padding"} too where the
      vocabulary has nothing to pad with but a stop token.

    Raises:
      UserError: parameters or tokenizer do not fit the configuration, or out_dir holds something else.
    """
    pieces, rows = tokenizer.vocab_size, config.vocab_size
    if pieces > rows:
        raise UserError(f"the tokenizer has {pieces} pieces, the model's vocab_size is {rows}")
    out_dir = Path(out_dir).absolute()
    fields = hf_config_of(config, tokenizer, dtype, base, head) | {MARK: __version__}
    with whole_folder(out_dir, is_replaceable) as folder:
        write_json(folder / "config.json", fields)
        file_dtype = np.dtype(DTYPES[DTYPE_OF[dtype]])
        written = write_weights(folder, params, config, file_dtype, max_shard_bytes, head, tick, read)
        save_tokenizer(tokenizer, folder)
        if head == "lm":
            write_json(folder / GENERATION_CONFIG, fields_of(tokenizer, generation, base_generation, fields))
        card = model_card(out_dir.name, config, dtype, written["parameters"], description, head)
        write_text(folder / "README.md", card)
        verify(folder)
    return {"path": str(out_dir), **written, **padding(tokenizer)}


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is a former export: another program's model is not ours to remove."""
    config = folder / "config.json"
    return config.is_file() and f'"{MARK}"' in config.read_text(encoding="utf-8")


def model_card(
    name: str, config: ModelConfig, dtype: str, parameters: int, description: str, head: Head
) -> str:
    """README.md: what the model is, how to load it, how it expects a conversation."""
    c = config
    scaling = f", {c.rope_scaling.type} scaling x{c.rope_scaling.factor:g}" if c.rope_scaling else ""
    table = {
        "Parameters": f"{parameters:,}",
        "Layers": c.n_layers,
        "Width": c.d_model,
        "Feed-forward width": c.d_ff,
        "Query / key-value heads": f"{c.n_heads} / {c.n_kv_heads}, width {c.k_dim}",
        "Vocabulary": f"{c.vocab_size:,}",
        "Weights": dtype,
        "Context": f"{c.context:,} tokens",
        "Rotary base": f"{c.rope_theta:g}{scaling}",
        "Embeddings": "tied" if c.tie_embeddings else "untied",
    }
    lines = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    about = f"{description.strip()}\n\n" if description.strip() else ""
    use = USE_LM if head == "lm" else USE_SCORE
    task = "text-generation" if head == "lm" else "text-classification"
    return MODEL_CARD.format(name=name, about=about, table=lines, use=use.format(name=name), task=task)


MODEL_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [llama, maxllm, jax]
---

# {name}

{about}Exported by maxllm (JAX).

| | |
|---|---|
{table}

## Use

```python
{use}```

Encode text from outside with `split_special_tokens=True`, so that it cannot spell a control token.
"""

USE_LM = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

USE_SCORE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
messages = [{{"role": "user", "content": "1 + 1?"}}, {{"role": "assistant", "content": "2"}}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
# The score is read at the end of the assistant's turn: without what the template writes after it.
end = (inputs["input_ids"][0] == tokenizer.eos_token_id).nonzero()[-1, 0] + 1
print(model(inputs["input_ids"][:, :end]).logits[0, 0].item())
"""
