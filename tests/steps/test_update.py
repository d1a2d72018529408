"""Accumulation is exact, a non-finite step changes nothing, and dropout differs by step."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
import rounding
from flax.traverse_util import flatten_dict

from maxllm.config.optimizer import OptimizerConfig
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.records import LmBatch
from maxllm.steps.language import language_loss
from maxllm.steps.state import TrainState, init_params, partition_of
from maxllm.steps.update import Loss, accumulate, eval_step, split, train_step, update
from maxllm.weights import Declaration, Kind, Weights

B, T, V = 8, 16, 64


TABLE = Declaration(Kind.TABLE, (None,))
MATRIX = Declaration(Kind.MATRIX, ("layers", None, None))
OPTIMIZER = plain.sgd(1.0, momentum=0.9)
"""With rate 1 the first update is the gradient itself; the momentum is a state to keep."""


def fresh(params, optimizer):
    return TrainState(jnp.int32(0), params, optimizer.init(params))


@pytest.fixture(scope="module")
def state(tiny_model, params_of):
    return fresh(params_of(Llama(tiny_model())), OPTIMIZER)


@pytest.fixture(scope="module")
def step_of(tiny_model):
    """step_of(microbatches, seed, **model changes): a jitted step of the language model, compiled once."""

    @cache
    def make(microbatches=1, seed=0, **changes):
        step = partial(
            train_step, loss_fn=partial(language_loss, Llama(tiny_model(**changes))), optimizer=OPTIMIZER
        )
        return jax.jit(partial(step, seed=seed, microbatches=microbatches))

    return make


def uneven_batch(seed=0):
    """Row i has 2 i + 1 weighted targets, so that a mean of row means is far from the token mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, V, (B, T + 1)).astype(np.int32)
    weights = (np.arange(T) < (2 * np.arange(B) + 1)[:, None]).astype(np.float32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return LmBatch(tokens[:, :-1], tokens[:, 1:], weights, np.ones((B, T), np.int32), positions)


def assert_close(actual, expected, atol):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), actual, expected)


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def largest_gap(a, b):
    gaps = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)
    return max(jax.tree.leaves(gaps))


# Accumulation


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_do_not_change_the_update(state, step_of, microbatches):
    """Parameters differ by the gradient's rounding, B T terms to each of its sums."""
    batch, step = uneven_batch(), step_of()
    whole, whole_metrics = step(state, batch)
    parts, part_metrics = step_of(microbatches)(state, batch)

    def update(params):
        return jax.tree.map(jnp.subtract, step(state.replace(params=params), batch)[0].params, params)

    assert_close(parts.params, whole.params, rounding.of_network(update, state.params, B * T))
    assert float(whole_metrics["loss"][1]) == sum(range(1, 16, 2)) == 64
    np.testing.assert_array_equal(part_metrics["accuracy"], whole_metrics["accuracy"])
    for name in ("loss", "gradient_norm"):

        def total(params, name=name):
            return step(state.replace(params=params), batch)[1][name][0]

        atol = rounding.of_network(total, state.params, B * T)
        np.testing.assert_allclose(part_metrics[name], whole_metrics[name], rtol=0, atol=atol, err_msg=name)


def test_the_update_is_not_a_mean_of_row_means(state, step_of, tiny_model):
    """The wrong way, for comparison, misses by thousands of tolerances: the test above can fail."""
    batch = uneven_batch()
    right, _ = step_of()(state, batch)
    loss_fn = partial(language_loss, Llama(tiny_model()))

    @jax.jit
    def row_gradient(row):
        one = jax.tree.map(lambda x: x[None], row)
        return accumulate(loss_fn, state.params, one, jax.random.key(0), 1)[0]

    rows = [row_gradient(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(B)]
    shares = batch.loss_weights_BT.sum(1) / batch.loss_weights_BT.sum()

    def weighted(weights):
        return jax.tree.map(
            lambda p, *g: p - sum(w * x for w, x in zip(weights, g, strict=True)), state.params, *rows
        )

    assert largest_gap(weighted(shares), right.params) < 1e-6
    assert largest_gap(weighted([1 / B] * B), right.params) > 1e-3


def test_split_deals_every_row_out_once():
    parts = split({"x": np.arange(12).reshape(6, 2)}, 3)["x"]
    assert parts.shape == (3, 2, 2)
    np.testing.assert_array_equal(np.sort(parts.reshape(6, 2)[:, 0]), np.arange(0, 12, 2))
    np.testing.assert_array_equal(parts[0], [[0, 1], [6, 7]])  # rows 0 and 3 of 6: dealt out in turn


def test_every_microbatch_draws_its_own_dropout():
    def loss_fn(weights, part, key):
        draw = jax.random.uniform(key)
        return Loss(jnp.sum(weights.base["w"]) * 0, jnp.float32(1), {"draw": (draw, draw**2)})

    _, loss = accumulate(loss_fn, {"w": jnp.ones(2)}, jnp.zeros(4), jax.random.key(0), 4)
    total, squares = map(float, loss.metrics["draw"])
    assert squares / 4 - (total / 4) ** 2 > 1e-3  # the variance of four equal draws would be 0


def test_a_batch_without_targets_changes_nothing(state, step_of):
    batch = uneven_batch()
    empty = batch.replace(loss_weights_BT=np.zeros_like(batch.loss_weights_BT))
    after, metrics = step_of(2)(state, empty)
    assert_identical(after.params, state.params)
    assert [float(x) for x in metrics["loss"]] == [0, 0] and float(metrics["skipped"][0]) == 0


def test_padding_rows_leave_gradients_finite_and_unchanged(state, step_of):
    """Rows that are all padding attend to nothing; their softmax must not make a NaN of the gradient."""
    batch = uneven_batch()
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    alone, _ = step_of()(state, batch)
    with_padding, metrics = step_of()(state, padded)
    assert float(metrics["skipped"][0]) == 0
    assert_close(with_padding.params, alone.params, 1e-6)


# Not finite, no update


def weighted_square(weights, part, key):
    """sum(x w^2) + the third column, which reaches the total and not the gradient."""
    total = jnp.sum(part[:, :2] * jnp.square(weights.base["w"])) + jnp.sum(part[:, 2])
    return Loss(total, jnp.float32(part.shape[0]), {})


def square_root(weights, part, key):
    """sqrt(sum(x w^2)): at x = 0 the value is 0 and the gradient 0 / 0."""
    return Loss(jnp.sqrt(jnp.sum(part[:, :2] * jnp.square(weights.base["w"]))), jnp.float32(1), {})


GOOD = jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]])
BAD = {
    "infinite loss, finite gradient": (weighted_square, GOOD.at[0, 2].set(jnp.inf), (False, True)),
    "NaN loss, finite gradient": (weighted_square, GOOD.at[1, 2].set(jnp.nan), (False, True)),
    "finite loss, NaN gradient": (square_root, jnp.zeros((2, 3)), (True, False)),
    "both NaN": (weighted_square, GOOD.at[0, 0].set(jnp.nan), (False, False)),
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("case", BAD)
def test_not_finite_means_no_update(case, microbatches):
    loss_fn, bad, (loss_is_finite, gradient_is_finite) = BAD[case]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=4), 10, {"w": TABLE})
    key = jax.random.key(0)
    step = jax.jit(
        partial(update, key=key, loss_fn=loss_fn, optimizer=optimizer, microbatches=microbatches),
    )
    start = fresh({"w": jnp.array([1.0, -2.0])}, optimizer)
    gradients, loss = accumulate(loss_fn, start.params, bad, key, microbatches)
    assert bool(jnp.isfinite(loss.total)) == loss_is_finite
    assert bool(jnp.isfinite(optax.global_norm(gradients))) == gradient_is_finite

    once, first = step(start, GOOD)
    skipped, metrics = step(once, bad)
    assert [float(x) for x in first["skipped"]] == [0, 1]
    assert [float(x) for x in metrics["skipped"]] == [1, 1]
    assert int(skipped.step) == 2
    assert_identical(skipped.params, once.params)
    assert_identical(skipped.opt_state, once.opt_state)

    after, metrics = step(skipped, GOOD)  # as if the bad batch had never been
    expected, _ = step(once, GOOD)
    assert float(metrics["skipped"][0]) == 0 and int(after.step) == 3
    assert_identical(after.params, expected.params)
    assert_identical(after.opt_state, expected.opt_state)
    assert largest_gap(after.params, once.params) > 1e-3


def test_a_language_model_survives_an_infinite_weight(state, step_of):
    batch = uneven_batch()
    weights = np.where(batch.loss_weights_BT > 0, np.float32(np.inf), np.float32(0))
    once, _ = step_of(2)(state, batch)
    skipped, metrics = step_of(2)(once, batch.replace(loss_weights_BT=weights))
    assert float(metrics["skipped"][0]) == 1 and int(skipped.step) == 2
    assert_identical((skipped.params, skipped.opt_state), (once.params, once.opt_state))
    after, metrics = step_of(2)(skipped, batch)
    assert float(metrics["skipped"][0]) == 0 and largest_gap(after.params, once.params) > 1e-3


# Randomness


def test_dropout_is_a_function_of_seed_and_step(state, step_of):
    batch = uneven_batch()

    def loss(step, number):
        return float(step(state.replace(step=jnp.int32(number)), batch)[1]["loss"][0])

    step = step_of(residual_dropout=0.5)
    assert loss(step, 3) == loss(step, 3)
    assert len({loss(step, number) for number in range(4)}) == 4
    assert loss(step, 3) != loss(step_of(seed=1, residual_dropout=0.5), 3)


def test_evaluation_has_no_dropout(state, tiny_model):
    batch = uneven_batch()
    plain, dropping = Llama(tiny_model()), Llama(tiny_model(residual_dropout=0.5, embedding_dropout=0.5))
    losses = [
        jax.jit(partial(eval_step, loss_fn=partial(language_loss, model)))(Weights(state.params), batch)
        for model in (plain, dropping)
    ]
    assert_identical(*losses)


def test_bfloat16_gradients_are_the_float32_ones_rounded(tiny_model):
    """The layers' matrices to a bfloat16's 8 bits, everything else exactly; also summed over microbatches."""
    model = Llama(tiny_model())
    params = nn.unbox(init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, 64, (4, 9)), jnp.int32)
    ones = jnp.ones((4, 8), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8), (4, 8))
    batch = LmBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(jnp.float32), ones, positions)

    def loss_fn(weights, part, _):
        return language_loss(model, weights, part, None)

    def gradients(dtype, parts):
        settings = {"microbatches": parts, "dtype": dtype, "partition": partition_of(model)}
        run = jax.jit(partial(accumulate, loss_fn, batch=batch, key=jax.random.key(0), **settings))
        return run(params=params)[0]

    kinds = {path: leaf.kind for path, leaf in flatten_dict(partition_of(model).declared).items()}

    for microbatches in (1, 2):
        exact = flatten_dict(gradients(jnp.dtype("float32"), microbatches))
        rounded = flatten_dict(gradients(jnp.dtype("bfloat16"), microbatches))
        assert rounded.keys() == exact.keys()
        for path, gradient in rounded.items():
            assert gradient.dtype == jnp.float32
            if kinds[path] is Kind.MATRIX:
                largest = float(jnp.abs(exact[path]).max())
                # Each part and their sum are rounded, by 2^-9 of numbers that may be twice the largest.
                np.testing.assert_allclose(gradient, exact[path], rtol=2**-8, atol=3 * 2**-8 * largest)
                assert float(jnp.abs(gradient - exact[path]).max()) > 0
            else:
                atol = rounding.of_sum(32, float(jnp.abs(exact[path]).max()))
                np.testing.assert_allclose(gradient, exact[path], rtol=0, atol=atol)


# What an update tells of itself


def by_hand(name, gradient, rates):
    """Updates of w = [[3, 4], [0, 0]] by a constant gradient that is a rotation, from the papers' equations.

    Returns:
      [(the update's change of w, w after it)].
    """
    w, done = np.array([[3.0, 4.0], [0.0, 0.0]]), []
    m, v, rows, columns = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2), np.zeros(2)
    for t, rate in enumerate(rates, start=1):
        match name:
            case "adamw":
                m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
                direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            case "adafactor":
                kept = 1 - t**-0.8
                square = gradient**2
                rows = kept * rows + (1 - kept) * square.mean(1)
                columns = kept * columns + (1 - kept) * square.mean(0)
                direction = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
                direction = direction / max(1.0, np.sqrt(np.mean(direction**2)))
                direction = direction * max(1e-3, np.sqrt(np.mean(w**2)))
            case "muon":  # momentum points where the gradient does; five Newton-Schulz steps on its two sides
                side = 0.5**0.5
                for _ in range(5):
                    side = 3.4445 * side - 4.7750 * side**3 + 2.0315 * side**5
                direction = 0.2 * 2**0.5 * side * gradient / np.linalg.norm(gradient) * 2**0.5
        change = -rate * (direction + 0.1 * w)
        w = w + change
        done.append((change, w))
    return done


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_update_tells_its_rate_and_norms(name):
    """Warmup to 0.2 in two steps, so that rates are 0.1 and 0.2 after a first update at 0; between them an
    update is skipped, which moves neither the rate nor the parameters."""
    config = OptimizerConfig(
        name=name, learning_rate=0.2, warmup_steps=2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1
    )
    optimizer = make_optimizer(config.model_copy(update={"clip_norm": 1e9}), 10, {"w": MATRIX})
    gradient = np.array([[1.0, -2.0], [2.0, 1.0]])

    def linear(weights, part, key):
        return Loss(jnp.sum(part * weights.base["w"]), jnp.float32(1), {})

    step = jax.jit(partial(update, key=jax.random.key(0), loss_fn=linear, optimizer=optimizer))
    state = fresh({"w": jnp.array([[[3.0, 4.0], [0.0, 0.0]]])}, optimizer)
    told = []
    for batch in (gradient, gradient, np.full((2, 2), np.nan), gradient):
        state, metrics = step(state, jnp.asarray(batch, jnp.float32))
        names = ("learning_rate", "update_norm", "parameter_norm")
        assert all(float(metrics[each][1]) == 1 for each in names)
        told.append([float(metrics[each][0]) for each in names])

    norms = [tuple(map(np.linalg.norm, pair)) for pair in by_hand(name, gradient, [0.0, 0.1, 0.2])]
    expected = [[0.0, 0.0, 5.0], [0.1, *norms[1]], [0.2, 0.0, norms[1][1]], [0.2, *norms[2]]]
    # Some twenty operations on each number, each rounded by 2^-24 of it, and powers by a few times that.
    # Each of Muon's five steps may multiply an error by 3.4445.
    ulps = 64 * (3.4445**5 if name == "muon" else 1)
    np.testing.assert_allclose(told, expected, rtol=ulps * 2**-24, atol=0)


def test_norms_are_over_all_parameters_and_of_the_updated_ones():
    """Gradient descent at 1/2 from (3, 4) and 12 by the gradients (2, 0) and 6: to (2, 4) and 9."""
    rule = plain.sgd(0.5)

    def linear(weights, part, key):
        return Loss(2 * weights.base["a"][0] + 6 * weights.base["b"], jnp.float32(1), {})

    start = fresh({"a": jnp.array([3.0, 4.0]), "b": jnp.float32(12)}, rule)
    state, metrics = update(start, jnp.zeros(1), jax.random.key(0), loss_fn=linear, optimizer=rule)
    assert float(state.params["b"]) == 9
    assert float(metrics["update_norm"][0]) == np.float32(np.sqrt(1 + 9))
    assert float(metrics["parameter_norm"][0]) == np.float32(np.sqrt(4 + 16 + 81))
