"""Jinja chat templates, as Hugging Face runs them: compiled once, filled, and looked into.

A template comes with a model, from anywhere. It runs in Jinja's sandbox, and whatever it raises is a row that
cannot be used. Hugging Face's extension `{% generation %}` marks what an assistant says; here the marked text
comes out between two marks that no text can hold, so that where it stands needs no counting.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maxllm.data.chat import Message
from maxllm.data.fields import RowError
from maxllm.errors import UserError

Span = tuple[int, int]
"""First character, and the one behind the last."""

NONCE = secrets.token_hex(8)
"""Part of every mark that we put into text: nobody can write a text that holds one."""

OPEN, CLOSE = f"\ufdd0{NONCE}(", f"\ufdd0{NONCE})"
"""Around what a template generates; U+FDD0 is no character."""

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
"""The special tokens that a template may write."""

SEARCHES = {
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "find",
    "index",
    "replace",
}
"""Methods by which a template looks for something in a text."""


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the body, between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """A call block around the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what Hugging Face offers inside a template."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    made.globals["raise_exception"] = refuse
    return made


@cache
def compiled(template: str) -> jinja2.Template:
    """A template, ready to be filled.

    Raises:
      UserError: it is not Jinja.
    """
    try:
        return environment().from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not Jinja: {error}") from None


@cache
def marks_generation(template: str) -> bool:
    """Whether a template says by `{% generation %}` what an assistant is trained to say."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def fill(
    template: str,
    special: Mapping[str, str],
    messages: Sequence[Message],
    add_generation_prompt: bool,
    day: datetime.date | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[Span]]:
    """A template's text for some messages, and the spans of it that it generates.

    Args:
      template: Jinja.
      special: the tokens in NAMED that the tokenizer has.
      messages: the conversation.
      add_generation_prompt: whether the text shall go on to where the assistant speaks.
      day: what `strftime_now` tells; now, when absent.
      tools: the functions that may be called, as JSON schemas.

    Raises:
      RowError: the template refuses the messages, or fails on them.
    """
    now = datetime.datetime.combine(day, datetime.time()) if day else datetime.datetime.now()
    try:
        text = compiled(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            strftime_now=now.strftime,
            **special,
        )
    except jinja2.TemplateError as error:
        raise RowError(f"the chat template refuses it: {error}") from None
    except Exception as error:  # a template is a program, and can raise whatever Python can
        raise RowError(f"the chat template fails on it: {type(error).__name__}: {error}") from None
    return without_marks(text)


def without_marks(text: str) -> tuple[str, list[Span]]:
    """A filled template's text, and the spans that stood between OPEN and CLOSE."""
    parts: list[str] = []
    spans: list[Span] = []
    opened: list[int] = []
    length = 0
    for part in re.split(f"({re.escape(OPEN)}|{re.escape(CLOSE)})", text):
        if part == OPEN:
            opened.append(length)
        elif part == CLOSE:
            spans.append((opened.pop() if opened else length, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), sorted(spans)


@cache
def framing(template: str, special: tuple[tuple[str, str], ...]) -> str:
    """What a template writes around the messages of plain conversations, and before a reply."""
    texts = []
    user, reply = Message(role="user", content="0"), Message(role="assistant", content="1")
    system = Message(role="system", content="2")
    for messages in ([user], [user, reply, user], [system, user, reply, user], [user, reply]):
        for prompt in (False, True):
            try:
                texts.append(fill(template, dict(special), messages, prompt)[0])
            except UserError:  # some templates know no system, some want a user's turn last
                continue
    return "\0".join(texts)


@cache
def looked_for(template: str) -> tuple[str, ...]:
    """The texts that a template looks for inside messages, as in `content.split('</think>')`."""
    try:
        return tuple(searched_constants(environment().parse(template)))
    except jinja2.TemplateError:  # no Jinja: whoever fills it is told
        return ()


def searched_constants(tree: nodes.Template) -> Iterator[str]:
    """Constants on the left of `in`, and those that methods of SEARCHES are given."""
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in comparison.ops):
            yield from constants(comparison.expr)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCHES:
            for argument in call.args:
                yield from constants(argument)


def constants(node: nodes.Node) -> Iterator[str]:
    """The text of a node that is a constant text."""
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
