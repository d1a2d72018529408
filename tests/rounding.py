"""How far float32 may move a number: what the tolerances of these tests are made of.

Two programs that compute the same differ by rounding alone, and by how much depends on the processor: how
wide its vectors are, whether a product and a sum are one instruction, how many threads share a sum. What was
read off one machine fails on the next. These come from the arithmetic:

    one operation    relative error of at most UNIT = 2^-24, the unit roundoff of float32
    a sum of n       at most n UNIT sum|x|, in any order (Higham 2002, Accuracy and Stability, eq. 4.4); with
    terms            errors of random sign LAMBDA sqrt(n) UNIT sum|x|, but for a chance of 7e-4 a sum,
                     2 exp(-LAMBDA^2 / 2) at LAMBDA = 4 (Higham and Mary 2019, theorem 2.4)
    a network        a dot product of n terms is the exact one of weights that are each off by as much (ibid.,
                     section 3): the weights are moved so far by lot, and what comes of it is seen

Two results are compared, each with such an error: hence twice.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

UNIT = 2.0**-24

LAMBDA = 4.0


def of_sum(terms: int, magnitude: float = 1.0) -> float:
    """How far two float32 sums of the same terms may lie apart, whatever their orders.

    Args:
      terms: how many there are; of sums of sums, all terms that go into one number.
      magnitude: the sum of their absolute values, or a bound of it.
    """
    return 2 * min(terms, LAMBDA * np.sqrt(terms)) * UNIT * magnitude


def of_operations(count: int, magnitude: float = 1.0) -> float:
    """How far two float32 results may lie apart that `count` operations in a row made of the same numbers.

    Args:
      count: operations, each of which may be rounded otherwise (a polynomial of degree 8 has 16).
      magnitude: the largest number among the results.
    """
    return 2 * count * UNIT * magnitude


def of_network(
    function: Callable[[Any], Any], weights: Any, terms: int, draws: int = 3, seed: int = 0
) -> float:
    """How far rounding may move the results of a network of float32 matmuls.

    Args:
      function: weights -> arrays, jitted where it takes long; called `draws` + 1 times.
      weights: a tree of float32 arrays, each of whose entries is moved up or down by lot.
      terms: of the longest dot product.
      draws: how often the lots are drawn; the largest change counts.
      seed: of the lots.
    """
    rng, off = np.random.default_rng(seed), LAMBDA * np.sqrt(terms) * UNIT

    def moved(weight: Any) -> np.ndarray:
        weight = np.asarray(weight)
        return (weight * (1 + off * rng.choice([-1.0, 1.0], weight.shape))).astype(weight.dtype)

    exact = jax.tree.leaves(function(weights))
    changes = [
        np.max(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)), initial=0.0)
        for _ in range(draws)
        for one, other in zip(jax.tree.leaves(function(jax.tree.map(moved, weights))), exact, strict=True)
    ]
    return 2 * float(max(changes))
