"""Records go to a folder and come back; what was damaged since is told."""

import json

import numpy as np
import pytest
from flax import struct

from maxllm.data import store
from maxllm.errors import UserError
from maxllm.records import PairBatch, PromptBatch, ReplyPairBatch


class Rows(struct.PyTreeNode):
    """Every kind of field."""

    pairs: ReplyPairBatch
    answers: list[str | None]
    prompts: PromptBatch = struct.field(pytree_node=False)


def rows(first=1):
    ids = np.arange(first, 13, dtype=np.int32)[:4]
    pairs = PairBatch(
        np.tile(ids[:, None, None], (1, 2, 3)), np.tile(ids[:, None], 2), ids.astype(np.float32)
    )
    prompts = PromptBatch(np.zeros((0, 5), np.int32), np.zeros(0, np.int32))
    return Rows(ReplyPairBatch(pairs, np.ones((4, 2), np.int32)), ["a\n", None, "", "牛 \U0001f400"], prompts)


def same(one, other):
    ours, theirs = (dict(store.parts_of(record)) for record in (one, other))
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        np.testing.assert_array_equal(ours[name], part)
        if not isinstance(part, list):
            assert ours[name].dtype == part.dtype


def test_a_record_comes_back(tmp_path):
    store.write_record(tmp_path / "rows", rows())
    back = store.read_record(tmp_path / "rows", Rows)
    same(back, rows())
    assert back.answers == rows().answers and back.prompts.row_B is None
    assert isinstance(back.pairs.pairs.tokens_BCT, np.memmap)
    names = {path.name for path in (tmp_path / "rows").iterdir()}
    assert {"index.json", "pairs.starts_BC.npy", "pairs.pairs.tokens_BCT.npy"} <= names and len(names) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_the_same_record_is_left_alone_and_another_takes_its_place(tmp_path):
    store.write_record(tmp_path / "rows", rows())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    store.write_record(tmp_path / "rows", rows())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == before
    store.write_record(tmp_path / "rows", rows(first=2))
    same(store.read_record(tmp_path / "rows", Rows), rows(first=2))


def test_what_is_no_record_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not ours to replace"):
        store.write_record(tmp_path, rows())


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        store.write_record(tmp_path / "rows", rows())
    assert list(tmp_path.iterdir()) == []


def answer(index):
    index["texts"]["answers"][0] = "b"


@pytest.mark.parametrize(
    "change", [answer, lambda index: index.pop("hash"), lambda index: index["arrays"].pop()]
)
def test_a_damaged_record_is_told(tmp_path, change):
    store.write_record(tmp_path / "rows", rows())
    path = tmp_path / "rows" / store.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="rows is damaged"):
        store.read_record(tmp_path / "rows", Rows)
