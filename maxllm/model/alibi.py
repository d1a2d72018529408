"""Attention with linear biases (Press et al. 2022, "Train short, test long"): positions without embeddings.

The score of a query at slot t and a key at slot s is q k^T / sqrt(K) - slope (t - s), with a slope for each
head. Within a document slots differ as positions do, so that nothing but the slots need be known.
"""

import numpy as np


def slopes(heads: int) -> np.ndarray:
    """The slope of each head, [H] float32: 2^(-8 i / H) for i = 1 … H where H is a power of two.

    Else, as in the authors' code, those of the next lower power of two, then of the next higher the first,
    third, … until there are enough.
    """
    lower = 1 << heads.bit_length() - 1
    return np.concatenate([powers(lower), powers(2 * lower)[::2]])[:heads].astype(np.float32)


def powers(heads: int) -> np.ndarray:
    """2^(-8 i / H) for i = 1 … H."""
    return 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
