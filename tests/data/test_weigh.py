"""What tokens count: thoughts by a weight of their own, samples alike, replies numbered."""

import numpy as np
import pytest
import tokenizers

from maxllm.config.loss import LossConfig
from maxllm.data.bpe import SETTINGS, FastTokenizer
from maxllm.data.conversation import read_conversation
from maxllm.data.pack import Piece, pack
from maxllm.data.shown import texts_of
from maxllm.data.weigh import numbered, thoughts, weighed
from maxllm.hf.tokenizer import fast_tokenizer

ROW = {
    "messages": [
        {"role": "user", "content": "<think>no thought</think> 春眠?"},
        {"role": "assistant", "content": "So:<think>春 is spring 🙂</think>Spring."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Sleep."},
    ]
}


def piece_of(tokenizer, row=ROW):
    return read_conversation(tokenizer, row, 999).pieces[0]


def test_thoughts_have_a_weight_of_their_own(tiny_tokenizer):
    """Only in replies; the tokens of both marks are among them, and every other one keeps its weight."""
    piece = piece_of(tiny_tokenizer)
    got = weighed(tiny_tokenizer, piece, LossConfig(thoughts=0.25))
    texts = texts_of(tiny_tokenizer, list(piece.ids))
    thought = "".join(text for text, weight in zip(texts, got.weights, strict=True) if weight == 0.25)
    assert "<think>春 is spring 🙂</think>" in thought
    assert "no thought" not in thought and "Sleep" not in thought
    # A token may hold a mark's end and what follows it.
    assert len(thought) <= len("<think>春 is spring 🙂</think>") + 2 * max(map(len, texts))
    np.testing.assert_array_equal(np.asarray(got.weights) > 0, np.asarray(piece.weights) > 0)
    assert set(np.asarray(got.weights).tolist()) == {0.0, 0.25, 1.0}


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a", "<think>", "b", "</think>", "c"], [0, 1, 1, 1, 0]),
        (["a<thi", "nk>b</", "think>c", "d"], [1, 1, 1, 0]),
        (["b", "</think>", "c"], [1, 1, 0]),  # the template wrote <think>
        (["a", "<think>", "b"], [0, 1, 1]),  # the reply was cut
        (["a", "<think>", "b", "</think>", "c", "<think>", "d", "</think>"], [0, 1, 1, 1, 0, 1, 1, 1]),
        (["a", "b"], [0, 0]),
    ],
)
def test_which_tokens_are_thoughts(texts, wanted):
    np.testing.assert_array_equal(thoughts(texts), np.array(wanted, bool))


def test_marks_that_are_tokens_of_their_own(tiny_tokenizer):
    """As Qwen3 has them: decoding leaves control tokens out."""
    backend = tokenizers.Tokenizer.from_str(fast_tokenizer(tiny_tokenizer).to_str())
    backend.add_special_tokens(["<think>", "</think>"])
    tokenizer = FastTokenizer(backend.to_str().encode(), SETTINGS)
    open_mark, close_mark = (backend.token_to_id(mark) for mark in ("<think>", "</think>"))
    said = tokenizer.encode("so")
    piece = Piece([7, open_mark, *said, close_mark, *said], [0, *[1] * (2 * len(said) + 2)])
    got = weighed(tokenizer, piece, LossConfig(thoughts=0.5)).weights
    assert got.tolist() == [0, *[0.5] * (len(said) + 2), *[1] * len(said)]


def test_samples_count_alike(tiny_tokenizer):
    """Each sample's weights add up to 1, so that the mean over a batch is the mean of the samples' means."""
    short = {"prompt": "2+2?", "completion": "4"}
    long = {"prompt": "Count.", "completion": "1 2 3 4 5 6 7 8 9"}
    pieces = [piece_of(tiny_tokenizer, row) for row in (short, long, ROW)]
    counted = [weighed(tiny_tokenizer, piece, LossConfig(mean="samples")) for piece in pieces]
    batch = pack(counted, 256, tiny_tokenizer.pad)
    assert float(batch.loss_weights_BT.sum()) == pytest.approx(3, abs=3 * 2**-24 * len(ROW) * 100)
    losses = [np.arange(1.0, len(piece.ids) + 1) for piece in pieces]
    means = [np.average(each, weights=piece.weights) for each, piece in zip(losses, pieces, strict=True)]
    ours = sum(np.sum(each * np.asarray(piece.weights)) for each, piece in zip(losses, counted, strict=True))
    assert ours / 3 == pytest.approx(np.mean(means), rel=1e-6)


def test_replies_are_numbered():
    piece = Piece([7, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1, 0])
    assert numbered(piece, 3).weights.tolist() == [0, 0, 3, 3, 0, 4, 0]
