"""What users bring: every form says what it means, what is not read is named, what is wrong is a reason."""

import json

import pytest

from maxllm.data.fields import Fields, RowError
from maxllm.data.rows import messages_of, preference_of, prompt_of, whole_text

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
ASKED = {"role": "user", "content": "q"}
ABOUT = {"role": "user", "content": "q\nabout", "instruction": "q", "input": "about"}
SAID = {"role": "assistant", "content": "a"}
SCHEMA = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}


def reply(content):
    return {"role": "assistant", "content": content}


def ending(content):
    return [*TALK, reply(content)]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q", "completion": "a"}, [ASKED, SAID]),
        ({"question": "q", "answer": "a"}, [ASKED, SAID]),
        ({"instruction": "q", "context": "about", "response": "a"}, [ABOUT, SAID]),
        ({"prompt": [ASKED], "completion": [SAID]}, [ASKED, SAID]),
        ({"prompt": [ASKED], "completion": "a"}, [ASKED, SAID]),
        (
            {"prompt": TALK, "completion": [SAID]},
            [TALK[0], TALK[1] | {"untrained": True}, TALK[2], SAID],
        ),
        (
            {"messages": [ASKED | {"content": [{"type": "text", "text": "q"}]}, SAID | {"content": ["a"]}]},
            [ASKED, SAID],
        ),
        (
            {"instruction": "q", "output": "a", "system": "Be brief.", "history": [["one", "two"]]},
            [{"role": "system", "content": "Be brief."}, *TALK[:2], ASKED, SAID],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "bard", "value": "a"}],
                "system": "s",
            },
            [{"role": "system", "content": "s"}, ASKED, SAID],
        ),
        (
            {"messages": [{"role": "system", "content": ""}, ASKED, SAID]},
            [{"role": "system", "content": ""}, ASKED, SAID],
        ),
        (
            {"messages": [{"role": "developer", "content": "d"}, ASKED, SAID]},
            [{"role": "developer", "content": "d"}, ASKED, SAID],
        ),
        (
            {"messages": [*TALK[:1], TALK[1] | {"weight": 0}, ASKED, SAID]},
            [*TALK[:1], TALK[1] | {"untrained": True}, ASKED, SAID],
        ),
        ({"messages": [ASKED, SAID | {"weight": 1}]}, [ASKED, SAID]),
    ],
)
def test_forms(row, messages):
    assert messages_of(row) == messages


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [SCHEMA], SCHEMA, json.dumps([TOOL])])
def test_calls_of_functions_are_one_thing_in_all_forms(role, call, tools):
    row = {"messages": [ASKED, call, {"role": role, "content": "2"}, SAID], "tools": tools}
    assert messages_of(row) == [ASKED | {"tools": [TOOL]}, CALLING, RESULT, SAID]


def test_a_name_and_an_id_of_a_call_stay():
    call = CALL | {"id": "c1"}
    result = RESULT | {"name": "add", "tool_call_id": "c1"}
    row = {"messages": [ASKED, CALLING | {"tool_calls": [call]}, result, SAID]}
    assert messages_of(row) == row["messages"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [ASKED, SAID | {"weight": 0}]}, "no turn of the assistant's is in the loss"),
        ({"messages": [ASKED, SAID | {"weight": 0.5}]}, "a turn whose weight is neither 0 nor 1"),
        ({"messages": [ASKED | {"content": [{"type": "image_url"}]}, SAID]}, "no text but 'image_url'"),
        ({"messages": [ASKED | {"content": [{"type": "text"}]}, SAID]}, "no text but 'text'"),
        ({"messages": [ASKED | {"content": 7}, SAID]}, "neither text nor parts"),
        ({"messages": [ASKED, SAID | {"content": None}]}, "a turn without text"),
        ({"messages": [ASKED, CALLING | {"tool_calls": [{"function": {}}]}]}, "a call without a name"),
        ({"messages": [ASKED, {"role": "function_call", "content": "add(1)"}]}, "a call that is not JSON"),
        (
            {"messages": [ASKED, CALLING | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "arguments of a call that are no object",
        ),
        ({"messages": [ASKED, SAID], "tools": [{"type": "function"}]}, "a function without a name"),
        ({"messages": [ASKED, SAID], "tools": "add"}, "field 'tools' that is not JSON"),
        (
            {"messages": [{"role": "system", "content": "s"}, ASKED, SAID], "system": "t"},
            "two different systems",
        ),
        ({"instruction": "q", "output": "a", "system": ["s"]}, "field 'system' is not text"),
        ({"instruction": "q", "output": "a", "history": ["one"]}, "not a list of pairs of texts"),
        ({"instruction": "q", "output": "a", "history": 7}, "not a list of pairs of texts"),
        ({"prompt": "q"}, "field 'completion' is missing"),
    ],
)
def test_what_is_wrong_is_a_reason(row, what):
    with pytest.raises(RowError, match=what):
        messages_of(row)


def test_a_text_is_no_conversation():
    assert whole_text({"text": "Once."}) == "Once." and whole_text({"instruction": "q", "text": "x"}) is None
    with pytest.raises(RowError, match="field 'text' is not text or is empty"):
        whole_text({"text": " "})


@pytest.mark.parametrize("tools", [None, [], "[]"])
def test_empty_fields_change_nothing(tools):
    row = {"instruction": "q", "output": "a", "system": "", "history": [], "tools": tools}
    assert messages_of(row) == [ASKED, SAID] and not Fields.of(row).unread() - set(row)


def test_a_table_with_turns_of_both_kinds_has_nulls_in_each():
    empty = {"role": None, "content": None, "from": None, "value": None}
    turns = [empty | {"from": "human", "value": "q"}, empty | SAID]
    assert messages_of({"conversations": turns}) == [ASKED, SAID]


@pytest.mark.parametrize("completion", ["a", [SAID]])
@pytest.mark.parametrize("lead", ["system", "developer"])
def test_history_stands_behind_the_system_and_is_in_the_loss(completion, lead):
    """However the prompt and the completion are written."""
    system = {"role": lead, "content": "s"}
    row = {"prompt": [system, ASKED], "history": [["one", "two"]], "completion": completion}
    wanted = [system, TALK[0], TALK[1], ASKED, SAID]
    assert messages_of(row) == wanted
    assert messages_of(row | {"prompt": "q", "system": "s"}) == [
        {"role": "system", "content": "s"},
        *wanted[1:],
    ]
    with pytest.raises(RowError, match="two different systems"):
        messages_of(row | {"system": "another"})


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [ASKED, SAID]}, set()),
        ({"messages": [ASKED, SAID], "id": 7, "note": "", "tags": []}, {"id"}),
        (
            {"messages": [ASKED, SAID | {"train": False}], "conversations": [ASKED]},
            {"messages.train", "conversations"},
        ),
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, {"text"}),
        ({"prompt": "q", "completion": "a", "input": "about"}, {"input"}),
    ],
)
def test_what_nobody_reads_is_known(row, unread):
    fields = Fields(row)
    messages_of(fields)
    assert fields.unread() == unread


@pytest.mark.parametrize("prompt", ["three", "one", TALK, TALK[:2], None])
def test_a_prompt_beside_whole_conversations_drops_no_turn(prompt):
    row = {"chosen": ending("good"), "rejected": ending("bad")} | ({"prompt": prompt} if prompt else {})
    assert preference_of(row) == (TALK, reply("good"), reply("bad"))


def test_an_instruction_with_its_input_may_be_repeated_by_the_replies():
    """There it stands in one piece."""
    row, texts = {"instruction": "q", "input": "about"}, {"chosen": "b", "rejected": "c"}
    asked = {"role": "user", "content": "q\nabout"}
    listed = {name: [asked, {"role": "assistant", "content": text}] for name, text in texts.items()}
    assert preference_of(row | listed) == ([asked], reply("b"), reply("c"))
    assert preference_of(row | texts) == ([ABOUT], reply("b"), reply("c"))


def test_a_preference_and_a_prompt_have_a_system_and_earlier_turns():
    lead = {"system": "s", "history": [["one", "two"]]}
    turns = [{"role": "system", "content": "s"}, *TALK[:2], ASKED]
    row = {"prompt": "q", "chosen": "b", "rejected": "c"} | lead
    assert preference_of(row) == (turns, reply("b"), reply("c"))
    assert prompt_of({"prompt": "q"} | lead) == turns


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
        (
            {"conversations": TALK[:2], "chosen": "good", "rejected": "bad"},
            "field 'conversations' ends with the assistant's turn, where 'chosen' shall follow",
        ),
        ({"conversations": TALK, "chosen": ASKED, "rejected": SAID}, "field 'chosen' does not end with the"),
    ],
)
def test_conversations_that_contradict_are_refused(row, what):
    with pytest.raises(RowError, match=what):
        preference_of(row)
