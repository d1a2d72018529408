"""A prepared corpus: a folder of packed rows, and a manifest that says what they were made of.

Each split is a folder with one .npy file per array, written row by row and read as rows are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maxllm.config.root import Config
from maxllm.data.pack import Piece, fill, packed
from maxllm.data.remote import RemoteArray, cache_of_process
from maxllm.data.sources import source_hash, source_state
from maxllm.errors import UserError
from maxllm.files import read_json, write_json
from maxllm.recipe import flat
from maxllm.records import LmBatch
from maxllm.storage import is_remote

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")

# --- rows --------------------------------------------------------------------------------------------------


def write_rows(folder: Path, pieces: Iterable[Piece], length: int, pad: int) -> tuple[int, int]:
    """Packs pieces into rows on disk, one .npy file per array [N, length]; a row is written when it is full.

    Returns:
      (number of rows, number of targets).
    """
    folder.mkdir(parents=True)
    count, tokens = 0, 0
    with ExitStack() as stack:
        files = [RowFile(stack.enter_context(path.open("wb"))) for path in paths_of(folder)]
        for number, row in packed(pieces, length):
            filled = fill([row], length, pad)
            for file, field in zip(files, dataclasses.fields(filled), strict=True):
                file.write(number, getattr(filled, field.name))
            count = max(count, number + 1)
            tokens += sum(map(len, row))
        for file in files:
            file.finish(count)
    return count, tokens


def read_rows(prepared: Path, split: str, cache_gb: float = 0) -> LmBatch:
    """Packed rows [N, T], memory-mapped; in a bucket, fetched as they are asked for.

    Args:
      prepared: the corpus.
      split: one of SPLITS.
      cache_gb: gigabytes of a corpus in a bucket that are kept on this disk.

    Raises:
      UserError: an array is missing or cut short.
    """
    try:
        if is_remote(prepared):
            kept = cache_of_process(int(cache_gb * 1e9))
            recorded = read_manifest(prepared)[split].get("fingerprint")
            return LmBatch(*(RemoteArray(file, kept, recorded) for file in paths_of(prepared / split)))
        return LmBatch(*(np.load(file, mmap_mode="r") for file in paths_of(prepared / split)))
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared} is damaged ({error}); remove it and prepare it anew") from None


def paths_of(folder: Path) -> list[Path]:
    """The files of a record of rows."""
    return [folder / f"{field.name}.npy" for field in dataclasses.fields(LmBatch)]


class RowFile:
    """A .npy file that grows by rows, in any order; NumPy leaves room in its head for any number of them."""

    def __init__(self, stream: BinaryIO) -> None:
        """Takes an empty file, opened for writing."""
        self._stream = stream
        self._start = 0
        self._kind: tuple[tuple[int, ...], np.dtype] | None = None

    def write(self, number: int, rows: np.ndarray) -> None:
        """Puts an array [1, ...] where row `number` belongs."""
        if self._kind is None:
            self._kind = rows.shape[1:], rows.dtype
            self._start = self._head(0)
        self._stream.seek(self._start + number * rows.nbytes)
        self._stream.write(rows.tobytes())

    def finish(self, count: int) -> None:
        """Says how many rows there are."""
        if self._kind is not None:
            assert self._head(count) == self._start, "NumPy's head keeps its length"

    def _head(self, count: int) -> int:
        assert self._kind is not None, "there is a row"
        shape, dtype = self._kind
        self._stream.seek(0)
        head = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        }
        np.lib.format.write_array_header_1_0(self._stream, head)
        return self._stream.tell()


# --- the manifest ------------------------------------------------------------------------------------------


def is_prepared(prepared: Path) -> bool:
    """Whether a folder holds a corpus."""
    return (prepared / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Says what the rows in a folder are."""
    write_json(folder / MANIFEST, manifest)


def read_manifest(prepared: Path) -> dict[str, Any]:
    """What a prepared corpus says of itself.

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


def settings_of(config: Config, known: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """What a prepared corpus depends on. Where it stands, and where its tokenizer does, is not part of it.

    Args:
      config: the recipe.
      known: content hashes of sources that need not be read again.
    """
    tokenizer = config.tokenizer and config.tokenizer.model_dump(
        mode="json", exclude={"path", "sample_bytes"}
    )
    settings = {
        "data": config.data.model_dump(mode="json", exclude={"prepared_dir", "max_bad_share", "cache_gb"})
    }
    known = known or {}
    settings["content"] = {
        source: known[source] if source in known else source_hash(source) for source in sources_of(config)
    }
    return settings | {"tokenizer": tokenizer, "batch": {"sequence_length": config.batch.sequence_length}}


def sources_of(config: Config) -> list[str]:
    """All of a recipe's sources."""
    return [*config.data.sources, *config.data.heldout_sources]


def states_of(config: Config) -> dict[str, list[list[int]] | None]:
    """{source: sizes and times of its files}."""
    return {source: source_state(source) for source in sources_of(config)}


def check_settings(config: Config, prepared: Path, manifest: dict[str, Any], read: bool = True) -> None:
    """A prepared corpus must be the one that a recipe describes, its sources as they were.

    Args:
      config: the recipe.
      prepared: where the corpus is.
      manifest: what it says of itself.
      read: whether sources are read whatever their files' sizes and times say.

    Raises:
      UserError: naming the first setting that differs.
    """
    former_content = manifest["settings"].get("content", {})
    states = {} if read else states_of(config)
    known = {
        source: former_content[source]
        for source, state in states.items()
        if source in former_content and state == manifest.get("source_states", {}).get(source)
    }
    former, now = flat(manifest["settings"]), flat(settings_of(config, known))
    for key in sorted(former.keys() | now.keys()):
        gone = key.startswith("content.") and now.get(key) is None  # the corpus outlives its sources
        if former.get(key) == now.get(key) or gone:
            continue
        if key.startswith("content.") and former.get(key) is not None:
            raise UserError(
                f"{key.removeprefix('content.')} has changed since {prepared} was prepared from it; remove "
                "that folder, or give another data.prepared_dir"
            )
        raise UserError(
            f"{prepared} was prepared with {key}={former.get(key)}, not {now.get(key)}; "
            "remove it, or give another data.prepared_dir"
        )
