"""The SentencePiece tokenizer: training, encoding, decoding.

Text goes through it unchanged (identity normalization, no dummy prefix, byte fallback), and for every string
decode(encode(s)) == s. Control tokens are never produced from text, so a document cannot forge a chat turn;
PAD is a token of its own and never EOS.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece as spm

from maxllm.config import TokenizerConfig
from maxllm.errors import UserError

UNK, BOS, EOS, IM_START, IM_END, PAD = range(6)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")
"""Ids 0..5; the first five are those of the happy-llm tutorial."""

WORD_BOUNDARY = "▁"
"""SentencePiece's stand-in for a space (U+2581)."""

TRAINING_LINE_CHARS = 4096
"""SentencePiece silently skips longer lines than its limit; ours are cut here, so that none is skipped."""


@dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer. Ids 0..5 are `SPECIAL_TOKENS`."""

    model_bytes: bytes
    """The serialized SentencePiece model."""
    processor: spm.SentencePieceProcessor = field(compare=False, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special tokens included."""
        return self.processor.get_piece_size()

    @property
    def fingerprint(self) -> str:
        """sha256 of the model: two runs that exchange tokens must agree on it."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""
        # A literal U+2581 would come back as a space; its three UTF-8 bytes as byte pieces come back exactly.
        first, *rest = text.split(WORD_BOUNDARY)
        ids = self.processor.encode(first)
        for part in rest:
            ids += [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_BOUNDARY.encode()]
            ids += self.processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens vanish."""
        return self.processor.decode([int(i) for i in ids])


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer that `train_tokenizer` wrote.

    Raises:
      UserError: no such file, not a SentencePiece model, or not with our special tokens.
    """
    if not Path(path).is_file():
        raise UserError(f"tokenizer {path} does not exist; `maxllm prepare RECIPE` trains one")
    return from_bytes(Path(path).read_bytes(), str(path))


def from_bytes(model_bytes: bytes, origin: str) -> Tokenizer:
    """A tokenizer from a serialized model; `origin` names it in errors."""
    processor = spm.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model_bytes)
    except RuntimeError:
        raise UserError(f"{origin} is not a SentencePiece model") from None
    found = tuple(
        processor.id_to_piece(i) for i in range(min(len(SPECIAL_TOKENS), processor.get_piece_size()))
    )
    if found != SPECIAL_TOKENS:
        raise UserError(f"{origin} starts with the pieces {found}, where {SPECIAL_TOKENS} are expected")
    return Tokenizer(model_bytes, processor)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains on texts, line by line.

    Raises:
      UserError: the texts cannot support the vocabulary asked for.
    """
    written = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=written,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            unk_piece=SPECIAL_TOKENS[UNK],
            pad_piece=SPECIAL_TOKENS[PAD],
            control_symbols=list(SPECIAL_TOKENS[IM_START : IM_END + 1]),
            user_defined_symbols=["\n"],  # a line break is one token and no piece crosses it
            byte_fallback=True,
            split_digits=True,
            required_chars="".join(map(chr, range(0x21, 0x7F))),  # ASCII is never left to bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * TRAINING_LINE_CHARS,
            num_threads=1,  # the trained model does not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size} cannot be trained on this text: {reason}"
        ) from None
    return from_bytes(written.getvalue(), "the trained tokenizer")


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines, the long ones cut."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), TRAINING_LINE_CHARS):
                yield line[start : start + TRAINING_LINE_CHARS]
