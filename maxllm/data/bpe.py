"""Tokenizers that Hugging Face's `tokenizers` library runs: byte-level BPE of our own, and imported ones.

A folder holds tokenizer.json (the algorithm) and tokenizer_config.json (which tokens are special, the chat
template, and `stop_token_ids`, our addition: a model may end its turns with several tokens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from maxllm.config import TokenizerConfig
from maxllm.data.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FAST_CONFIG_FILE,
    FAST_FILE,
    IM_END,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    fingerprint_of,
)
from maxllm.errors import UserError

STOP_KEY = "stop_token_ids"


@dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer.json with its configuration."""

    json_bytes: bytes
    """tokenizer.json, as it was read or trained."""
    config: Mapping[str, Any] = field(hash=False)
    """tokenizer_config.json."""

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The running tokenizer; control tokens spelled in a text are encoded as text."""
        backend = tokenizers.Tokenizer.from_str(self.json_bytes.decode())
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def reader(self) -> tokenizers.Tokenizer:
        """The same, but control tokens spelled in a text are those tokens: for rendered chat templates."""
        reader = tokenizers.Tokenizer.from_str(self.json_bytes.decode())
        reader.no_padding()
        reader.no_truncation()
        return reader

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        config = json.dumps(self.config, indent=2, ensure_ascii=False, sort_keys=True)
        return {FAST_FILE: self.json_bytes, FAST_CONFIG_FILE: (config + "\n").encode()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the files."""
        return fingerprint_of(self.files)

    def special(self, name: str) -> int | None:
        """The id of bos_token, eos_token, pad_token or unk_token."""
        token = self.config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.backend.token_to_id(content)

    @cached_property
    def bos(self) -> int | None:
        """bos_token, unless the configuration says that documents do not begin with it."""
        return None if self.config.get("add_bos_token") is False else self.special("bos_token")

    @cached_property
    def eos(self) -> int:
        """eos_token."""
        eos = self.special("eos_token")
        if eos is None:
            raise UserError(f"{FAST_CONFIG_FILE} names no eos_token that {FAST_FILE} has")
        return eos

    @cached_property
    def pad(self) -> int:
        """pad_token, or another special token where there is none: masks come from structure."""
        found = [self.special(name) for name in ("pad_token", "unk_token")]
        return next((token for token in found if token is not None), self.eos)

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The configuration's stop_token_ids, or eos_token."""
        return tuple(self.config.get(STOP_KEY, ())) or (self.eos,)

    @property
    def chat_template(self) -> str | None:
        """As the configuration has it."""
        return self.config.get("chat_template")

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The spelling of every token that is not text."""
        added = self.backend.get_added_tokens_decoder()
        return tuple(token.content for token in added.values() if token.special)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens vanish."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def load(folder: Path) -> FastTokenizer:
    """Reads tokenizer.json and tokenizer_config.json.

    Raises:
      UserError: one of them is missing or cannot be read.
    """
    try:
        json_bytes = (folder / FAST_FILE).read_bytes()
        config = json.loads((folder / FAST_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None
    return checked(json_bytes, config, str(folder))


def checked(json_bytes: bytes, config: Mapping[str, Any], origin: str) -> FastTokenizer:
    """A tokenizer whose parts have been looked at; `origin` names it in errors."""
    tokenizer = FastTokenizer(json_bytes, config)
    try:
        _ = tokenizer.backend, tokenizer.eos
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except Exception as error:  # `tokenizers` raises a bare Exception
        raise UserError(f"{origin}: {FAST_FILE} is not a tokenizer: {error}") from None
    return tokenizer


def train(texts: Iterable[str], config: TokenizerConfig) -> FastTokenizer:
    """Trains byte-level BPE: every byte is a token, so every text comes back as it was.

    Raises:
      UserError: the texts cannot support the vocabulary asked for.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size} cannot be trained on this text: "
            f"it supports {backend.get_vocab_size()}"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "unk_token": SPECIAL_TOKENS[UNK],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        STOP_KEY: [EOS, IM_END],
    }
    return FastTokenizer(backend.to_str().encode(), settings)
