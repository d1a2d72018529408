"""What is trained where that is not the whole model: every kind of adapter, and frozen parts.

The same losses and gradients packed and unpacked, in microbatches, and on eight devices; a fresh adapter
changes nothing, or what its tokens would; gradients of the upper layers are those of the whole model.
"""

from functools import cache, partial
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain as rules
import pytest
import rounding
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from maxllm.config.mesh import MeshConfig
from maxllm.config.tuning import (
    BottleneckConfig,
    FreezeConfig,
    LoraConfig,
    LoraTarget,
    PrefixConfig,
    PromptConfig,
    Tuning,
)
from maxllm.errors import UserError
from maxllm.generate.decode import prefill, step
from maxllm.model.adapters import plain
from maxllm.model.compressed import Blocks, made_whole
from maxllm.model.forward import forward
from maxllm.model.fresh import common_tokens, first_adapters
from maxllm.model.llama import Llama
from maxllm.parallel import processes, sharding
from maxllm.parallel.mesh import AXES, make_mesh
from maxllm.plan.flops import matmul_parameters
from maxllm.records import LmBatch, PromptBatch
from maxllm.run.program import Part, compile_part
from maxllm.stages.program import abstract_kept, frozen_type
from maxllm.steps.language import language_loss
from maxllm.steps.state import TrainState, abstract, init_params, partition_of
from maxllm.steps.update import accumulate, train_step
from maxllm.weights import Weights

B, T, V = 8, 16, 64
KEY = jax.random.key(5)

TUNINGS = {
    "lora": Tuning(LoraConfig(rank=3, alpha=6)),
    "rslora": Tuning(LoraConfig(rank=4, alpha=6, rank_stabilized=True, targets=("wq", "w_down"))),
    "dora": Tuning(LoraConfig(rank=3, alpha=6, dora=True)),
    "bfloat16": Tuning(LoraConfig(rank=3), freeze=FreezeConfig(dtype="bfloat16")),
    "int8": Tuning(LoraConfig(rank=3), freeze=FreezeConfig(dtype="int8")),
    "nf4": Tuning(LoraConfig(rank=3, dora=True), freeze=FreezeConfig(dtype="nf4")),
    "bottleneck": Tuning(bottleneck=BottleneckConfig(width=5)),
    "prefix": Tuning(prefix=PrefixConfig(length=3)),
    "prompt": Tuning(prompt=PromptConfig(length=3)),
    "all": Tuning(
        LoraConfig(rank=2, dora=True),
        BottleneckConfig(width=3),
        PrefixConfig(length=2),
        PromptConfig(length=3),
    ),
    "layers": Tuning(freeze=FreezeConfig(layers=1)),
    "embeddings": Tuning(freeze=FreezeConfig(embeddings=True)),
    "both": Tuning(freeze=FreezeConfig(layers=1, embeddings=True)),
}
every = pytest.mark.parametrize("name", TUNINGS)


@pytest.fixture(scope="module")
def config(tiny_model):
    """Every sharded dimension is a multiple of 8, and there are layers to freeze."""
    return tiny_model(n_heads=16, n_kv_heads=8, head_dim=4, d_ff=64, n_layers=3)


def batch_of(rows):
    """Rows of documents, as lists of lengths, each at the place where it lies in the row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, V, (B, T + 1)).astype(np.int32)
    segments, positions = np.zeros((2, B, T), np.int32)
    for row, lengths in enumerate(rows):
        end = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, end : end + length] = number
            positions[row, end : end + length] = np.arange(length)
            end += length
    weights = (segments > 0).astype(np.float32)
    return LmBatch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


PACKED = batch_of([[7, 9]] * B)


def alone(batch):
    """The documents of a batch, one to a row, at the row's beginning."""
    parts = []
    for row in range(B):
        for number in (1, 2):
            inside = batch.segment_ids_BT[row] == number
            count = inside.sum()

            def moved(array, fill=0, row=row, inside=inside, count=count):
                out = np.full(T, fill, array.dtype)
                out[:count] = array[row][inside]
                return out

            parts.append([moved(a) for a in (batch.tokens_BT, batch.targets_BT, batch.loss_weights_BT)])
            ones = (np.arange(T) < count).astype(np.int32)
            parts[-1] += [ones, np.arange(T, dtype=np.int32) * ones]
    return LmBatch(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def tuned(config, params_of):
    """tuned(name): (model, what is trained, what stays), none of it at a place where gradients vanish."""

    @cache
    def make(name):
        model = Llama(config, TUNINGS[name])
        base, rng = params_of(Llama(config)), np.random.default_rng(1)
        weights = Weights(base)
        if TUNINGS[name].adapters:
            fresh = first_adapters(model, weights, KEY)
            noise = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), fresh)
            weights = weights.replace(adapters=noise)
        trained, kept = partition_of(model).split(weights)
        return model, *jax.device_get((trained, frozen_type(model, kept)))

    return make


@cache
def compiled_gradient(model, microbatches, dtype):
    run = partial(accumulate, partial(language_loss, model), microbatches=microbatches, dtype=dtype)
    run = partial(run, partition=partition_of(model), key=KEY)
    return jax.jit(lambda params, kept, batch: run(params=params, kept=kept, batch=batch))


def gradients_of(model, trained, kept, batch, microbatches=1, dtype="float32"):
    grads, loss = compiled_gradient(model, microbatches, jnp.dtype(dtype))(trained, kept, batch)
    return grads, np.float32(loss.total / loss.weight)


@every
def test_what_is_put_together_is_what_was_split(tuned, name):
    model, trained, kept = tuned(name)
    partition = partition_of(model)
    weights = partition.joined(trained, kept)
    if model.tuning.lora and model.tuning.frozen_dtype == "bfloat16":
        merged = plain(weights, model.tuning).base["decoder"]["layers"]["mlp"]["w_up"]
        assert merged.dtype == jnp.float32, "merged in float32, whatever the base is kept in"
    if not model.tuning.adapters:
        again, stays = partition.split(plain(weights, model.tuning))
        jax.tree.map(np.testing.assert_array_equal, (again, stays), (trained, kept))
    shapes = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, shapes)
    assert jax.tree.structure(partition.declared) == jax.tree.structure(trained)


@every
def test_packed_and_unpacked_and_in_microbatches(tuned, name):
    """Documents by themselves, two to a row, and two rows at a time: one loss and one gradient."""
    model, trained, kept = tuned(name)
    wanted, loss = gradients_of(model, trained, kept, PACKED)
    off = rounding.of_network(
        lambda params: gradients_of(model, params, kept, PACKED), trained, terms=model.config.d_ff
    )
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted)) > 100 * off
    for batch, microbatches in ((alone(PACKED), 1), (PACKED, 4)):
        got, other = gradients_of(model, trained, kept, batch, microbatches)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=off), got, wanted)
        assert other == pytest.approx(loss, abs=off)


@every
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 1, 1, 2), (1, 4, 2, 1, 1), pytest.param((1, 2, 1, 2, 2), marks=pytest.mark.slow)],
)
def test_eight_devices_do_what_one_does(tuned, name, shape):
    """One step of gradient descent; the pipeline for what lies in every layer, and a split of the positions
    for what is seen within a document."""
    model, trained, kept = tuned(name)
    if (shape[2] > 1 and model.tuning.freeze) or (shape[3] > 1 and model.tuning.before):
        pytest.skip("refused, see test_recipes_that_do_not_go_together")
    if model.tuning.frozen_dtype in ("int8", "nf4"):
        # Their values and scales are gathered at once, for which simulated devices can run out of threads.
        shape = (8 // (shape[2] * shape[4]), 1, shape[2], 1, shape[4])
    if shape[2] > 1:
        model = model.clone(config=model.config.model_copy(update={"n_layers": 4}))
        trained, kept = grown(model, trained), grown(model, kept)
    wanted, _ = gradients_of(model, trained, kept, PACKED)
    loss, rate = partial(language_loss, model), 0.1
    optimizer = rules.sgd(rate)
    function = partial(
        train_step, loss_fn=loss, optimizer=optimizer, seed=0, microbatches=1, partition=partition_of(model)
    )

    def init(key):
        params = init_params(model, key)
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    mesh = mesh_of(shape)
    description = abstract(init, mesh)
    stays = abstract_kept(model, mesh)
    state = TrainState(np.int32(0), trained, optimizer.init(trained))
    state, frozen = (
        jax.jit(lambda tree: tree, out_shardings=sharding.shardings_of(of))(tree)
        for tree, of in ((state, description), (kept, stays))
    )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PACKED)
    part = Part(function=function, arguments=(description, shapes, stays), updates=True)
    compiled = compile_part(mesh, part)
    after, _ = compiled(state, processes.to_global(PACKED, sharding.batch_sharding(mesh)), frozen)
    off = rounding.of_network(
        lambda params: gradients_of(model, params, kept, PACKED)[0], trained, terms=model.config.d_ff
    )
    moved = jax.tree.map(
        lambda a, b: np.asarray(b - np.asarray(a)) / rate, jax.device_get(after.params), trained
    )
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(trained))
    atol = off + rounding.of_operations(2, size) / rate
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), moved, wanted)


def grown(model, tree):
    """Stacked layers, the last of them once more."""

    def more(path, leaf):
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return np.concatenate([leaf, leaf[-1:]]) if stacked else leaf

    return jax.tree_util.tree_map_with_path(more, tree)


def mesh_of(shape):
    if np.prod(shape) == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])
    return make_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))))


# At first


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "bottleneck"])
def test_fresh_adapters_change_nothing(config, params_of, name):
    """What they add is 0 times something; the compiler may sum what it is added to in another order."""
    model, base = Llama(config, TUNINGS[name]), params_of(Llama(config))
    inputs = PACKED.tokens_BT, PACKED.segment_ids_BT, PACKED.positions_BT
    fresh = Weights(base, first_adapters(model, Weights(base), KEY))
    logits = jax.jit(lambda w: forward(Llama(config), w, *inputs))
    flat = flatten_dict(fresh.adapters, sep="/")
    added = [leaf for path, leaf in flat.items() if path.endswith(("_b", "_up"))]
    assert added and not any(np.any(leaf) for leaf in added)
    atol = rounding.of_network(logits, Weights(base), config.d_ff)
    np.testing.assert_allclose(forward(model, fresh, *inputs), logits(Weights(base)), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_fresh_prefix_is_what_its_tokens_would_be(config, params_of, name):
    """The same logits as after these tokens in the text, of which every document of a row has its own."""
    model, base = Llama(config, TUNINGS[name]), params_of(Llama(config))
    P = model.tuning.before
    key = KEY if name == "prefix" else jax.random.fold_in(KEY, 1)
    own = np.asarray(common_tokens(key, config, P))
    fresh = Weights(base, first_adapters(model, Weights(base), KEY))
    inputs = PACKED.tokens_BT, PACKED.segment_ids_BT, PACKED.positions_BT
    got = forward(model, fresh, *inputs)
    plainly = jax.jit(lambda w, tokens, ones: forward(Llama(config), w, tokens, ones, positions))
    for first, last in ((0, 7), (7, T)):
        tokens = np.concatenate([np.tile(own, (B, 1)), PACKED.tokens_BT[:, first:last]], axis=1)
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (B, 1))
        run = partial(plainly, tokens=tokens, ones=np.ones_like(tokens))
        atol = rounding.of_network(run, Weights(base), config.d_ff)
        np.testing.assert_allclose(got[:, first:last], run(Weights(base))[:, P:], rtol=0, atol=atol)
        jax.clear_caches()  # `positions` is a constant of what was compiled


@pytest.mark.parametrize("name", ["dora", "nf4", "bottleneck", "prefix", "prompt", "all", "both"])
def test_decoding_sees_what_training_sees(tuned, name):
    """Logits of two tokens after left-padded prompts, token by token with a cache, and at once."""
    model, trained, kept = tuned(name)
    weights = partition_of(model).joined(trained, kept)
    decoder, made = Llama(model.config, model.tuning.beside), plain(weights, model.tuning)
    lengths, P = np.array([5, 2, 1, 4, 3, 5, 5, 1], np.int32), 5
    texts = [PACKED.tokens_BT[row, : length + 1] for row, length in enumerate(lengths)]
    prompts = np.stack([np.pad(text[:-1], (P - len(text) + 1, 0)) for text in texts]).astype(np.int32)
    first, cache = prefill(decoder, made, PromptBatch(prompts, lengths), P + 1)
    last = np.array([[text[-1]] for text in texts], np.int32)
    ones = np.ones((B, 1), np.int32)
    second, _ = step(decoder, made, cache, P + 1, last, ones, lengths[:, None])
    for row, text in enumerate(texts):
        inputs = text[None], np.ones((1, len(text)), np.int32), np.arange(len(text))[None]
        whole = jax.jit(lambda w, inputs=inputs: forward(model, w, *inputs))
        atol = rounding.of_network(whole, weights, model.config.d_ff)
        logits = whole(weights)[0]
        np.testing.assert_allclose(first[row], logits[-2], rtol=0, atol=atol)
        np.testing.assert_allclose(second[row], logits[-1], rtol=0, atol=atol)


# Against other arithmetic


def test_dora_is_the_papers_equation(tuned, config):
    """m (W + s A B) / |W + s A B| in place of each matrix, in float64."""
    model, trained, kept = tuned("dora")
    base, low = flatten_dict(kept.base, sep="/"), flatten_dict(trained, sep="/")
    lora, made = (
        model.tuning.lora,
        flatten_dict(plain(Weights(kept.base, trained), model.tuning).base, sep="/"),
    )
    for path in [path.removesuffix("_m") for path in low if path.endswith("_m")]:
        a, b, m = (np.float64(low[f"{path}_{letter}"]) for letter in "abm")
        w = np.float64(base[path]).reshape(a.shape[0], a.shape[1], -1) + lora.alpha / lora.rank * a @ b
        wanted = m[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True)
        atol = rounding.of_sum(a.shape[1], float(np.abs(wanted).max()))
        np.testing.assert_allclose(made[path].reshape(w.shape), wanted, rtol=0, atol=atol)
    inputs = PACKED.tokens_BT, PACKED.segment_ids_BT, PACKED.positions_BT
    merged = plain(Weights(kept.base, trained), model.tuning)
    atol = rounding.of_network(jax.jit(lambda w: forward(Llama(config), w, *inputs)), merged, config.d_ff)
    beside = forward(model, Weights(kept.base, trained), *inputs)
    np.testing.assert_allclose(forward(Llama(config), merged, *inputs), beside, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["layers", "embeddings", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_above_frozen_layers_are_the_whole_models(tuned, config, params_of, name, dtype):
    """Those of the whole model, without the layers and the table that are frozen; with the gradients of the
    layers' matrices in bfloat16 too, each of which is rounded once."""
    model, trained, kept = tuned(name)
    base, partition = params_of(Llama(config)), partition_of(model)
    part, _ = gradients_of(model, trained, kept, PACKED, dtype=dtype)
    whole, _ = gradients_of(Llama(config), base, None, PACKED)
    wanted = partition.split(Weights(whole))[0]
    off = rounding.of_network(
        lambda params: gradients_of(Llama(config), params, None, PACKED)[0], base, terms=config.d_ff
    )
    rtol = 2**-8 if dtype == "bfloat16" else 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=off), part, wanted)


def test_frozen_layers_have_no_backward_pass(tuned):
    """With the table frozen nothing is differentiated below the first trained weight."""

    def flops(name):
        model, trained, kept = tuned(name)
        partition = partition_of(model)

        def loss(params):
            return language_loss(model, partition.joined(params, kept), PACKED, None).total

        return jax.jit(jax.grad(loss)).lower(trained).compile().cost_analysis()["flops"]

    assert flops("both") < flops("layers")


def test_all_layers_cannot_be_frozen(tiny_model):
    with pytest.raises(UserError, match="leaves none of the model's 2 layers to train"):
        partition_of(Llama(tiny_model(), Tuning(freeze=FreezeConfig(layers=2))))


# In few bits


@pytest.mark.parametrize(
    ("dtype", "largest"), [("int8", 0.5 / 127), ("nf4", (1 - 0.6961928) / 2), ("bfloat16", 2**-8)]
)
def test_how_far_few_bits_are_off(config, params_of, dtype, largest):
    """Of int8, half a level of a block's largest weight; of nf4, half of the gap between -1 and its next."""
    model, base = (
        Llama(config, Tuning(LoraConfig(), freeze=FreezeConfig(dtype=dtype))),
        params_of(Llama(config)),
    )
    kept = frozen_type(model, Weights(base))
    before, after = (flatten_dict(tree, sep="/") for tree in (base, made_whole(kept).base))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if path.split("/")[-1] not in get_args(LoraTarget):
            np.testing.assert_array_equal(after[path], leaf)
            continue
        off = np.abs(np.float32(after[path]) - leaf).max()
        assert 0 < off <= 1.01 * largest * np.abs(leaf).max(), path
    if dtype == "bfloat16":
        return
    values, scales = (
        sum(leaf.size for leaf in jax.tree.leaves(jax.tree.map(get, kept.compressed, is_leaf=is_blocks)))
        for get in (lambda blocks: blocks.values, lambda blocks: blocks.scales)
    )
    assert values == matmul_parameters(config, 0) // (2 if dtype == "nf4" else 1)
    assert 4 * scales <= values * (2 if dtype == "nf4" else 1)


def is_blocks(node):
    return isinstance(node, Blocks)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_few_bits_compute_what_their_values_do(tuned, name):
    """The same loss and gradients as beside float32 matrices of these values; and no whole matrix waits for
    the backward pass."""
    model, trained, kept = tuned(name)
    got, loss = gradients_of(model, trained, kept, PACKED)
    whole = jax.device_get(made_whole(kept))
    run = partial(gradients_of, model, kept=whole, batch=PACKED)
    wanted, other = run(trained)
    off = rounding.of_network(run, trained, terms=model.config.d_ff)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=off), got, wanted)
    assert loss == pytest.approx(other, abs=off)

    def kept_for_backward(kept):
        joined = partition_of(model).joined(trained, kept)
        low = joined.adapters
        _, pull = jax.vjp(
            lambda low: language_loss(model, joined.replace(adapters=low), PACKED, None).total, low
        )
        return {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32}

    L, D, F = model.config.n_layers, model.config.d_model, model.config.d_ff
    assert (L, D, F) in kept_for_backward(whole)
    assert (L, D, F) not in kept_for_backward(kept)
