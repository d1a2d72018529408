"""What training adds to next-token prediction, and what evaluation tells of it by origin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import AxisType, Mesh

from maxllm.losses.token import Regularization
from maxllm.model.embedding import noise
from maxllm.model.llama import Llama
from maxllm.parallel.mesh import AXES
from maxllm.records import LmBatch
from maxllm.run.program import compile_reader
from maxllm.steps.language import language_loss, origin_losses
from maxllm.steps.update import eval_step
from maxllm.weights import Weights

B, T, V = 8, 16, 64
ADDED = Regularization(label_smoothing=0.1, z=0.01)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, V, (B, T + 1)).astype(np.int32)
    weights = rng.random((B, T)).astype(np.float32)
    segments = np.where(np.arange(T) < 10, 1, 2)[None].repeat(B, 0).astype(np.int32)
    positions = np.where(np.arange(T) < 10, np.arange(T), np.arange(T) - 10)[None].repeat(B, 0)
    return LmBatch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions.astype(np.int32))


def on(shape, model, params, batch, loss_of):
    """Loss and gradient on a mesh of that shape."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    gradient = jax.value_and_grad(lambda params, batch: loss_of(model, Weights(params), batch).total)
    return compile_reader(mesh, gradient)(params, batch)


@pytest.mark.parametrize("shape", [(2, 2, 1, 1, 2), (1, 2, 1, 2, 2)], ids=str)
def test_a_regularized_loss_on_eight_devices(tiny_model, params_of, batch, shape):
    """Also where the vocabulary is split: its mean logit and its log-sum-exp are those of all of it."""
    model = Llama(tiny_model())
    params = params_of(model)

    def loss_of(model, weights, batch):
        return language_loss(model, weights, batch, jax.random.key(0), ADDED)

    alone = on((1, 1, 1, 1, 1), model, params, batch, loss_of)
    loss = jax.jit(lambda params: loss_of(model, Weights(params), batch).total)
    eight = on(shape, model, params, batch, loss_of)
    within = rounding.of_network(loss, params, B * T)
    np.testing.assert_allclose(eight[0], alone[0], rtol=0, atol=within)
    within = rounding.of_network(jax.grad(loss), params, B * T)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=within), eight[1], alone[1])


def test_evaluation_is_the_plain_cross_entropy(tiny_model, params_of, batch):
    """Training's loss is larger, and tells the plain one beside it; without dropout they are the same."""
    model = Llama(tiny_model())
    weights = Weights(params_of(model))
    plain = jax.jit(partial(eval_step, loss_fn=partial(language_loss, model)))(weights, batch)
    added = partial(language_loss, model, regularization=ADDED)
    evaluated = jax.jit(partial(eval_step, loss_fn=added))(weights, batch)
    jax.tree.map(np.testing.assert_array_equal, evaluated, plain)
    trained = jax.jit(added)(weights, batch, jax.random.key(0))
    np.testing.assert_array_equal(trained.metrics["cross_entropy"], plain["loss"])
    assert trained.total > plain["loss"][0]


def test_embedding_noise_is_neftunes(tiny_model, params_of, batch):
    """Uniform in ±alpha / sqrt(L D), L the tokens of the text, not of the row; none in evaluation."""
    D, alpha, rows = 32, 5.0, 64
    segments = np.tile(np.asarray(batch.segment_ids_BT[:1]), (rows, 1))
    drawn = noise(jax.random.key(0), jnp.zeros((rows, T, D)), jnp.asarray(segments), alpha)
    for first, last in ((0, 10), (10, 16)):
        bound = alpha / np.sqrt((last - first) * D)
        inside = np.asarray(drawn[:, first:last])
        assert np.abs(inside).max() <= bound * (1 + 2**-20)
        # The variance of so many numbers that are uniform in ±1 is 1/3, off by sqrt(4 / 45 / N) in the mean.
        spread = np.mean(np.square(inside / bound)) - 1 / 3
        assert abs(spread) < 5 * np.sqrt(4 / 45 / inside.size)
    model, noisy = Llama(tiny_model()), Llama(tiny_model(embedding_noise=alpha))
    weights = Weights(params_of(model))

    def loss(model, key):
        return float(language_loss(model, weights, batch, key).total)

    assert loss(noisy, None) == loss(model, None)
    assert loss(noisy, jax.random.key(0)) != loss(noisy, jax.random.key(1)) != loss(model, jax.random.key(1))


def test_losses_by_origin_are_those_of_their_targets_alone(tiny_model, params_of, batch):
    """Each is the loss of a batch in which only its targets have weight; together they are the whole."""
    model = Llama(tiny_model())
    params = params_of(model)
    origins = np.random.default_rng(1).integers(1, 4, (B, T)).astype(np.int32)

    def whole(params, rows=batch):
        return eval_step(Weights(params), rows, loss_fn=partial(language_loss, model))

    def by_origin(params):
        return origin_losses(model, {"turn": [1, 2, 3]}, Weights(params), (batch, {"turn": origins}))

    got = jax.jit(by_origin)(params)
    within = rounding.of_network(jax.jit(lambda p: whole(p)["loss"][0]), params, B * T)
    for number in (1, 2, 3):
        alone = batch.replace(loss_weights_BT=batch.loss_weights_BT * (origins == number))
        for mine, theirs in zip(got[f"loss/turn {number}"], whole(params, alone)["loss"], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=within)
    for name in ("loss", "accuracy"):
        for mine, theirs in zip(got[name], whole(params)[name], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=within)
