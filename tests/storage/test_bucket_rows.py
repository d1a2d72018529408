"""Rows of a corpus in a bucket: which bytes are fetched, which are kept; batches stay what they are."""

import fsspec
import jax
import numpy as np
import pytest

from maxllm.data import remote
from maxllm.data.ahead import Ahead
from maxllm.data.corpus import read_rows, write_rows
from maxllm.data.loader import ArrayBatches, fingerprint
from maxllm.data.pack import Piece
from maxllm.data.remote import RemoteArray, RowCache
from maxllm.records import LmBatch

ROWS, LENGTH = 640, 16
PROCESSES = 64


@pytest.fixture
def fetched(monkeypatch):
    """Bytes that were fetched, piece by piece; a folder of this disk stands for a bucket."""
    pieces = []

    class Counted(type(fsspec.filesystem("file"))):
        cachable = False

        def cat_ranges(self, paths, starts, ends, **options):
            pieces.extend(end - start for start, end in zip(starts, ends, strict=True))
            return super().cat_ranges(paths, starts, ends, **options)

    monkeypatch.setattr(remote, "filesystem", lambda path: Counted())
    return pieces


@pytest.fixture
def corpus(tmp_path):
    """A split of 640 rows, and its folder."""
    weights = np.ones(LENGTH + 1, np.int8)
    pieces = (Piece(np.full(LENGTH + 1, number, np.int32), weights) for number in range(ROWS))
    count, _ = write_rows(tmp_path / "train", pieces, LENGTH, 0)
    return tmp_path, read_rows(tmp_path, "train"), count


def far(prepared, kept, recorded=None):
    files = [prepared / "train" / f"{name}.npy" for name in LmBatch.__dataclass_fields__]
    return LmBatch(*(RemoteArray(file, kept, recorded) for file in files))


def kept_in(folder, limit=10**9):
    folder.mkdir(exist_ok=True)
    return RowCache(folder, limit)


def test_each_of_64_processes_fetches_a_64th_and_the_batches_stay(corpus, fetched, tmp_path):
    prepared, near, count = corpus
    batch, steps = 2 * PROCESSES, 3
    expected = ArrayBatches(near, batch, 7)
    shares = []
    parts = {step: [] for step in range(steps)}
    for process in range(PROCESSES):
        mine = ArrayBatches(far(prepared, kept_in(tmp_path / f"{process}")), batch, 7)
        fetched.clear()
        for step in range(steps):
            parts[step].append(mine.at(step, slice(2 * process, 2 * process + 2)))
        shares.append(sum(fetched))
    row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(near)) // count
    assert shares == [2 * steps * row_bytes] * PROCESSES
    assert sum(shares) == steps * batch * row_bytes
    for step in range(steps):
        whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts[step])
        jax.tree.map(np.testing.assert_array_equal, whole, expected.at(step))


def test_rows_that_were_fetched_once_are_read_here(corpus, fetched, tmp_path):
    prepared, near, _ = corpus
    for _ in range(2):  # the second one as another process that comes after
        rows = far(prepared, kept_in(tmp_path / "kept"))
        np.testing.assert_array_equal(rows.tokens_BT[np.array([5, 3, 5])], near.tokens_BT[[5, 3, 5]])
    assert len(fetched) == 2
    rows.tokens_BT[4:9]
    assert fetched[2:] == [LENGTH * 4, 3 * LENGTH * 4]  # 4, and 6 to 8 as one piece


def test_what_is_kept_stays_within_its_bound(corpus, fetched, tmp_path, monkeypatch):
    prepared, near, count = corpus
    monkeypatch.setattr(remote, "SHARD_BYTES", 4096)
    limit = 32768
    rows = far(prepared, kept_in(tmp_path / "kept", limit))
    for start in range(0, count - 8, 8):
        np.testing.assert_array_equal(rows.tokens_BT[start : start + 8], near.tokens_BT[start : start + 8])
        assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "kept").glob("*.rows")) <= limit


def test_a_kept_row_that_was_damaged_is_fetched_again(corpus, fetched, tmp_path):
    prepared, near, _ = corpus
    rows = far(prepared, kept_in(tmp_path / "kept"))
    rows.tokens_BT[7:8]
    [file] = (tmp_path / "kept").glob("*.rows")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    np.testing.assert_array_equal(rows.tokens_BT[7:8], near.tokens_BT[7:8])
    assert len(fetched) == 2


def test_a_recorded_fingerprint_is_not_computed_again(corpus, fetched, tmp_path):
    prepared, near, count = corpus
    assert fingerprint(far(prepared, kept_in(tmp_path / "a"))) == fingerprint(near)
    fetched.clear()
    assert fingerprint(far(prepared, kept_in(tmp_path / "b"), {"rows": count, "hash": "x"}))["hash"] == "x"
    assert not fetched


def test_rows_ahead_are_the_rows(corpus):
    _, near, _ = corpus
    batches = ArrayBatches(near, 8, 1)
    ahead = Ahead(batches)
    for step in (0, 1, 2, 7, 3):
        for rows in (slice(0, 4), slice(4, 8)):
            jax.tree.map(np.testing.assert_array_equal, ahead.at(step, rows), batches.at(step, rows))
    assert ahead.fingerprint() == batches.fingerprint() and ahead.batch_rows == 8
