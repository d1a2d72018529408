"""Adapters at the first step, where they are made from the weights that they are put beside."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.config.model import ModelConfig
from maxllm.model.adapters import lengths
from maxllm.model.compressed import made_whole
from maxllm.model.forward import init_weights
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Decoder, Llama
from maxllm.records import Params
from maxllm.weights import Weights

COMMON_TOKENS = 5000
"""Prefixes and prompts begin as tokens from the first so many of the vocabulary (Lester et al. 2021, section
3.2); merges of a tokenizer stand in the order in which they were most frequent."""


def first_adapters(model: Llama | ScalarModel, weights: Weights, key: jax.Array) -> Params:
    """Adapters beside weights with which they compute the same, or, of prefixes and prompts, what they
    compute after some tokens."""
    return jax.jit(made, static_argnums=0)(model, weights, key)


def made(model: Llama | ScalarModel, weights: Weights, key: jax.Array) -> Params:
    """`first_adapters`, not compiled."""
    base = made_whole(weights).base
    flat = flatten_dict(nn.unbox(init_weights(model, key)).adapters, sep="/")
    matrices = flatten_dict(base, sep="/")
    for path in [path for path in flat if path.endswith("_m")]:
        path = path.removesuffix("_m")
        L, D, _ = flat[f"{path}_a"].shape
        flat[f"{path}_m"] = lengths(matrices[path].astype(jnp.float32).reshape(L, D, -1))
    tuning = model.tuning
    assert tuning is not None, "a model without has no adapters"
    if tuning.prefix is not None:
        tokens = common_tokens(key, model.config, tuning.prefix.length)
        for letter, array in zip("kv", keys_and_values(model.config, base, tokens), strict=True):
            flat[f"decoder/layers/attention/prefix_{letter}"] = array
    if tuning.prompt is not None:
        tokens = common_tokens(jax.random.fold_in(key, 1), model.config, tuning.prompt.length)
        flat["decoder/prompt"] = matrices["decoder/embedding"][tokens]
    return unflatten_dict(flat, sep="/")


def common_tokens(key: jax.Array, config: ModelConfig, count: int) -> jax.Array:
    """Ids of so many tokens, drawn from the first of the vocabulary, [P]."""
    return jax.random.randint(key, (count,), 0, min(config.vocab_size, COMMON_TOKENS))


def keys_and_values(config: ModelConfig, base: Params, tokens_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every layer at tokens that begin a text, [L, P, G, K] each, float32; keys are rotated."""
    P = tokens_P.shape[0]
    decoder = Decoder(config.model_copy(update={"dtype": "float32"}))
    inputs = tokens_P[None], jnp.ones((1, P), jnp.int32), jnp.arange(P)[None]
    _, cache = decoder.apply({"params": base["decoder"]}, *inputs, True, P, mutable=["cache"])
    attention = cache["cache"]["layers"]["attention"]
    return attention["k"][:, 0], attention["v"][:, 0]
