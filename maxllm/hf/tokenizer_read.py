"""The tokenizer in a Hugging Face folder, as one of ours.

    tokenizer.json                    taken as it is
    tokenizer.model of our own        read by SentencePiece (our exports have both, with the same ids)
    tokenizer.model of others         SentencePiece or tiktoken ranks, converted by `transformers`

Which ids stop generation is written in three places; the most specific wins: generation_config.json, then
config.json, then the tokenizer's own eos_token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxllm.data import bpe, spm
from maxllm.data.bpe import STOP_KEY
from maxllm.data.tokenizer import FAST_CONFIG_FILE, FAST_FILE, SPM_FILE, Tokenizer
from maxllm.errors import UserError
from maxllm.files import read_json

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
    """tokenizer.json and configuration as `transformers` makes them of a tokenizer.model.

    Raises:
      UserError: it cannot.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        json_bytes = theirs.backend_tokenizer.to_str().encode()
    except Exception as error:  # transformers raises whatever its converters do
        raise UserError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(theirs, name) for name in names if getattr(theirs, name) is not None}
    return json_bytes, special | {"chat_template": theirs.chat_template}


def stop_tokens(folder: Path, fields: Mapping[str, Any]) -> list[int]:
    """The ids that end generation; empty where neither configuration says."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    found = fields.get("eos_token_id") if found is None else found
    return [found] if isinstance(found, int) else list(found or [])
