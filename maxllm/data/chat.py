"""Turns of a conversation, in the shapes that users bring, as the messages that chat templates take."""

from __future__ import annotations

import json
from typing import Any, NotRequired, TypedDict

from maxllm.data.fields import Fields, RowError

ROLE_NAMES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
"""What the roles of OpenAI's, ShareGPT's, LLaMA-Factory's and Llama's conversations are called here."""

CALLING_ROLES = ("function_call", "tool_call")
"""Roles whose text is a call as JSON."""


class Message(TypedDict):
    """One turn."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool` (what a call came to)."""
    content: str
    instruction: NotRequired[str]
    input: NotRequired[str]
    """The two fields that a user's content was put together from, for templates that keep them apart."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """The functions that an assistant calls: {"type": "function", "function": {"name", "arguments": {…}}}."""
    name: NotRequired[str]
    """Of the function whose result this is."""
    tool_call_id: NotRequired[str]
    tools: NotRequired[list[dict[str, Any]]]
    """In a conversation's first turn: the functions that may be called in all of it, as JSON schemas."""
    untrained: NotRequired[bool]
    """Whether an assistant's turn is left out of the loss."""


def in_loss(message: Message) -> bool:
    """Whether the model is trained to say a turn."""
    return message["role"] == "assistant" and not message.get("untrained", False)


def in_one(message: Message) -> Message:
    """A turn without the fields that its content was put together from."""
    return {key: value for key, value in message.items() if key not in ("instruction", "input")}  # type: ignore[return-value]


def left_out(message: Message) -> Message:
    """A turn that is no part of the loss."""
    return {**message, "untrained": True} if message["role"] == "assistant" else message


def read_turns(turns: Any, name: str, row: Fields) -> list[Message]:
    """Messages from role/content or from/value turns.

    Args:
      turns: what the row has.
      name: of the field it stands in.
      row: is told which fields of the turns are read.

    Raises:
      RowError: naming the field and what is wrong.
    """
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"field {name!r} is not a list of turns")
    return [read_turn(row.below(name, turn), name) for turn in turns]


def read_turn(turn: Fields, name: str) -> Message:
    """One of them."""
    said, content = either(turn, "role", "from"), either(turn, "content", "value")
    if not isinstance(said, str) or said not in ROLE_NAMES:
        raise RowError(f"field {name!r} has the unknown role {said!r}")
    content = text_of(content, name)
    message = Message(role=ROLE_NAMES[said], content=content)
    if said in CALLING_ROLES:
        message = Message(role="assistant", content="", tool_calls=read_calls(content, name))
    if message["role"] == "assistant":
        calls = turn.get("tool_calls") or turn.get("function_call")
        if calls:
            message["tool_calls"] = read_calls(calls, name)
        if not read_weight(turn.get("weight"), name):
            message["untrained"] = True
    if message["role"] == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
    may_be_empty = message["role"] in ("system", "developer", "tool") or "tool_calls" in message
    if not (message["content"].strip() or may_be_empty):
        raise RowError(f"field {name!r} has a turn without text")
    return message


def either(turn: Fields, name: str, other: str) -> Any:
    """What a turn has in one of two fields: a table with turns of both kinds has both, one of them null."""
    value = turn.get(name)
    return turn.get(other) if value is None else value


def text_of(content: Any, name: str) -> str:
    """A turn's text: as it is, in parts (`{"type": "text", "text"}`), or absent.

    Raises:
      RowError: it is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"field {name!r} has a turn whose content is neither text nor parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"field {name!r} has a part that is no text but {kind!r}")
        texts.append(text)
    return "".join(texts)


def read_weight(weight: Any, name: str) -> bool:
    """Whether a turn is in the loss, by OpenAI's `weight` of 0 or 1; it is where there is none."""
    if weight not in (None, 0, 1):
        raise RowError(f"field {name!r} has a turn whose weight is neither 0 nor 1")
    return weight is None or weight == 1


def read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls of functions, one or several, as objects or as JSON, with arguments as objects or as JSON.

    Raises:
      RowError: one is not a call.
    """
    calls = parsed(calls, f"field {name!r} has a call")
    return [read_call(call, name) for call in (calls if isinstance(calls, list) else [calls])]


def read_call(call: Any, name: str) -> dict[str, Any]:
    """One of them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"field {name!r} has a call without a name")
    arguments = parsed(function.get("arguments") or {}, f"field {name!r} has arguments of a call")
    if not isinstance(arguments, dict):
        raise RowError(f"field {name!r} has arguments of a call that are no object")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) else read


def read_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    """The functions of a row: a list, one alone, or either as JSON; bare schemas are wrapped as OpenAI's are.

    Raises:
      RowError: one has no name.
    """
    tools = parsed(tools, f"field {name!r}")
    read = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"field {name!r} has a function without a name")
        read.append(tool if "function" in tool else {"type": "function", "function": function})
    return read


def parsed(value: Any, what: str) -> Any:
    """A value that may be JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"{what} that is not JSON") from None
