"""Byte n-grams worked out by hand."""

from math import log2

import numpy as np
import pytest

from maxllm.data.ngram import ByteCounts, bits_per_byte

CLOSE = 1e-12
"""float64."""


def test_counts():
    counts = ByteCounts(["aab", "", "ba"])
    a, b = ord("a"), ord("b")
    assert (counts.singles[a], counts.singles[b], counts.bytes) == (3, 2, 5)
    assert (counts.pairs[a, a], counts.pairs[a, b], counts.pairs[b, a], counts.pairs[b, b]) == (1, 1, 1, 0)
    assert counts.pairs.sum() == 3  # never across documents
    assert (counts.firsts[a], counts.firsts[b]) == (1, 1)


def test_bytes_are_utf8():
    counts = ByteCounts(["é"])  # C3 A9
    assert counts.bytes == 2 and counts.pairs[0xC3, 0xA9] == 1 and counts.firsts[0xC3] == 1


def test_bits_per_byte_by_hand():
    """Train "aab". Unigram: p(a) = 3/259, p(b) = 2/259, others 1/259.

    Bigram: a was followed by a and b once each: p(x|a) = (c + p(x)) / 3; b by nothing: p(x|b) = p(x).
    Held out "aba": unigram -log2(p(a) p(b) p(a)) / 3; bigram -log2(p(a) p(b|a) p(a|b)) / 3.
    """
    p_a, p_b = 3 / 259, 2 / 259
    unigram, bigram = bits_per_byte(ByteCounts(["aab"]), ByteCounts(["aba"]))
    assert unigram == pytest.approx(-log2(p_a * p_b * p_a) / 3, abs=CLOSE)
    assert bigram == pytest.approx(-log2(p_a * ((1 + p_b) / 3) * p_a) / 3, abs=CLOSE)


def test_nothing_learned_is_eight_bits():
    """Without training text both are uniform over 256 bytes."""
    assert bits_per_byte(ByteCounts([]), ByteCounts(["héllo", "x"])) == pytest.approx((8, 8), abs=CLOSE)


def test_each_document_starts_from_the_unigram():
    """Two documents of one byte: the bigram has nothing to add."""
    unigram, bigram = bits_per_byte(ByteCounts(["ababab"]), ByteCounts(["a", "b"]))
    assert unigram == bigram == pytest.approx(-(2 * log2(4 / 262)) / 2, abs=CLOSE)


def test_distributions_sum_to_one():
    """Bits of every byte after a given one: sum 2^-bits = 1."""
    train, total = ByteCounts(["the cat sat on the mat"]), 0.0
    first = -log2((train.singles[ord("t")] + 1) / (train.bytes + 256))
    for byte in range(128):
        _, bigram = bits_per_byte(train, ByteCounts(["t" + chr(byte)]))
        total += 2 ** -(2 * bigram - first)
    unseen = 128 * (1 / (train.bytes + 256)) / (train.pairs[ord("t")].sum() + 1)
    assert total + unseen == pytest.approx(1, abs=1e-9)


def test_structure_is_worth_bits():
    text = "abcd" * 200
    unigram, bigram = bits_per_byte(ByteCounts([text]), ByteCounts([text]))
    assert bigram < 0.1 < 1.9 < unigram
    assert isinstance(unigram, float) and np.isfinite(bigram)
