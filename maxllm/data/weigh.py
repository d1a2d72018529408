"""What each token of SFT counts in the loss, and which reply and source it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from maxllm.config.loss import LossConfig
from maxllm.data.pack import Piece
from maxllm.data.shown import texts_of
from maxllm.data.tokenizer import Tokenizer

THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
"""A chain of thought as reasoning models write it, in a reply that may have been cut."""

ENDED = re.compile(r"\A(?:(?!<think>).)*?</think>", re.DOTALL)
"""One that begins with the reply: some templates write <think> themselves."""


def weighed(tokenizer: Tokenizer, piece: Piece, loss: LossConfig) -> Piece:
    """A piece whose tokens count as a recipe says: its thoughts by `loss.thoughts`, and with
    loss.mean=samples all of it as much as any other piece."""
    if loss == LossConfig():
        return piece
    weights = np.array(piece.weights, np.float32)
    if loss.thoughts != 1:
        for first, last in runs(weights):
            ids = [int(token) for token in piece.ids[first:last]]
            named = "".join(filter(None, map(tokenizer.control_name, ids)))  # which decoding leaves out
            if "think>" in tokenizer.decode(ids) + named:  # where each token's text is, is dearer to find out
                weights[first:last][thoughts(texts_of(tokenizer, ids))] *= loss.thoughts
    if loss.mean == "samples" and (total := weights[1:].sum()) > 0:  # the first token is no target
        weights /= total
    return replace(piece, weights=weights)


def thoughts(texts: Sequence[str]) -> np.ndarray:
    """Which of a reply's tokens, given as texts, are part of a thought or of its marks; [N] bool."""
    text = "".join(texts)
    ends = np.cumsum([len(each) for each in texts])
    starts = ends - [len(each) for each in texts]
    inside = np.zeros(len(texts), bool)
    for found in [*ENDED.finditer(text), *THOUGHT.finditer(text)]:
        inside |= (starts < found.end()) & (ends > found.start())
    return inside


def runs(weights: Sequence[float] | np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, one behind the last) of each stretch of tokens that are in the loss: of each reply."""
    trained = np.concatenate([[False], np.asarray(weights) > 0, [False]])
    changes = np.flatnonzero(trained[1:] != trained[:-1])
    yield from zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)


def numbered(piece: Piece, first: int) -> Piece:
    """A piece whose weights are the numbers of the replies that its trained tokens belong to, counted from
    `first`; 0 for tokens that are not trained."""
    numbers = np.zeros(len(piece.ids), np.int32)
    for number, (start, end) in enumerate(runs(piece.weights), start=first):
        numbers[start:end] = number
    return replace(piece, weights=numbers)
