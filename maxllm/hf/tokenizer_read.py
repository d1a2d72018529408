"""The tokenizer in a Hugging Face folder, as one of ours.

    tokenizer.json                    taken as it is
    tokenizer.model of our own        read by SentencePiece (our exports have both, with the same ids)
    tokenizer.model of others         SentencePiece BPE by its own merges; tiktoken ranks by `transformers`

Which ids stop generation is written in three places; the most specific wins: generation_config.json, then
config.json, then the tokenizer's own eos_token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from maxllm.data import bpe, spm
from maxllm.data.bpe import STOP_KEY
from maxllm.data.tokenizer import FAST_CONFIG_FILE, FAST_FILE, SPM_FILE, Tokenizer
from maxllm.errors import UserError
from maxllm.files import read_json
from maxllm.hf.gguf_tokenizer import sentence_piece

model_pb2: Any = sentencepiece_model_pb2  # generated at import: type checkers see nothing in it

TEMPLATE_FILE = "chat_template.jinja"


def read_tokenizer(folder: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder whose config.json is `fields`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if (folder / SPM_FILE).is_file():
        ours = our_own(folder / SPM_FILE)
        if ours is not None:
            return ours
    if (folder / FAST_FILE).is_file():
        json_bytes = (folder / FAST_FILE).read_bytes()
        config = read_json(folder / FAST_CONFIG_FILE) if (folder / FAST_CONFIG_FILE).is_file() else {}
    elif (folder / SPM_FILE).is_file():
        json_bytes, config = converted(folder)
    else:
        raise UserError(
            f"{folder} has no {FAST_FILE} and no {SPM_FILE}: the model comes without its tokenizer"
        )
    if (folder / TEMPLATE_FILE).is_file():
        config = config | {"chat_template": (folder / TEMPLATE_FILE).read_text(encoding="utf-8")}
    if isinstance(config.get("chat_template"), list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
        config = config | {"chat_template": named.get("default")}
    stops = stop_tokens(folder, fields)
    return bpe.checked(json_bytes, config | ({STOP_KEY: stops} if stops else {}), str(folder))


def our_own(file: Path) -> spm.SpmTokenizer | None:
    """A SentencePiece model with our special tokens, or None."""
    try:
        return spm.from_bytes(file.read_bytes(), str(file))
    except UserError:
        return None


def converted(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and configuration of a tokenizer.model: SentencePiece BPE, or else tiktoken's ranks.

    Raises:
      UserError: it is neither.
    """
    content = (folder / SPM_FILE).read_bytes()
    config = read_json(folder / FAST_CONFIG_FILE) if (folder / FAST_CONFIG_FILE).is_file() else {}
    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
        pieces = len(proto.pieces)
    except DecodeError:
        pieces = 0
    if pieces and proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE:
        backend = sentence_piece(spm_metadata(proto).get, str(folder))
        return backend.to_str().encode(), spm_special(proto) | config
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        json_bytes = theirs.backend_tokenizer.to_str().encode()
    except Exception as error:  # transformers raises whatever its converters do
        raise UserError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(theirs, name) for name in names if getattr(theirs, name) is not None}
    return json_bytes, special | {"chat_template": theirs.chat_template}


def spm_metadata(proto: Any) -> dict[str, Any]:
    """A SentencePiece model in the words of GGUF, which took its piece types over."""
    return {
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": proto.trainer_spec.unk_id,
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }


def spm_special(proto: Any) -> dict[str, Any]:
    """The special tokens that a SentencePiece model names; ids below 0 are absent."""
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    ids["unk_token"] = spec.unk_id
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def stop_tokens(folder: Path, fields: Mapping[str, Any]) -> list[int]:
    """The ids that end generation; empty where neither configuration says."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    found = fields.get("eos_token_id") if found is None else found
    return [found] if isinstance(found, int) else list(found or [])
