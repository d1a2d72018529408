"""The schedule at steps worked out by hand; AdamW and Adafactor against PyTorch's, Muon against NumPy's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import torch

from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.tuning import FreezeConfig, LoraConfig, Tuning
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer, schedule
from maxllm.steps.state import init_params, partition_of
from maxllm.weights import Declaration, Kind


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

TABLE, NORM = Declaration(Kind.TABLE, ()), Declaration(Kind.NORM, ())


def test_decay_skips_norm_scales_alone(tiny_model, params_of):
    """Scanned norm scales are [L, D]: a rule by number of dimensions would take them for matrices."""
    model = Llama(tiny_model())
    params, declared = params_of(model), partition_of(model).declared
    assert jax.tree.structure(params) == jax.tree.structure(declared)
    named = {jax.tree_util.keystr(path): d for path, d in jax.tree_util.tree_leaves_with_path(declared)}
    skipped = [name for name, declaration in named.items() if not declaration.kind.decayed]
    assert len(skipped) == 3 and all(name.endswith("['scale']") for name in skipped)
    assert params["decoder"]["layers"]["attention_norm"]["scale"].ndim == 2


def test_decay_is_decoupled_and_by_the_rate(tiny_model, params_of):
    """With zero gradients a step is p -= rate * decay * p on matrices, and nothing on scales."""
    model = Llama(tiny_model())
    params = params_of(model)
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10, partition_of(model).declared)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["lm_head"], 0.995 * params["lm_head"], rtol=1e-6)
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(
            after["decoder"]["layers"][name]["scale"], params["decoder"]["layers"][name]["scale"]
        )


@pytest.mark.parametrize(
    ("name", "tied", "frozen"), [("adamw", False, 1), ("adafactor", False, 0), ("muon", True, 0)]
)
def test_rates_fall_from_the_head_down(tiny_model, params_of, name, tied, frozen):
    """By half from the head to the last layer, to each below it, and to the table: decay too, exactly, for
    powers of 2 round nothing. Where the first layer is frozen the table is below the one that is trained."""
    tuning = Tuning(freeze=FreezeConfig(layers=frozen)) if frozen else None
    model = Llama(tiny_model(tie_embeddings=tied, n_layers=3), tuning)
    partition, params = partition_of(model), params_of(model)
    config = OptimizerConfig(name=name, learning_rate=0.01, schedule="constant")
    plain, falling = (
        make_optimizer(config.model_copy(update={"layer_decay": share}), 10, partition.declared)
        for share in (1.0, 0.5)
    )
    gradients = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    (was, _), (now, _) = (o.update(gradients, o.init(params), params) for o in (plain, falling))
    layers = 3 - frozen
    for path, update in jax.tree_util.tree_leaves_with_path(now):
        where = jax.tree_util.keystr(path)
        shares = [1.0]
        if "attention" in where or "mlp" in where:
            shares = [0.5**n for n in range(layers, 0, -1)]
        elif "embedding" in where:
            shares = [0.5 ** (layers + 1)]
        before = dict(jax.tree_util.tree_leaves_with_path(was))[path]
        wanted = before * np.array(shares).reshape(-1, *[1] * (before.ndim - 1))
        np.testing.assert_array_equal(update, wanted.astype(np.float32), err_msg=where)
        assert np.abs(wanted).max() > 0


# Against PyTorch


def after_steps(steps, rate):
    """How far parameters of up to 3 may lie apart after some steps: three operations on each in a step, and
    about forty on an update of `rate`, whose means are over a dozen terms."""
    return steps * (rounding.of_operations(3, 3.0) + rounding.of_operations(40, rate))


def test_adamw_equals_torch():
    """Six steps with warmup, cosine, clipping (which bites in some) and decay."""
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

    optimizer = make_optimizer(config, 6, {"w": TABLE, "norm": {"scale": NORM}})
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
        np.testing.assert_allclose(params["w"], w.detach().numpy(), rtol=0, atol=after_steps(6, 0.1))
        np.testing.assert_allclose(
            params["norm"]["scale"], scale.detach().numpy(), rtol=0, atol=after_steps(6, 0.1)
        )
    assert any(clipped) and not all(clipped)


def test_biases_are_not_decayed(tiny_model):
    """Scanned biases are [L, H, K]: their declaration keeps decay away."""
    model = Llama(tiny_model(attention_bias="qkvo", mlp_bias=True, qk_norm=True))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, declaration in jax.tree_util.tree_leaves_with_path(partition_of(model).declared)
        if declaration.kind.decayed
    }
    layers = "decoder/layers/"
    assert decayed == {
        *("decoder/embedding", "lm_head"),
        *(f"{layers}attention/{name}" for name in ("wq", "wk", "wv", "wo")),
        *(f"{layers}mlp/{name}" for name in ("w_gate", "w_up", "w_down")),
    }


# The other optimizers

# A stack of L = 3 layers, the matrices of which have every layout that there is, and what is not a layer.
SHAPES = {
    "layers": {
        "attention": {"wq": (3, 4, 2, 5), "wo": (3, 2, 5, 4), "q_bias": (3, 2, 5)},
        "mlp": {"w_up": (3, 4, 7), "w_down": (3, 7, 4)},
        "mlp_norm": {"scale": (3, 4)},
    },
    "embedding": (9, 4),
    "final_norm": {"scale": (4,)},
}
STACK = ("layers",)
DECLARED = {
    "layers": {
        "attention": {
            "wq": Declaration(Kind.MATRIX, STACK),
            "wo": Declaration(Kind.MATRIX, STACK, inputs=2),
            "q_bias": Declaration(Kind.BIAS, STACK),
        },
        "mlp": {"w_up": Declaration(Kind.MATRIX, STACK), "w_down": Declaration(Kind.MATRIX, STACK)},
        "mlp_norm": {"scale": Declaration(Kind.NORM, STACK)},
    },
    "embedding": TABLE,
    "final_norm": {"scale": NORM},
}
AS_MATRIX = {"wq": (4, 10), "wo": (10, 4), "w_up": (4, 7), "w_down": (7, 4)}
CONSTANT = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.2, clip_norm=1e9)


def normal(seed, scale=1.0):
    """Float32 numbers in SHAPES."""
    rng = np.random.default_rng(seed)
    shapes = jax.tree.leaves(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    leaves = [jnp.array(rng.normal(0, scale, shape), jnp.float32) for shape in shapes]
    outline = jax.tree.structure(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.unflatten(outline, leaves)


def steps_of(config, params, gradients, declared=DECLARED):
    """Parameters after each step."""
    optimizer = make_optimizer(config, 10, declared)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def pieces(tree):
    """(name, layer, array): the matrices [rows, columns] and vectors that a tree of SHAPES is made of."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path[-1].key
        if path[0].key != "layers":
            yield name, None, np.asarray(leaf)
            continue
        for layer in range(3):
            yield name, layer, np.asarray(leaf[layer]).reshape(AS_MATRIX.get(name, -1))


def test_adafactor_equals_torch():
    """Three steps; torch gets each layer's matrix as a parameter of its own. Gradients of which the second is
    ten times the first are clipped by their root mean square. Updates are 0.01 of numbers of order 1, whose
    square roots and means are a few roundings of float32 off."""
    params, gradients = normal(0), [normal(1, 0.1), normal(2, 1.0), normal(3, 0.1)]
    mine = steps_of(CONSTANT.model_copy(update={"name": "adafactor"}), params, gradients)
    theirs = [(name, torch.nn.Parameter(torch.tensor(array))) for name, _, array in pieces(params)]
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in ("scale", "q_bias") else 0.2} for name, p in theirs
    ]
    reference = torch.optim.Adafactor(groups, lr=0.01, eps=(1e-15, 1e-3))
    for gradient, after in zip(gradients, mine, strict=True):
        for (_, p), (_, _, g) in zip(theirs, pieces(gradient), strict=True):
            p.grad = torch.tensor(g)
        reference.step()
        for (name, p), (_, layer, array) in zip(theirs, pieces(after), strict=True):
            np.testing.assert_allclose(
                array, p.detach().numpy(), rtol=0, atol=after_steps(3, 0.01), err_msg=f"{name} {layer}"
            )


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    """11 + 14 + 14 + 11 numbers of the four matrices of a layer, its bias and scale; and 9 + 4 + 4."""
    state = make_optimizer(OptimizerConfig(name="adafactor"), 10, DECLARED).init(normal(0))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32 and leaf.shape[-1] > 1]
    kept = sum(leaf.size for leaf in moments)
    assert kept == 3 * (11 + 14 + 14 + 11 + 10 + 4) + 9 + 4 + 4


def orthogonalized(m):
    """Jordan et al. 2024, in float64: five quintic iterations on a matrix of Frobenius norm 1."""
    if m.shape[0] > m.shape[1]:
        return orthogonalized(m.T).T
    x = m / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_equals_numpy():
    """Three steps. Layers' matrices: Nesterov's momentum with Adam's correction of its bias, orthogonalized,
    times 0.2 sqrt(longer side), beside decay. Everything else: Adam. Each of the five iterations multiplies
    small singular values, and float32's roundings of 6e-8 with them, by 3.4 (485 in all): 3e-5 of entries of
    order 1, times 0.01 x 0.2 x sqrt(10) and three steps is 6e-7 more."""
    params, gradients = normal(0), [normal(seed, 0.5) for seed in (1, 2, 3)]
    config = CONSTANT.model_copy(update={"name": "muon", "momentum": 0.9, "beta1": 0.8, "beta2": 0.9})
    mine = steps_of(config, params, gradients)
    wanted = {(name, layer): array.astype(np.float64) for name, layer, array in pieces(params)}
    first = dict.fromkeys(wanted, 0.0)
    second = dict.fromkeys(wanted, 0.0)
    for t, (gradient, after) in enumerate(zip(gradients, mine, strict=True), start=1):
        for name, layer, g in pieces(gradient):
            g, key, p = g.astype(np.float64), (name, layer), wanted[name, layer]
            if name in AS_MATRIX:
                first[key] = 0.9 * first[key] + 0.1 * g
                nesterov = 0.9 * first[key] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
                step = orthogonalized(nesterov) * 0.2 * max(g.shape) ** 0.5
            else:
                first[key] = 0.8 * first[key] + 0.2 * g
                second[key] = 0.9 * second[key] + 0.1 * g**2
                step = first[key] / (1 - 0.8**t) / (np.sqrt(second[key] / (1 - 0.9**t)) + 1e-8)
            decay = 0.0 if name in ("scale", "q_bias") else 0.2
            wanted[key] = p - 0.01 * (step + decay * p)
        for name, layer, array in pieces(after):
            message = f"{name} {layer}, step {t}"
            atol = after_steps(3, 0.01) + 6e-7
            np.testing.assert_allclose(array, wanted[name, layer], rtol=0, atol=atol, err_msg=message)


def test_muon_orthogonalizes_as_torch_does():
    """The first step, where both have the gradient's direction alone. Torch iterates in bfloat16: three
    products rounded by 2^-9, with coefficients that add up to 10.2, are 2 % of the norm in each of five
    iterations, 10 % at most."""
    params, gradient = normal(0), normal(1)
    config = CONSTANT.model_copy(update={"name": "muon", "weight_decay": 0.0})
    after = next(steps_of(config, params, [gradient]))
    rows = zip(pieces(params), pieces(gradient), pieces(after), strict=True)
    for (name, _, before), (_, _, g), (_, _, array) in rows:
        if name not in AS_MATRIX:
            continue
        p = torch.nn.Parameter(torch.tensor(before))
        p.grad = torch.tensor(g)
        torch.optim.Muon([p], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        mine, theirs = array - before, p.detach().numpy() - before
        assert np.linalg.norm(mine - theirs) < 0.1 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_adapters_have_every_optimizer(name, tiny_model):
    """LoRA's matrices are [L, D, R] and [L, R, O]; three steps move them all and stay finite."""
    model = Llama(tiny_model(), Tuning(LoraConfig(rank=4, targets=("wq", "wo", "w_up"))))
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(name=name, learning_rate=0.1)
    *_, after = steps_of(config, params, [ones] * 3, partition_of(model).declared)
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert np.isfinite(now).all() and np.abs(now - before).min() > 0


# Moments in bfloat16


def moment_bytes(config, params):
    """Bytes of the optimizer's arrays."""
    state = make_optimizer(config, 10, DECLARED).init(params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)


@pytest.mark.parametrize(
    ("name", "dtype", "each"), [("adamw", "float32", 8), ("adamw", "bfloat16", 4), ("muon", "bfloat16", 2)]
)
def test_bytes_of_moments(name, dtype, each):
    """Per parameter; Muon has one moment, and Adam's two of what is not a layer's matrix."""
    params = normal(0)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rest = sum(array.size for part, _, array in pieces(params) if part not in AS_MATRIX)
    more = 2 * rest + 3 * 4 if name == "muon" else 0  # and the three coefficients of its iteration
    assert moment_bytes(OptimizerConfig(name=name, moment_dtype=dtype), params) == each * count + more


@pytest.mark.parametrize("beta2", [0.95, 0.98])
def test_a_bfloat16_second_moment_follows_its_gradients(beta2):
    """After 300 steps of N(0, 1) and 300 of N(0, 0.1^2), sqrt(v) beside that of float32, over 4096
    parameters: within 1 % in the mean, and 1 % from each other, after roundings of up to 0.4 %."""
    optimizers = [
        make_optimizer(OptimizerConfig(beta2=beta2, moment_dtype=dtype, clip_norm=1e9), 10, {"w": TABLE})
        for dtype in ("float32", "bfloat16")
    ]
    params = {"w": jnp.zeros(4096)}

    def follow(optimizer):
        def one(state, key_and_scale):
            key, scale = key_and_scale
            _, state = optimizer.update({"w": scale * jax.random.normal(key, (4096,))}, state, params)
            return state, None

        keys = jax.random.split(jax.random.key(0), 600)
        return jax.lax.scan(one, optimizer.init(params), (keys, jnp.repeat(jnp.array([1.0, 0.1]), 300)))[0]

    exact, rounded = (optax.tree.get(follow(optimizer), "nu")["w"] for optimizer in optimizers)
    assert rounded.dtype == jnp.bfloat16
    ratio = np.sqrt(np.asarray(rounded, np.float32) / np.asarray(exact))
    assert abs(ratio.mean() - 1) < 0.01 and ratio.std() < 0.01


def test_why_beta2_has_a_limit():
    """At 0.999 a moment that should have decayed to 0.37 in 1000 steps has not moved, at 0.98 it has in 100:
    the decay is less than half of bfloat16's spacing in the one case, and several of it in the other."""
    for beta2, steps, moved in ((0.999, 1000, False), (0.98, 100, True)):
        config = OptimizerConfig(moment_dtype="bfloat16").model_copy(update={"beta2": beta2})
        optimizer, params = make_optimizer(config, 10, {"w": TABLE}), {"w": jnp.ones(1)}
        _, state = optimizer.update({"w": jnp.ones(1)}, optimizer.init(params), params)
        before = float(optax.tree.get(state, "nu")["w"][0])
        for _ in range(steps):
            _, state = optimizer.update({"w": jnp.zeros(1)}, state, params)
        after = float(optax.tree.get(state, "nu")["w"][0])
        assert (after < 0.5 * before) if moved else (after == before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, "adafactor keeps no moment"),
        ({"beta2": 0.99, "moment_dtype": "bfloat16"}, "give beta2=0.98 or less"),
    ],
)
def test_what_bfloat16_moments_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        OptimizerConfig(**changes)


def test_inverse_square_root_goes_on_for_ever():
    """Vaswani et al. 2017, equation 3: the peak at the end of warmup, half of it at four times as many."""
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="inverse_sqrt")
    rates = [float(schedule(config, steps)(40)) for steps in (50, 5000)]
    assert rates == pytest.approx([1.0, 1.0], rel=1e-6)
    assert float(schedule(config, 50)(10)) == pytest.approx(2.0, rel=1e-6)
    assert float(schedule(config, 50)(5)) == pytest.approx(1.0, rel=1e-6)


def test_warmup_is_steps_or_a_share():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0.1, schedule="constant")
    assert [float(schedule(config, 100)(step)) for step in (0, 5, 10, 99)] == pytest.approx([0, 1, 2, 2])
    assert OptimizerConfig(warmup_steps=10).warmup_of(100) == 10
    with pytest.raises(ValueError, match="is neither whole nor a share below 1"):
        OptimizerConfig(warmup_steps=1.5)
