"""A record of arrays and lists of texts in a folder: one .npy file per array, and index.json with the rest.

The fields of the record's type say where everything belongs, so a folder is read with the type that was
written.
"""

from __future__ import annotations

import dataclasses
import io
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maxllm.data.loader import fingerprint
from maxllm.errors import UserError
from maxllm.files import read_json, whole_folder, write_bytes, write_json
from maxllm.storage import is_remote

Record = TypeVar("Record")

INDEX = "index.json"
"""The names of the arrays, the lists of texts, and the hash of everything."""
REMEDY = "remove that folder, and its content is read from the data again"


def write_record(folder: Path, record: Any) -> None:
    """Stores a record, whole or not at all, in the place of a former one; the same one is left as it is.

    Args:
      folder: where it goes; absent, or with a record.
      record: a dataclass of numpy arrays, lists of texts and further dataclasses, each of which may be None.
    """
    parts = dict(parts_of(record))
    digest = fingerprint(parts)["hash"]
    if is_record(folder) and read_json(folder / INDEX).get("hash") == digest:
        return
    texts = {name: part for name, part in parts.items() if isinstance(part, list)}
    arrays = [name for name in parts if name not in texts]
    index = {"hash": digest, "arrays": arrays, "texts": texts}
    if is_remote(folder):
        (folder / INDEX).unlink(missing_ok=True)  # without which there is no record
        for name in arrays:
            content = io.BytesIO()
            np.save(content, parts[name])
            write_bytes(folder / f"{name}.npy", content.getvalue())
        write_json(folder / INDEX, index)
        return
    with whole_folder(folder, is_record) as partial:
        for name in arrays:
            np.save(partial / f"{name}.npy", parts[name])
        write_json(partial / INDEX, index)


def read_record(folder: Path, kind: type[Record]) -> Record:
    """A stored record, its arrays memory-mapped; in memory, where it comes from a bucket.

    Raises:
      UserError: it is not what was written.
    """
    try:
        index = read_json(folder / INDEX)
        parts = index["texts"] | {name: load_array(folder / f"{name}.npy") for name in index["arrays"]}
        record: Record = assembled(kind, parts)
        whole = fingerprint(dict(parts_of(record)))["hash"] == index["hash"]
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f"{folder} is damaged ({error}); {REMEDY}") from None
    if not whole:
        raise UserError(f"{folder} is damaged: its content is not what was written; {REMEDY}")
    return record


def load_array(file: Path) -> np.ndarray:
    """The array in a .npy file."""
    return np.load(io.BytesIO(file.read_bytes())) if is_remote(file) else np.load(file, mmap_mode="r")


def is_record(folder: Path) -> bool:
    """Whether a record is stored in a folder."""
    return (folder / INDEX).is_file()


def parts_of(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, array or list of texts) of everything in a record."""
    for field in dataclasses.fields(record):
        name, value = f"{prefix}{field.name}", vars(record)[field.name]
        if dataclasses.is_dataclass(value):
            yield from parts_of(value, f"{name}.")
        elif value is not None:
            yield name, value


def assembled(kind: Any, parts: dict[str, Any], prefix: str = "") -> Any:
    """A record of a type from its parts; undoes `parts_of`."""
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        nested = name not in parts and dataclasses.is_dataclass(hints[field.name])
        values[field.name] = assembled(hints[field.name], parts, f"{name}.") if nested else parts.get(name)
    return kind(**values)
