"""Rows of files: JSON lines (plain, .gz, .zst), JSON, Parquet, and Arrow as `datasets` saves it.

Rows that cannot be read are counted in a `Tally` with the place of the first one, never passed over in
silence.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maxllm.data.tally import Tally
from maxllm.errors import UserError
from maxllm.storage import path_of

TABLE_SUFFIXES = (".parquet", ".arrow")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", *TABLE_SUFFIXES)
ARROW_FILE = b"ARROW1"
"""How an Arrow file begins; a stream, which `datasets` writes under the same ending, does not."""
TURNS = ("messages", "conversations")
"""Fields that hold turns."""
BOM = b"\xef\xbb\xbf"

Row = tuple[int, dict[str, Any]]


def read_rows(path: str | Path, tally: Tally) -> Iterator[Row]:
    """Iterate (number, object) over one of the files at the head; numbers are 1-based.

    The number is the line's; in a table and in a .json file that holds one list, the row's place in it (a
    .json file may also hold an object a line). Blank lines are skipped. A line that is not JSON, not UTF-8 or
    not an object counts in `tally` as bad. UserError at once when the file is missing or of another kind;
    while reading, when it is broken.
    """
    path = path_of(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if not path.name.endswith(ROW_SUFFIXES):
        raise UserError(f"{path} is not a {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]} file")
    return rows_of_file(path, tally)


def place(path: str | Path, number: int) -> str:
    """`rows.jsonl line 7`: where the row is that `read_rows` numbered so, for a message."""
    return f"{path} {'row' if str(path).endswith(('.json', *TABLE_SUFFIXES)) else 'line'} {number}"


def rows_of_file(path: Path, tally: Tally) -> Iterator[Row]:
    """`read_rows` of a file that is there, and of one of the kinds."""
    if path.suffix in TABLE_SUFFIXES:
        yield from _rows_of_table(path, tally)
        return
    if path.suffix == ".json" and _starts_with_bracket(path):
        yield from _rows_of_list(path, tally)
        return
    try:
        with path.open("rb") as raw, _unpacked(raw, path.suffix) as stream:
            yield from _rows_of_lines(stream, str(path), tally)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is cut off or corrupt
        raise UserError(f"{path} cannot be read ({error})") from error


def _unpacked(raw: BinaryIO, suffix: str) -> Any:
    """A file's lines as they were before they were compressed."""
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":
        import pyarrow  # here, for it takes a tenth of a second

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _rows_of_table(path: Path, tally: Tally) -> Iterator[Row]:
    """Rows of Parquet, and of Arrow's streams and files, as `datasets` saves them."""
    import pyarrow

    number = 0
    try:
        with path.open("rb") as stream:
            for batch in _batches(stream, path.suffix):
                for row in batch.to_pylist():
                    number += 1
                    tally.rows += 1
                    where = place(path, number)
                    try:
                        value = plain_value(row)
                    except UnicodeDecodeError:
                        tally.drop("not UTF-8", f"{where} is not UTF-8")
                        continue
                    if _is_object(value, where, tally):
                        yield number, value
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be read ({reason})") from error


def _batches(stream: BinaryIO, suffix: str) -> Iterator[Any]:
    """Record batches of a table, some rows at a time."""
    import pyarrow.ipc
    import pyarrow.parquet

    if suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024)
    if stream.read(len(ARROW_FILE)) == ARROW_FILE:
        file = pyarrow.ipc.open_file(stream)
        return (file.get_batch(index) for index in range(file.num_record_batches))
    stream.seek(0)
    return iter(pyarrow.ipc.open_stream(stream))


def plain_value(value: Any) -> Any:
    """What a table or TensorFlow Datasets has at a place, as JSON would have it.

    A table has every field in every row, null where there is none: those are left out, but for `content`,
    whose null says something. Turns that TensorFlow Datasets keeps field by field are turns again.

    Raises:
      UnicodeDecodeError: bytes that are no text.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return plain_value(value.tolist())
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, dict):
        return {
            name: _turns(plain_value(each)) if name in TURNS else plain_value(each)
            for name, each in value.items()
            if each is not None or name == "content"
        }
    if isinstance(value, list | tuple):
        return [plain_value(each) for each in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value


def _turns(value: Any) -> Any:
    """{"role": [...], "content": [...]} as a list of turns; anything else as it is."""
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        lengths = {len(each) for each in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1024).removeprefix(BOM).lstrip().startswith(b"[")


def _rows_of_lines(lines: Iterable[bytes], name: str, tally: Tally) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
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
        tally.drop("not an object", f"{where} is not a JSON object but {kind_of(value)}")
        return False
    # JSON can spell "\ud800", which no tokenizer and no file can take.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        tally.drop("not valid Unicode", f"{where} holds half of a surrogate pair")
        return False
    return True


def kind_of(value: Any) -> str:
    """A JSON value's kind in the words of the user's file."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    kinds |= {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
