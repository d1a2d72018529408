"""The next step's rows, built while the device computes: for data that is far away."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from maxllm.data.loader import ALL, Batches

Given = TypeVar("Given")


class Ahead(Generic[Given]):
    """The same batches; whoever asks for rows of one step finds those of the next one built already."""

    def __init__(self, batches: Batches[Given]) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1)
        self._begun: dict[tuple[int, int | None, int | None], Future[Given]] = {}

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self._batches.batch_rows

    def at(self, step: int, rows: slice = ALL) -> Given:
        """Some rows of the batch at `step`."""
        begun = self._begun.pop((step, rows.start, rows.stop), None)
        given = begun.result() if begun is not None else self._batches.at(step, rows)
        for key in [key for key in self._begun if key[0] <= step - 1]:
            self._begun.pop(key).cancel()
        self._begun[step + 1, rows.start, rows.stop] = self._pool.submit(self._batches.at, step + 1, rows)
        return given

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is."""
        return self._batches.fingerprint()
