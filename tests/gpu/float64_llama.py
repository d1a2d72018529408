"""A LLaMA in float64 by the papers' formulas, and how far bfloat16 may move what it computes.

maxllm's model rounds to bfloat16 in known places: every weight that is multiplied, every result of a matmul
and of a norm, the residual stream, attention's probabilities, and the gradient of each of these. Here such a
place is `Rounding.both` (value and gradient), `.value` or `.gradient`. Without rounding results are exact;
with it, each number is multiplied by 1 + u or 1 - u, by lot, where u is the `unit` roundoff.

What rounding does is, to first order, a sum over all of these places of an independent error, at most u of
the number, times how much the result depends on it. Of the lots, the root mean square of a result's change is
the root of the sum of the squares of these terms; the norm of a sum of vectors of random sign is more than
LAMBDA times that with a chance of at most 2 exp(-LAMBDA^2 / 2), 7e-4 at 4 (Pinelis 1994, theorem 3.5; of
numbers it is the bound of tests/rounding.py). Nothing is read off a run on the hardware that is tested.

A compiler that leaves a rounding out, as XLA may inside a fusion, makes the error smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rounding

from maxllm.config.model import ModelConfig

BFLOAT16 = 2.0**-8
"""Unit roundoff of bfloat16, which has 8 bits of precision."""


def unit(terms: int) -> float:
    """The largest relative error of a bfloat16 number that a float32 sum of so many terms was rounded to."""
    return BFLOAT16 + rounding.LAMBDA * np.sqrt(terms) * rounding.UNIT


@jax.custom_vjp
def moved(x: jax.Array, factor: jax.Array, gradient_factor: jax.Array) -> jax.Array:
    """x times a factor, whose gradient is multiplied by another: the derivative of rounding is 1."""
    return x * factor


def moved_backward(gradient_factor: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    """The gradient of x alone."""
    return g * gradient_factor, None, None


moved.defvjp(lambda x, factor, gradient_factor: (x * factor, gradient_factor), moved_backward)


class Rounding:
    """The places where bfloat16 rounds, in the order in which a function comes to them."""

    def __init__(self, lots: Callable[[tuple[int, ...]], jax.Array]) -> None:
        """`lots` says, place after place, what numbers of a shape are multiplied by: 1 for none, or 1 more or
        less than the size of an error."""
        self.lots = lots

    def value(self, x: jax.Array) -> jax.Array:
        """Rounded, and its gradient is not."""
        return moved(x, self.lots(x.shape), jnp.float64(1))

    def gradient(self, x: jax.Array) -> jax.Array:
        """Its gradient alone is rounded."""
        return moved(x, jnp.float64(1), self.lots(x.shape))

    def both(self, x: jax.Array) -> jax.Array:
        """Rounded, as its gradient is."""
        return moved(x, self.lots(x.shape), self.lots(x.shape))


DRAWS = 8
"""Of the lots. The root of the mean of eight squares of one number is off by a quarter (standard
deviation); of the norm of an array with many numbers, by next to nothing."""


def deviations(function: Callable[..., Any], terms: int) -> Callable[..., tuple[Any, list[Any]]]:
    """A function of arrays that gives what `function` gives of them exactly, in float64 on the CPU, and by
    how much each of some draws of the lots changes that.

    Args:
      function: (Rounding, *arrays) -> a tree of arrays.
      terms: of its longest dot product.
    """

    @jax.jit
    def jitted(lots: list[jax.Array], *arrays: Any) -> Any:
        rest = iter(lots)
        return function(Rounding(lambda shape: next(rest)), *arrays)

    def measured(*arrays: Any) -> tuple[Any, list[Any]]:
        arrays = jax.tree.map(widened, jax.device_get(arrays))
        shapes: list[tuple[int, ...]] = []
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            jax.eval_shape(partial(function, Rounding(partial(noted, shapes))), *arrays)
            exact = jax.device_get(jitted([np.ones(shape) for shape in shapes], *arrays))
            rng = np.random.default_rng(0)
            draws = [[1 + unit(terms) * signs(rng, shape) for shape in shapes] for _ in range(DRAWS)]
            moved = [jax.device_get(jitted(lots, *arrays)) for lots in draws]
        return exact, [jax.tree.map(np.subtract, one, exact) for one in moved]

    return measured


def noted(shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> jax.Array:
    """Ones, whose shape is noted."""
    shapes.append(shape)
    return jnp.ones(shape)


def signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """1 or -1 by lot."""
    return 2.0 * rng.integers(0, 2, shape, np.int8) - 1


def widened(array: Any) -> np.ndarray:
    """Floating-point numbers in float64; others as they are."""
    array = np.asarray(array)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def norms_allowed(changes: list[Any]) -> Any:
    """For each array the norm that its error may have."""
    mean = partial(np.mean, axis=0)
    squares = jax.tree.map(lambda *arrays: mean([np.sum(a**2) for a in arrays]), *changes)
    return jax.tree.map(lambda square: rounding.LAMBDA * np.sqrt(square), squares)


# --- the model ---------------------------------------------------------------------------------------------


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, seen_BTS: jax.Array, r: Rounding
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, [B, T, H, K]; a query that sees nothing has 0.

    Kernels round the probabilities before they multiply them with values, and the gradients of scores before
    they multiply them with queries and keys (Dao et al. 2022, appendix B.2). Heads that share keys and values
    may have their gradients rounded before they are added.
    """
    heads = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (r.gradient(jnp.repeat(a, heads, axis=2)) for a in (k_BSGK, v_BSGK))
    scores_BHTS = r.gradient(jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / q_BTHK.shape[-1] ** 0.5)
    largest_BHT1 = jax.lax.stop_gradient(jnp.max(scores_BHTS, -1, keepdims=True))
    exp_BHTS = jnp.where(seen_BTS[:, None], jnp.exp(scores_BHTS - largest_BHT1), 0.0)
    sum_BHT1 = jnp.maximum(jnp.sum(exp_BHTS, -1, keepdims=True), 1e-30)
    p_BHTS = exp_BHTS / sum_BHT1
    weighted = partial(jnp.einsum, "bhts,bshk->bthk")
    o_BTHK, exact_BTHK = weighted(r.value(p_BHTS), v_BSHK), jax.lax.stop_gradient(weighted(p_BHTS, v_BSHK))
    lse_BHT1 = jnp.log(sum_BHT1) + largest_BHT1
    return r.gradient(attended(o_BTHK, lse_BHT1, exact_BTHK, r.lots(o_BTHK.shape)))


@jax.custom_vjp
def attended(o_BTHK: jax.Array, lse_BHT1: jax.Array, exact_BTHK: jax.Array, factor: jax.Array) -> jax.Array:
    """Attention's output times a factor. Kernels take sum(o do) of that output for sum(p dp), which they
    subtract from dp, the gradient of p: what the one differs from the other by, times p, is an error of the
    gradient of scores. The logsumexp's gradient is p."""
    return o_BTHK * factor


def attended_forward(o_BTHK: jax.Array, lse_BHT1: jax.Array, exact_BTHK: jax.Array, factor: jax.Array) -> Any:
    """The output, and its error."""
    return o_BTHK * factor, o_BTHK * factor - exact_BTHK


def attended_backward(error_BTHK: jax.Array, do_BTHK: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    """The gradients of o and, for the error, of the logsumexp."""
    return do_BTHK, -jnp.einsum("bthk,bthk->bht", error_BTHK, do_BTHK)[..., None], None, None


attended.defvjp(attended_forward, attended_backward)


def seen_by(config: ModelConfig, segments_BT: Any) -> jax.Array:
    """[B, T, S] bool: a token sees those of its own segment up to itself, of a window that ends there."""
    T = segments_BT.shape[1]
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    near_TS = (distance_TS >= 0) & (distance_TS < (config.sliding_window or T))
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return jnp.asarray(near_TS & same_BTS & (segments_BT != 0)[:, :, None])


def turned(x_BTHK: jax.Array, angles_BTK: jax.Array) -> jax.Array:
    """The pair (x_i, x_{i + K/2}) as a complex number times e^(i angle) (Su et al. 2021)."""
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    cos, sin = jnp.cos(angles_BTK)[:, :, None], jnp.sin(angles_BTK)[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float, r: Rounding) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) scale; the matmuls that read it add gradients that are rounded."""
    x_BTD = r.gradient(x_BTD)
    y_BTD = x_BTD / jnp.sqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + eps) * scale_D
    return r.gradient(r.both(y_BTD))


def times(x: jax.Array, w: jax.Array, r: Rounding) -> jax.Array:
    """x's last axis with w's first, both rounded, and the product; as are its three gradients."""
    return r.both(jnp.tensordot(r.gradient(x), r.both(w), 1))


def layer(
    config: ModelConfig, w: Any, x_BTD: jax.Array, angles: jax.Array, seen_BTS: jax.Array, r: Rounding
) -> jax.Array:
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""
    a, m = w["attention"], w["mlp"]
    h_BTD = norm(x_BTD, w["attention_norm"]["scale"], config.norm_eps, r)
    q, k, v = (times(h_BTD, a[name], r) for name in ("wq", "wk", "wv"))
    q, k = r.both(turned(q, angles)), r.both(turned(k, angles))
    o_BTHK = attention(q, k, v, seen_BTS, r)
    wo_HKD = a["wo"]
    o_BTE = o_BTHK.reshape(*o_BTHK.shape[:2], -1)
    x_BTD = r.both(x_BTD + times(o_BTE, wo_HKD.reshape(-1, wo_HKD.shape[-1]), r))
    h_BTD = norm(x_BTD, w["mlp_norm"]["scale"], config.norm_eps, r)
    gate_BTF, up_BTF = times(h_BTD, m["w_gate"], r), times(h_BTD, m["w_up"], r)
    silu_BTF = r.both(r.gradient(gate_BTF) * r.both(jax.nn.sigmoid(r.gradient(gate_BTF))))
    return r.both(x_BTD + times(r.both(silu_BTF * r.gradient(up_BTF)), m["w_down"], r))


def logits(
    config: ModelConfig, r: Rounding, params: Any, tokens_BT: Any, segments_BT: Any, positions_BT: Any
) -> jax.Array:
    """[B, T, V]; only the gradient of the logits is rounded, they are float32."""
    K = config.k_dim
    angles_BTK = positions_BT[..., None] / config.rope_theta ** (jnp.arange(0, K, 2) / K)
    decoder = params["decoder"]
    x_BTD = r.both(decoder["embedding"][tokens_BT])
    for number in range(config.n_layers):
        w = jax.tree.map(lambda leaf, n=number: leaf[n], decoder["layers"])
        x_BTD = layer(config, w, x_BTD, angles_BTK, seen_by(config, segments_BT), r)
    x_BTD = norm(x_BTD, decoder["final_norm"]["scale"], config.norm_eps, r)
    return r.gradient(jnp.tensordot(x_BTD, r.value(params["lm_head"]), 1))


def loss(config: ModelConfig, r: Rounding, params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy of the weighted targets, nats."""
    arrays = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    logps_BTV = jax.nn.log_softmax(logits(config, r, params, *arrays))
    chosen_BT = jnp.take_along_axis(logps_BTV, batch.targets_BT[..., None], -1)[..., 0]
    return -jnp.sum(chosen_BT * batch.loss_weights_BT) / jnp.sum(batch.loss_weights_BT)
