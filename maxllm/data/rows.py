"""Conversations, preferences, prompts and texts in the rows that users bring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxllm.data.chat import Message, in_loss, in_one, left_out, read_tools, read_turns
from maxllm.data.fields import Fields, RowError

QUESTIONS = ("instruction", "prompt", "question")
INPUTS = ("input", "context")
"""What an instruction is about, where it stands apart."""
REPLIES = ("output", "completion", "response", "answer")
TURNS = ("messages", "conversations")
OPENAI = ("preferred_output", "non_preferred_output")
PREFERENCES = (("chosen", "rejected"), OPENAI)


def first_of(row: Fields, names: tuple[str, ...]) -> str | None:
    """The first of some fields that a row has."""
    return next(filter(row.__contains__, names), None)


def whole_text(row: Mapping[str, Any]) -> str | None:
    """The text of a `{"text"}` row, which is no conversation: all of it is in the loss.

    Raises:
      RowError: it is empty or no text.
    """
    fields = Fields.of(row)
    if "text" not in fields or first_of(fields, (*TURNS, *QUESTIONS, *REPLIES)):
        return None
    return text_field(fields, "text")


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The conversation in a row of any of the forms users bring.

    `{"messages": [{"role", "content"}]}`, `{"conversations": [{"from", "value"}]}` (ShareGPT),
    `{"instruction", "input", "output"}` (Alpaca, BELLE), `{"prompt", "completion"}` as text or as turns,
    `{"question", "answer"}`; with `system`, `history` (pairs of earlier turns) and `tools` beside them.
    A prompt's own turns of the assistant's are not in the loss, those of `history` are.

    Raises:
      RowError: naming the field.
    """
    row = Fields.of(row)
    turns, reply = first_of(row, TURNS), first_of(row, REPLIES)
    if turns is not None:
        messages = with_lead(row, read_turns(row[turns], turns, row))
    elif reply is not None or "instruction" in row:
        name = reply or "output"
        prompt = map(left_out, question_turns(row))
        if isinstance(row.get(name), list):
            said = read_turns(row[name], name, row)
        else:
            said = [Message(role="assistant", content=text_field(row, name))]
        messages = with_lead(row, [*prompt, *said])
    elif first_of(row, QUESTIONS) is not None:
        raise RowError("field 'completion' is missing")
    else:
        raise RowError(f"none of the fields {', '.join(map(repr, (*TURNS, *QUESTIONS)))} is there")
    if messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's")
    if not any(map(in_loss, messages)):
        raise RowError("no turn of the assistant's is in the loss")
    return messages


def preference_of(row: Mapping[str, Any]) -> tuple[list[Message], Message, Message]:
    """(prompt, chosen reply, rejected reply) of a row in any of the forms users bring.

    `{"prompt", "chosen", "rejected"}`, where the prompt is text (one user turn) or a list of messages;
    `question` or `instruction` is accepted for it, with `system`, `history` and `tools` beside them, or
    ShareGPT's `conversations`. A reply is text, a turn, or a list of messages that ends with it. What stands
    before it there is the prompt: all of it, where `prompt` repeats one of its turns or its beginning.
    `{"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}` (OpenAI's) has one message
    in each list.

    Raises:
      RowError: naming the field; also for two equal replies, or for two that answer different turns.
    """
    row = Fields.of(row)
    names = next((pair for pair in PREFERENCES if pair[0] in row), PREFERENCES[0])
    (before, chosen), (other, rejected) = (reply_of(row, name) for name in names)
    if names == OPENAI and (before or other):
        raise RowError(f"{names[0]!r} or {names[1]!r} has several turns, where one reply is compared")
    if before != other:
        raise RowError(f"{names[0]!r} and {names[1]!r} begin with different turns")
    if chosen == rejected:
        raise RowError(f"{names[0]!r} and {names[1]!r} are equal")
    if names == OPENAI:
        return input_of(row), chosen, rejected
    if first_of(row, QUESTIONS) is None:
        return with_lead(row, before or turns_before(row)), chosen, rejected
    prompt = question_turns(row)
    same = [in_one(message) for message in prompt]
    if before and before[: len(same)] != same and not (len(same) == 1 and same[0] in before):
        raise RowError("'chosen' begins with other turns than 'prompt'")
    return with_lead(row, before or prompt), chosen, rejected


def reply_of(row: Fields, name: str) -> tuple[list[Message], Message]:
    """(turns before it, the assistant's turn) of a field with a reply: a text, a turn, or turns.

    Raises:
      RowError: naming the field.
    """
    said = row.get(name)
    if not isinstance(said, list | dict):
        return [], Message(role="assistant", content=text_field(row, name))
    *before, last = read_turns([said] if isinstance(said, dict) else said, name, row)
    if last["role"] != "assistant":
        raise RowError(f"field {name!r} does not end with the assistant's turn")
    last.pop("untrained", None)  # a reply that is compared is always read
    return before, last


def input_of(row: Fields) -> list[Message]:
    """The prompt in OpenAI's rows of preferences.

    Raises:
      RowError: naming the field.
    """
    given = row.get("input")
    if not isinstance(given, dict):
        raise RowError("field 'input' is not an object with messages")
    asked = row.below("input", given)
    asked.get("parallel_tool_calls")  # asks a server for something, and says nothing of the turns
    return with_lead(asked, read_turns(asked.get("messages"), "messages", asked))


def turns_before(row: Fields) -> list[Message]:
    """The prompt of a row of preferences that stands in `conversations` or `messages`.

    Raises:
      RowError: it is missing, or the reply is there already.
    """
    name = first_of(row, TURNS)
    if name is None:
        raise RowError("field 'prompt' is missing")
    turns = read_turns(row[name], name, row)
    if turns[-1]["role"] == "assistant":
        raise RowError(f"field {name!r} ends with the assistant's turn, where 'chosen' shall follow")
    return turns


def prompt_of(row: Mapping[str, Any]) -> list[Message]:
    """The prompt of a row: field `prompt`, `question` or `instruction`, as text or messages, after what
    `system` and `history` say.

    Raises:
      RowError: naming the field.
    """
    row = Fields.of(row)
    return with_lead(row, question_turns(row))


def question_turns(row: Fields) -> list[Message]:
    """The prompt without what `system` and `history` say."""
    name = first_of(row, QUESTIONS) or ("instruction" if "output" in row else "prompt")
    if isinstance(row.get(name), list):
        return read_turns(row[name], name, row)
    question = text_field(row, name)
    about = first_of(row, INPUTS) if name == "instruction" else None
    extra = row[about] if about else ""
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"field {about!r} is not text")
    if not extra:
        return [Message(role="user", content=question)]
    return [Message(role="user", content=f"{question}\n{extra}", instruction=question, input=extra)]


def with_lead(row: Fields, messages: list[Message]) -> list[Message]:
    """Turns with a row's `system` before them and its `history` between the system and the rest, the first of
    them with the row's functions.

    Raises:
      RowError: there are two different systems, or a field is not what it should be.
    """
    system = row.get("system")
    leads = messages[0]["role"] in ("system", "developer")
    if system:
        if not isinstance(system, str):
            raise RowError("field 'system' is not text")
        if leads and messages[0]["content"] != system:
            raise RowError("field 'system' and the first turn are two different systems")
        if not leads:
            messages = [Message(role="system", content=system), *messages]
            leads = True
    messages = [*messages[:leads], *history_of(row), *messages[leads:]]
    for name in ("tools", "functions"):
        if row.get(name) and (tools := read_tools(row[name], name)):
            first = messages[0].copy()
            first["tools"] = tools
            return [first, *messages[1:]]
    return messages


def history_of(row: Fields) -> list[Message]:
    """The turns in LLaMA-Factory's `history`, which are in the loss.

    Raises:
      RowError: it is not a list of pairs of texts.
    """
    turns: list[Message] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("field 'history' is not a list of pairs of texts")
        turns += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return turns


def text_field(row: Fields, name: str) -> str:
    """A field that must hold non-empty text."""
    if name not in row:
        raise RowError(f"field {name!r} is missing")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field {name!r} is not text or is empty")
    return value
