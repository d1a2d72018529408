"""The schedule at steps worked out by hand, and AdamW against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from maxllm.config import OptimizerConfig
from maxllm.model.llama import Llama
from maxllm.optim import is_matrix, make_optimizer, schedule


def rate(step, total=110, **changes):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_share=0.1).model_copy(update=changes)
    return float(schedule(config, total)(step))


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        # warmup over 10 steps from 0
        ("cosine", 0, 0.0),
        ("cosine", 1, 0.2),
        ("linear", 5, 1.0),
        ("constant", 9, 1.8),
        # the peak, then 100 steps of decay to a tenth
        ("cosine", 10, 2.0),
        ("cosine", 35, 2 * (0.1 + 0.45 * (1 + 0.5**0.5))),  # cos 45 degrees
        ("cosine", 60, 2 * 0.55),
        ("cosine", 110, 0.2),
        ("cosine", 500, 0.2),
        ("linear", 10, 2.0),
        ("linear", 35, 2 * 0.775),
        ("linear", 110, 0.2),
        ("linear", 500, 0.2),
        ("constant", 10, 2.0),
        ("constant", 500, 2.0),
    ],
)
def test_schedule(kind, step, expected):
    assert rate(step, schedule=kind) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_without_warmup_the_first_step_has_the_peak():
    assert rate(0, warmup_steps=0) == 2.0
    assert rate(55, warmup_steps=0) == pytest.approx(1.1, rel=1e-6)


def test_decay_to_zero():
    """PPO's linear anneal: the last update (step 109) still moves, by a hundredth."""
    assert rate(109, schedule="linear", final_share=0.0) == pytest.approx(0.02, rel=1e-4)
    assert rate(110, schedule="linear", final_share=0.0) == 0


def test_warmup_longer_than_the_run():
    assert rate(4, total=5) == pytest.approx(0.8)


# Which parameters decay


def test_decay_skips_norm_scales_alone(tiny_model, params_of):
    """Scanned norm scales are [L, D]: a rule by number of dimensions would take them for matrices."""
    params = params_of(Llama(tiny_model()))
    decays = jax.tree_util.tree_map_with_path(is_matrix, params)
    named = {jax.tree_util.keystr(path): decay for path, decay in jax.tree_util.tree_leaves_with_path(decays)}
    skipped = [name for name, decay in named.items() if not decay]
    assert len(skipped) == 3 and all(name.endswith("['scale']") for name in skipped)
    assert params["decoder"]["layers"]["attention_norm"]["scale"].ndim == 2


def test_decay_is_decoupled_and_by_the_rate(tiny_model, params_of):
    """With zero gradients a step is p -= rate * decay * p on matrices, and nothing on scales."""
    params = params_of(Llama(tiny_model()))
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.5), steps=10
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["lm_head"], 0.995 * params["lm_head"], rtol=1e-6)
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(
            after["decoder"]["layers"][name]["scale"], params["decoder"]["layers"][name]["scale"]
        )


# Against PyTorch


def test_adamw_equals_torch():
    """Six steps with warmup, cosine, clipping (which bites in some) and decay. Parameters of order 1, steps
    of 0.1: 1e-6 is a few roundings of float32."""
    config = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=2,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
        clip_norm=1.5,
        final_share=0.2,
    )
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(0, 1, (4, 3)), "norm": {"scale": rng.normal(1, 0.1, (2, 3))}}
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    w = torch.nn.Parameter(torch.tensor(np.asarray(params["w"])))
    scale = torch.nn.Parameter(torch.tensor(np.asarray(params["norm"]["scale"])))
    groups = [{"params": [w], "weight_decay": 0.2}, {"params": [scale], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-3)

    optimizer = make_optimizer(config, steps=6)
    state, clipped = optimizer.init(params), []
    for step in range(6):
        gradients = {"w": rng.normal(0, 0.5, (4, 3)), "norm": {"scale": rng.normal(0, 0.1, (2, 3))}}
        gradients = jax.tree.map(lambda x: jnp.array(x, jnp.float32), gradients)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)

        g_w, g_scale = np.asarray(gradients["w"]), np.asarray(gradients["norm"]["scale"])
        norm = float(np.sqrt((g_w.astype(np.float64) ** 2).sum() + (g_scale.astype(np.float64) ** 2).sum()))
        clipped.append(norm > 1.5)
        share = min(1.0, 1.5 / norm)
        w.grad, scale.grad = torch.tensor(g_w * np.float32(share)), torch.tensor(g_scale * np.float32(share))
        warm, decay = step / 2, 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * (step - 2) / 4))
        for group in reference.param_groups:
            group["lr"] = 0.1 * (warm if step < 2 else decay)
        reference.step()
        np.testing.assert_allclose(params["w"], w.detach().numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(params["norm"]["scale"], scale.detach().numpy(), rtol=0, atol=1e-6)
    assert any(clipped) and not all(clipped)


def test_biases_are_not_decayed(tiny_model, params_of):
    """Scanned biases are [L, H, K]: their names keep decay away, boxed with logical axes or not."""
    from maxllm.model.llama import Llama
    from maxllm.optim import is_matrix
    from maxllm.steps.state import init_params

    model = Llama(tiny_model(attention_bias="qkvo", mlp_bias=True, qk_norm=True))
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    for params in (params_of(model), boxed):
        decayed = {
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            if is_matrix(path, None)
        }
        layers = "decoder/layers/"
        assert decayed == {
            *("decoder/embedding", "lm_head"),
            *(f"{layers}attention/{name}" for name in ("wq", "wk", "wv", "wo")),
            *(f"{layers}mlp/{name}" for name in ("w_gate", "w_up", "w_down")),
        }
