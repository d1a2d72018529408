"""Cross-entropy of a linear head without its logits: of [N, V] in float32, only some rows are ever held.

The loss is the last thing a forward pass computes, so its gradient is known as soon as it is: each part of
the logits is made once, gives its share of the loss and of both gradients, and is dropped: the three
matmuls that a head costs anyway (forward, dx, dw), where recomputing logits would take four. The idea is
that of Liger kernels (Hsu et al. 2024) and Cut Cross-Entropy (Wijmans et al. 2024).

The vocabulary may be split over a mesh axis (Shoeybi et al. 2019): each device holds some columns, and three
numbers per row are summed over the axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxllm.losses.token import PLAIN, UNREGULARIZED, Regularization, Shaping

PART_BYTES = 1 << 28
"""Logits that a device holds at once, float32."""


class Sums(NamedTuple):
    """What the loss of a block of rows adds up to; float32 scalars."""

    total: jax.Array
    """Sum of the weighted losses, nats: -log p(target), and what a regularization adds to it."""
    plain: jax.Array
    """Sum of weighted -log p(target), nats."""
    weight: jax.Array
    """Sum of the weights."""
    right: jax.Array
    """Sum of the weights of targets that are likelier than every other token."""


def cross_entropy(
    x_ND: jax.Array,
    w_DV: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    vocab_axis: str | None = None,
    gradients: bool = False,
    shaping: Shaping = PLAIN,
    regularization: Regularization = UNREGULARIZED,
) -> tuple[Sums, jax.Array | None, jax.Array | None]:
    """Sums over rows, and where asked for the gradients of `total`.

    Args:
      x_ND: hidden states; matmuls are in their type.
      w_DV: the head; V is this device's share of the vocabulary.
      targets_N: int32 ids in the whole vocabulary.
      weights_N: float32.
      vocab_axis: mesh axis over which V is split, inside `shard_map`.
      gradients: whether dx_ND (in x's type) and dw_DV (float32) are wanted; None otherwise.
      shaping: what is made of the logits first.
      regularization: what is added to each row's loss.
    """
    (N, D), V = x_ND.shape, w_DV.shape[1]
    smoothing, z = regularization.label_smoothing, regularization.z
    rows = rows_at_once(N, V)
    w_DV = w_DV.astype(x_ND.dtype)

    def part(x_nD: jax.Array, targets_n: jax.Array, weights_n: jax.Array):
        softmax = softmax_of(x_nD, w_DV, targets_n, vocab_axis, shaping)
        plain = total = jnp.sum(softmax.losses_n * weights_n)
        if regularization != UNREGULARIZED:
            total = jnp.sum(regularized(softmax, regularization) * weights_n)
        sums = Sums(total, plain, jnp.sum(weights_n), jnp.sum(softmax.right_n * weights_n))
        if not gradients:
            return sums, None, None
        dlogits_nV = softmax.exp_nV / softmax.sum_n[:, None]
        if z:
            dlogits_nV = dlogits_nV * (1 + 2 * z * softmax.log_sum_n[:, None])
        if smoothing:
            dlogits_nV = dlogits_nV - (1 - smoothing) * softmax.target_nV - smoothing / softmax.vocabulary
        else:
            dlogits_nV = dlogits_nV - softmax.target_nV
        dlogits_nV = dlogits_nV * weights_n[:, None]
        if shaping.temperature != 1:
            dlogits_nV = dlogits_nV / shaping.temperature
        dlogits_nV = dlogits_nV.astype(x_nD.dtype)
        dx_nD = over(vocab_axis, jnp.matmul(dlogits_nV, w_DV.T))
        dw_DV = jnp.matmul(x_nD.T, dlogits_nV, preferred_element_type=jnp.float32)
        return sums, dx_nD, dw_DV

    if rows == N:
        return part(x_ND, targets_N, weights_N)

    def add(so_far, block):
        sums, dx_nD, dw_DV = part(*block)
        return jax.tree.map(jnp.add, so_far, (sums, dw_DV)), dx_nD

    zero = jnp.float32(0)
    start = (Sums(zero, zero, zero, zero), jnp.zeros((D, V), jnp.float32) if gradients else None)
    blocks = in_blocks(rows, x_ND, targets_N, weights_N)
    (sums, dw_DV), dx = jax.lax.scan(add, start, blocks)
    return sums, dx.reshape(-1, D)[:N] if gradients else None, dw_DV


def regularized(softmax: Softmax, regularization: Regularization) -> jax.Array:
    """(1 - ε) (-log p_target) + ε mean over v of (-log p_v) + z (log Σ exp)² of each row, [n] float32."""
    smoothing = regularization.label_smoothing
    spread_n = softmax.log_sum_n - softmax.mean_n
    losses_n = (1 - smoothing) * softmax.losses_n + smoothing * spread_n
    return losses_n + regularization.z * jnp.square(softmax.log_sum_n)


class Chosen(NamedTuple):
    """What is told of each row, or position, and its target; XLA makes those that are read."""

    logps: jax.Array
    """float32; log p(target)."""
    entropy: jax.Array
    """float32; of the distribution, nats."""
    right: jax.Array
    """bool; the target is likelier than every other token."""


def target_logps(
    x_ND: jax.Array,
    w_DV: jax.Array,
    targets_N: jax.Array,
    vocab_axis: str | None = None,
    shaping: Shaping = PLAIN,
) -> Chosen:
    """Each row's figures, [N]; the arguments are those of `cross_entropy`.

    The gradient of the first for a cotangent g_N is that of `cross_entropy` with the weights -g_N, which
    makes the logits again.
    """
    N, V = len(x_ND), w_DV.shape[1]
    rows = rows_at_once(N, V)
    w_DV = w_DV.astype(x_ND.dtype)

    def part(block: tuple[jax.Array, jax.Array]) -> Chosen:
        softmax = softmax_of(block[0], w_DV, block[1], vocab_axis, shaping)
        return Chosen(-softmax.losses_n, softmax.entropy_n, softmax.right_n)

    if rows == N:
        return part((x_ND, targets_N))
    parts = jax.lax.map(part, in_blocks(rows, x_ND, targets_N))
    return Chosen(*(each.reshape(-1)[:N] for each in parts))


def in_blocks(rows: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [N, …] as [parts, rows, …], the last part filled up with zeros: rows of no weight."""

    def block(array: jax.Array) -> jax.Array:
        missing = -len(array) % rows
        if missing:
            array = jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
        return array.reshape(-1, rows, *array.shape[1:])

    return tuple(map(block, arrays))


class Softmax(NamedTuple):
    """The softmax of some rows' logits, and their loss."""

    exp_nV: jax.Array
    """exp(logit - the row's largest)."""
    sum_n: jax.Array
    """Sum of these exponentials over the whole vocabulary."""
    target_nV: jax.Array
    """bool; where the target is."""
    losses_n: jax.Array
    """-log p(target)."""
    entropy_n: jax.Array
    """Entropy of the distribution, nats; XLA makes it where it is read."""
    log_sum_n: jax.Array
    """log Σ exp(logit)."""
    mean_n: jax.Array
    """Mean of the row's logits over the whole vocabulary."""
    vocabulary: int
    """Tokens of the whole vocabulary."""
    right_n: jax.Array
    """bool; the target is likelier than every other token. A tie is no answer: a collapsed model, to which
    all tokens are alike, would have all of them right."""


def softmax_of(
    x_nD: jax.Array, w_DV: jax.Array, targets_n: jax.Array, vocab_axis: str | None, shaping: Shaping = PLAIN
) -> Softmax:
    """All that is made of the logits of some rows; the arguments are those of `cross_entropy`."""
    V = w_DV.shape[1]
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * V
    logits_nV = shaping(jnp.matmul(x_nD, w_DV, preferred_element_type=jnp.float32), first)
    largest_n = jax.lax.stop_gradient(jnp.max(logits_nV, -1))
    if vocab_axis is not None:
        largest_n = jax.lax.pmax(largest_n, vocab_axis)
    exp_nV = jnp.exp(logits_nV - largest_n[:, None])
    sum_n = over(vocab_axis, jnp.sum(exp_nV, -1))
    target_nV = jnp.arange(V) == (targets_n - first)[:, None]
    chosen_n = over(vocab_axis, jnp.sum(jnp.where(target_nV, logits_nV, 0.0), -1))
    log_sum_n = jnp.log(sum_n) + largest_n
    vocabulary = V if vocab_axis is None else V * jax.lax.axis_size(vocab_axis)
    likeliest_n = over(vocab_axis, jnp.sum(logits_nV == largest_n[:, None], -1))
    right_n = (chosen_n >= largest_n) & (likeliest_n == 1)
    # H = log sum exp(z) - sum p z, with z counted from the largest logit.
    expected_n = over(vocab_axis, jnp.sum(exp_nV * (logits_nV - largest_n[:, None]), -1)) / sum_n
    return Softmax(
        exp_nV=exp_nV,
        sum_n=sum_n,
        target_nV=target_nV,
        losses_n=log_sum_n - chosen_n,
        entropy_n=jnp.log(sum_n) - expected_n,
        log_sum_n=log_sum_n,
        mean_n=over(vocab_axis, jnp.sum(logits_nV, -1)) / vocabulary,
        vocabulary=vocabulary,
        right_n=right_n,
    )


def over(vocab_axis: str | None, x: jax.Array) -> jax.Array:
    """Summed over the shares of the vocabulary."""
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)


def rows_at_once(N: int, V: int) -> int:
    """Rows of a part, whose logits take at most PART_BYTES.

    The largest such divisor of N, so that no part has to be filled up; but of an N that has none within half
    of what would fit (a prime, say, whose parts would be single rows), as many as make the parts equal.
    """
    parts = -(-N * V * 4 // PART_BYTES)
    count = next((count for count in range(parts, min(2 * parts, N) + 1) if N % count == 0), parts)
    return -(-N // count)
