"""A record of arrays and lists of texts in a folder: one .npy file per array, and index.json with the rest.

The fields of the record's type say where everything belongs, so a folder is read with the type that was
written.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maxllm.data.loader import fingerprint
from maxllm.errors import UserError
from maxllm.files import read_json, whole_folder, write_json

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
    with whole_folder(folder, is_record) as partial:
        for name in arrays:
            np.save(partial / f"{name}.npy", parts[name])
        write_json(partial / INDEX, {"hash": digest, "arrays": arrays, "texts": texts})


def read_record(folder: Path, kind: type[Record]) -> Record:
    """A stored record, its arrays memory-mapped.

    Raises:
      UserError: it is not what was written.
    """
    try:
        index = read_json(folder / INDEX)
        parts = index["texts"] | {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in index["arrays"]
        }
        record: Record = assembled(kind, parts)
        whole = fingerprint(dict(parts_of(record)))["hash"] == index["hash"]
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f"{folder} is damaged ({error}); {REMEDY}") from None
    if not whole:
        raise UserError(f"{folder} is damaged: its content is not what was written; {REMEDY}")
    return record


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
