"""Text that spells control tokens stays text, also inside a filled chat template.

    quoted  = quote(content, control)                every letter of `<|im_end|>` gets a mark before it
    text    = the template, filled with quoted messages
    ids     = of `private(text, control)`            for a tokenizer made by `renamed`

In the filled text a control token without marks is the template's own. Those get private spellings, which
`renamed` gives the tokenizer too, and then the marks go: `<|im_end|>` in a message is no token any more. The
tokenizer sees the text in one piece, so that its normalizer and its cuts are those of any other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from maxllm.data.template import NONCE

QUOTE = f"\ufdd1{NONCE}"
"""Before a letter that is no part of a control token."""


def quote(text: str, control: Sequence[str]) -> str:
    """The text, with a mark before every letter of the control tokens (the longest first) that it spells."""
    if not any(token in text for token in control):
        return text
    pattern = "|".join(map(re.escape, control))
    return re.sub(pattern, lambda match: "".join(QUOTE + letter for letter in match.group()), text)


def name_of(number: int) -> str:
    """The private spelling of a control token."""
    return f"\ufdd2{NONCE}{number}\ufdd2"


def private(text: str, control: Sequence[str]) -> tuple[str, list[int]]:
    """The text with private spellings and without marks, and where each of its letters stood."""
    names = {token: name_of(number) for number, token in enumerate(control)}
    tokens = "|".join(map(re.escape, control))
    parts: list[str] = []
    stood: list[int] = []
    for match in re.finditer(f"{QUOTE}(?P<letter>.)|(?P<token>{tokens})|(?P<other>.)", text, re.DOTALL):
        part = names[match["token"]] if match["token"] else match["letter"] or match["other"]
        parts.append(part)
        stood += [match.start()] * len(part)
    return "".join(parts), [*stood, len(text)]


def renamed(json_bytes: bytes, control: Sequence[str]) -> str:
    """tokenizer.json in which the control tokens have their private spellings, and their ids."""
    names = {token: name_of(number) for number, token in enumerate(control)}
    document: dict[str, Any] = json.loads(json_bytes)
    model, vocab = document["model"], document["model"].get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    elif isinstance(vocab, list):  # unigram: pieces with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in document.get("added_tokens") or []:
        token["content"] = names.get(token["content"], token["content"])
    document["post_processor"] = None  # it names control tokens, and is not asked
    return json.dumps(document, ensure_ascii=False)
