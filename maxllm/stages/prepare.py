"""Prepare: raw text to a tokenizer and packed rows.

    maxllm prepare configs/pretrain/tiny_slice_cpu.yaml

1. read and clean documents, drop duplicates (data/sources, clean, dedup)
2. split off the held-out documents by a hash of their content
3. train the tokenizer on the training documents, unless tokenizer.path is there already or the run starts
   from a model, whose tokenizer it is then
4. tokenize, chunk, pack; write data.prepared_dir, whole or not at all
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxllm.config import Config, DataConfig, TokenizerConfig
from maxllm.data import bpe, ngram, spm
from maxllm.data.clean import clean_text, reason_to_drop
from maxllm.data.dedup import drop_duplicates, text_key
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.pack import chunks, pack
from maxllm.data.sources import Tally, read_documents, source_bytes
from maxllm.data.tokenizer import SPM_FILE, Tokenizer, document_start
from maxllm.errors import UserError
from maxllm.files import read_json, whole_folder, write_bytes, write_json
from maxllm.records import LmBatch
from maxllm.run.record import console, progress
from maxllm.run.session import flat

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")


def run(config: Config) -> dict[str, Any]:
    """Prepares what a pretrain recipe needs; returns the manifest. Does nothing when it is done already."""
    assert config.data.prepared_dir is not None, "Config checks this"
    out = Path(config.data.prepared_dir)
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        check_settings(config, out, manifest)
        console().print(f"prepare: {out} is prepared already", markup=False, soft_wrap=True)
        return manifest

    with whole_folder(out) as folder:
        manifest = prepare(config, folder)
        write_json(folder / MANIFEST, manifest)
    return manifest


def prepare(config: Config, folder: Path) -> dict[str, Any]:
    """Fills a folder with packed rows; returns what the manifest says of them."""
    started = time.perf_counter()
    terminal = console()
    train, heldout, tallies = split_documents(config.data)
    for tally in tallies:
        terminal.print(f"prepare: {tally.line()}", markup=False, soft_wrap=True)
    tokenizer = the_tokenizer(config, train)
    train_counts, heldout_counts = ngram.ByteCounts(train), ngram.ByteCounts(heldout)
    unigram, bigram = ngram.bits_per_byte(train_counts, heldout_counts)
    manifest: dict[str, Any] = {
        "settings": settings_of(config),
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "sources": [tally.report() for tally in tallies],
        "bits_per_byte_unigram": unigram,
        "bits_per_byte_bigram": bigram,
    }
    for name, texts, counts in (("train", train, train_counts), ("heldout", heldout, heldout_counts)):
        rows = pack_documents(tokenizer, texts, config.batch.sequence_length)
        write_rows(folder / name, rows)
        tokens = int(rows.loss_weights_BT.sum())
        manifest[name] = {
            "documents": len(texts),
            "bytes": counts.bytes,
            "tokens": tokens,
            "rows": len(rows.tokens_BT),
            "fill": tokens / rows.tokens_BT.size,
        }
    return manifest | {"seconds": round(time.perf_counter() - started, 3)}


def the_tokenizer(config: Config, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer of the model that the run starts from, or the one at tokenizer.path, or a new one."""
    if config.tokenizer is None:
        return load_tokenizer(config.start.policy or "")
    path = Path(config.tokenizer.path)
    if path.exists():
        tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size != config.tokenizer.vocab_size:
            raise UserError(
                f"tokenizer {path} is there already with {tokenizer.vocab_size} pieces, "
                f"tokenizer.vocab_size is {config.tokenizer.vocab_size}; remove it to train another"
            )
        return tokenizer
    with console().status("prepare: training the tokenizer"):
        tokenizer = train_tokenizer(texts, config.tokenizer)
    save_tokenizer(tokenizer, path)
    return tokenizer


def settings_of(config: Config) -> dict[str, Any]:
    """What a prepared corpus depends on. Where it stands, and where its tokenizer does, is not part of it."""
    tokenizer = config.tokenizer and config.tokenizer.model_dump(mode="json", exclude={"path"})
    settings = {"data": config.data.model_dump(mode="json", exclude={"prepared_dir", "max_bad_share"})}
    sources = [*config.data.sources, *config.data.heldout_sources]
    settings["bytes"] = {source: source_bytes(source) for source in sources}  # an edited file is another one
    return settings | {"tokenizer": tokenizer, "batch": {"sequence_length": config.batch.sequence_length}}


def check_settings(config: Config, prepared: Path, manifest: dict[str, Any]) -> None:
    """A prepared corpus must be the one that a recipe describes.

    Raises:
      UserError: naming the first setting that differs.
    """
    former, now = flat(manifest["settings"]), flat(settings_of(config))
    for key in sorted(former.keys() | now.keys()):
        gone = key.startswith("bytes.") and now.get(key) is None  # the corpus outlives its sources
        if former.get(key) != now.get(key) and not gone:
            raise UserError(
                f"{prepared} was prepared with {key}={former.get(key)}, not {now.get(key)}; "
                "remove it, or give another data.prepared_dir"
            )


def split_documents(data: DataConfig) -> tuple[list[str], list[str], list[Tally]]:
    """(training documents, held-out documents, counts by source), cleaned and free of exact duplicates."""
    if not data.sources:
        raise UserError("data.sources is empty: name at least one file, folder or slice:NAME")
    seen: set[bytes] = set()
    # Held-out sources go first: a document that stands in both is then not trained on.
    heldout, tallies = read_clean(data.heldout_sources, data, seen)
    documents, train_tallies = read_clean(data.sources, data, seen)
    if data.heldout_sources:
        return documents, heldout, tallies + train_tallies
    train: list[str] = []
    for text in documents:
        held = int.from_bytes(text_key(text)[:8], "big") / 2**64 < data.heldout_share
        (heldout if held else train).append(text)
    if not train or not heldout:
        raise UserError(
            f"{len(documents)} documents are too few to hold out data.heldout_share={data.heldout_share:g} "
            "of them; give data.heldout_sources"
        )
    return train, heldout, train_tallies


def read_clean(sources: Sequence[str], data: DataConfig, seen: set[bytes]) -> tuple[list[str], list[Tally]]:
    """Cleaned, deduplicated documents of the sources in order."""
    documents: list[str] = []
    tallies = []
    for source in sources:
        tally = Tally(source)
        documents += drop_duplicates(fit_documents(source, data, tally), tally, seen)
        tally.check(data.max_bad_share)
        tallies.append(tally)
    return documents, tallies


def fit_documents(source: str, data: DataConfig, tally: Tally) -> Iterator[str]:
    """Cleaned documents of one source that no rule drops."""
    rules = data.clean
    documents = read_documents(source, data.text_field, tally)
    for raw in progress(documents, f"prepare: reading {source}"):
        text = clean_text(raw)
        reason = reason_to_drop(text, rules.min_chars, rules.max_symbol_share, rules.max_repeated_line_share)
        if reason is None:
            yield text
        else:
            tally.drop(reason)


def pack_documents(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> LmBatch:
    """BOS document EOS, chunked and packed; every token after the first is a target once."""

    def pieces() -> Iterator[Any]:
        for text in progress(texts, "prepare: tokenizing"):
            ids = [*document_start(tokenizer, text), tokenizer.eos]
            yield from chunks(ids, [1] * len(ids), length)

    return pack(pieces(), length, tokenizer.pad)


def train_tokenizer(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """Trains the tokenizer that a recipe asks for."""
    return bpe.train(texts, config) if config.algorithm == "byte_bpe" else spm.train(texts, config)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a SentencePiece model to its path, a byte-level tokenizer's files into a folder of that name."""
    if list(tokenizer.files) == [SPM_FILE]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, tokenizer.files[SPM_FILE])
        return
    with whole_folder(path) as folder:
        for name, content in tokenizer.files.items():
            write_bytes(folder / name, content)


def write_rows(folder: Path, rows: LmBatch) -> None:
    """One .npy file per array."""
    folder.mkdir(parents=True)
    for field in dataclasses.fields(rows):
        np.save(folder / f"{field.name}.npy", getattr(rows, field.name))


def read_rows(prepared: Path, split: str) -> LmBatch:
    """Packed rows [N, T], memory-mapped.

    Raises:
      UserError: an array is missing or cut short.
    """
    files = [prepared / split / f"{field.name}.npy" for field in dataclasses.fields(LmBatch)]
    try:
        return LmBatch(*(np.load(file, mmap_mode="r") for file in files))
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared} is damaged ({error}); remove it and prepare it anew") from None


def read_manifest(prepared: Path) -> dict[str, Any]:
    """What `run` wrote.

    Raises:
      UserError: the corpus was not prepared.
    """
    path = prepared / MANIFEST
    if not path.is_file():
        raise UserError(f"{prepared} is not prepared; run `maxllm prepare RECIPE` first")
    manifest = read_json(path)
    if not {"settings", "tokenizer_sha256", *SPLITS} <= manifest.keys():
        raise UserError(f"{path} is damaged; remove {prepared} and prepare it anew")
    return manifest
