"""What the backward pass keeps and what it computes again changes no gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from pydantic import ValidationError

from maxllm.model.llama import Llama
from maxllm.records import LmBatch
from maxllm.steps.language import language_loss
from maxllm.weights import Weights

ALL = ("q", "k", "v", "gate", "up")


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "offload"},
        *({"remat": "full", where: (name,)} for name in ALL for where in ("keep", "keep_in_host")),
        {"remat": "full", "keep": ALL},
        {"remat": "offload", "keep": ("q", "up"), "keep_in_host": ("k", "gate")},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_remat(tiny_model, params_of, changes):
    """The same operations in the same types, fused otherwise: float32's rounding alone."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, 64, (2, 9)), jnp.int32)
    ones, positions = jnp.ones((2, 8), jnp.int32), jnp.tile(jnp.arange(8), (2, 1))
    batch = LmBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(jnp.float32), ones, positions)
    params = params_of(Llama(tiny_model()))

    def gradients(**changes):
        model = Llama(tiny_model(**changes))
        return jax.jit(jax.grad(lambda params: language_loss(model, Weights(params), batch, None).total))

    plain = gradients()
    atol = rounding.of_network(plain, params, terms=64)
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol)
    jax.tree.map(close, gradients(**changes)(params), plain(params))


def test_each_name_keeps_its_bytes(tiny_model, params_of):
    """What jax.vjp keeps for the backward pass grows by [L, B, T, width] in float32 for each name, on the
    device or in the host's memory as it says."""
    B, T = 2, 8
    ids = jnp.ones((B, T), jnp.int32)
    params = params_of(Llama(tiny_model()))

    def kept(**changes):
        model = Llama(tiny_model(remat="full", **changes))
        forward = lambda p: model.apply({"params": p}, ids, ids, ids, method="hidden")  # noqa: E731
        leaves = jax.make_jaxpr(lambda p: jax.vjp(forward, p)[1])(params).out_avals
        in_host = [leaf.memory_space == jax.memory.Space.Host for leaf in leaves]
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
        return np.array([sum(s for s, h in zip(sizes, in_host, strict=True) if h == side) for side in (0, 1)])

    c = tiny_model()
    head, one = 4 * c.n_layers * B * T * c.k_dim, 4 * c.n_layers * B * T
    widths = {"q": head * c.n_heads, "k": head * c.n_kv_heads, "v": head * c.n_kv_heads}
    widths |= {"gate": one * c.d_ff, "up": one * c.d_ff}
    for name, size in widths.items():
        np.testing.assert_array_equal(kept(keep=(name,)) - kept(), (size, 0), name)
        np.testing.assert_array_equal(kept(keep_in_host=(name,)) - kept(), (0, size), name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keep": ("q",)}, "exceptions from remat=full, not from remat=none"),
        ({"keep_in_host": ("q",), "remat": "dots"}, "not from remat=dots"),
        ({"keep": ("q", "q"), "remat": "full"}, "q is named more than once"),
        ({"keep": ("q", "up"), "keep_in_host": ("up",), "remat": "full"}, "up is named more than once"),
        ({"keep": ("wq",), "remat": "full"}, "'q', 'k', 'v', 'gate' or 'up'"),
    ],
    ids=str,
)
def test_names_that_make_no_sense_are_told(tiny_model, changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        tiny_model(**changes)
