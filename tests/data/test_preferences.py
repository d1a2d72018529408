"""Preferences in the forms of OpenAI and ShareGPT, and replies that call functions."""

import pytest

from maxllm.data.fields import Fields, RowError
from maxllm.data.instruct import reply_pair
from maxllm.data.rows import preference_of
from maxllm.data.tokenizer import BOS, IM_END, IM_START

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
TALK = [ASKED, SAID, {"role": "user", "content": "r"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 12}}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 12}'}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "13"}
OPENAI = {
    "input": {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [CALLED]}],
    "non_preferred_output": [SAID],
}
"""A row of OpenAI's guide to direct preference optimization, with a function."""
AGAIN = {
    "input": {
        "messages": [
            {"role": "user", "content": "Add"},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "c1", "content": "13"},
        ],
        "tools": [TOOL],
    },
    "preferred_output": [{"role": "assistant", "content": "Again.", "tool_calls": [CALLED]}],
    "non_preferred_output": [{"role": "assistant", "content": "13"}],
}
"""One in which a function was called before."""


def reply(content):
    return {"role": "assistant", "content": content}


def test_openais_preferences():
    fields = Fields(OPENAI)
    call = CALLING | {"tool_calls": [CALL | {"id": "c1"}]}
    assert preference_of(fields) == ([ASKED | {"tools": [TOOL]}], call, SAID)
    assert fields.unread() == set()
    fields = Fields(OPENAI | {"input": {"messages": TALK, "temperature": 1}, "id": 7})
    assert preference_of(fields) == (TALK, call, SAID)
    assert fields.unread() == {"input.temperature", "id"}


@pytest.mark.parametrize("turns", ["conversations", "messages"])
def test_sharegpts_preferences(turns):
    row = {
        turns: [{"from": "human", "value": "q"}],
        "system": "s",
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    }
    fields = Fields(row)
    assert preference_of(fields) == ([{"role": "system", "content": "s"}, ASKED], reply("b"), reply("c"))
    assert fields.unread() == set()
    calling = row | {"chosen": {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 12}}'}}
    assert preference_of(calling)[1] == CALLING


def test_a_reply_may_call_functions_and_answer_what_they_gave():
    """In a list, the turns that both replies share are the prompt, results among them."""
    before = [ASKED, CALLING, RESULT]
    row = {"chosen": [*before, SAID], "rejected": [*before, CALLING], "tools": [TOOL]}
    assert preference_of(row) == ([ASKED | {"tools": [TOOL]}, CALLING, RESULT], SAID, CALLING)
    weightless = {"prompt": "q", "chosen": [SAID | {"weight": 0}], "rejected": "c"}
    assert preference_of(weightless) == ([ASKED], SAID, reply("c"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"preferred_output": [SAID]}, "'preferred_output' and 'non_preferred_output' are equal"),
        (
            {name: [CALLING, RESULT, SAID] for name in ("preferred_output", "non_preferred_output")},
            "'preferred_output' or 'non_preferred_output' has several turns, where one reply is compared",
        ),
        ({"preferred_output": [CALLING, RESULT, SAID]}, "has several turns"),
        ({"non_preferred_output": [SAID, SAID]}, "has several turns"),
        ({"non_preferred_output": [RESULT]}, "'non_preferred_output' does not end with the assistant's turn"),
        ({"non_preferred_output": []}, "field 'non_preferred_output' is not a list of turns"),
        ({"non_preferred_output": None}, "field 'non_preferred_output' is not text or is empty"),
        ({"input": "q"}, "field 'input' is not an object with messages"),
        ({"input": {"tools": [TOOL]}}, "field 'messages' is not a list of turns"),
    ],
)
def test_what_is_wrong_with_openais_rows_is_a_reason(changes, what):
    with pytest.raises(RowError, match=what):
        preference_of(OPENAI | changes)


def test_openais_pairs_are_the_replies_after_their_input(tiny_tokenizer):
    """Calls of functions are part of a reply; what they gave stands before it."""
    call = '<tool_call>{"name": "add", "arguments": {"x": 12}}</tool_call>'
    turns = [
        'system\nFunctions that you may call, a JSON schema on each line:\n{"type": "function", "function": '
        '{"name": "add", "parameters": {}}}\nA call of one is <tool_call>{"name": …, "arguments": {…}}'
        "</tool_call>.",
        "user\nAdd",
        f"assistant\n{call}",
        "tool\n13",
    ]
    encode = tiny_tokenizer.encode
    prompt = [BOS]
    for turn in turns:
        role, said = turn.split("\n", 1)
        prompt += [IM_START, *encode(f"{role}\n"), *encode(said), IM_END, *encode("\n")]
    prompt += [IM_START, *encode("assistant\n")]
    pair = reply_pair(tiny_tokenizer, AGAIN, 999)
    assert pair.starts == (len(prompt), len(prompt))
    assert pair.ids == ([*prompt, *encode(f"Again.\n{call}"), IM_END], [*prompt, *encode("13"), IM_END])


def test_replies_that_read_the_same_are_no_pair(tiny_tokenizer):
    """Two calls with ids of their own, which are not said."""
    (said,) = AGAIN["preferred_output"]
    other = said | {"tool_calls": [CALLED | {"id": "c2"}]}
    with pytest.raises(RowError, match="the two replies are equal as the model reads them"):
        reply_pair(tiny_tokenizer, AGAIN | {"non_preferred_output": [other]}, 999)
