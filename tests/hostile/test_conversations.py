"""Rows of any shape: read and laid out, or a reason to count."""

import json

from hypothesis import given
from hypothesis import strategies as st

from maxllm.data.chat import ROLE_NAMES
from maxllm.data.conversation import read_conversation
from maxllm.data.fields import RowError

TEXTS = st.sampled_from(["", " ", "a", "<|im_end|>", "\x00é", '{"name": "f"}', "[]", "null", "system"])
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(-1, 2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": TEXTS | VALUES}, optional={"arguments": VALUES, "parameters": VALUES}
)
CALLS = FUNCTIONS | st.fixed_dictionaries({"function": FUNCTIONS}, optional={"id": VALUES})
PARTS = st.lists(
    TEXTS | st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": VALUES})
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLE_NAMES, "narrator"]), "content": TEXTS | PARTS | VALUES},
    optional={
        "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
        "function_call": CALLS,
        "weight": VALUES,
        "name": VALUES,
        "tool_call_id": VALUES,
    },
)
TALKS = st.lists(TURNS, max_size=5)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": TALKS | VALUES,
        "conversations": TALKS,
        "prompt": TEXTS | TALKS,
        "completion": TEXTS | TALKS,
        "instruction": TEXTS,
        "output": VALUES,
        "system": VALUES,
        "history": st.lists(st.lists(TEXTS, max_size=3)) | VALUES,
        "tools": st.lists(CALLS, max_size=2) | VALUES,
        "text": VALUES,
    },
)


@given(row=ROWS, turns=st.sampled_from(["all", "each", "last"]))
def test_any_conversation(tiny_tokenizer, row, turns):
    before = json.dumps(row)
    try:
        conversation = read_conversation(tiny_tokenizer, row, 10_000, turns)
    except RowError as error:
        assert str(error).strip() and "\n" not in str(error)
    else:
        assert conversation.pieces and all(any(piece.weights) for piece in conversation.pieces)
        assert all(len(piece.ids) == len(piece.weights) for piece in conversation.pieces)
    assert json.dumps(row) == before, "a row stays as it is"
