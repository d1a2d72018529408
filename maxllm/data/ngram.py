"""Byte n-gram models: the baselines that a language model's bits per byte are printed beside."""

from collections.abc import Iterable

import numpy as np


class ByteCounts:
    """Counts of bytes and of byte pairs inside documents."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.pairs = np.zeros((256, 256))
        self.singles = np.zeros(256)
        self.firsts = np.zeros(256)
        for text in texts:
            data = np.frombuffer(text.encode(), np.uint8)
            if len(data):
                self.singles += np.bincount(data, minlength=256)
                self.firsts[data[0]] += 1
                codes = data[:-1].astype(np.int64) * 256 + data[1:]
                self.pairs += np.bincount(codes, minlength=65536).reshape(256, 256)

    @property
    def bytes(self) -> int:
        """Bytes counted."""
        return int(self.singles.sum())


def bits_per_byte(train: ByteCounts, heldout: ByteCounts) -> tuple[float, float]:
    """Held-out bits per byte of the unigram and of the bigram model fitted on `train`.

    Unigram: add-one smoothing. Bigram: p(b | a) = (c(a, b) + p(b)) / (c(a) + 1), that is, backed off to the
    unigram with the weight of one observation; a document's first byte is predicted by the unigram.
    """
    unigram = (train.singles + 1) / (train.singles.sum() + 256)
    bigram = (train.pairs + unigram) / (train.pairs.sum(1, keepdims=True) + 1)
    unigram_bits = -(heldout.singles * np.log2(unigram)).sum()
    bigram_bits = -(heldout.pairs * np.log2(bigram)).sum() - (heldout.firsts * np.log2(unigram)).sum()
    return float(unigram_bits / heldout.bytes), float(bigram_bits / heldout.bytes)
