"""The lock of a folder in a bucket: a lease that its owner renews, and loses by dying.

Buckets have no locks, but an object can be made on the condition that it is not there yet. A lease is a
folder of numbered terms. Whoever makes the next one holds the folder, and rewrites it every few seconds. A
term that stays as it is for as long as it says belongs to an owner that is gone: the next term may be made.
Clocks of different machines are never compared, so taking over means watching for that long.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maxllm.errors import UserError, leave
from maxllm.storage import children, create, reachable

SECONDS = 30.0
"""How long a term lasts without being renewed; it is renewed three times as often."""


@contextmanager
def leased(folder: Path, what: str, say: Callable[[str], None], seconds: float = SECONDS) -> Iterator[None]:
    """Holds a lease while the body runs.

    An owner that was held up for longer than its lease, and finds that another process has taken over, ends
    its process at once: two would write the same folder.

    Args:
      folder: where the terms lie; a file of that name must not be there.
      what: what is held, for messages.
      say: told while an owner is watched that may be gone.
      seconds: how long a term lasts.

    Raises:
      UserError: another process holds it, and renews it.
    """
    with reachable(folder):
        held = _take(folder, what, say, seconds)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(held, what, ended), daemon=True, name="lease")
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(Exception):  # what cannot be given back ends by itself
            held.write(released=True)


class _Term:
    """A term of a lease that this process holds."""

    def __init__(self, folder: Path, number: int, seconds: float) -> None:
        self.folder, self.number, self.seconds = folder, number, seconds
        self._owner = f"process {os.getpid()} of {socket.gethostname()}"
        self._id, self._renewed = uuid.uuid4().hex, 0

    @property
    def file(self) -> Path:
        return self.folder / f"{self.number:08d}"

    def content(self, released: bool = False) -> bytes:
        """What the object says; another text at every call."""
        self._renewed += 1
        told = {"owner": self._owner, "id": self._id, "seconds": self.seconds, "renewed": self._renewed}
        return json.dumps(told | {"released": released}).encode()

    def write(self, released: bool = False) -> None:
        """Renews it, or gives it back."""
        self.file.write_bytes(self.content(released))


def _take(folder: Path, what: str, say: Callable[[str], None], seconds: float) -> _Term:
    """The next term, once the newest one is given back or its owner is gone."""
    watched: dict[str, Any] | None = None
    since = 0.0
    while True:
        number = max(_numbers(folder), default=0)
        current: dict[str, Any] | None = {"released": True}
        if number:
            current = _read(folder / f"{number:08d}")
        if current is None:
            continue  # removed meanwhile, for there is a newer one
        if current["released"] or (current == watched and time.monotonic() - since >= current["seconds"]):
            term = _Term(folder, number + 1, seconds)
            try:
                create(term.file, term.content())
            except FileExistsError:
                continue
            for former in _numbers(folder):
                if former < term.number:
                    (folder / f"{former:08d}").unlink(missing_ok=True)
            return term
        if watched is None or current["id"] != watched["id"]:
            watched, since = current, time.monotonic()
            say(f"{what} is held by {current['owner']}; watching whether that is alive")
        elif current != watched:
            raise UserError(f"another process is training in {what}: {current['owner']}")
        time.sleep(min(1.0, current["seconds"] / 20))


def _renew(held: _Term, what: str, ended: threading.Event) -> None:
    """Rewrites the term until it is to be given back; a bucket that cannot be reached is tried again."""
    while not ended.wait(held.seconds / 3):
        try:
            if max(_numbers(held.folder), default=0) > held.number:
                leave(1, f"another process has taken over {what}, for this one was held up for too long")
            held.write()
        except Exception:
            continue


def _numbers(folder: Path) -> list[int]:
    return [int(file.name) for file in children(folder) if file.name.isdigit()]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
