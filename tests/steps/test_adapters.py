"""LoRA: nothing changes at first, only adapters are trained, merging computes the same."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import rounding

from maxllm.config.dpo import DpoConfig
from maxllm.config.reward import RewardConfig
from maxllm.config.tuning import LoraConfig, Tuning
from maxllm.model.adapters import plain as without_adapters
from maxllm.model.forward import forward, init_weights
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.records import LmBatch, PairBatch, ReplyPairBatch
from maxllm.steps.dpo import dpo_loss
from maxllm.steps.language import language_loss
from maxllm.steps.reward import reward_loss
from maxllm.steps.state import TrainState, init_params, partition_of
from maxllm.steps.update import train_step
from maxllm.weights import Kind, Weights

LORA = LoraConfig(rank=3, alpha=6)
TUNED = Tuning(LORA)
B, T = 2, 12


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 64, (2, B, T)).astype(np.int32)
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return LmBatch(tokens, targets, ones.astype(np.float32), ones, positions)


def pairs():
    """Two pairs of full rows whose completions begin at the fifth token."""
    tokens = np.random.default_rng(1).integers(6, 64, (B, 2, T)).astype(np.int32)
    return PairBatch(tokens, np.full((B, 2), T, np.int32), np.ones(B, np.float32))


def adapters_of(model, seed=0, b=0.0):
    """Fresh adapters, B filled with noise of that size."""
    fresh = jax.jit(lambda key: nn.unbox(init_weights(model, key)).adapters)(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + b * noise.normal(size=x.shape) if path[-1].key.endswith("_b") else x, fresh
    )


def trained(model, params, batch, kept, loss_fn, steps=1, dtype="float32"):
    """(parameters after some steps, losses)"""
    optimizer = plain.adam(1e-2)
    step = jax.jit(
        partial(
            train_step,
            loss_fn=loss_fn,
            optimizer=optimizer,
            seed=0,
            microbatches=1,
            gradient_dtype=jnp.dtype(dtype),
            partition=partition_of(model),
        )
    )
    state, losses = TrainState(jnp.int32(0), params, optimizer.init(params)), []
    for _ in range(steps):
        state, metrics = step(state, batch, kept)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state.params, losses


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 4, "tie_embeddings": True}, {"attention_bias": "qkvo"}]
)
def test_merged_and_beside_compute_the_same(tiny_model, params_of, batch, changes):
    config = tiny_model(**changes)
    plain, adapted = Llama(config), Llama(config, TUNED)
    params, inputs = params_of(plain), (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    before = forward(plain, Weights(params), *inputs)
    fresh = Weights(params, adapters_of(adapted))
    np.testing.assert_array_equal(forward(adapted, fresh, *inputs), before)
    weights = Weights(params, adapters_of(adapted, b=0.3))
    beside = forward(adapted, weights, *inputs)
    assert np.abs(beside - before).max() > 0.1
    np.testing.assert_array_equal(forward(adapted, weights.replace(adapters=None), *inputs), before)
    merged = without_adapters(weights, TUNED)
    assert merged.adapters is None
    atol = rounding.of_network(jax.jit(lambda w: forward(plain, w, *inputs)), merged, config.d_ff)
    np.testing.assert_allclose(forward(plain, merged, *inputs), beside, rtol=0, atol=atol)


def test_gradients_are_those_of_the_merged_weights(tiny_model, params_of, batch):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, from a gradient that knows nothing of adapters."""
    config = tiny_model()
    plain, adapted = Llama(config), Llama(config, TUNED)
    params, low = params_of(plain), adapters_of(adapted, b=0.3)
    merged = without_adapters(Weights(params, low), TUNED).base
    gradient = jax.jit(jax.grad(lambda p: language_loss(plain, Weights(p), batch, None).total))
    wide = gradient(merged)
    got = jax.grad(lambda a: language_loss(adapted, Weights(params, a), batch, None).total)(low)
    dw_LDO = wide["decoder"]["layers"]["attention"]["wq"].reshape(2, 32, 32)
    a_LDR, b_LRO = (low["decoder"]["layers"]["attention"][name] for name in ("wq_a", "wq_b"))
    da = LORA.scale * np.einsum("ldo,lro->ldr", dw_LDO, b_LRO)
    db = LORA.scale * np.einsum("ldr,ldo->lro", a_LDR, dw_LDO)
    off = rounding.of_network(lambda p: gradient(p)["decoder"]["layers"]["attention"]["wq"], merged, 48)
    for name, wanted, factor_LXY in (("wq_a", da, b_LRO), ("wq_b", db, a_LDR)):
        atol = off * LORA.scale * np.abs(factor_LXY).sum(-1 if name == "wq_a" else 1).max()
        got_LXY = got["decoder"]["layers"]["attention"][name]
        np.testing.assert_allclose(got_LXY, wanted, rtol=0, atol=atol)
        assert np.abs(wanted).max() > 100 * atol


def test_only_adapters_are_trained_and_the_loss_falls(tiny_model, params_of, batch):
    config = tiny_model()
    model = Llama(config, Tuning(LoraConfig(rank=4, alpha=8, dropout=0.1, targets=("wq", "wv"))))
    low = adapters_of(model)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(low)}
    assert names == {"wq_a", "wq_b", "wv_a", "wv_b"}
    kept = Weights(params_of(Llama(config)))
    after, losses = trained(model, low, batch, kept, partial(language_loss, model), steps=30)
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.structure(after) == jax.tree.structure(low)
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(after))


def test_gradients_in_bfloat16_are_the_matrices_alone(tiny_model, params_of, batch):
    """Adapters are none of the layers' matrices: theirs stay float32, and the step is the same."""
    model, config = Llama(tiny_model(), TUNED), tiny_model()
    kept, low = Weights(params_of(Llama(config))), adapters_of(model)
    plain, rounded = (
        trained(model, low, batch, kept, partial(language_loss, model), dtype=dtype)[0]
        for dtype in ("float32", "bfloat16")
    )
    jax.tree.map(np.testing.assert_array_equal, plain, rounded)


# What is trained and what stays


def whole(model, key=0):
    """All weights of a model, adapters too."""
    return jax.jit(lambda key: nn.unbox(init_weights(model, key)))(jax.random.key(key))


@pytest.mark.parametrize("kind", [Llama, ScalarModel])
@pytest.mark.parametrize("tuning", [None, TUNED], ids=["all", "adapters"])
def test_a_partition_is_put_together_again(tiny_model, kind, tuning):
    """Two parts that hold every weight once; the trained one is what a fresh state and a checkpoint hold."""
    model = kind(tiny_model(), tuning)
    weights, partition = whole(model), partition_of(model)
    params, kept = partition.split(weights)
    assert (kept is not None) == partition.keeps == (tuning is not None)
    assert len(jax.tree.leaves((params, kept))) == len(jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, partition.joined(params, kept), weights)
    fresh = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    assert jax.tree.structure(fresh) == jax.tree.structure(params) == jax.tree.structure(partition.declared)
    kinds = {declaration.kind for declaration in jax.tree.leaves(partition.declared)}
    head = {Kind.HEAD} if kind is ScalarModel else {Kind.TABLE}
    assert kinds >= head if tuning is None else kinds == {Kind.ADAPTER} | head - {Kind.TABLE}


def test_a_scalar_model_learns_by_adapters_and_its_head(tiny_model):
    """Pairs come into their order while the decoder stays: it is not in the trained part."""
    model = ScalarModel(tiny_model(), TUNED)
    partition = partition_of(model)
    params, kept = partition.split(whole(model))
    assert set(params) == {"decoder", "head"} and set(kept.base) == {"decoder"}
    after, losses = trained(
        model, params, pairs(), kept, partial(reward_loss, model, RewardConfig()), steps=20
    )
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, after)
    assert min(jax.tree.leaves(moved)) > 1e-3
    merged = without_adapters(partition.joined(after, kept), TUNED)
    inputs = np.ones((1, T), np.int32), np.ones((1, T), np.int32), np.arange(T)[None]
    plain, beside = ScalarModel(tiny_model()), partition.joined(after, kept)
    atol = rounding.of_network(lambda w: forward(plain, w, *inputs), merged, tiny_model().d_ff)
    np.testing.assert_allclose(
        forward(plain, merged, *inputs), forward(model, beside, *inputs), rtol=0, atol=atol
    )


def test_the_reference_is_the_policy_with_its_adapters_off(tiny_model, params_of):
    """DPO without a reference of its own: bit for bit as with the base beside it."""
    config = tiny_model()
    model, base = Llama(config, TUNED), Weights(params_of(Llama(config)))
    weights = base.replace(adapters=adapters_of(model, b=0.3))
    batch = ReplyPairBatch(pairs(), np.full((B, 2), 4, np.int32))
    loss = jax.jit(partial(dpo_loss, model, DpoConfig()))
    alone, beside = loss(weights, batch, None), loss(weights, batch, None, base)
    jax.tree.map(np.testing.assert_array_equal, alone, beside)
    assert abs(float(alone.metrics["reward_chosen"][0])) > 1e-3
    fresh = loss(base.replace(adapters=adapters_of(model)), batch, None)
    assert float(fresh.metrics["reward_chosen"][0]) == 0
    _, losses = trained(
        model, adapters_of(model), batch, base, partial(dpo_loss, model, DpoConfig(beta=0.5)), steps=10
    )
    assert losses[-1] < 0.7 * losses[0]
