"""How decoding lays out a model's weights: by heads or whole, in the compute type, once for all tokens."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.config.generation import GenerationConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.tuning import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig, Tuning
from maxllm.generate.decode import decoder_of, generate, laid_out, prefill, step
from maxllm.model.llama import Llama, unstack
from maxllm.parallel import sharding
from maxllm.parallel.mesh import make_mesh
from maxllm.plan import hlo
from maxllm.records import PromptBatch
from maxllm.run.program import compile_reader
from maxllm.steps.state import abstract, init_params
from maxllm.weights import Weights

B, P, R, PAD = 8, 5, 6, 5
CONFIG = GenerationConfig(max_new_tokens=R)


def prompts():
    rng = np.random.default_rng(0)
    return PromptBatch(rng.integers(6, 64, (B, P)).astype(np.int32), rng.integers(1, P + 1, B, np.int32))


def respond(model):
    """generate with one stop token outside the vocabulary: R tokens of every row."""
    return partial(generate, model, key=jax.random.key(0), config=CONFIG, stop_tokens=(64,), pad=PAD)


def gathered(text):
    """(all-gathers outside of loops, all-gathers inside of one), as results of XLA's text."""
    computations, entry = hlo.parse(text)
    inside = []
    for lines in computations.values():
        for line in lines:
            found = hlo.instruction(line)
            if found is not None and found.kind == "while":
                body = line.split("body=%")[1].split(",")[0]
                inside += [line for line, *_ in hlo.walk(computations, body, 1)]
    found = [hlo.instruction(line) for line, *_ in hlo.walk(computations, entry, 1) if line not in inside]
    outside = [one.result for one in found if one is not None and one.kind.startswith("all-gather")]
    found = [hlo.instruction(line) for line in inside]
    return outside, [one.result for one in found if one is not None and one.kind.startswith("all-gather")]


@pytest.mark.parametrize(
    ("shape", "kv_heads", "platform"),
    [
        ((1, 8, 1, 1, 1), 2, "cpu"),
        ((1, 8, 1, 1, 1), 8, "cpu"),
        ((1, 2, 2, 1, 2), 2, "tpu"),
        ((2, 2, 1, 1, 2), 8, "tpu"),
    ],
    ids=str,
)
def test_weights_travel_before_the_loop_over_tokens(tiny_model, params_of, shape, kv_heads, platform):
    """On eight devices that each hold a part of every weight; the responses are those of one device.

    Eight heads of keys and values are split over fsdp and tensor, two are not: there, weights are gathered.
    """
    config = tiny_model(vocab_size=72, n_heads=8, n_kv_heads=kv_heads)
    whole = kv_heads == 2
    model = decoder_of(Llama(config), platform)
    assert model.unstacked == (platform == "cpu")
    names = ("data", "fsdp", "stage", "context", "tensor")
    mesh = make_mesh(MeshConfig(**dict(zip(names, shape, strict=True))))
    weights = Weights(params_of(Llama(config)))
    one = jax.device_get(jax.jit(respond(model))(weights, prompts()))
    described = Weights(abstract(partial(init_params, Llama(config)), mesh))
    many = jax.device_put(weights, sharding.shardings_of(described))
    got = jax.device_get(compile_reader(mesh, lambda w, batch: respond(model)(w, batch))(many, prompts()))
    np.testing.assert_array_equal(got.tokens_BT, one.tokens_BT)
    atol = rounding.of_network(jax.jit(lambda w: respond(model)(w, prompts()).logps_BR[:, 0]), weights, 48)
    np.testing.assert_allclose(got.logps_BR[:, 0], one.logps_BR[:, 0], rtol=0, atol=atol)

    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)), prompts()
    )
    with jax.set_mesh(mesh), sharding.nn.logical_axis_rules(sharding.RULES):
        text = jax.jit(respond(model)).lower(described, batch).compile().as_text()
    outside, inside = gathered(text)
    vocabulary_parts = shape[4] if whole else shape[1] * shape[4]
    matrices = len(jax.tree.leaves(weights)) - 3  # three norms are whole already
    assert len(outside) >= matrices if whole else size_of(outside) <= B * max(P, R) * vocabulary_parts
    # Each row's best logit of every part of the vocabulary and, where rows are not split, the ids so far.
    best = 0 if vocabulary_parts == 1 else B * vocabulary_parts
    assert size_of(inside) <= (best if whole else max(best, B * R))


def size_of(results):
    """Elements of the largest of some results."""
    shapes = (one.split("{")[0].split("[")[1] for one in results)
    return max((math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes), default=0)


@pytest.mark.parametrize(
    "tuning",
    [
        None,
        Tuning(LoraConfig(rank=2)),
        Tuning(LoraConfig(rank=2, dora=True), BottleneckConfig(width=3), PrefixConfig(length=3)),
        Tuning(prompt=PromptConfig(length=2)),
        Tuning(prefix=PrefixConfig(length=3), prompt=PromptConfig(length=2)),
    ],
    ids=["plain", "lora", "within", "prompt", "before"],
)
@pytest.mark.parametrize("unstacked", [False, True])
def test_the_layout_changes_no_number(tiny_model, params_of, tuning, unstacked):
    """In bfloat16, where weights are rounded once instead of at every use: the logits of a prompt and of the
    token after it, bit for bit. Only norms and biases stay float32."""
    config = tiny_model(dtype="bfloat16", attention_bias="qkvo")
    model = Llama(config, tuning)
    base = params_of(Llama(config))
    adapters = None if tuning is None else jax.tree.map(lambda x: x + 0.1, params_of(model))
    weights = Weights(base, adapters)
    tokens = np.random.default_rng(1).integers(6, 64, (2, P + 1)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.tile(np.arange(P + 1, dtype=np.int32), (2, 1))
    decoder = model.clone(unstacked=unstacked)

    @jax.jit
    def logits(weights):
        batch = PromptBatch(tokens[:, :P], np.full(2, P, np.int32))
        first, cache = prefill(decoder, weights, batch, P + 1)
        second, _ = step(decoder, weights, cache, P + 1, tokens[:, P:], ones[:, P:], positions[:, P:])
        return first, second

    laid = jax.jit(partial(laid_out, decoder))(weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path(laid):
        name = path[-1].key
        stays = name == "scale" or name.endswith(("_bias", "_m"))
        assert leaf.dtype == (jnp.float32 if stays else jnp.bfloat16), name
    as_trained = unstack(weights, config.n_layers) if unstacked else weights
    jax.tree.map(np.testing.assert_array_equal, logits(laid), logits(as_trained))
