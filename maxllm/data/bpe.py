"""Tokenizers that Hugging Face's `tokenizers` library runs: byte-level BPE of our own, and imported ones.

A folder holds tokenizer.json (the algorithm) and tokenizer_config.json (which tokens are special, the chat
template, and `stop_token_ids`, our addition: a model may end its turns with several tokens).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from maxllm.config.data import TokenizerConfig
from maxllm.data import control, template
from maxllm.data.fields import RowError
from maxllm.data.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FAST_CONFIG_FILE,
    FAST_FILE,
    IM_END,
    PAD,
    PLAIN_CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    UNK,
    fingerprint_of,
)
from maxllm.errors import UserError

STOP_KEY = "stop_token_ids"

PADDING = ("<|endoftext|>", "<unk>", "reserved", "unused")
"""Tokens that may pad where none is there for that; a conversation has none of them."""

SETTINGS: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL_TOKENS[BOS],
    "eos_token": SPECIAL_TOKENS[EOS],
    "pad_token": SPECIAL_TOKENS[PAD],
    "unk_token": SPECIAL_TOKENS[UNK],
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    STOP_KEY: [EOS, IM_END],
}
"""tokenizer_config.json of the tokenizers we train."""


@dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer.json with its configuration."""

    json_bytes: bytes
    """tokenizer.json, as it was read or trained."""
    config: Mapping[str, Any] = field(hash=False)
    """tokenizer_config.json."""
    day: datetime.date | None = None
    """What a chat template takes for today; the day on which it is asked, when absent."""

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The running tokenizer; control tokens spelled in a text are encoded as text."""
        backend = self.fresh()
        control = [AddedToken(token, special=True) for token in self.control_tokens]
        backend.add_special_tokens(control)  # they are there: this only raises their flag
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def reader(self) -> tokenizers.Tokenizer:
        """The tokenizer that takes a control token spelled in a text for that token, as templates need it."""
        return self.fresh()

    @cached_property
    def renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with private spellings of the control tokens, so that no text is one of them.

        Raises:
          RowError: merges lead to one of them, so that it is not to be told from text.
        """
        try:
            return self.fresh(control.renamed(self.json_bytes, self.control_tokens))
        except Exception as error:  # `tokenizers` raises a bare Exception
            raise RowError(f"the text spells a control token that the tokenizer merges: {error}") from None

    def fresh(self, json_text: str | None = None) -> tokenizers.Tokenizer:
        """tokenizer.json (or another text of its kind) running, without padding and truncation."""
        backend = tokenizers.Tokenizer.from_str(json_text or self.json_bytes.decode())
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def ids(self) -> frozenset[int]:
        """Every id that has a piece."""
        return frozenset(self.reader.get_vocab(with_added_tokens=True).values())

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.ids) + 1

    @cached_property
    def holes(self) -> tuple[int, ...]:
        """Ids between the others that no piece has."""
        return tuple(sorted(set(range(self.vocab_size)) - self.ids))

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        config = json.dumps(self.config, indent=2, ensure_ascii=False, sort_keys=True)
        return {FAST_FILE: self.json_bytes, FAST_CONFIG_FILE: (config + "\n").encode()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the files."""
        return fingerprint_of(self.files)

    @cached_property
    def named(self) -> dict[str, str]:
        """The spelling of bos_token, eos_token, pad_token and unk_token: those that the configuration has."""
        found = {name: spelling(self.config.get(name)) for name in template.NAMED}
        return {name: token for name, token in found.items() if token is not None}

    def special(self, name: str) -> int | None:
        """The id of bos_token, eos_token, pad_token or unk_token."""
        return self.reader.token_to_id(self.named[name]) if name in self.named else None

    @cached_property
    def bos(self) -> int | None:
        """bos_token."""
        return self.special("bos_token")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether documents begin with bos_token: by the configuration or tokenizer.json's post-processor.

        The tokenizers we train say neither, and have it before documents as before conversations.
        """
        if self.bos is None:
            return False
        if self.config.get("add_bos_token") or self.ours:
            return True
        return self.reader.encode("a", add_special_tokens=True).ids[:1] == [self.bos]

    @cached_property
    def eos(self) -> int:
        """eos_token, or the first token that stops generation where none is named."""
        eos = self.special("eos_token")
        if eos is None and self.config.get(STOP_KEY):
            return int(self.config[STOP_KEY][0])
        if eos is None:
            raise UserError(f"{FAST_CONFIG_FILE} names no eos_token that {FAST_FILE} has")
        return eos

    @cached_property
    def pad(self) -> int:
        """pad_token, or another special token that does not stop generation, as long as there is one.

        The first of these: pad_token; the special tokens that are named for padding, as `<|pad|>` and
        `<|finetune_right_pad_id|>`; unk_token; the special tokens that are named as PADDING says. Of several
        the one with the lowest id. Masks come from structure and never look at it; other programs' may.
        """
        found = [self.special("pad_token"), *self.flagged_as("pad"), self.special("unk_token")]
        found += [token for word in PADDING for token in self.flagged_as(word)]
        candidates = [token for token in found if token is not None]
        unlike = (token for token in candidates if token not in self.stop_tokens)
        return next(unlike, candidates[0] if candidates else self.eos)

    def flagged_as(self, word: str) -> list[int | None]:
        """The ids of the special tokens that are spelled with a word."""
        return [self.reader.token_to_id(token) for token in self.flagged if word in token.lower()]

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The configuration's stop_token_ids, or eos_token."""
        return tuple(self.config.get(STOP_KEY, ())) or (self.eos,)

    @property
    def chat_template(self) -> str | None:
        """As the configuration has it."""
        return self.config.get("chat_template")

    @cached_property
    def ours(self) -> bool:
        """Whether the special tokens are those of the tokenizers we train, with the same ids."""
        ids = [self.reader.token_to_id(token) for token in SPECIAL_TOKENS]
        return ids == list(range(len(SPECIAL_TOKENS)))

    @property
    def speaks_chatml(self) -> bool:
        """Whether conversations are laid out as by the models we train, with the same ids."""
        return self.chat_template in (CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE) and self.ours

    @cached_property
    def flagged(self) -> tuple[str, ...]:
        """The spelling of the added tokens that tokenizer.json calls special."""
        added = self.reader.get_added_tokens_decoder()
        return tuple(token.content for _, token in sorted(added.items()) if token.special)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The spelling of every token that is not text, the longest first.

        Those called special, those that stop generation, and whatever else the chat template writes around
        messages: a file may have forgotten to call `<|im_end|>` special. A token that the template looks for
        inside messages (`</think>`) is part of what a message may say.
        """
        added = {i: token.content for i, token in self.reader.get_added_tokens_decoder().items()}
        control = {*self.flagged, *(added[i] for i in self.stop_tokens if i in added)}
        if self.chat_template is not None:
            frame = template.framing(self.chat_template, tuple(sorted(self.named.items())))
            written = {token for token in added.values() if token in frame and not token.isspace()}
            control |= written - self.sayable
        return tuple(sorted(control, key=lambda token: (-len(token), token)))

    def control_name(self, token: int) -> str | None:
        """How a control token is spelled; None for every other id."""
        name = self.reader.id_to_token(token)
        return name if name in self.control_tokens else None

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens but <unk>, which text may become."""
        ids = {self.reader.token_to_id(token) for token in self.control_tokens}
        return frozenset(i for i in ids if i is not None and i != self.special("unk_token"))

    @cached_property
    def sayable(self) -> frozenset[str]:
        """The added tokens that a reply may spell, because the template looks for them inside messages."""
        if self.chat_template is None:
            return frozenset()
        added = self.reader.get_added_tokens_decoder().items()
        sought = "\0".join(template.looked_for(self.chat_template))
        return frozenset(t.content for i, t in added if t.content in sought and i not in self.stop_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.control_ids.isdisjoint(ids):
            return ids
        # A unigram model finds every piece in text, control tokens too.
        return self.renamed.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens vanish."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def spelling(token: Any) -> str | None:
    """The text of a special token, which a configuration gives as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def load(folder: Path, day: datetime.date | None = None) -> FastTokenizer:
    """Reads tokenizer.json and tokenizer_config.json; the template takes `day` for today.

    Raises:
      UserError: one of them is missing or cannot be read.
    """
    try:
        json_bytes = (folder / FAST_FILE).read_bytes()
        config = json.loads((folder / FAST_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None
    return checked(json_bytes, config, str(folder), day)


def checked(
    json_bytes: bytes, config: Mapping[str, Any], origin: str, day: datetime.date | None = None
) -> FastTokenizer:
    """A tokenizer whose parts have been looked at; `origin` names it in errors."""
    tokenizer = FastTokenizer(json_bytes, config, day)
    try:
        _ = tokenizer.reader, tokenizer.eos
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
    return FastTokenizer(backend.to_str().encode(), SETTINGS)
