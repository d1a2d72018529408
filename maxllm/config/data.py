"""Data: the tokenizer, the sources, and the shape of a batch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from maxllm.config.section import Effect, Name, Place, Section

TEMPLATES = ("chatml", "llama2", "llama3", "alpaca", "instruction", "happy-llm")
"""The chat templates that have a name (data/layouts.py)."""


def layout(name: str) -> str:
    """The name of a chat template or of a file that holds one, as it is.

    Raises:
      ValueError: it is neither.
    """
    if name not in TEMPLATES and not name.endswith(".jinja"):
        raise ValueError(f"{name} is none of {', '.join(TEMPLATES)}, nor a file that ends in .jinja")
    return name


Layout = Annotated[Place, AfterValidator(layout)]
"""A chat template, by its name or file."""


class TokenizerConfig(Section):
    """The SentencePiece tokenizer."""

    path: Place = Field(
        description="A tokenizer.model, or a folder with tokenizer.json; `prepare` trains it if absent."
    )
    vocab_size: int = Field(4096, ge=512, description="Pieces to train, special tokens included.")
    algorithm: Literal["bpe", "unigram", "byte_bpe"] = Field(
        "bpe", description="SentencePiece BPE or unigram, or byte-level BPE (then `path` is a folder)."
    )
    character_coverage: float = Field(
        0.9995,
        gt=0.5,
        le=1,
        description="Share of characters that get a piece of their own; the rest fall back to bytes.",
    )
    sample_bytes: int = Field(
        16_000_000,
        gt=0,
        description="UTF-8 bytes of training documents, evenly spread over all, that the tokenizer is "
        "trained on; that takes 4 times as much memory for bpe, 20 times for unigram.",
    )


class CleanConfig(Section):
    """What makes a document unfit; the thresholds are explained in data/clean.py."""

    min_chars: int = Field(20, ge=0, description="Documents with fewer non-blank characters are dropped.")
    max_symbol_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest share of non-blank characters that are not letters of any script.",
    )
    max_repeated_line_share: float = Field(
        0.3, gt=0, le=1, description="Largest share of lines that repeat an earlier line (Gopher)."
    )


class DataConfig(Section):
    """Where the stage's data comes from."""

    sources: tuple[Name, ...] = Field(
        (),
        description="Files, folders, slice:NAME, tfds:NAME@SPLIT; after pretrain JSONL, tasks:SPLIT:COUNT.",
    )
    heldout_sources: tuple[Name, ...] = Field(
        (), description="Held-out data of the same form; empty: a share of `sources` is held out."
    )
    heldout_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of documents or rows held out when heldout_sources is empty."
    )
    fold: str | None = Field(
        None,
        pattern="^[1-9][0-9]*/[1-9][0-9]*$",
        description="K/N: of N equal parts of the rows the K-th is held out, for cross-validation by N runs "
        "(after pretrain).",
    )
    text_field: str = Field("text", description="Field that holds a document in JSONL and TFDS rows.")
    prepared_dir: Place | None = Field(
        None,
        description="Folder, here or in a bucket, of the packed corpus that `prepare` writes and `pretrain` "
        "reads.",
    )
    cache_gb: Annotated[float, Effect.RECORD] = Field(
        10,
        gt=0,
        description="Gigabytes of a corpus in a bucket that each process keeps on the disk of its machine.",
    )
    clean: CleanConfig = Field(default_factory=CleanConfig, description="Document filters (pretrain).")
    template: Layout | None = Field(
        None,
        description="How conversations are laid out: chatml, llama2, llama3, alpaca, instruction, happy-llm, "
        "or a .jinja file; without it, as by the run that this one starts from.",
    )
    turns: Literal["all", "each", "last"] = Field(
        "all",
        description="What SFT trains on in a conversation: all replies in one sample, each in a sample of "
        "its own, or the last alone. The loss on a reply is the same in all three.",
    )
    strict: Annotated[bool, Effect.RECORD] = Field(
        False, description="Whether a field of a row that nothing here reads is an error, not a remark."
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="Largest share of unusable rows before the run refuses to start."
    )

    @model_validator(mode="after")
    def _fold(self) -> Self:
        if self.fold is None:
            return self
        number, parts = map(int, self.fold.split("/"))
        if parts < 2 or number > parts:
            raise ValueError(f"fold={self.fold} is not one of at least two parts; give 1/5, 2/5 and so on")
        if self.heldout_sources:
            raise ValueError(
                f"fold={self.fold} holds out a part of data.sources: leave heldout_sources empty"
            )
        return self

    @property
    def heldout_range(self) -> tuple[int, int]:
        """A row is held out if its prompt's hash, of 64 bits, is in [first, second) of these."""
        if self.fold is None:
            return 0, int(self.heldout_share * 2**64)
        number, parts = map(int, self.fold.split("/"))
        return (number - 1) * 2**64 // parts, number * 2**64 // parts


class BatchConfig(Section):
    """The shape of a global batch."""

    rows: int = Field(gt=0, description="Sequences (PPO: prompts) per step over all devices.")
    sequence_length: int = Field(gt=1, description="Tokens per sequence (T).")
    microbatches: Annotated[int, Effect.COMPUTATION] = Field(
        1, gt=0, description="Parts a batch is split into for gradient accumulation."
    )
