"""Files and folders that are written whole or not at all; JSON and YAML that are read with a clear error."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml

from maxllm.errors import UserError
from maxllm.storage import is_remote


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; an object of a bucket is that by itself."""
    if is_remote(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Plain data with null for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      UserError: it does not exist, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def parse_yaml(text: str) -> Any:
    """Plain data from YAML, by the loader that makes nothing else.

    Raises:
      ValueError: with one line on what is wrong.
    """
    try:
        return yaml.safe_load(text)
    # Beside its own errors, Python's of all kinds: of 2024-99-99, 0b_, `!!timestamp x`, brackets 1,000 deep.
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no recipe: sections such as run: and batch: are expected")
    return tree


MAPPED_FROM = 1 << 19
"""Bytes of a file from which copying takes longer than mapping does."""

FETCHED = 1 << 24
"""Bytes that are fetched from a bucket at a time."""


def file_hash(path: Path) -> str:
    """XXH3 of a file's content, 128 bits in hexadecimal."""
    if is_remote(path):
        digest = xxhash.xxh3_128()
        with path.open("rb") as stream:
            while part := stream.read(FETCHED):
                digest.update(part)
        return digest.hexdigest()
    with path.open("rb", buffering=0) as stream:
        if os.fstat(stream.fileno()).st_size < MAPPED_FROM:
            return xxhash.xxh3_128_hexdigest(stream.read())
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            content.madvise(mmap.MADV_SEQUENTIAL)
            return xxhash.xxh3_128_hexdigest(content)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a lock file that a process which ends, however, gives back; the file is gone afterwards.

    Raises:
      UserError: another process holds it; `busy` is the sentence.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy) from None
            # Its former holder may have removed the name since: a lock that others do not find is none.
            if not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def whole_folder(target: Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A folder to fill that takes its place at `target` if the body succeeds; a kill leaves nothing there.

    One process at a time: two that fill one folder would mix their files. Between the two renames of a
    replacement neither folder stands at `target`; the former one is then beside it as `.NAME.former`.

    Args:
      target: absent, an empty folder, or one that `replaceable` accepts.
      replaceable: whether a folder that holds something may be replaced.

    Raises:
      UserError: target is something else, or another process is writing it; before the body. Or it has become
        something else meanwhile; after the body.
    """
    if is_remote(target):
        raise UserError(f"{target} is not a local path; give a local folder, and copy it there")
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UserError(f"{target} cannot be written: give a folder below it")
    check_replaceable(target, replaceable)
    partial = target.with_name(f".{target.name}.partial")
    former = target.with_name(f".{target.name}.former")
    with locked(target.with_name(f".{target.name}.lock"), f"another process is writing {target}"):
        check_replaceable(target, replaceable)
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill
        partial.mkdir()
        try:
            yield partial
            check_replaceable(target, replaceable)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
            target.rename(former)
        partial.rename(target)
        shutil.rmtree(former, ignore_errors=True)


def check_replaceable(target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Looks at what stands where a folder is to go.

    Raises:
      UserError: it is neither an empty folder nor one that `replaceable` accepts.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaceable(target))):
        raise UserError(f"{target} exists and is not ours to replace; remove it or choose another folder")


def read_json_lines(path: Path, keys: set[str]) -> Iterator[dict[str, Any]]:
    """The records in a file of JSON lines, none where it is not there; a last line that a kill cut short is
    left out.

    Args:
      path: the file.
      keys: what every record has.

    Raises:
      UserError: another line is damaged.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not keys <= record.keys():
                raise ValueError(f"it is no record with {', '.join(sorted(keys))}")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path} line {number} is damaged: {error}") from None
        yield record


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(finite(dict(record)), allow_nan=False) + "\n"


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON to a file; none leave it as it is, or absent."""
    text = "".join(map(json_line, records))
    if text and is_remote(path):  # an object cannot be added to
        write_bytes(path, (path.read_bytes() if path.is_file() else b"") + text.encode("utf-8"))
    elif text:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
