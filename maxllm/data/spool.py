"""Documents on disk while a corpus is prepared: written once, read several times, never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LENGTH_BYTES = 8


class Spool:
    """Texts in a file, each after its length; appended to first, iterated over afterwards."""

    def __init__(self, path: Path) -> None:
        """Creates the file; its folder must be there."""
        self._path = path
        self._stream = path.open("wb")
        self._count = 0
        self.bytes = 0
        """UTF-8 bytes of all texts."""

    def append(self, text: str) -> None:
        """Adds a text at the end."""
        data = text.encode()
        self._stream.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        self._count += 1
        self.bytes += len(data)

    def __len__(self) -> int:
        """Texts in it."""
        return self._count

    def __iter__(self) -> Iterator[str]:
        """The texts, in order."""
        self._stream.flush()
        with self._path.open("rb") as stream:
            while head := stream.read(LENGTH_BYTES):
                yield stream.read(int.from_bytes(head, "big")).decode()

    def sample(self, size: int) -> Iterator[str]:
        """Texts of about `size` UTF-8 bytes in all, evenly spread; all of them if they are fewer."""
        owed = 0.0
        for text in self:
            length = len(text.encode())
            owed += length * min(1.0, size / max(self.bytes, 1))
            if owed >= length:
                owed -= length
                yield text

    def close(self) -> None:
        """Removes the file."""
        self._stream.close()
        self._path.unlink(missing_ok=True)
