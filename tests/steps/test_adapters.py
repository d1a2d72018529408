"""LoRA: nothing changes at first, only adapters are trained, merging computes the same."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

from maxllm.config import LoraConfig
from maxllm.model.adapters import merge
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.records import LmBatch
from maxllm.steps.language import adapters_loss, language_loss
from maxllm.steps.state import TrainState, init_adapters
from maxllm.steps.update import train_step

LORA = LoraConfig(rank=3, alpha=6)
B, T = 2, 12


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 64, (2, B, T)).astype(np.int32)
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return LmBatch(tokens, targets, ones.astype(np.float32), ones, positions)


def adapters_of(model, seed=0, b=0.0):
    """Fresh adapters, B filled with noise of that size."""
    fresh = jax.jit(lambda key: nn.unbox(init_adapters(model, key)))(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + b * noise.normal(size=x.shape) if path[-1].key.endswith("_b") else x, fresh
    )


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 4, "tie_embeddings": True}, {"attention_bias": "qkvo"}]
)
def test_merged_and_beside_compute_the_same(tiny_model, params_of, batch, changes):
    config = tiny_model(**changes)
    plain, adapted = Llama(config), Llama(config, LORA)
    params, inputs = params_of(plain), (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    before = forward(plain, params, *inputs)
    np.testing.assert_array_equal(forward(adapted, params, *inputs, adapters=adapters_of(adapted)), before)
    low = adapters_of(adapted, b=0.3)
    beside = forward(adapted, params, *inputs, adapters=low)
    assert np.abs(beside - before).max() > 0.1
    merged = merge(params, low, LORA)
    atol = rounding.of_network(jax.jit(lambda p: forward(plain, p, *inputs)), merged, config.d_ff)
    np.testing.assert_allclose(forward(plain, merged, *inputs), beside, rtol=0, atol=atol)


def test_gradients_are_those_of_the_merged_weights(tiny_model, params_of, batch):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, from a gradient that knows nothing of adapters."""
    config = tiny_model()
    plain, adapted = Llama(config), Llama(config, LORA)
    params, low = params_of(plain), adapters_of(adapted, b=0.3)
    merged = merge(params, low, LORA)
    gradient = jax.jit(jax.grad(lambda p: language_loss(plain, p, batch, None).total))
    wide = gradient(merged)
    got = jax.grad(lambda a: language_loss(adapted, params, batch, None, a).total)(low)
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
    config, optimizer = tiny_model(), optax.adam(1e-2)
    model = Llama(config, LoraConfig(rank=4, alpha=8, dropout=0.1, targets=("wq", "wv")))
    base, low = params_of(Llama(config)), adapters_of(model)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(low)}
    assert names == {"wq_a", "wq_b", "wv_a", "wv_b"}
    state = TrainState(jnp.int32(0), low, optimizer.init(low))
    step = jax.jit(
        partial(
            train_step, loss_fn=partial(adapters_loss, model), optimizer=optimizer, seed=0, microbatches=1
        )
    )
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch, base)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(state.params))
