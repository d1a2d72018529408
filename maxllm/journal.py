"""A text in a bucket that grows by lines: the whole object is written anew, in the background.

An object cannot be added to. Writing it takes a tenth of a second, which the loop does not wait for, and a
bucket takes about one version of an object a second, so lines of the same second go together.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SECONDS_BETWEEN = 1.0


class Journal:
    """A growing object; a reader sees whole lines, the last second's perhaps not yet."""

    def __init__(self, path: Path) -> None:
        """Continues what is there."""
        self._path = path
        self._content = path.read_bytes() if path.is_file() else b""
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1)
        self._writing = False
        self._under_way: Future[None] | None = None

    def append(self, text: str) -> None:
        """Adds lines.

        Raises:
          Exception: former ones could not be written; what the bucket's client raised.
        """
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()
        with self._lock:
            self._content += text.encode("utf-8")
            if not self._writing:
                self._writing = True
                self._under_way = self._pool.submit(self._write)

    def flush(self) -> None:
        """Waits until all is written; raises as `append` does."""
        if self._under_way is not None:
            self._under_way.result()

    def _write(self) -> None:
        written = None
        while True:
            with self._lock:
                content = self._content
                if content == written:
                    self._writing = False
                    return
            try:
                self._path.write_bytes(content)
            except BaseException:
                self._writing = False
                raise
            written = content
            time.sleep(SECONDS_BETWEEN)
