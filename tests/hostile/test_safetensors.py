"""Weights from anywhere: a header or an index that lies is one sentence, and no file outside is read."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from maxllm.errors import UserError
from maxllm.hf.source import INDEX, WEIGHTS, open_folder

WHOLE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)})
HEADER_BYTES = int.from_bytes(WHOLE[:8], "little")

NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-3, 50) | st.floats() | st.none() | st.text(max_size=4)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "", "f32"]) | NUMBERS,
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
    },
)
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | NUMBERS, max_size=3)


def read_all(folder):
    """Every tensor, whole; or the sentence that says why not."""
    try:
        source = open_folder(folder)
        for name, tensor in source.tensors.items():
            assert source.read(name).shape == tensor.shape
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@given(header=HEADERS, claimed=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=24))
def test_headers(folder, header, claimed, data):
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes((claimed or len(text)).to_bytes(8, "little") + text + data)
    (folder / INDEX).unlink(missing_ok=True)
    read_all(folder)


@given(bit=st.integers(0, 8 * (8 + HEADER_BYTES) - 1), cut=st.integers(0, len(WHOLE)))
def test_flipped_and_cut(folder, bit, cut):
    content = bytearray(WHOLE)
    content[bit // 8] ^= 1 << bit % 8
    (folder / WEIGHTS).write_bytes(bytes(content[: len(WHOLE) - (cut if cut % 3 == 0 else 0)]))
    (folder / INDEX).unlink(missing_ok=True)
    read_all(folder)


FILES = st.sampled_from(
    [WEIGHTS, "../outside/secret", "/etc/passwd", "..", ".", "", "sub/../../x", "a\0b", "x" * 300, "link"]
) | st.text(max_size=8)
VALUES = FILES | st.none() | st.integers() | st.lists(FILES, max_size=2)
INDEXES = st.fixed_dictionaries(
    {}, optional={"weight_map": st.dictionaries(st.sampled_from("ab") | st.text(max_size=4), VALUES) | VALUES}
)


@given(index=INDEXES)
def test_indexes(folder, index):
    """The file beside the folder is a good one, and must not be found by any path."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_bytes(WHOLE)
    (folder / WEIGHTS).write_bytes(WHOLE)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(outside / "secret")
    read_all(folder)
    named = index.get("weight_map")
    if isinstance(named, dict) and "../outside/secret" in named.values():
        with pytest.raises(UserError, match=r"outside|not an index"):
            open_folder(folder)


@given(content=st.binary(max_size=40))
def test_any_bytes(folder, content):
    for name in (WEIGHTS, INDEX):
        (folder / INDEX).unlink(missing_ok=True)
        (folder / WEIGHTS).write_bytes(WHOLE)
        (folder / name).write_bytes(content)
        read_all(folder)
