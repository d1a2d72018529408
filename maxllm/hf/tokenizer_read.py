"""The tokenizer in a Hugging Face folder, as one of ours.

    tokenizer.json                    taken as it is
    tokenizer.model of our own        read by SentencePiece (our exports have both, with the same ids), unless
                                      the folder says something else by now: then tokenizer.json
    tokenizer.model of others         SentencePiece BPE by its own merges; tiktoken ranks by `transformers`

To either come the tokens that `added_tokens_decoder` (tokenizer_config.json) or added_tokens.json add, and
what special_tokens_map.json names. Which ids stop generation stands in many places: all of them count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from maxllm.data import bpe, spm
from maxllm.data.bpe import STOP_KEY, FastTokenizer
from maxllm.data.tokenizer import FAST_CONFIG_FILE, FAST_FILE, SPECIAL_TOKENS, SPM_FILE, Tokenizer
from maxllm.errors import UserError
from maxllm.files import read_json
from maxllm.hf.gguf_tokenizer import sentence_piece
from maxllm.hf.tokenizer import fast_tokenizer, padding, tokenizer_config

model_pb2: Any = sentencepiece_model_pb2  # generated at import: type checkers see nothing in it

TEMPLATE_FILE, MAP_FILE, ADDED_FILE = "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"
MODEL_CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


class Found(NamedTuple):
    """A folder's tokenizer, and where it and its stop tokens come from."""

    tokenizer: Tokenizer
    file: str
    """What it was read from, in words."""
    stops: dict[str, list[int]]
    """File -> the ids that end generation by it."""

    def report(self) -> dict[str, Any]:
        """Plain data for whoever converts: {"tokenizer", "stop_tokens": [{"id", "token", "in"}]}, and
        {"padding"} where there is something to say of it."""
        tokenizer = self.tokenizer
        spell: Callable[[int], str | None] = SPECIAL_TOKENS.__getitem__
        if isinstance(tokenizer, FastTokenizer):
            spell = tokenizer.reader.id_to_token
        stops = [
            {"id": i, "token": spell(i), "in": [name for name, ids in self.stops.items() if i in ids]}
            for i in tokenizer.stop_tokens
        ]
        return {"tokenizer": self.file, "stop_tokens": stops, **padding(tokenizer)}


def read_tokenizer(folder: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder whose config.json is `fields`; raises as `find_tokenizer` does."""
    return find_tokenizer(folder, fields).tokenizer


def find_tokenizer(folder: Path, fields: Mapping[str, Any]) -> Found:
    """The tokenizer of a folder whose config.json is `fields`, and where it comes from.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    ours = our_own(folder / SPM_FILE) if (folder / SPM_FILE).is_file() else None
    file = FAST_FILE
    if (folder / FAST_FILE).is_file():
        json_bytes, config = (folder / FAST_FILE).read_bytes(), read_config(folder)
    elif ours is not None:
        file, json_bytes = SPM_FILE, fast_tokenizer(ours).to_str().encode()
        config = tokenizer_config() | read_config(folder)
    elif (folder / SPM_FILE).is_file():
        file, (json_bytes, config) = SPM_FILE, converted(folder, read_config(folder))
    else:
        raise UserError(
            f"{folder} has no {FAST_FILE} and no {SPM_FILE}: the model comes without its tokenizer"
        )
    added = added_tokens(folder, config)
    if file == SPM_FILE:  # what our conversion normalizes is blanks, and not those of these tokens
        added = [token | {"normalized": False} for token in added]
    json_bytes = with_added(json_bytes, added, str(folder))
    stops = stop_tokens(folder, fields, tokenizers.Tokenizer.from_str(json_bytes.decode()))
    ids = list(dict.fromkeys(i for place in stops.values() for i in place))
    tokenizer = bpe.checked(json_bytes, config | ({STOP_KEY: ids} if ids else {}), str(folder))
    if ours is None:
        return Found(tokenizer, file, stops)
    if same(ours, tokenizer):
        return Found(ours, SPM_FILE, stops)
    return Found(tokenizer, f"{file}; {SPM_FILE} alone would say something else", stops)


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json and chat_template.jinja say, as `transformers`
    puts them together: the map is older, and counts where tokenizer_config.json lists no added tokens."""
    config = read_json(folder / FAST_CONFIG_FILE) if (folder / FAST_CONFIG_FILE).is_file() else {}
    named = read_json(folder / MAP_FILE) if (folder / MAP_FILE).is_file() else {}
    given = {name: token for name, token in config.items() if token is not None}
    config = config | (named | given if "added_tokens_decoder" in config else named)
    if (folder / TEMPLATE_FILE).is_file():
        config["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if isinstance(config.get("chat_template"), list):  # several, by name
        templates = {entry["name"]: entry["template"] for entry in config["chat_template"]}
        config["chat_template"] = templates.get("default")
    return config


# --- SentencePiece models ----------------------------------------------------------------------------------


def our_own(file: Path) -> spm.SpmTokenizer | None:
    """A SentencePiece model with our special tokens, or None."""
    try:
        return spm.from_bytes(file.read_bytes(), str(file))
    except UserError:
        return None


def same(ours: spm.SpmTokenizer, theirs: FastTokenizer) -> bool:
    """Whether a folder's tokenizer.json, template and stop tokens are still those of our tokenizer.model.

    Another program may have added a token or changed the template, and know nothing of tokenizer.model.
    """
    mine, found = fast_tokenizer(ours), theirs.reader
    parts = [json.loads(backend.to_str()) for backend in (mine, found)]
    alike = all(parts[0][part] == parts[1][part] for part in ("model", "normalizer", "pre_tokenizer"))
    pieces = [backend.get_vocab(with_added_tokens=True) for backend in (mine, found)]
    same_text = alike and pieces[0] == pieces[1] and theirs.chat_template == ours.chat_template
    return same_text and set(theirs.stop_tokens) == set(ours.stop_tokens)


def converted(folder: Path, config: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and configuration of a tokenizer.model: SentencePiece BPE, or else tiktoken's ranks.

    Raises:
      UserError: it is neither.
    """
    content = (folder / SPM_FILE).read_bytes()
    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
        pieces = len(proto.pieces)
    except DecodeError:
        pieces = 0
    if pieces and proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE:
        backend = sentence_piece(spm_metadata(proto).get)
        if config.get("legacy") is False and proto.normalizer_spec.add_dummy_prefix:
            # Only the text's beginning gets a blank before it, not what follows a control token.
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        # Nothing beside it says whether BOS begins a text: as in LLaMA's own code, it does.
        rule = {} if (folder / FAST_CONFIG_FILE).is_file() else {"add_bos_token": True}
        return backend.to_str().encode(), spm_special(proto) | rule | config
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


# --- tokens that other files add ---------------------------------------------------------------------------


def added_tokens(folder: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that stand beside a tokenizer, in the form of tokenizer.json's `added_tokens`.

    Those of added_tokens.json count where tokenizer_config.json lists none, and are special where the
    configuration names them: as in `transformers`.
    """
    if "added_tokens_decoder" in config:
        listed = {int(i): dict(token) for i, token in config["added_tokens_decoder"].items()}
    elif (folder / ADDED_FILE).is_file():
        named = [*(config.get(name) for name in bpe.template.NAMED), *extra_special(config)]
        special = {bpe.spelling(token) for token in named}
        found = read_json(folder / ADDED_FILE).items()
        listed = {i: {"content": token, "special": token in special} for token, i in found}
    else:
        return []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    return [
        {"id": i} | flags | {"normalized": not token.get("special", False)} | token
        for i, token in sorted(listed.items())
    ]


def extra_special(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a role, under the name of transformers 4 or 5."""
    names = ("additional_special_tokens", "extra_special_tokens")
    lists = [config[name] for name in names if isinstance(config.get(name), list)]
    return [token for tokens in lists for token in tokens]


def with_added(json_bytes: bytes, added: list[dict[str, Any]], origin: str) -> bytes:
    """tokenizer.json with the tokens that it lacks.

    Raises:
      UserError: it has one of them under another id, or another token under its id.
    """
    reader = tokenizers.Tokenizer.from_str(json_bytes.decode())
    known = {token.content for token in reader.get_added_tokens_decoder().values()}
    missing = [token for token in added if token["content"] not in known]
    if not missing:
        return json_bytes
    document = json.loads(json_bytes)
    for token in missing:
        there = reader.token_to_id(token["content"]), reader.id_to_token(token["id"])
        if there not in ((None, None), (token["id"], token["content"])):
            raise UserError(
                f"{origin}: the files beside the tokenizer give {token['content']!r} the id {token['id']}, "
                f"the tokenizer itself gives it {there[0]}, and the id to {there[1]!r}"
            )
        if isinstance(document["model"].get("vocab"), dict):
            document["model"]["vocab"][token["content"]] = token["id"]  # so that it keeps its id over a gap
    document["added_tokens"] = sorted([*document["added_tokens"], *missing], key=lambda token: token["id"])
    return json.dumps(document, ensure_ascii=False).encode()


# --- where generation stops --------------------------------------------------------------------------------


def stop_tokens(
    folder: Path, fields: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, list[int]]:
    """File -> the ids that end generation by it; files that name none that the tokenizer has are left out."""
    found = {
        GENERATION_CONFIG: ids_of((read_generation(folder) or {}).get("eos_token_id")),
        MODEL_CONFIG: ids_of(fields.get("eos_token_id")),
    }
    for name in (FAST_CONFIG_FILE, MAP_FILE):
        token = bpe.spelling(read_json(folder / name).get("eos_token")) if (folder / name).is_file() else None
        found[name] = ids_of(None if token is None else backend.token_to_id(token))
    known = {name: [i for i in ids if backend.id_to_token(i) is not None] for name, ids in found.items()}
    return {name: ids for name, ids in known.items() if ids}


def read_generation(folder: Path) -> dict[str, Any] | None:
    """generation_config.json, where there is one."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else None


def ids_of(value: Any) -> list[int]:
    """`eos_token_id`, which may be one id or several."""
    return [value] if isinstance(value, int) else list(value or [])
