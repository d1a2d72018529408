"""Whatever a file of rows holds: rows are read or counted by reason, and a broken file is one sentence."""

import gzip
import json

from hypothesis import given
from hypothesis import strategies as st

from maxllm.data import rows
from maxllm.data.fields import RowError
from maxllm.data.row_files import read_rows
from maxllm.data.tally import Tally
from maxllm.errors import UserError

TEXT = st.text(max_size=12) | st.sampled_from(["user", "assistant", "system", "human", "gpt", "\ud800"])
FIELDS = """
instruction input output messages conversations role content from value prompt chosen rejected answer
system history weight tools
"""
NAMES = TEXT | st.sampled_from(FIELDS.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=4),
    max_leaves=10,
)
LINES = st.lists(
    st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()),
    max_size=6,
).map(b"\n".join)
MANY = 100_000
DEEP = st.sampled_from([b"[" * MANY, b'{"a":' * MANY, b"9" * MANY, b'{"a": 1e999}', b"\xef\xbb\xbf{}"])


def read(folder, name, content):
    """All rows, or the sentence that says why not."""
    file, tally = folder / name, Tally(name)
    file.write_bytes(content)
    try:
        rows = list(read_rows(file, tally))
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    assert all(isinstance(row, dict) for _, row in rows)
    assert tally.rows == len(rows) + sum(tally.dropped.values()), "every row is kept, or counted by a reason"


@given(content=LINES | DEEP, suffix=st.sampled_from(["jsonl", "json"]))
def test_any_bytes(tmp_path_factory, content, suffix):
    read(tmp_path_factory.getbasetemp(), f"hostile.{suffix}", content)


@given(content=LINES, cut=st.integers(0, 60), flip=st.integers(0, 400))
def test_compressed_and_damaged(tmp_path_factory, content, cut, flip):
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[flip // 8 % len(packed)] ^= 1 << flip % 8
    read(tmp_path_factory.getbasetemp(), "hostile.jsonl.gz", bytes(packed[: len(packed) - cut]))


@given(row=st.dictionaries(NAMES, VALUES, max_size=5))
def test_any_row(row):
    """Conversations, preferences and prompts: read, or a reason to count."""
    for of in (rows.messages_of, rows.preference_of, rows.prompt_of):
        try:
            of(row)
        except RowError as error:
            assert str(error).strip()
