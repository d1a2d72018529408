"""Prepare: clean text, train the tokenizer, pack the corpus of a pretrain recipe.

    maxllm prepare configs/pretrain/tiny_slice_cpu.yaml

1. read and clean documents, drop duplicates (data/sources, clean, dedup)
2. split off the held-out documents by a hash of their content
3. train the tokenizer on the training documents, unless tokenizer.path is there already or the run starts
   from a model, whose tokenizer it is then
4. tokenize, chunk, pack; write data.prepared_dir, whole or not at all
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from sentencepiece import sentencepiece_model_pb2

from maxllm.config.data import DataConfig, TokenizerConfig
from maxllm.config.root import Config
from maxllm.data import bpe, ngram, spm
from maxllm.data.clean import clean_text, reason_to_drop
from maxllm.data.corpus import (
    MANIFEST,
    SPLITS,
    check_settings,
    is_prepared,
    read_manifest,
    read_rows,
    settings_of,
    states_of,
    write_manifest,
    write_rows,
)
from maxllm.data.dedup import drop_duplicates, text_key
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.loader import fingerprint
from maxllm.data.pack import Piece, chunks
from maxllm.data.sources import read_documents
from maxllm.data.spool import Spool
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import SPM_FILE, Tokenizer, document_start
from maxllm.errors import RunFailed, UserError
from maxllm.files import whole_folder, write_bytes
from maxllm.run.console import console, progress
from maxllm.storage import copy_in, is_remote, path_of, reachable, refusal

model_pb2: Any = sentencepiece_model_pb2  # generated at import: type checkers see nothing in it


def run(config: Config) -> dict[str, Any]:
    """Prepares what a pretrain recipe needs; returns the manifest. Does nothing when it is done already."""
    assert config.data.prepared_dir is not None, "Config checks this"
    out = path_of(config.data.prepared_dir)
    with reachable(out):
        done = is_prepared(out)
    if done:
        manifest = read_manifest(out)
        check_settings(config, out, manifest)
        console().print(f"prepare: {out} is prepared already", markup=False, soft_wrap=True)
        return manifest

    if is_remote(out):
        return prepare_remote(config, out)
    with whole_folder(out) as folder:
        manifest = prepare(config, folder)
        write_manifest(folder, manifest)
    return manifest


def prepare_remote(config: Config, out: Path) -> dict[str, Any]:
    """Prepares a corpus here, then copies it to a bucket; the manifest last, which says that all is there.

    Raises:
      RunFailed: the copy failed; the next time, what was prepared is copied again.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxllm" / "prepared"
    local = home / xxhash.xxh3_64_hexdigest(str(out).encode())
    home.mkdir(parents=True, exist_ok=True)
    there = config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": str(local)})})
    manifest = run(there)
    try:
        for file in sorted(local.rglob("*"), key=lambda file: file.name == MANIFEST):
            if file.is_file():
                copy_in(file, out / file.relative_to(local).as_posix())
    except Exception as error:
        reason = refusal(error, out) or f"{type(error).__name__}: {error}"
        raise RunFailed(
            f"{local} is prepared but could not be copied to {out} ({reason}); the same command copies it"
        ) from error
    shutil.rmtree(local)
    return manifest


def prepare(config: Config, folder: Path) -> dict[str, Any]:
    """Fills a folder with packed rows; returns what the manifest says of them."""
    started = time.perf_counter()
    settings, states = (
        settings_of(config),
        states_of(config),
    )  # of the sources as they are before they are read
    terminal = console()
    with documents_in(folder) as documents:
        train, heldout = (documents[name] for name in SPLITS)
        tallies = split_documents(config.data, train, heldout)
        for tally in tallies:
            terminal.print(f"prepare: {tally.line()}", markup=False, soft_wrap=True)
        tokenizer = read_or_train_tokenizer(config, train)
        counts = {name: ngram.ByteCounts(documents[name]) for name in SPLITS}
        unigram, bigram = ngram.bits_per_byte(counts["train"], counts["heldout"])
        manifest: dict[str, Any] = {
            "settings": settings,
            "source_states": states,
            "tokenizer_sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "sources": [tally.report() for tally in tallies],
            "bits_per_byte_unigram": unigram,
            "bits_per_byte_bigram": bigram,
        }
        for name, texts in documents.items():
            pieces = pieces_of(tokenizer, texts, config.batch.sequence_length)
            rows, tokens = write_rows(folder / name, pieces, config.batch.sequence_length, tokenizer.pad)
            manifest[name] = {
                "documents": len(texts),
                "bytes": counts[name].bytes,
                "tokens": tokens,
                "rows": rows,
                "fill": tokens / (rows * config.batch.sequence_length),
                "fingerprint": fingerprint(read_rows(folder, name)),
            }
    return manifest | {"seconds": round(time.perf_counter() - started, 3)}


@contextmanager
def documents_in(folder: Path) -> Iterator[dict[str, Spool]]:
    """Files for the cleaned documents of each split, gone afterwards."""
    documents = {name: Spool(folder / f".{name}.documents") for name in SPLITS}
    try:
        yield documents
    finally:
        for spool in documents.values():
            spool.close()


def read_or_train_tokenizer(config: Config, texts: Spool) -> Tokenizer:
    """The tokenizer of the model that the run starts from, or the one at tokenizer.path, or a new one."""
    if config.tokenizer is None:
        return load_tokenizer(config.start.policy or "")
    path = path_of(config.tokenizer.path)
    if path.exists():
        tokenizer = load_tokenizer(path)
        check_tokenizer(tokenizer, config.tokenizer)
        return tokenizer
    size = min(config.tokenizer.sample_bytes, texts.bytes)
    with console().status(f"prepare: training the tokenizer on {size / 1e6:,.0f} MB"):
        tokenizer = train_tokenizer(texts.sample(size), config.tokenizer)
    save_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """A tokenizer that is there already must be one that the recipe describes.

    Raises:
      UserError: naming the setting that differs.
    """
    found: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if isinstance(tokenizer, spm.SpmTokenizer):
        trainer = model_pb2.ModelProto.FromString(tokenizer.model_bytes).trainer_spec
        found["algorithm"] = model_pb2.TrainerSpec.ModelType.Name(trainer.model_type).lower()
        found["character_coverage"] = round(trainer.character_coverage, 6)  # of a float32
    elif isinstance(tokenizer, bpe.FastTokenizer):
        kind = str(json.loads(tokenizer.json_bytes)["model"].get("type")).lower()
        byte_level = kind == "bpe" and config.algorithm == "byte_bpe"  # an imported one may be of either kind
        found["algorithm"] = "byte_bpe" if byte_level else kind
    wanted = config.model_dump(mode="json")
    for name, value in found.items():
        if value != wanted[name]:
            raise UserError(
                f"tokenizer {config.path} is there already with {name}={value}, the recipe has "
                f"tokenizer.{name}={wanted[name]}; change that, or remove the tokenizer to train another"
            )


def split_documents(data: DataConfig, train: Spool, heldout: Spool) -> list[Tally]:
    """Cleaned documents, free of exact duplicates, into the two spools; returns the counts by source."""
    if not data.sources:
        raise UserError("data.sources is empty: name at least one file, folder or slice:NAME")
    seen: set[bytes] = set()

    def held(text: str) -> bool:
        return int.from_bytes(text_key(text)[:8], "big") / 2**64 < data.heldout_share

    if data.heldout_sources:
        # Held-out sources go first: a document that stands in both is then not trained on.
        tallies = read_clean(data.heldout_sources, data, seen, heldout.append)
        return tallies + read_clean(data.sources, data, seen, train.append)
    tallies = read_clean(
        data.sources, data, seen, lambda text: (heldout if held(text) else train).append(text)
    )
    if not len(train) or not len(heldout):
        raise UserError(
            f"{len(train) + len(heldout)} documents are too few to hold out "
            f"data.heldout_share={data.heldout_share:g} of them; give data.heldout_sources"
        )
    return tallies


def read_clean(
    sources: Sequence[str], data: DataConfig, seen: set[bytes], take: Callable[[str], None]
) -> list[Tally]:
    """Hands the cleaned, deduplicated documents of the sources to `take`, in order."""
    tallies = []
    for source in sources:
        tally = Tally(source)
        for text in drop_duplicates(fit_documents(source, data, tally), tally, seen):
            take(text)
        tally.check(data.max_bad_share)
        tallies.append(tally)
    return tallies


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


def pieces_of(tokenizer: Tokenizer, texts: Spool, length: int) -> Iterator[Piece]:
    """BOS document EOS, in chunks; every token after the first is a target once."""
    for text in progress(texts, "prepare: tokenizing"):
        ids = np.array([*document_start(tokenizer, text), tokenizer.eos], np.int32)
        yield from chunks(ids, np.ones(len(ids), np.int8), length)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains the tokenizer that a recipe asks for."""
    return bpe.train(texts, config) if config.algorithm == "byte_bpe" else spm.train(texts, config)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a SentencePiece model to its path, a byte-level tokenizer's files into a folder of that name."""
    if list(tokenizer.files) == [SPM_FILE]:
        if not is_remote(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, tokenizer.files[SPM_FILE])
        return
    with whole_folder(path) as folder:
        for name, content in tokenizer.files.items():
            write_bytes(folder / name, content)
