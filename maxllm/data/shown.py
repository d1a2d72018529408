"""Rows as a careful user looks at them: every token as text, with its document and its weight in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxllm.data.tokenizer import Tokenizer
from maxllm.records import LmBatch

BEFORE = 8
"""Tokens before one that can matter to its text: those of one character; a space that only a start drops."""


@dataclass(frozen=True)
class ShownRow:
    """A row of a batch; all lists are of the same length."""

    tokens: list[int]
    text: list[str]
    """Of each token; of one that is a part of a character, nothing, and the character at its last."""
    segments: list[int]
    """The document that a token belongs to, from 1."""
    weights: list[float]
    """What predicting this token counts in the loss."""


def shown_row(
    tokenizer: Tokenizer, tokens: Sequence[int], weights: Sequence[float], segments: Sequence[int] = ()
) -> ShownRow:
    """A row of these tokens; one document, where no segments are given."""
    ids = [int(token) for token in tokens]
    numbers = [int(number) for number in segments] or [1] * len(ids)
    return ShownRow(ids, texts_of(tokenizer, ids), numbers, [float(weight) for weight in weights])


def shown_packed(tokenizer: Tokenizer, batch: LmBatch, number: int) -> ShownRow:
    """A row of a packed batch: each document whole, its first token with the weight 0, without padding."""
    tokens: list[int] = []
    weights: list[float] = []
    segments: list[int] = []
    of_row = np.asarray(batch.segment_ids_BT[number])
    for segment in range(1, int(of_row.max(initial=0)) + 1):
        inside = of_row == segment
        tokens += [int(batch.tokens_BT[number][inside][0]), *batch.targets_BT[number][inside].tolist()]
        weights += [0.0, *np.asarray(batch.loss_weights_BT[number])[inside].tolist()]
        segments += [segment] * (int(inside.sum()) + 1)
    return shown_row(tokenizer, tokens, weights, segments)


def texts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; control tokens as they are spelled."""
    texts = []
    for n, token in enumerate(ids):
        name = tokenizer.control_name(token)
        before = tokenizer.decode(ids[max(0, n - BEFORE) : n])
        after = tokenizer.decode([*ids[max(0, n - BEFORE) : n], token])
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        texts.append(name if name is not None else after[same:].replace("\ufffd", ""))
    return texts
