"""Rows that say more than is read of them are refused, and rows that say the same are the same."""

import pytest

from maxllm.data.chat import RowError, messages_of, preference_of

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def ending(content):
    return [*TALK, {"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "a", "output": "b", "system": "Be rude."}, "field 'system'"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history'"),
        ({"conversations": [{"from": "human", "value": "a"}], "system": "Be rude."}, "field 'system'"),
        ({"messages": ending("x"), "tools": [{"name": "f"}]}, "field 'tools'"),
        ({"messages": [*TALK, {"role": "assistant", "content": "x", "weight": 0}]}, "a turn with a weight"),
        ({"messages": [*TALK, {"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "'tool_calls'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be rude."}, "field 'system'"),
    ],
)
def test_a_field_that_changes_the_meaning_is_a_reason(row, what):
    with pytest.raises(RowError, match=what):
        preference_of(row) if "chosen" in row else messages_of(row)


def test_empty_fields_and_whole_weights_change_nothing():
    row = {"instruction": "a", "output": "b", "system": "", "history": [], "tools": None}
    assert messages_of(row) == messages_of({"instruction": "a", "output": "b"})
    weighted = [*TALK, {"role": "assistant", "content": "x", "weight": 1}]
    assert messages_of({"messages": weighted}) == ending("x")


@pytest.mark.parametrize("prompt", ["three", "one", TALK, TALK[:2], None])
def test_a_prompt_beside_whole_conversations_drops_no_turn(prompt):
    row = {"chosen": ending("good"), "rejected": ending("bad")} | ({"prompt": prompt} if prompt else {})
    assert preference_of(row) == (TALK, "good", "bad")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            {"prompt": "four", "chosen": ending("good"), "rejected": ending("bad")},
            "other turns than 'prompt'",
        ),
        (
            {"prompt": "three", "chosen": ending("good"), "rejected": ending("bad")[2:]},
            "begin with different turns",
        ),
        ({"chosen": "good", "rejected": "bad"}, "field 'prompt' is missing"),
    ],
)
def test_conversations_that_contradict_are_refused(row, what):
    with pytest.raises(RowError, match=what):
        preference_of(row)
