"""Rows of prompts in every form, and the rows of SFT that are made of them."""

from __future__ import annotations

from typing import Any

import pytest

from maxllm.data.chat import Message, in_loss
from maxllm.data.fields import Fields, RowError
from maxllm.data.prompts import conversation_row, prompt_turns, rest_of
from maxllm.data.rows import messages_of

TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def user(text: str) -> Message:
    """A user's turn."""
    return Message(role="user", content=text)


@pytest.mark.parametrize(
    ("row", "turns", "rest"),
    [
        ({"prompt": "Hi"}, [user("Hi")], {}),
        ({"question": "1+1?", "answer": "2"}, [user("1+1?")], {"answer": "2"}),
        (
            {"instruction": "Sort", "input": "b a", "output": "a b", "id": 7},
            [Message(role="user", content="Sort\nb a", instruction="Sort", input="b a")],
            {"id": 7, "output": "a b"},
        ),
        ({"prompt": [USER, REPLY, USER]}, [user("Hi"), Message(**REPLY), user("Hi")], {}),
        ({"messages": [USER]}, [user("Hi")], {}),
        ({"messages": [USER, REPLY]}, [user("Hi")], {}),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [user("Hi")], {}),
        (
            {"prompt": "Hi", "system": "Be kind", "meta": {"task": "qa", "id": 1}, "id": 2, "note": ""},
            [Message(role="system", content="Be kind"), user("Hi")],
            {"task": "qa", "id": 2},
        ),
    ],
)
def test_what_is_asked_and_what_is_carried_along(
    row: dict[str, Any], turns: list[Message], rest: dict[str, Any]
) -> None:
    fields = Fields(row)
    assert prompt_turns(fields) == turns
    assert rest_of(fields) == rest
    assert fields.unread() <= {"note"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [REPLY]}, "field 'messages' holds no turn to answer"),
        ({"messages": [USER, REPLY, REPLY]}, "field 'messages' holds no turn to answer"),
        ({"messages": []}, "not a list of turns"),
        ({"text": "Hi"}, "field 'prompt' is missing"),
        ({"prompt": " "}, "field 'prompt' is not text or is empty"),
    ],
)
def test_rows_that_ask_nothing(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        prompt_turns(Fields(row))


def test_a_made_row_reads_as_it_was_asked() -> None:
    """Functions, calls, what they gave, earlier replies; the last reply alone is trained on."""
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}],
    }
    given = {"role": "tool", "name": "now", "content": "noon"}
    row = {"messages": [USER, REPLY, USER, calls, given], "tools": [TOOL], "system": "Be kind"}
    asked = prompt_turns(Fields(row))
    fields = Fields(conversation_row(asked, "It is noon.", {"finished": True}))
    read = messages_of(fields)
    assert not fields.unread()
    assert [{k: v for k, v in turn.items() if k != "untrained"} for turn in read[:-1]] == asked
    assert read[-1] == Message(role="assistant", content="It is noon.")
    assert [in_loss(turn) for turn in read] == [False] * 6 + [True]
