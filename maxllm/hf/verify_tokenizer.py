"""The proof of a tokenizer's conversion: `transformers` cuts the same texts into the same ids."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from maxllm.data.bpe import FastTokenizer
from maxllm.data.chat import Message
from maxllm.data.fields import RowError
from maxllm.data.render import render, render_prompt
from maxllm.data.spm import WORD_BOUNDARY, SpmTokenizer
from maxllm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from maxllm.errors import RunFailed

TEXTS = (
    *(
        "Hello",
        " Hello world",
        "The quick brown fox jumps over the lazy dog.",
        "I'm, you've; DON'T! (e.g. this)",
    ),
    *("", " ", "  two  blanks   three", "\n", "a\n\nb\r\nc\n", "\ttab\t\ttabs", "trailing  "),
    *("0", "7 42 123 4567 3.14159", "1,000,000", "x = [1, 2]\n\tfor i in x:\n\t\tprint(i ** 2)  # why"),
    *(
        "床前明月光，疑是地上霜。",
        "こんにちは世界",
        "안녕하세요",
        "Привет, мир!",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
    ),
    *("naïve café e\u0301", "ﬁ ① Ａ", "🙂 👩‍👩‍👧", "\u00a0\u3000\u200b", "<|nothing|> </nor> [this]"),
)
"""Scripts, blanks, digits, code, and what normalizers change."""

TALKS: tuple[list[Message], ...] = (
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  静夜思 \n\n是谁写的？"},
        {"role": "assistant", "content": "李白。"},
    ],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ],
)
"""Conversations that most templates can render."""

CONTROL_TOKENS = 32
"""So many are tried; LLaMA 3 has 256, nearly all of them reserved."""


def check_tokenization(
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    gguf: str | None = None,
    skipped: Callable[[str], bool] | None = None,
) -> int:
    """Compares our ids with those of the tokenizer that `transformers` loads from a folder.

    Texts and rendered conversations as they are, control tokens inside a text, and whether a text begins with
    BOS. Where a tokenizer puts a blank before texts, as SentencePiece does, versions of `transformers` do not
    agree on one before a text that has its own, nor on one after a control token (`legacy`): there, the
    control tokens and the text between them are compared.

    Args:
      tokenizer: ours.
      folder: what `transformers` reads.
      gguf: names a file in the folder to read instead.
      skipped: whether a text is one that `transformers` is known to cut by another rule than the source's.

    Returns:
      How many texts and conversations there were, all the same.

    Raises:
      RunFailed: naming the first that is not.
    """
    theirs = load(folder, gguf)
    check_bos(tokenizer, theirs)
    count = 0
    for what, ours, found in [*texts(tokenizer, theirs), *conversations(tokenizer, theirs)]:
        if skipped is not None and skipped(tokenizer.decode(ours)):
            continue
        alike = ours == found or is_tie(tokenizer, ours, found) or but_for_blanks(tokenizer, ours, found)
        if not alike:
            first = next((i for i, (a, b) in enumerate(zip(ours, found, strict=False)) if a != b), 0)
            raise RunFailed(
                f"the tokenizer does not say what transformers says: {what} has the ids "
                f"{shown(ours, first)} here and {shown(found, first)} there, after {first} that are the same"
            )
        count += 1
    return count


def load(folder: str | os.PathLike[str], gguf: str | None = None) -> Any:
    """The tokenizer of a folder, or of a GGUF file in it, in `transformers`.

    Raises:
      RunFailed: it does not load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, local_files_only=True)
    except Exception as error:  # transformers raises whatever its converters do
        reason = " ".join(str(error).split())[:300]
        raise RunFailed(f"transformers does not load the tokenizer in {folder}: {reason}") from None


def check_bos(tokenizer: Tokenizer, theirs: Any) -> None:
    """Compares whether BOS begins a text.

    Not asked where a flag in tokenizer_config.json says it, which transformers 4 reads and 5 does not, nor of
    the tokenizers we train: documents begin with it there, and no file for other programs has a rule.

    Raises:
      RunFailed: the two do not agree.
    """
    if not isinstance(tokenizer, FastTokenizer) or tokenizer.ours or tokenizer.bos is None:
        return
    if "add_bos_token" in tokenizer.config:
        return
    begins = theirs("a")["input_ids"][:1] == [tokenizer.bos]
    if begins != tokenizer.adds_bos:
        here, there = ("begins", "does not") if tokenizer.adds_bos else ("does not begin", "does")
        raise RunFailed(f"a text {here} with BOS (id {tokenizer.bos}) here, and {there} in transformers")


def texts(tokenizer: Tokenizer, theirs: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """(what it is, our ids, transformers' ids) of conversations, whole and up to a reply.

    Those that a template refuses are left out.
    """
    for text in TEXTS:
        yield repr(text), tokenizer.encode(text), theirs(text, add_special_tokens=False)["input_ids"]
    if isinstance(tokenizer, FastTokenizer):
        control = [token for token in tokenizer.control_tokens if token != tokenizer.named.get("unk_token")]
        for token in control[:CONTROL_TOKENS]:
            text = f"a{token}b {token}\n"
            ours = tokenizer.reader.encode(text, add_special_tokens=False).ids
            yield repr(text), ours, theirs(text, add_special_tokens=False)["input_ids"]
    else:
        ids = list(range(len(SPECIAL_TOKENS)))
        yield "the list of special tokens", ids, theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS))


def conversations(tokenizer: Tokenizer, theirs: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """(what it is, our ids, transformers' ids) of conversations, whole and up to a reply.

    Those that a template refuses are left out.
    """
    if tokenizer.chat_template is None:
        return
    for talk in TALKS:
        asked: Any = talk
        try:
            whole, prompt = render(tokenizer, talk)[0], render_prompt(tokenizer, talk[:-1])
        except RowError:
            continue
        found = theirs.apply_chat_template(asked, return_dict=True)["input_ids"]
        yield f"a conversation of {len(talk)} turns", whole, found
        found = theirs.apply_chat_template(asked[:-1], add_generation_prompt=True, return_dict=True)
        yield f"the prompt of a conversation of {len(talk)} turns", prompt, found["input_ids"]


def but_for_blanks(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two lists of ids are one text but for blanks at its beginning and after control tokens.

    Only where the tokenizer puts a blank before a text, and the text has its own, or control tokens.
    """
    if not isinstance(tokenizer, FastTokenizer):
        return False
    prefixed = tokenizer.reader.encode("a", add_special_tokens=False).tokens[0].startswith(WORD_BOUNDARY)
    in_question = not tokenizer.control_ids.isdisjoint(ours) or tokenizer.decode(ours).startswith(" ")
    return prefixed and in_question and outline(tokenizer, ours) == outline(tokenizer, theirs)


def outline(tokenizer: FastTokenizer, ids: Sequence[int]) -> list[int | str]:
    """The control tokens among some ids, and the text between them without blanks around it."""
    parts: list[int | str] = []
    for control, stretch in itertools.groupby(ids, key=tokenizer.control_ids.__contains__):
        between = list(stretch)
        parts += between if control else [tokenizer.decode(between).strip(" ")]
    return [part for part in parts if part != ""]


def is_tie(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether a unigram model of SentencePiece gives two segmentations of a text the same probability.

    Rounding decides between them, which is float32 in SentencePiece and float64 in `tokenizers`.
    """
    if not isinstance(tokenizer, SpmTokenizer) or tokenizer.decode(ours) != tokenizer.decode(theirs):
        return False
    scores = [math.fsum(map(tokenizer.processor.get_score, ids)) for ids in (ours, theirs)]
    return math.isclose(*scores, rel_tol=1e-6)


def shown(ids: Sequence[int], first: int) -> str:
    """A few ids from where two lists differ."""
    return str(list(ids[first : first + 6]))
