"""SentencePiece tokenizers: training, encoding, decoding.

Text goes through unchanged (identity normalization, no dummy prefix, byte fallback), and for every string
decode(encode(s)) == s. PAD is a token of its own and never EOS.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import sentencepiece as spm

from maxllm.config.data import TokenizerConfig
from maxllm.data.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    SPM_FILE,
    UNK,
    fingerprint_of,
)
from maxllm.errors import UserError

WORD_BOUNDARY = "▁"
"""SentencePiece's stand-in for a space (U+2581)."""

TRAINING_LINE_CHARS = 4096
"""SentencePiece silently skips longer lines than its limit; ours are cut here, so that none is skipped."""


@dataclass(frozen=True)
class SpmTokenizer:
    """A trained SentencePiece model. Ids 0..5 are `SPECIAL_TOKENS`."""

    model_bytes: bytes
    """The serialized SentencePiece model."""
    processor: spm.SentencePieceProcessor = field(compare=False, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special tokens included."""
        return self.processor.get_piece_size()

    @property
    def holes(self) -> tuple[int, ...]:
        """None: every id has a piece."""
        return ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the files."""
        return fingerprint_of(self.files)

    @property
    def files(self) -> Mapping[str, bytes]:
        """The model as tokenizer.model."""
        return {SPM_FILE: self.model_bytes}

    @property
    def bos(self) -> int:
        """<s>"""
        return BOS

    @property
    def adds_bos(self) -> bool:
        """Documents begin with it."""
        return True

    @property
    def eos(self) -> int:
        """</s>"""
        return EOS

    @property
    def pad(self) -> int:
        """<pad>"""
        return PAD

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The end of a document or of a turn."""
        return EOS, IM_END

    @property
    def chat_template(self) -> str:
        """ChatML."""
        return CHAT_TEMPLATE

    def control_name(self, token: int) -> str | None:
        """How a control token is spelled; None for every other id."""
        return SPECIAL_TOKENS[token] if 0 <= token < len(SPECIAL_TOKENS) else None

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
        """The text of token ids; control tokens and ids without a piece vanish."""
        return self.processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


def from_bytes(model_bytes: bytes, origin: str) -> SpmTokenizer:
    """A tokenizer that `train` made, from its serialized model; `origin` names it in errors.

    Raises:
      UserError: not a SentencePiece model, or not with our special tokens.
    """
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
    return SpmTokenizer(model_bytes, processor)


def train(texts: Iterable[str], config: TokenizerConfig) -> SpmTokenizer:
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
