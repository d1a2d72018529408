"""A tokenizer with another chat template than its own: `data.template`."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from maxllm.data import layouts, template
from maxllm.data.bpe import STOP_KEY, FastTokenizer
from maxllm.data.chat import Message
from maxllm.data.spm import SpmTokenizer
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError, listed
from maxllm.hf.tokenizer import as_fast

SPELLED = re.compile(r"<\|[^<>|\s]+\|>")
"""What is meant as a control token wherever a template writes it."""

REPLY = "1"
"""Said by the assistant in the conversation that shows how a turn ends."""


def laid_out(tokenizer: Tokenizer, name: str | None, day: datetime.date | None = None) -> Tokenizer:
    """The tokenizer with the chat template `data.template`, whose end of a turn stops generation too.

    The ids of texts stay. A tokenizer of ours is ChatML as it is.

    Args:
      tokenizer: as it was read.
      name: of the template, or its file; the tokenizer's own, when absent.
      day: what the template takes for today.

    Raises:
      UserError: the tokenizer lacks a token that the template writes, or a turn ends without one.
    """
    if name is None:
        return tokenizer
    fast = as_fast(tokenizer, day) if isinstance(tokenizer, SpmTokenizer) else tokenizer
    assert isinstance(fast, FastTokenizer), "there are two kinds"
    if name == "chatml" and fast.speaks_chatml:
        return tokenizer
    made = with_config(fast, {"chat_template": layouts.text_of(name, fast.adds_bos)})
    check_control_tokens(made, name)
    end = end_of_turn(made, name)
    return with_config(made, {STOP_KEY: [end, *(i for i in fast.stop_tokens if i != end)]})


def with_config(tokenizer: FastTokenizer, changes: Mapping[str, Any]) -> FastTokenizer:
    """The tokenizer with other entries in its configuration."""
    return replace(tokenizer, config={**tokenizer.config, **changes})


def check_control_tokens(tokenizer: FastTokenizer, name: str) -> None:
    """Looks whether what the template writes as control tokens are tokens.

    Raises:
      UserError: naming those that would be cut as text.
    """
    assert tokenizer.chat_template is not None, "it was just given"
    written = template.framing(tokenizer.chat_template, tuple(sorted(tokenizer.named.items())))
    reader = tokenizer.reader
    missing = [
        token
        for token in sorted(set(SPELLED.findall(written)))
        if reader.encode(token, add_special_tokens=False).ids != [reader.token_to_id(token)]
    ]
    if missing:
        raise UserError(
            f"data.template={name} writes {listed(missing)}, which this model's tokenizer does not have as "
            "tokens; alpaca, instruction and llama2 need none but EOS"
        )


def end_of_turn(tokenizer: FastTokenizer, name: str) -> int:
    """The control token that follows what the assistant says.

    Raises:
      UserError: there is none.
    """
    assert tokenizer.chat_template is not None, "it was just given"
    talk = [Message(role="user", content="0"), Message(role="assistant", content=REPLY)]
    try:
        text, _ = template.fill(tokenizer.chat_template, tokenizer.named, talk, False, tokenizer.day)
    except UserError as error:
        raise UserError(f"data.template={name} cannot be used: {error}") from None
    encoding = tokenizer.reader.encode(text, add_special_tokens=False)
    said = text.rfind(REPLY)
    behind = (i for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if start > said)
    end = next((i for i in behind if i in tokenizer.control_ids), None)
    if end is None:
        raise UserError(
            f"data.template={name} ends the assistant's turn without a control token of this model's "
            "tokenizer, so that nobody could tell where a reply ends"
        )
    return end
