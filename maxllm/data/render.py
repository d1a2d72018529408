"""Conversations to token ids and loss masks, built together from the structure.

The models we train speak ChatML, put together here token by token, so that no content can forge a turn:

    <s><|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

An imported model speaks its own Jinja chat template, exactly as Hugging Face renders and encodes it; only
that what a message spells is never a control token (control.py). The mask is 1 on an assistant's content and
the token that ends its turn: what the model must learn to produce.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from maxllm.data import control, template
from maxllm.data.bpe import FastTokenizer
from maxllm.data.chat import Message, in_loss, left_out
from maxllm.data.fields import RowError
from maxllm.data.template import Span
from maxllm.data.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    IM_END,
    IM_START,
    PLAIN_CHAT_TEMPLATE,
    TOOLS_FOOT,
    TOOLS_HEAD,
    Tokenizer,
)
from maxllm.errors import UserError


class TurnsDiffer(RowError):
    """A chat template renders a turn differently once the conversation goes on (Qwen3's drops thoughts)."""

    def __init__(self) -> None:
        super().__init__("the chat template renders a turn differently once the conversation goes on")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and, for each id, 1 if the model is trained to produce it.

    Raises:
      RowError: the tokenizer's template cannot render it.
    """
    if speaks_chatml(tokenizer):
        return render_chatml(tokenizer, messages)
    return render_template(with_template(tokenizer), messages)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak; raises as `render` does."""
    if speaks_chatml(tokenizer):
        ids, _ = render_chatml(tokenizer, messages)
        return [*ids, IM_START, *encoded(tokenizer, "assistant\n")]
    tokenizer = with_template(tokenizer)
    text, _ = filled(tokenizer, messages, True)
    check_functions(tokenizer, messages, True, text)
    return encode_filled(tokenizer, text)[0]


def render_to_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with the token that ends the assistant's last turn."""
    return render_reply(tokenizer, messages)[0]


def render_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], int]:
    """(token ids, how many of them stand before what the model is trained to say in the last turn) of a
    conversation that ends with the token that ends that turn."""
    ids, mask = render(tokenizer, messages)
    end = len(mask) - mask[::-1].index(1)
    start = end - mask[:end][::-1].index(0)
    # A template's own span of what is generated may go on behind the token that ends the turn.
    while ids[end - 1] not in tokenizer.stop_tokens:
        end -= 1
    return ids[:end], start


# --- ChatML ------------------------------------------------------------------------------------------------


def speaks_chatml(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer lays out conversations as those we train do."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.speaks_chatml
    return tokenizer.chat_template in (CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE)


def render_chatml(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """`render` for the tokenizers we train."""
    if any("tools" in message or "tool_calls" in message for message in messages):
        if tokenizer.chat_template == PLAIN_CHAT_TEMPLATE:
            raise RowError("this tokenizer's chat template, of an earlier version, knows no functions")
        messages = functions_as_text(messages)
    ids, mask = [BOS], [0]
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        header = [IM_START, *encoded(tokenizer, role + "\n")]
        body = [*encoded(tokenizer, message["content"]), IM_END]
        newline = encoded(tokenizer, "\n")
        ids += [*header, *body, *newline]
        mask += [0] * len(header) + [int(in_loss(message))] * len(body) + [0] * len(newline)
    return ids, mask


@lru_cache(256)
def encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a text, kept for a while: roles come back in every turn, systems in every conversation, and
    a prompt is rendered by itself and again before its reply."""
    return tuple(tokenizer.encode(text))


def functions_as_text(messages: Sequence[Message]) -> list[Message]:
    """A conversation in which functions are text of the system's turn, and calls text of the assistant's."""
    turns = []
    tools = messages[0].get("tools", [])
    leads = messages[0]["role"] in ("system", "developer")
    if tools:
        schemas = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        head = messages[0]["content"] + "\n\n" if leads and messages[0]["content"] else ""
        turns.append(Message(role="system", content=head + TOOLS_HEAD + schemas + TOOLS_FOOT))
    for message in messages[1:] if tools and leads else messages:
        calls = [call_text(call["function"]) for call in message.get("tool_calls", ())]
        said = [message["content"]] if message["content"] else []
        turn = Message(role=message["role"], content="\n".join(said + calls))
        turns.append(turn if in_loss(message) else left_out(turn))
    return turns


def call_text(function: Mapping[str, Any]) -> str:
    """A call of a function as our models say it."""
    name, arguments = (json.dumps(function[key], ensure_ascii=False) for key in ("name", "arguments"))
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


# --- Jinja chat templates ----------------------------------------------------------------------------------


def with_template(tokenizer: Tokenizer) -> FastTokenizer:
    """The tokenizer, known to have a chat template.

    Raises:
      UserError: it has none.
    """
    if tokenizer.chat_template is None or not isinstance(tokenizer, FastTokenizer):
        raise UserError("this model has no chat template: it completes text, and does not read conversations")
    return tokenizer


def render_template(tokenizer: FastTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """`render` for imported tokenizers.

    Where the template marks what it generates, that is what is trained. Elsewhere an assistant's span begins
    where the prompt before it ends, and ends with the first stop token after its content; the template is
    asked for every prefix of the conversation, so the spans are its own.
    """
    text, generated = filled(tokenizer, messages, False)
    check_functions(tokenizer, messages, False, text)
    ids, offsets = encode_filled(tokenizer, text)
    mask = [0] * len(ids)
    if template.marks_generation(tokenizer.chat_template or ""):
        for first, last in in_loss_of(generated, messages):
            inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
            if not any(ids[i] in tokenizer.stop_tokens for i in inside):
                raise RowError("what the chat template marks as generated has no stop token in it")
            for i in inside:
                mask[i] = 1
        return ids, mask
    for first, content, last in assistant_spans(tokenizer, messages, text):
        inside = [i for i, (start, end) in enumerate(offsets) if first <= start and end <= last]
        stops = (n for n, i in enumerate(inside) if ids[i] in tokenizer.stop_tokens)
        stop = next((n for n in stops if offsets[inside[n]][0] >= content), None)
        if stop is None:
            raise RowError("the chat template ends the assistant's turn without a stop token")
        for i in inside[: stop + 1]:
            mask[i] = 1
    return ids, mask


def in_loss_of(generated: Sequence[Span], messages: Sequence[Message]) -> list[Span]:
    """What a template marks as generated, without the turns that are no part of the loss.

    Raises:
      RowError: there are such turns, and which marks are theirs cannot be told.
    """
    replies = [message for message in messages if message["role"] == "assistant"]
    if all(map(in_loss, replies)):
        return list(generated)
    if len(generated) != len(replies):
        raise RowError("a turn is left out of the loss, and the chat template marks no span for each turn")
    return [span for span, reply in zip(generated, replies, strict=True) if in_loss(reply)]


def assistant_spans(
    tokenizer: FastTokenizer, messages: Sequence[Message], text: str
) -> list[tuple[int, int, int]]:
    """Where in a conversation's text each reply begins, where its content ends, and where its turn ends.

    Raises:
      TurnsDiffer: a turn is not rendered alike with and without those after it.
    """
    spans = []
    for number, message in enumerate(messages):
        if in_loss(message):
            tools = messages[0].get("tools")  # also where the assistant speaks first
            head, _ = filled(tokenizer, messages[:number], True, tools)
            turn, _ = filled(tokenizer, messages[: number + 1], False, tools)
            if not (turn.startswith(head) and text.startswith(turn)):
                raise TurnsDiffer
            content = quoted(tokenizer, message)["content"].strip()
            at = turn.find(content, len(head))
            # A template that rewrites the content is trusted to write no stop token into it.
            spans.append((len(head), at + len(content) if at >= 0 else len(head), len(turn)))
    return spans


def quoted(tokenizer: FastTokenizer, message: Message) -> Message:
    """What a template is given of a message: nothing in it spells a control token, but that a reply may spell
    what the template looks for. A template that knows no developer is given a system."""
    tokens = tokenizer.control_tokens
    if message["role"] == "assistant":
        tokens = tuple(token for token in tokens if token not in tokenizer.sayable)
    given = {key: value for key, value in message.items() if key not in ("tools", "untrained")}
    given = quoted_deep(given, tokens)
    if message["role"] == "developer" and "developer" not in (tokenizer.chat_template or ""):
        given["role"] = "system"
    return given


def quoted_deep(value: Any, tokens: Sequence[str]) -> Any:
    """Plain data in which no text spells a control token."""
    if isinstance(value, str):
        return control.quote(value, tokens)
    if isinstance(value, list):
        return [quoted_deep(each, tokens) for each in value]
    if isinstance(value, dict):
        return {quoted_deep(key, tokens): quoted_deep(each, tokens) for key, each in value.items()}
    return value


def filled(
    tokenizer: FastTokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[Span]]:
    """The template's text for some messages, in which marks tell text from control tokens, and what of it is
    generated. The functions are those of the first message, where none are given."""
    assert tokenizer.chat_template is not None, "with_template looked"
    plain = [quoted(tokenizer, message) for message in messages]
    tools = tools or (messages[0].get("tools") if messages else None)
    return template.fill(
        tokenizer.chat_template,
        tokenizer.named,
        plain,
        add_generation_prompt,
        tokenizer.day,
        quoted_deep(tools, tokenizer.control_tokens),
    )


def check_functions(
    tokenizer: FastTokenizer, messages: Sequence[Message], add_generation_prompt: bool, text: str
) -> None:
    """Looks whether a template writes the functions of a conversation, its calls and what they gave: many
    pass over what they do not know.

    Raises:
      RowError: it writes the same text without them.
    """
    fewer: dict[str, list[Message]] = {
        "the functions": [left_without(message, "tools") for message in messages],
        "calls of functions": [left_without(message, "tool_calls") for message in messages],
        "what functions gave": [
            {**message, "content": ""} if message["role"] == "tool" else message for message in messages
        ],
    }
    for what, others in fewer.items():
        if others == list(messages):
            continue
        try:
            same = filled(tokenizer, others, add_generation_prompt)[0] == text
        except RowError:  # it misses them
            continue
        if same:
            raise RowError(f"the chat template leaves out {what}")


def left_without(message: Message, name: str) -> Message:
    """A message without one of its fields."""
    return {key: value for key, value in message.items() if key != name}  # type: ignore[return-value]


def encode_filled(tokenizer: FastTokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Ids and character spans of a filled template, its control tokens included."""
    if control.QUOTE not in text:
        encoding = tokenizer.reader.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    spelled, stood = control.private(text, tokenizer.control_tokens)
    encoding = tokenizer.renamed.encode(spelled, add_special_tokens=False)
    return encoding.ids, [(stood[start], stood[end]) for start, end in encoding.offsets]
