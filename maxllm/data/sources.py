"""Read documents and rows from files, folders, the committed slice and TensorFlow Datasets.

A source is a name: `book.txt`, `rows.jsonl`, `rows.jsonl.gz`, `rows.json`, a folder of these, `slice:NAME`
(`maxllm/data/slice`) or `tfds:NAME[/config[:version]][@split]`; files may lie in a bucket. Rows that cannot
be read are counted in a `Tally` with the place of the first one, never passed over in silence; the caller
ends with `tally.check()`.
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from maxllm.errors import UserError
from maxllm.files import file_hash
from maxllm.storage import files_below, name_below, path_of, reachable, size_of, written_at_ns

SLICES = ("shakespeare", "austen", "tang")
DOCUMENT_END = "<|endoftext|>"
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
_BOM = b"\xef\xbb\xbf"

Row = tuple[int, dict[str, Any]]


@dataclass
class Tally:
    """What became of a source's rows. Readers count rows and bad ones, later stages drop more of them."""

    source: str
    """The name as the user gave it."""
    rows: int = 0
    """Rows met, bad ones included, blank lines not."""
    bad: int = 0
    """Rows that could not be read: those dropped with a place."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows went, by reason; bad rows are among them."""
    unread: Counter[str] = field(default_factory=Counter)
    """How many rows had a field that nobody read, by name."""
    first_bad: str | None = None
    """The first bad row: its file, line and what is wrong, a sentence without its full stop."""

    @property
    def kept(self) -> int:
        """Rows not dropped, by anyone, so far."""
        return self.rows - self.dropped.total()

    def drop(self, reason: str, where: str | None = None) -> None:
        """Count one row as dropped; `where` (file, line, what is wrong) marks it as bad, not just unfit."""
        self.dropped[reason] += 1
        if where is not None:
            self.bad += 1
            self.first_bad = self.first_bad or where

    def report(self) -> dict[str, Any]:
        """The counts as plain data."""
        counts = {"source": self.source, "rows": self.rows, "kept": self.kept, "dropped": dict(self.dropped)}
        return counts | ({"unread": dict(self.unread)} if self.unread else {})

    def line(self) -> str:
        """The counts as a line for the console."""
        reasons = "".join(f"; {count:,} dropped: {reason}" for reason, count in self.dropped.most_common())
        fields = ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(self.unread.items()))
        unread = f"; fields that are not read: {fields}" if fields else ""
        return f"{self.source}: {self.rows:,} rows, {self.kept:,} kept{reasons}{unread}"

    def check(self, max_bad_share: float) -> None:
        """Raise UserError when the source is empty, more than `max_bad_share` (0..1) bad, or none kept."""
        if self.rows == 0:
            raise UserError(f"{self.source} is empty")
        if self.bad > max_bad_share * self.rows:
            raise UserError(
                f"{self.first_bad}; {self.bad} of {self.rows} rows are bad, "
                f"more than data.max_bad_share={max_bad_share:g} allows"
            )
        if self.kept == 0:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())
            raise UserError(f"{self.source}: none of {self.rows} rows was kept ({reasons})")


# 1. Rows ----------------------------------------------------------------------------------------------------


def read_rows(path: str | Path, tally: Tally) -> Iterator[Row]:
    """Iterate (number, object) over a .jsonl, .jsonl.gz or .json file; numbers are 1-based.

    The number is the line's; in a .json file that holds one list, the element's place in it (a .json file may
    also hold an object a line). Blank lines are skipped. A line that is not JSON, not UTF-8 or not an object
    counts in `tally` as bad. UserError at once when the file is missing or of another kind; while reading,
    when a .json list or a .gz is broken.
    """
    path = path_of(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if not path.name.endswith(ROW_SUFFIXES):
        raise UserError(f"{path} is not a {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]} file")
    return _rows_of_file(path, tally)


def place(path: str | Path, number: int) -> str:
    """`rows.jsonl line 7`: where the row is that `read_rows` numbered so, for a message."""
    return f"{path} {'row' if str(path).endswith('.json') else 'line'} {number}"


def _rows_of_file(path: Path, tally: Tally) -> Iterator[Row]:
    if path.suffix == ".json" and _starts_with_bracket(path):
        yield from _rows_of_list(path, tally)
        return
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            yield from _rows_of_lines(stream, str(path), tally)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is cut off or corrupt
        raise UserError(f"{path} cannot be read ({error})") from error


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1024).removeprefix(_BOM).lstrip().startswith(b"[")


def _rows_of_lines(lines: Iterable[bytes], name: str, tally: Tally) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        tally.rows += 1
        where = place(name, number)
        try:
            # Without its line end: json would place a fault at the end on column 1 of a line of its own.
            value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            tally.drop("not UTF-8", f"{where} is not UTF-8 (byte {error.start + 1} of the line)")
        except (ValueError, RecursionError) as error:
            tally.drop("not JSON", f"{where} is not JSON ({_json_error(error)})")
        else:
            if _is_object(value, where, tally):
                yield number, value


def _rows_of_list(path: Path, tally: Tally) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        line = f" on line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON ({_json_error(error)}{line})") from error
    for number, value in enumerate(values, start=1):
        tally.rows += 1
        if _is_object(value, place(path, number), tally):
            yield number, value


def _json_error(error: Exception) -> str:
    # Most faults come with a column; a number of 5,000 digits or deep nesting comes in Python's own words.
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _is_object(value: Any, where: str, tally: Tally) -> bool:
    if not isinstance(value, dict):
        tally.drop("not an object", f"{where} is not a JSON object but {_kind(value)}")
        return False
    # JSON can spell "\ud800", which no tokenizer and no file can take.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        tally.drop("not valid Unicode", f"{where} holds half of a surrogate pair")
        return False
    return True


def _kind(value: Any) -> str:
    """A JSON value's kind in the words of the user's file."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    kinds |= {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


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
    files = _files_of(path_of(source))
    return (text for file in files for text in _documents_of_file(file, text_field, tally))


def files_of_source(source: str) -> list[Path]:
    """A source's files; none for what is no file, or is not here (any more)."""
    if source.startswith("tfds:"):
        return []
    if source.startswith("slice:"):
        return _slice_files(source.removeprefix("slice:"))
    return _files_of(path_of(source)) if path_of(source).exists() else []


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


def _files_of(path: Path) -> list[Path]:
    kinds = (".txt", *ROW_SUFFIXES)
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
    if not files:
        raise UserError(f"{path} holds no {', '.join(kinds[:-1])} or {kinds[-1]} file")
    return files


def _documents_of_file(path: Path, text_field: str, tally: Tally) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from _documents_of_text(path, tally)
        return
    for number, row in _rows_of_file(path, tally):
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
        tally.drop("not a string", f"{where}: field {text_field!r} is not a string but {_kind(text)}")
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
            line = line.removeprefix(_BOM) if number == 1 else line
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
