"""Read documents and rows from files, folders, the committed slice and TensorFlow Datasets.

A source is a name: `book.txt`, `rows.jsonl` or another file of row_files.py, a pattern such as
`data/train-*.parquet`, a folder of these or one that `datasets` saved, `slice:NAME` (`maxllm/data/slice`) or
`tfds:NAME[/config[:version]][@split]`; files may lie in a bucket. What cannot be read is counted in a
`Tally`, and the caller ends with `tally.check()`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from maxllm.data.row_files import BOM, ROW_SUFFIXES, kind_of, place, plain_value, rows_of_file
from maxllm.data.tally import Tally
from maxllm.errors import UserError
from maxllm.files import file_hash
from maxllm.storage import files_below, is_remote, name_below, path_of, reachable, size_of, written_at_ns

SLICES = ("shakespeare", "austen", "tang")
DOCUMENT_END = "<|endoftext|>"
SAVED = "dataset_info.json"
"""What `datasets` writes into every folder that it saves."""
SPLIT = re.compile(r"(train|test|validation|valid|dev)(?=[-_.]|$)")
"""How a file or folder is named after the split that it holds."""

# 1. Rows ----------------------------------------------------------------------------------------------------


def rows_of_source(source: str, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of a source, file by file.

    Raises:
      UserError: at once where there is no such source, or it is text; while reading, where a file is broken.
    """
    if source.startswith("tfds:"):
        return _rows_of_tfds(_open_tfds(source), source, tally)
    files = (
        _slice_files(source.removeprefix("slice:"))
        if source.startswith("slice:")
        else files_of(path_of(source))
    )
    for file in files:
        if not file.name.endswith(ROW_SUFFIXES):
            raise UserError(f"{file} is not a {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]} file")
    return ((place(file, number), row) for file in files for number, row in rows_of_file(file, tally))


# 2. Documents -----------------------------------------------------------------------------------------------


def read_documents(source: str | Path, text_field: str, tally: Tally) -> Iterator[str]:
    """Iterate the documents of a source (see the head of this file), each a non-blank string.

    `text_field` names the text in .jsonl and .json rows and in TFDS examples; the slice's is always `text`.
    In a .txt file, documents are separated by lines that hold only `<|endoftext|>`. A folder is read file by
    file in the order of their paths, hidden files and other kinds left out. A row whose text is missing,
    blank, not a string or not valid Unicode counts in `tally` as bad. UserError at once when there is no such
    source.
    """
    name = str(source)
    if name.startswith("tfds:"):
        return _texts_of_tfds(_open_tfds(name), name, text_field, tally)
    if name.startswith("slice:"):
        files = _slice_files(name.removeprefix("slice:"))
        return (text for file in files for text in _documents_of_file(file, "text", tally))
    files = files_of(path_of(source))
    return (text for file in files for text in _documents_of_file(file, text_field, tally))


def files_of_source(source: str) -> list[Path]:
    """A source's files; none for what is no file, or is not here (any more)."""
    if source.startswith("tfds:"):
        return []
    if source.startswith("slice:"):
        return _slice_files(source.removeprefix("slice:"))
    path = path_of(source)
    there = any(path.parent.glob(path.name)) if is_pattern(path) else path.exists()
    return files_of(path) if there else []


def source_state(source: str) -> list[list[int]] | None:
    """[size, modification time in ns] of each of a source's files; None where there are none.

    Files whose sizes and times are the same are taken for the same where reading them would take too long.
    """
    files = files_of_source(source)
    return [[size_of(file), written_at_ns(file)] for file in files] or None


def source_hash(source: str) -> str | None:
    """XXH3 of the content of a source's files, in order; None where there are none."""
    files = files_of_source(source)
    if not files:
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(file_hash, files))
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("\n".join(hashes).encode())


def _slice_files(name: str) -> list[Path]:
    if name not in (*SLICES, "all"):
        raise UserError(f"slice:{name} does not exist; there are slice:{', slice:'.join((*SLICES, 'all'))}")
    # The package is never run from a zip file (jax could not be), so its files are real paths.
    folder = Path(str(resources.files("maxllm.data"))) / "slice"
    return [folder / f"{each}.jsonl" for each in (SLICES if name == "all" else (name,))]


def files_of(path: Path) -> list[Path]:
    """The files of a path: itself, those that a pattern names, or those in a folder, in order.

    Raises:
      UserError: there is none, or they are of several splits.
    """
    kinds = (".txt", *ROW_SUFFIXES)
    if is_pattern(path):
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"{path} matches no file")
        return files
    with reachable(path):
        there = path.exists()
    if not there:
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        if not path.name.endswith(kinds):
            raise UserError(f"{path} is not a {', '.join(kinds[:-1])} or {kinds[-1]} file")
        return [path]
    inside = sorted(files_below(path), key=lambda file: name_below(file, path))
    hidden = re.compile(r"(^|/)\.")
    files = [file for file in inside if file.name.endswith(kinds)]
    files = [file for file in files if not hidden.search(name_below(file, path))]
    if any(file.name == SAVED for file in files):
        # What `datasets` saved: its rows are Arrow, beside them lies JSON about them.
        files = [file for file in files if file.suffix == ".arrow"]
    if not files:
        raise UserError(f"{path} holds no {', '.join(kinds[:-1])} or {kinds[-1]} file")
    check_one_split(path, files)
    return files


def is_pattern(path: Path) -> bool:
    """Whether a path names files by a pattern, which those in buckets do not."""
    return "*" in path.name and not is_remote(str(path))


def check_one_split(path: Path, files: Sequence[Path]) -> None:
    """A dataset's folder may hold its test rows beside its training rows, in files or folders that are named
    after them.

    Raises:
      UserError: it does.
    """
    found: dict[str, Path] = {}
    for file in files:
        for part in reversed(name_below(file, path).split("/")):
            if split := SPLIT.match(part):
                found.setdefault(split[1], file)
                break
    if len(found) > 1:
        some = min(found)
        raise UserError(
            f"{path} holds the splits {', '.join(sorted(found))}: name one of them, as a folder or by a "
            f"pattern such as {path}/{some}*{found[some].suffix}"
        )


def _documents_of_file(path: Path, text_field: str, tally: Tally) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from _documents_of_text(path, tally)
        return
    for number, row in rows_of_file(path, tally):
        text = _text_of(row, text_field, place(path, number), tally)
        if text is not None:
            yield text


def _text_of(row: dict[str, Any], text_field: str, where: str, tally: Tally) -> str | None:
    """The row's text, or None after counting in `tally` what is wrong with it."""
    text = row.get(text_field)
    if text_field not in row:
        has = ", ".join(row) or "nothing"
        tally.drop("field missing", f"{where} has no field {text_field!r} (it has {has})")
    elif not isinstance(text, str):
        tally.drop("not a string", f"{where}: field {text_field!r} is not a string but {kind_of(text)}")
    elif not text.strip():
        tally.drop("empty", f"{where}: field {text_field!r} is empty")
    else:
        return text
    return None


def _documents_of_text(path: Path, tally: Tally) -> Iterator[str]:
    for start, data in _blocks_of_text(path):
        if not data.strip():
            continue
        tally.rows += 1
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = start + data.count(b"\n", 0, error.start)
            tally.drop("not UTF-8", f"{path} line {line} is not UTF-8")
        else:
            yield text


def _blocks_of_text(path: Path) -> Iterator[tuple[int, bytes]]:
    """The documents of a .txt file as (number of its first line, bytes); holds one document in memory."""
    separator = DOCUMENT_END.encode()
    start = 1
    lines: list[bytes] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip() == separator:
                yield start, b"".join(lines)
                start, lines = number + 1, []
            else:
                lines.append(line)
    yield start, b"".join(lines)


# 3. TensorFlow Datasets -------------------------------------------------------------------------------------


def _open_tfds(source: str) -> Sequence[dict[str, Any]]:
    """Random access to a TFDS split; TFDS prepares the dataset first when its folder does not hold it yet."""
    name, _, split = source.removeprefix("tfds:").partition("@")
    # Imported here because it takes seconds and most runs never need it.
    import tensorflow_datasets as tfds

    try:
        # TFDS reads TFDS_DATA_DIR when it is imported; passed on here so that a later change counts too.
        return tfds.data_source(name, split=split or "train", data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # tfds raises a dozen kinds, from its own to OSError
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{source} cannot be read: {reason} (a dataset must lie in TFDS_DATA_DIR in the array_record "
            "format, or be one that tensorflow_datasets can prepare)"
        ) from error


def _texts_of_tfds(
    examples: Sequence[dict[str, Any]], source: str, text_field: str, tally: Tally
) -> Iterator[str]:
    for index in range(len(examples)):
        tally.rows += 1
        example, where = examples[index], f"{source} example {index}"
        value = example.get(text_field)
        if isinstance(value, bytes):  # TFDS's Text feature
            try:
                example = {**example, text_field: value.decode("utf-8")}
            except UnicodeDecodeError:
                tally.drop("not UTF-8", f"{where}: feature {text_field!r} is not UTF-8")
                continue
        text = _text_of(example, text_field, where, tally)
        if text is not None:
            yield text


def _rows_of_tfds(
    examples: Sequence[dict[str, Any]], source: str, tally: Tally
) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in range(len(examples)):
        tally.rows += 1
        where = f"{source} example {index}"
        try:
            yield where, plain_value(examples[index])
        except UnicodeDecodeError:
            tally.drop("not UTF-8", f"{where} is not UTF-8")
