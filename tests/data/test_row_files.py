"""Rows of tables and of compressed lines are those of the same rows as JSON lines."""

import json

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from maxllm.data.conversation import read_conversation
from maxllm.data.instruct import RowReader
from maxllm.data.row_files import plain_value, read_rows
from maxllm.data.rows import messages_of
from maxllm.data.sources import files_of_source, read_documents, rows_of_source, source_hash
from maxllm.data.tally import Tally
from maxllm.errors import UserError

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}]},
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4", "weight": 0},
        ],
        "system": "Be brief.",
    },
    {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], "id": 7},
] * 700
"""More than one batch of a table; every field is missing somewhere."""


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, rows=ROWS):
    """The rows as the file's ending says."""
    kind = "".join(path.suffixes)
    names = {name for row in rows for name in row}
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in sorted(names)})
    match kind:
        case ".parquet":
            pyarrow.parquet.write_table(table, path)
        case ".arrow":  # as `datasets` writes it
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
        case ".file.arrow":
            with pyarrow.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
        case ".jsonl.zst":
            path.write_bytes(pyarrow.compress(lines(rows), "zstd", asbytes=True))
        case _:
            path.write_bytes(lines(rows))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.file.arrow", "a.jsonl.zst"])
def test_the_rows_of_json_lines(tmp_path, name):
    tally = Tally("a")
    path = write(tmp_path / name)
    got = list(rows_of_source(str(path), tally))
    assert [row for _, row in got] == ROWS
    assert tally.rows == len(ROWS) and tally.dropped.total() == 0
    assert got[6][0] == f"{path} {'line' if 'jsonl' in name else 'row'} 7"
    assert [messages_of(row) for _, row in got[:2]] == [messages_of(row) for row in ROWS[:2]]
    assert source_hash(str(path)) is not None


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_a_file_that_is_cut_off(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"{name} cannot be read \("):
        list(read_rows(path, Tally("a")))
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match=rf"{name} cannot be read \("):
        list(read_rows(path, Tally("a")))


def test_bytes_that_are_no_text(tmp_path):
    tally = Tally("a")
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pa_binary([b"fine", b"\xff"])}), path)
    assert list(read_rows(path, tally)) == [(1, {"text": "fine"})]
    assert tally.first_bad == f"{path} row 2 is not UTF-8"


def pa_binary(values):
    return pyarrow.array(values, pyarrow.binary())


def test_documents_of_a_table(tmp_path):
    write(tmp_path / "a.parquet", [{"text": "One."}, {"text": "Two."}, {"text": None}])
    tally = Tally("a")
    assert list(read_documents(str(tmp_path), "text", tally)) == ["One.", "Two."]
    assert tally.dropped == {"field missing": 1}


def test_what_datasets_saved(tmp_path):
    """A folder of `save_to_disk`: the rows are in Arrow, the JSON beside them is about them."""
    write(tmp_path / "data-00000-of-00002.arrow", ROWS[:2])
    write(tmp_path / "data-00001-of-00002.arrow", ROWS[2:4])
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    assert [row for _, row in rows_of_source(str(tmp_path), Tally("a"))] == ROWS[:4]


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}/data.parquet", "{}.parquet"])
def test_splits_are_not_read_together(tmp_path, layout):
    for split in ("train", "test"):
        path = tmp_path / layout.format(split)
        path.parent.mkdir(exist_ok=True)
        write(path, ROWS[:2] if split == "train" else ROWS[2:3])
    with pytest.raises(UserError, match="holds the splits test, train: name one of them"):
        list(rows_of_source(str(tmp_path), Tally("a")))
    train = tmp_path / layout.format("train").replace("00000-of-00001", "*")
    assert [row for _, row in rows_of_source(str(train), Tally("a"))] == ROWS[:2]
    assert len(files_of_source(str(train))) == 1 and source_hash(str(train))


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(UserError, match=r"b\*\.parquet matches no file"):
        list(rows_of_source(str(tmp_path / "b*.parquet"), Tally("a")))
    assert files_of_source(str(tmp_path / "b*.parquet")) == []


def test_a_training_source_of_several_files(tmp_path, tiny_tokenizer):
    """As SFT reads it: patterns, folders and tables are sources like any other."""
    from maxllm.config.data import DataConfig

    for number, rows in enumerate((ROWS[:1], ROWS[2:3])):
        write(tmp_path / f"train-{number}.parquet", rows)
    data = DataConfig(sources=(f"{tmp_path}/train-*.parquet",), heldout_sources=(str(tmp_path),))
    reader = RowReader(
        data,
        "instruction",
        0,
        lambda row: read_conversation(tiny_tokenizer, row, 256, "all"),
        lambda each: each.prompt,
    )
    rows, (tally,) = reader.read(data.sources)
    assert len(rows) == 2 and tally.unread == {"id": 1}


def test_examples_of_tensorflow_datasets():
    """Bytes are text, arrays are lists, and turns that are kept field by field are turns."""
    example = {
        "text": b"Hi",
        "ids": np.array([1, 2]),
        "score": np.float32(0.5),
        "messages": {"role": np.array([b"user", b"assistant"]), "content": np.array([b"A", b"B"])},
    }
    assert plain_value(example) == {
        "text": "Hi",
        "ids": [1, 2],
        "score": 0.5,
        "messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}],
    }
