"""Files and folders that are written whole or not at all, and JSON that is read with a clear error."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from maxllm.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
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
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def file_hash(path: Path) -> str:
    """XXH3 of a file's content, 128 bits in hexadecimal; mapped, for copying takes longer than hashing."""
    with path.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # which cannot be mapped
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            content.madvise(mmap.MADV_SEQUENTIAL)
            return xxhash.xxh3_128_hexdigest(content)


@contextlib.contextmanager
def whole_folder(target: Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A folder to fill that takes its place at `target` if the body succeeds; a kill leaves nothing there.

    Between the two renames of a replacement neither folder stands at `target`; the former one is then beside
    it as `.NAME.former`.

    Args:
      target: absent, an empty folder, or one that `replaceable` accepts.
      replaceable: whether a folder that holds something may be replaced.

    Raises:
      UserError: target is something else; before the body.
    """
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UserError(f"{target} cannot be written: give a folder below it")
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaceable(target))):
        raise UserError(f"{target} exists and is not ours to replace; remove it or choose another folder")
    partial = target.with_name(f".{target.name}.partial")
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        target.rename(former)
    partial.rename(target)
    shutil.rmtree(former, ignore_errors=True)
