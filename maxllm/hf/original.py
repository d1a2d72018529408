"""The layout of Meta's own release and of the tutorial (happy-llm's Tiny-K): other names, another RoPE.

    tok_embeddings, layers.N.attention.wq, feed_forward.w1 (gate) w2 (down) w3 (up), output

Their rotary pairs are neighbours (2i, 2i + 1); Hugging Face's and ours are half a head apart (i, i + K/2), so
the rows of wq and wk are reordered. Sizes come from `params.json` (Meta) or `config.json` (the tutorial).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from maxllm.errors import UserError
from maxllm.files import read_json
from maxllm.hf.source import Index, Source, Tensor

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
}
"""Name of a tensor in Meta's files -> its name in Hugging Face's, {} for the layer's number."""

TUTORIAL = "Tiny-K"
"""model_type in the tutorial's config.json."""

FREQUENCIES = ("rope.freqs", "freqs_cos", "freqs_sin")
"""Buffers that follow from the configuration."""


def is_original(folder: Path) -> bool:
    """Whether a folder is of this layout."""
    if (folder / "params.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == TUTORIAL


def hf_fields(folder: Path, source: Source) -> dict[str, Any]:
    """The `config.json` of Hugging Face's LLaMA for a folder of this layout.

    Widths that no file tells are read off the tensors.

    Raises:
      UserError: a size is missing.
    """
    meta = (folder / "params.json").is_file()
    fields = read_json(folder / ("params.json" if meta else "config.json"))
    missing = [name for name in ("dim", "n_layers", "n_heads") if not isinstance(fields.get(name), int)]
    if missing:
        raise UserError(f"{folder} does not tell {', '.join(missing)}")
    shapes = source.shapes
    try:
        vocab_size = shapes["tok_embeddings.weight"][0]
        d_ff = shapes["layers.0.feed_forward.w1.weight"][0]
    except KeyError as error:
        raise UserError(f"{folder}: {error.args[0]} is missing") from None
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": fields["dim"],
        "num_hidden_layers": fields["n_layers"],
        "num_attention_heads": fields["n_heads"],
        "num_key_value_heads": fields.get("n_kv_heads") or fields["n_heads"],
        "intermediate_size": d_ff,
        "rms_norm_eps": fields.get("norm_eps", 1e-5),
        "max_position_embeddings": fields.get("max_seq_len", 2048),
        "rope_theta": fields.get("rope_theta", 10_000.0),
        "tie_word_embeddings": not meta and tied(source),
    }


def tied(source: Source) -> bool:
    """Whether the output projection is the embedding table: absent, or stored twice."""
    if "output.weight" not in source.tensors:
        return True
    return bool(np.array_equal(source.read("output.weight"), source.read("tok_embeddings.weight")))


def as_hf(source: Source, heads: int, kv_heads: int, tie: bool) -> Source:
    """Weights of Meta's files under Hugging Face's names, the rows of wq and wk in Hugging Face's order."""
    patterns = {re.escape(theirs).replace(r"\{\}", r"(\d+)"): ours for theirs, ours in NAMES.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if name in FREQUENCIES or (tie and name == "output.weight"):
            continue
        for pattern, target in patterns.items():
            match = re.fullmatch(pattern, name)
            if match:
                if ".wq." in name or ".wk." in name:
                    tensor = half_split(tensor, heads if ".wq." in name else kv_heads)
                tensors[target.format(*match.groups())] = tensor
                break
        else:
            tensors[name] = tensor  # the shape check names it
    return Source(source.origin, tensors)


def half_split(tensor: Tensor, heads: int) -> Tensor:
    """A projection whose heads' rows go from neighbouring rotary pairs to pairs half a head apart."""
    rows, width = tensor.shape

    def load(index: Index) -> np.ndarray:
        pairs = tensor.load((slice(0, rows), slice(0, width))).reshape(heads, rows // heads // 2, 2, width)
        return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, width)[index]

    return Tensor(tensor.shape, tensor.dtype, load)
