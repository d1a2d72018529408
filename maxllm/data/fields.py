"""A row's fields, and which of them somebody has read: what nobody reads is told to the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxllm.errors import UserError

SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that a field may have and be passed over."""

ASIDE = "meta"
"""A field for what is told of a row and meant for no trainer: where it comes from, its known answer."""


class RowError(UserError):
    """A row that cannot be used; the text says which field and why. Where rows are many, they are counted."""


class Fields(Mapping[str, Any]):
    """The fields of a row, or of something in it. To look whether one is there is not to read it."""

    def __init__(self, fields: Mapping[str, Any], source: str = "") -> None:
        """None of them is read yet; `source` is where the row came from."""
        self.source = source
        self._fields = fields
        self._read: set[str] = set()
        self._below: list[tuple[str, Fields]] = []

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Fields:
        """A row, with its memory if it has one."""
        return row if isinstance(row, cls) else cls(row)

    def __getitem__(self, name: str) -> Any:
        """The value, which is read now."""
        self._read.add(name)
        return self._fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value, which is read now, or the default: Mapping's own way takes three times as long."""
        self._read.add(name)
        return self._fields.get(name, default)

    def __contains__(self, name: object) -> bool:
        """Whether the field is there."""
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._fields)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._fields)

    def below(self, name: str, fields: Mapping[str, Any]) -> Fields:
        """What stands in a field that is read, with fields of its own."""
        below = Fields(fields)
        self._below.append((name, below))
        return below

    def unread(self) -> set[str]:
        """Names of the fields that say something and were not read, `messages.name` for one of a turn's."""
        passed = self._read | {ASIDE}
        own = {name for name in self if name not in passed and self._fields[name] not in SAYS_NOTHING}
        return own | {f"{name}.{field}" for name, below in self._below for field in below.unread()}
