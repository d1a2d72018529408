"""The loss of a head without its logits, against the loss of its logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.losses import linear, token
from maxllm.steps.head import head_logps

N, D, V = 24, 8, 40
TERMS = max(N, D, V)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(N, D)), rng.normal(size=(D, V))
    return (
        jnp.asarray(x, jnp.float32),
        jnp.asarray(w, jnp.float32),
        jnp.asarray(rng.integers(0, V, N)),
        jnp.asarray(rng.random(N), jnp.float32),
    )


def by_logits(x_ND, w_DV, targets_N, weights_N):
    return -jnp.sum(token.token_logps((x_ND @ w_DV)[None], targets_N[None]) * weights_N)


@pytest.mark.parametrize("part_bytes", [1 << 28, 4 * V * 8, 4 * V * 7, 4 * V], ids=["1", "3", "4", "24"])
def test_loss_and_gradients_in_parts(rows, monkeypatch, part_bytes):
    """Parts of 24, 8, 6 and 1 rows."""
    monkeypatch.setattr(linear, "PART_BYTES", part_bytes)
    sums, dx, dw = linear.cross_entropy(*rows, gradients=True)
    total, (dx_wanted, dw_wanted) = jax.value_and_grad(by_logits, (0, 1))(*rows)
    x, w, targets, weights = rows
    loss = lambda xw: by_logits(*xw, targets, weights)  # noqa: E731
    close = partial(np.testing.assert_allclose, rtol=0)
    close(sums.total, total, atol=rounding.of_network(loss, (x, w), TERMS))
    atol = rounding.of_network(jax.grad(loss), (x, w), TERMS)
    close(dx, dx_wanted, atol=atol)
    close(dw, dw_wanted, atol=atol)
    right = (jnp.argmax(x @ w, -1) == targets) * weights
    np.testing.assert_allclose(sums.right, right.sum(), rtol=rounding.of_sum(N))
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=rounding.of_sum(N))
    alone, nothing, nothing_either = linear.cross_entropy(*rows)
    np.testing.assert_array_equal(alone.total, sums.total)
    assert nothing is None and nothing_either is None


@pytest.mark.parametrize("part_bytes", [1 << 28, 4 * V * 7], ids=["1", "4"])
@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 0.02), (0.3, 0.05)])
def test_label_smoothing_and_z_loss(rows, monkeypatch, part_bytes, smoothing, z):
    """Label smoothing is torch's, gradients included; the square of torch's log-sum-exp is added to it."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(linear, "PART_BYTES", part_bytes)
    x, w, targets, weights = rows
    added = token.Regularization(smoothing, z)
    sums, dx, dw = linear.cross_entropy(*rows, gradients=True, regularization=added)
    xw = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, w)]
    logits, labels = xw[0] @ xw[1], torch.tensor(np.asarray(targets, np.int64))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    each = each + z * torch.logsumexp(logits, -1) ** 2
    total = (each * torch.tensor(np.asarray(weights, np.float64))).sum()
    total.backward()
    within = rounding.of_sum(TERMS, float(jnp.abs(x @ w).max()) ** 2 * N)
    np.testing.assert_allclose(sums.total, total.item(), rtol=0, atol=within)
    np.testing.assert_allclose(sums.plain, linear.cross_entropy(*rows)[0].total, rtol=rounding.of_sum(N))
    for got, wanted in zip((dx, dw), xw, strict=True):
        scale = float(jnp.abs(x @ w).max()) * max(float(jnp.abs(x).max()), float(jnp.abs(w).max()))
        np.testing.assert_allclose(got, wanted.grad, rtol=0, atol=rounding.of_sum(TERMS, scale))


def test_a_tie_is_not_right():
    """A collapsed model, to which all tokens are alike, answers nothing; nor does one of two likeliest."""
    w_DV = jnp.zeros((2, V)).at[0, :2].set(1.0)
    x_ND = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    sums, _, _ = linear.cross_entropy(x_ND, w_DV, jnp.array([0, 1, 0]), jnp.ones(3))
    assert float(sums.right) == 0
    w_DV = w_DV.at[0, 1].set(2.0)
    sums, _, _ = linear.cross_entropy(x_ND, w_DV, jnp.array([0, 1, 0]), jnp.ones(3))
    assert float(sums.right) == 1


@pytest.mark.parametrize("shaping", [token.PLAIN, token.Shaping(0.6, (0, V - 1))], ids=["plain", "shaped"])
@pytest.mark.parametrize("part_bytes", [1 << 28, 4 * V * 7], ids=["1", "4"])
def test_log_probabilities_and_entropies_in_parts(rows, monkeypatch, part_bytes, shaping):
    """No target is an id that the policy never says."""
    monkeypatch.setattr(linear, "PART_BYTES", part_bytes)
    x, w, targets, _ = rows
    targets = np.clip(targets, 1, V - 2)

    def by_logits(xw):
        logits = token.without(xw[0] @ xw[1], shaping.never) / shaping.temperature
        return token.token_logps(logits[None], targets[None])[0], token.entropy(logits[None])[0]

    atol = rounding.of_network(by_logits, (x, w), TERMS)
    ours = linear.target_logps(x, w, targets, shaping=shaping)
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol)
    jax.tree.map(close, (ours.logps, ours.entropy), by_logits((x, w)))
    logits = token.without(x @ w, shaping.never)
    np.testing.assert_array_equal(ours.right, jnp.argmax(logits, -1) == targets)


def test_gradients_of_shaped_log_probabilities(rows):
    """The head's own, against those that JAX makes of the logits."""
    x, w, targets, _ = rows
    targets, shaping = np.clip(targets, 1, V - 2), token.Shaping(0.6, (0, V - 1))
    cotangent = np.random.default_rng(5).normal(size=len(targets)).astype(np.float32)

    def plain(x, w):
        logits = token.without(x @ w, shaping.never) / shaping.temperature
        return jnp.sum(cotangent * token.token_logps(logits[None], targets[None])[0])

    def ours(x, w):
        return jnp.sum(cotangent * head_logps(x[None], w, targets[None], shaping)[0])

    for got, wanted in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(plain, (0, 1))(x, w), strict=True):
        within = rounding.of_sum(max(len(targets), V), float(np.abs(wanted).max()) * 4)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=within)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "part", "wanted"),
    [
        (8192, 32000, 1 << 28, 2048),
        (2048, 8192, 1 << 28, 2048),
        (7, 100, 400, 1),
        (6, 100, 800, 2),
        (10, 100, 1200, 2),
        (8191, 32000, 1 << 28, 2048),  # a prime
        (2 * 4093, 32000, 1 << 28, 2047),  # twice one
    ],
)
def test_parts_fit_and_are_large_whatever_divides_the_rows(monkeypatch, rows, vocabulary, part, wanted):
    monkeypatch.setattr(linear, "PART_BYTES", part)
    assert linear.rows_at_once(rows, vocabulary) == wanted
    assert wanted * vocabulary * 4 <= part


@pytest.mark.parametrize(("count", "full"), [(23, 24), (13, 14)])
def test_rows_that_do_not_divide_are_filled_up_with_rows_of_no_weight(rows, monkeypatch, count, full):
    """Three parts of 8 rows, and two of 7: bit for bit what the rows give beside another of no weight."""
    monkeypatch.setattr(linear, "PART_BYTES", 4 * V * 8)
    x, w, targets, weights = (array if array.shape == (D, V) else array[:full] for array in rows)
    weights = weights.at[count:].set(0)
    wanted, dx_wanted, dw_wanted = linear.cross_entropy(x, w, targets, weights, gradients=True)
    sums, dx, dw = linear.cross_entropy(x[:count], w, targets[:count], weights[:count], gradients=True)
    np.testing.assert_array_equal(sums, wanted)
    np.testing.assert_array_equal(dx, dx_wanted[:count])
    np.testing.assert_array_equal(dw, dw_wanted)
    alone, beside = linear.target_logps(x[:count], w, targets[:count]), linear.target_logps(x, w, targets)
    jax.tree.map(lambda got, wanted: np.testing.assert_array_equal(got, wanted[:count]), alone, beside)


def test_logits_are_never_whole(monkeypatch):
    """The compiled loss with its gradients needs less memory than half the logits would take."""
    monkeypatch.setattr(linear, "PART_BYTES", 1 << 20)
    N, D, V = 4096, 16, 2048
    kinds = [((N, D), jnp.float32), ((D, V), jnp.float32), ((N,), jnp.int32), ((N,), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    compiled = jax.jit(lambda *rows: linear.cross_entropy(*rows, gradients=True)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * V * 4 / 2
