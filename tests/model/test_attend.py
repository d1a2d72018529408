"""The TPU's attention kernel, interpreted, against XLA's: packed, grouped, windowed; alone and on a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from maxllm.config import MeshConfig
from maxllm.errors import UserError
from maxllm.model import attend
from maxllm.parallel.mesh import make_mesh

B, T, H, G, K = 2, 256, 4, 2, 32


@pytest.fixture
def arrays():
    """Queries, keys, values, and three packed documents; the last row ends in padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, h, K)) for key, h in zip(keys, (H, G, G), strict=True))
    segments = np.repeat([1, 2, 3], [100, 60, 96])[None].repeat(B, 0)
    segments[1, 200:] = 0
    return q, k, v, attend.Keys(jnp.asarray(segments), jnp.asarray(segments), jnp.int32(0))


def outputs_and_gradients(backend, window, arrays):
    """The outputs of real queries, and the gradients of a sum over them."""
    q, k, v, keys = arrays
    real = (keys.query_segments_BT != 0)[:, :, None, None]

    def total(q, k, v):
        o = attend.attend(backend, q, k, v, keys, window, lambda probs: probs) * real
        return jnp.sum(o * jnp.cos(jnp.arange(K))), o

    gradients, o = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return o, *gradients


@pytest.mark.parametrize("window", [None, 70], ids=["causal", "window"])
@pytest.mark.parametrize("mesh", [None, {"context": 2, "fsdp": 2, "tensor": 2}], ids=["alone", "mesh"])
def test_splash_is_attention(monkeypatch, arrays, window, mesh):
    """Float32 throughout; sums of 256 terms in another order, scores of order 1: 1e-5."""
    wanted = outputs_and_gradients("xla", window, arrays)
    monkeypatch.setattr(kernels, "make_splash_mha", partial(kernels.make_splash_mha, interpret=True))
    if mesh is None:
        got = outputs_and_gradients("splash", window, arrays)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(data=-1, **mesh))):
            got = outputs_and_gradients("splash", window, arrays)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_auto_is_the_kernel_of_the_hardware():
    assert [attend.resolve("auto", platform) for platform in ("cpu", "tpu", "gpu")] == [
        "xla",
        "splash",
        "xla",
    ]


@pytest.mark.parametrize(("backend", "platform"), [("splash", "cpu"), ("splash", "gpu")])
def test_the_wrong_kernel_is_an_error(backend, platform):
    with pytest.raises(UserError, match=f"{backend} does not run on {platform}"):
        attend.resolve(backend, platform)


def test_splash_needs_whole_lanes(arrays):
    q, k, v, keys = arrays
    short = partial(jax.tree.map, lambda a: a[:, :100] if a.ndim > 1 else a)
    with pytest.raises(UserError, match="a multiple of 128 positions per device, not 100"):
        attend.attend("splash", short(q), short(k), short(v), short(keys), None, lambda probs: probs)
