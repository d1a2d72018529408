"""GGUF (llama.cpp's format): one file with quantized weights, the tokenizer and the chat template.

The file opens as the same kind of source as a Hugging Face folder: names and layouts are Hugging Face's,
values are float32, dequantized tensor by tensor. Needs the `gguf` package (pip install 'maxllm[gguf]').
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxllm.data import bpe
from maxllm.data.bpe import STOP_KEY, FastTokenizer
from maxllm.errors import UserError, listed
from maxllm.hf import gguf_tokenizer
from maxllm.hf.config import config_of
from maxllm.hf.folder import HfModel
from maxllm.hf.source import Index, Source, Tensor

EMBEDDING = "token_embd.weight"

NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.attn_q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
"""GGUF's names -> Hugging Face's, {} for the layer."""

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""general.architecture -> model_type. GGUF calls Mistral a llama too."""

INTERLEAVED = {"llama"}
"""Architectures whose q and k rows llama.cpp stores with neighbouring rotary pairs."""

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's scaling, stored as a divisor per rotary pair."""


PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of a part, as llama.cpp's gguf-split gives it."""


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file belongs to; of most models there is one.

    Raises:
      UserError: naming those that are not there.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match["stem"], match["count"]
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{path} is one of {int(count)} parts, and {listed(missing)} is not beside it")
    return parts


class GgufFile:
    """An open GGUF file, or the parts of one."""

    def __init__(self, path: Path) -> None:
        """Reads the header; weights stay on disk.

        Raises:
          UserError: no such file, not GGUF, a part is missing, the package is missing, or an architecture
            that we do not have.
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        self.path = path
        self._readers = [reader_of(part) for part in parts_of(path)]
        count = self.value("split.count", 1)
        if count > 1 and count != len(self._readers):
            raise UserError(
                f"{path} is one of {count} parts, which are read together where their names are "
                f"NAME-00001-of-{count:05d}.gguf and so on"
            )
        self.architecture = self.value("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path} has the architecture {self.architecture!r}, which is not supported "
                f"(supported: {', '.join(ARCHITECTURES)}; the closest is llama)"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata entry; `{arch}` in the key stands for the architecture's prefix."""
        field = self._readers[0].get_field(key)  # the first part has all of it
        return default if field is None else field.contents()

    def size(self, key: str, default: Any = None) -> Any:
        """A metadata entry of the architecture.

        Raises:
          UserError: it is missing and there is no default.
        """
        value = self.value(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(f"{self.path} lacks {self.architecture}.{key}")
        return value

    def tensors(self) -> dict[str, Any]:
        """GGUF name -> the reader's tensor.

        Raises:
          UserError: a tensor lies in two parts, or some are missing.
        """
        found = [tensor for reader in self._readers for tensor in reader.tensors]
        tensors = {tensor.name: tensor for tensor in found}
        wanted = self.value("split.tensors.count", len(tensors))
        if not len(found) == len(tensors) == wanted:
            raise UserError(
                f"{self.path}: its parts have {len(tensors)} tensors, {wanted} are meant to be there"
            )
        if EMBEDDING not in tensors:
            raise UserError(f"{self.path} has no {EMBEDDING}: it is no language model")
        return tensors


def reader_of(path: Path) -> Any:
    """The library's view of one file.

    Raises:
      UserError: it is not whole, or the library is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF needs the gguf package: pip install 'maxllm[gguf]'") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # numpy, struct and value errors, depending on where it breaks off
        raise UserError(f"{path} is not a whole GGUF file: {error}") from None


def open_gguf(path: Path) -> HfModel:
    """The model in a GGUF file, as if it were a Hugging Face folder with float32 weights.

    Raises:
      UserError: see `GgufFile`; or the file stretches RoPE in a way that the configuration cannot say.
    """
    file = GgufFile(path)
    stored = file.tensors()
    heads = file.size("attention.head_count")
    kv_heads = file.size("attention.head_count_kv", heads)
    fields = config_fields(file, heads, kv_heads, stored)
    config = config_of(fields, str(path))
    names: dict[str, str] = {theirs: ours for theirs, ours in NAMES.items() if "{}" not in theirs}
    for layer in range(config.n_layers):
        names |= {t.format(layer): o.format(layer) for t, o in NAMES.items() if "{}" in t}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name == ROPE_FACTORS:
            continue
        turned = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2], 0)
        turned = turned if file.architecture in INTERLEAVED else 0
        tensors[names.get(name, name)] = dequantized(tensor, turned)
    return HfModel(Source(str(path), tensors), config, fields)


def dequantized(tensor: Any, heads: int) -> Tensor:
    """A stored tensor as float32; with `heads`, its rows go from neighbouring rotary pairs to half-split."""
    from gguf import dequantize

    shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first

    def load(index: Index) -> np.ndarray:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32, copy=False)
        if heads:
            pairs = values.reshape(heads, shape[0] // heads // 2, 2, -1)
            values = np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(shape)
        return values[index]

    return Tensor(shape, np.dtype(np.float32), load)


def config_fields(file: GgufFile, heads: int, kv_heads: int, stored: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the metadata amounts to."""
    width = file.size("embedding_length")
    fields: dict[str, Any] = {
        "model_type": ARCHITECTURES[file.architecture],
        "vocab_size": int(stored[EMBEDDING].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": file.size("feed_forward_length"),
        "max_position_embeddings": file.size("context_length"),
        "rms_norm_eps": round_float(file.size("attention.layer_norm_rms_epsilon")),
        "rope_theta": round_float(file.size("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in stored,
        "torch_dtype": "float32",
    }
    head_dim = file.size("attention.key_length", file.size("rope.dimension_count", width // heads))
    if ARCHITECTURES[file.architecture] != "qwen2":
        fields["head_dim"] = head_dim
    scaling = rope_scaling(file, stored, fields, head_dim)
    return fields | ({"rope_scaling": scaling} if scaling else {})


def round_float(value: float) -> float:
    """A float32 as the short decimal it was written from: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def rope_scaling(
    file: GgufFile, stored: dict[str, Any], fields: dict[str, Any], head_dim: int
) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling.

    Raises:
      UserError: divisors that Llama 3's rule does not give.
    """
    kind = file.size("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": round_float(file.size("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = file.size("rope.scaling.original_context_length")
        return scaling
    if ROPE_FACTORS not in stored:
        return None
    found = np.asarray(stored[ROPE_FACTORS].data, np.float32)
    factor = float(found.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    inverse = fields["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 * inverse / (2 * math.pi) - 1.0) / (4.0 - 1.0), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError(f"{file.path}: {ROPE_FACTORS} is not Llama 3's scaling")
    return scaling


def tokenizer_of(path: Path) -> FastTokenizer:
    """The tokenizer and chat template in a GGUF file.

    Raises:
      UserError: there is none, or of a kind that we do not know.
    """
    file = GgufFile(path)
    tokens = file.value("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{path} holds no tokenizer")
    match file.value("tokenizer.ggml.model"):
        case "gpt2":
            backend = gguf_tokenizer.byte_level(file.value, str(path))
        case "llama":
            backend = gguf_tokenizer.sentence_piece(file.value)
        case kind:
            raise UserError(f"{path} has a tokenizer of the kind {kind!r}")
    ids = {
        name: file.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "unknown")
    }
    named = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    config: dict[str, Any] = {named[name]: tokens[i] for name, i in ids.items() if i is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    begins = file.value("tokenizer.ggml.add_bos_token", gguf_tokenizer.adds_bos(file.value))
    config["add_bos_token"] = bool(begins) and ids["bos"] is not None
    template = file.value("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    stops = [ids["eos"], file.value("tokenizer.ggml.eot_token_id")]
    config[STOP_KEY] = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return bpe.checked(backend.to_str().encode(), config, str(path))


def cut_otherwise_by_transformers(path: Path) -> Callable[[str], bool] | None:
    """Which texts `transformers` cuts into other ids than a file says; None where there are none.

    It does not read tokenizer.ggml.pre: digits that are to stand alone may be merged, and signs that count as
    numerals with what is beside them (transformers 5.24, SmolLM2).
    """
    pre = GgufFile(path).value("tokenizer.ggml.pre", "default")
    apart = pre in gguf_tokenizer.PRE and gguf_tokenizer.PRE[pre][0]
    return (lambda text: any(letter.isnumeric() for letter in text)) if apart else None
