"""Conversations to token ids and loss masks, built together from the structure.

The models we train speak ChatML, put together here token by token, so that no content can forge a turn:

    <s><|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

An imported model speaks its own Jinja chat template, exactly as Hugging Face renders and encodes it. The mask
is 1 on an assistant's content and the token that ends its turn: what the model must learn to produce.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxllm.data.bpe import FastTokenizer
from maxllm.data.chat import Message, RowError
from maxllm.data.tokenizer import BOS, CHAT_TEMPLATE, IM_END, IM_START, Tokenizer
from maxllm.errors import UserError


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and, for each id, 1 if the model is trained to produce it.

    Raises:
      RowError: the tokenizer's template cannot render it, or the content spells a control token.
    """
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return render_chatml(tokenizer, messages)
    return render_template(with_template(tokenizer), messages)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak; raises as `render` does."""
    if tokenizer.chat_template == CHAT_TEMPLATE:
        ids, _ = render_chatml(tokenizer, messages)
        return [*ids, IM_START, *tokenizer.encode("assistant\n")]
    tokenizer = with_template(tokenizer)
    return encode_rendered(tokenizer, messages, fill(tokenizer, messages, True))[0]


def render_to_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with the token that ends the assistant's last turn."""
    return render_reply(tokenizer, messages)[0]


def render_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], int]:
    """The same, and how many of these tokens stand before what the model is trained to say in that turn."""
    ids, mask = render(tokenizer, messages)
    end = len(mask) - mask[::-1].index(1)
    return ids[:end], end - mask[:end][::-1].index(0)


# --- ChatML ------------------------------------------------------------------------------------------------


def render_chatml(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """`render` for the tokenizers we train."""
    ids, mask = [BOS], [0]
    for message in messages:
        header = [IM_START, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), IM_END]
        newline = tokenizer.encode("\n")
        ids += header + body + newline
        trained = int(message["role"] == "assistant")
        mask += [0] * len(header) + [trained] * len(body) + [0] * len(newline)
    return ids, mask


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

    An assistant's span begins where the prompt before it ends, and ends with the first stop token after its
    content; the template is asked for every prefix of the conversation, so the spans are its own.
    """
    text = fill(tokenizer, messages, False)
    ids, offsets = encode_rendered(tokenizer, messages, text)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            head = fill(tokenizer, messages[:number], True)
            turn = fill(tokenizer, messages[: number + 1], False)
            if not (turn.startswith(head) and text.startswith(turn)):
                raise RowError("the chat template renders a turn differently once the conversation goes on")
            spans.append((len(head), len(turn)))
    mask = [0] * len(ids)
    for first, last in spans:
        inside = [i for i, (start, end) in enumerate(offsets) if first <= start and end <= last]
        stop = next((n for n, i in enumerate(inside) if ids[i] in tokenizer.stop_tokens), None)
        if stop is None:
            raise RowError("the chat template ends the assistant's turn without a stop token")
        for i in inside[: stop + 1]:
            mask[i] = 1
    return ids, mask


def fill(tokenizer: FastTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The template's text for some messages."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: spelling(tokenizer.config.get(name)) for name in names}
    assert tokenizer.chat_template is not None, "with_template looked"
    try:
        return compiled(tokenizer.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **{name: token for name, token in special.items() if token is not None},
        )
    except jinja2.TemplateError as error:
        raise RowError(f"the chat template refuses it: {error}") from None


def encode_rendered(
    tokenizer: FastTokenizer, messages: Sequence[Message], text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans of a rendered text, its control tokens included.

    Raises:
      RowError: a message spells a control token, which would forge a turn.
    """
    for message in messages:
        for token in tokenizer.control_tokens:
            if token in message["content"]:
                raise RowError(f"the text spells the control token {token!r}")
    encoding = tokenizer.reader.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def spelling(token: Any) -> str | None:
    """The text of a special token, which a configuration gives as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


@cache
def compiled(template: str) -> jinja2.Template:
    """A template with what Hugging Face offers inside it.

    Raises:
      UserError: it is not Jinja.
    """

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not Jinja: {error}") from None
