"""XLA's attention against JAX's own; the TPU's kernel, interpreted, against XLA's: packed, grouped, windowed.

cuDNN's kernel runs on GPUs only: what it is told is given to XLA's here, and its calls are found in the
program.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from maxllm.config.mesh import MeshConfig
from maxllm.errors import UserError
from maxllm.model import attend, xla
from maxllm.model.visible import Keys, visible
from maxllm.parallel import context
from maxllm.parallel.mesh import make_mesh

B, T, H, G, K = 2, 512, 4, 2, 32


@pytest.fixture
def arrays():
    """Queries, keys, values, and three packed documents; the last row ends in padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, h, K)) for key, h in zip(keys, (H, G, G), strict=True))
    segments = np.repeat([1, 2, 3], [200, 120, 192])[None].repeat(B, 0)
    segments[1, 400:] = 0
    return q, k, v, Keys(jnp.asarray(segments), jnp.asarray(segments), jnp.int32(0))


def outputs_and_gradients(backend, window, arrays, mesh=None, travelling=False):
    """The outputs of real queries, and the gradients of a sum over them; on a mesh, if there is one."""
    if mesh is None:
        return total_and_gradients(backend, window, arrays, travelling)
    devices = jax.devices()[: math.prod(mesh.values())]
    shards = mesh.get("context", 1)
    q, k, v, keys = jax.tree.map(lambda a: context.balanced(a, shards) if a.ndim else a, arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **mesh), devices)):
        placed = (q, k, v, keys.replace(shards=shards))
        got = total_and_gradients(backend, window, placed, travelling)
    return [context.unbalanced(jax.device_get(a), shards) for a in got]


def total_and_gradients(backend, window, arrays, travelling):
    q, k, v, keys = arrays
    real = (keys.query_segments_BT != 0)[:, :, None, None]

    def total(q, k, v):
        o = attend.attend(backend, q, k, v, keys, window, travelling) * real
        return jnp.sum(o * jnp.cos(jnp.arange(K))), o

    gradients, o = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return o, *gradients


def assert_close(got, wanted):
    """Float32 throughout: sums of T terms in another order, whose absolute values add up to a few."""
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=rounding.of_sum(T), atol=rounding.of_sum(T, magnitude=4.0)
        )


@pytest.mark.parametrize("window", [None, 70, 300], ids=["causal", "70", "300"])
@pytest.mark.parametrize("length", [T, 100], ids=["blocks", "block"])
def test_xla_is_attention(arrays, window, length):
    """In four blocks of queries or in one, against JAX's own."""
    q, k, v, keys = jax.tree.map(lambda a: a[:, :length] if a.ndim else a, arrays)
    real = (keys.query_segments_BT != 0)[:, :, None, None]
    mask_B1TS = visible(keys, window)[:, None]

    def total(q, k, v):
        o = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, implementation="xla") * real
        return jnp.sum(o * jnp.cos(jnp.arange(K))), o

    gradients, o = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert_close(outputs_and_gradients("xla", window, (q, k, v, keys)), (o, *gradients))


def test_blocks_leave_out_what_no_query_sees(arrays):
    """By hand: 512 queries, a window of 70; the last block starts at 384, and its first query sees 315."""
    q, k, _, keys = arrays
    shapes = q.swapaxes(1, 2)[:, None], k.swapaxes(1, 2)
    starts = 0, 128, 256, 384
    assert xla.blocks(*shapes, keys, None) == [(t, t + 128, 0, t + 128) for t in starts]
    firsts = 0, 59, 187, 315
    assert xla.blocks(*shapes, keys, 70) == [
        (t, t + 128, first, t + 128) for t, first in zip(starts, firsts, strict=True)
    ]
    assert xla.blocks(*shapes, keys.replace(shards=2), None) == [(0, 512, 0, 512)]


def test_scores_are_not_kept(arrays):
    """For the backward pass there are q, k, v, the outputs and one number a query and head."""
    q, k, v, keys = arrays
    _, backward = jax.vjp(lambda *heads: attend.attend("xla", *heads, keys, None), q, k, v)
    held = max(leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size"))
    assert held == q.size < B * H * T * T


def test_dropped_probabilities_are_dropped_in_both_passes(arrays):
    """Against autodiff of the formula, with the same of them dropped; of which there are as many as asked."""
    q, k, v, keys = jax.tree.map(lambda a: a[:, :100] if a.ndim else a, arrays)
    key, share = jax.random.key(1), 0.3
    block, pattern = xla.Block(0, 100, 0, 100), xla.Pattern(None, share)
    kept = xla.scoring(block, pattern, (G, H // G), keys, None, key).kept_BGQTS.reshape(B, H, 100, 100)
    # 80,000 draws: the share of zeros is 0.3 with a standard deviation of 0.0016.
    np.testing.assert_allclose(np.mean(kept == 0), share, atol=0.007)
    np.testing.assert_allclose(np.max(kept), 1 / (1 - share), rtol=rounding.of_operations(2))

    def formula(q, k, v):
        k, v = (jnp.repeat(a, H // G, axis=2) for a in (k, v))
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / K**0.5
        probs = jax.nn.softmax(jnp.where(visible(keys, None)[:, None], scores, -1e30), -1)
        return jnp.einsum("bhts,bshk->bthk", probs * kept, v)

    def ours(q, k, v):
        return attend.attend("xla", q, k, v, keys, None, dropout=share, dropout_key=key)

    outputs = [f(q, k, v) for f in (ours, formula)]
    atol = rounding.of_network(lambda heads: formula(*heads), (q, k, v), terms=100)
    np.testing.assert_allclose(*outputs, rtol=0, atol=atol)
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), (0, 1, 2))(q, k, v) for f in (ours, formula)]
    assert_close(*gradients)


@pytest.mark.parametrize("window", [None, 70], ids=["causal", "window"])
@pytest.mark.parametrize("mesh", [None, {"context": 2, "fsdp": 2, "tensor": 2}], ids=["alone", "mesh"])
def test_splash_is_attention(monkeypatch, arrays, window, mesh):
    monkeypatch.setattr(kernels, "make_splash_mha", partial(kernels.make_splash_mha, interpret=True))
    got = outputs_and_gradients("splash", window, arrays, mesh)
    assert_close(got, outputs_and_gradients("xla", window, arrays))


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("mesh", [{"context": 2, "fsdp": 2, "tensor": 2}, {"context": 2}], ids=str)
def test_a_ring_is_attention(monkeypatch, arrays, backend, mesh):
    """Keys of a document travel past the queries of all its devices, and their gradients come home."""
    monkeypatch.setattr(kernels, "make_splash_mha", partial(kernels.make_splash_mha, interpret=True))
    got = outputs_and_gradients(backend, None, arrays, mesh, travelling=True)
    assert_close(got, outputs_and_gradients("xla", None, arrays))


@pytest.mark.parametrize("window", [None, 70], ids=["causal", "window"])
@pytest.mark.parametrize(
    "mesh",
    [None, {"fsdp": 2, "tensor": 2}, {"context": 2, "fsdp": 2, "tensor": 2}],
    ids=["alone", "mesh", "context"],
)
def test_what_cudnn_is_told_is_attention(monkeypatch, arrays, window, mesh):
    by_xla, told = jax.nn.dot_product_attention, []

    def instead(q, k, v, *, mask, is_causal, implementation):
        told.append((implementation, is_causal, k.shape[2]))
        return by_xla(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    got = outputs_and_gradients("cudnn", window, arrays, mesh)
    sizes = mesh or {}
    assert set(told) == {("cudnn", "context" not in sizes, G // sizes.get("tensor", 1))}
    assert_close(got, outputs_and_gradients("xla", window, arrays))


def test_cudnn_is_called_forward_and_backward(monkeypatch, arrays):
    """The program for CUDA has both calls, on keys that are not repeated, and no matmul beside them."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    *projections, keys = arrays
    q, k, v = (array.astype(jnp.bfloat16) for array in projections)
    program = jax.jit(jax.grad(lambda q, k, v: attend.attend("cudnn", q, k, v, keys, None).sum()))
    text = program.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call" in line and "fmha" in line]
    assert [name in call for name, call in zip(("Softmax(", "SoftmaxBackward("), calls, strict=True)] == [
        True,
        True,
    ]
    for call in calls:
        assert f"tensor<{B}x{T}x{H}x{K}xbf16>, tensor<{B}x{T}x{G}x{K}xbf16>" in call
        assert f"tensor<{B}x1x{T}x{T}xbf16>" in call  # the mask has no heads
    assert "dot_general" not in text


def test_who_sees_whom_by_hand():
    """Two documents and padding; then the second half of the queries, as a device of two has them."""
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    wanted = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
        bool,
    )
    keys = Keys(segments, segments, jnp.int32(0))
    np.testing.assert_array_equal(visible(keys, None)[0], wanted)
    half = Keys(segments[:, 3:], segments, jnp.int32(3))
    np.testing.assert_array_equal(visible(half, None)[0], wanted[3:])
    wanted[4, 2] = False
    np.testing.assert_array_equal(visible(keys, 2)[0], wanted)


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("cpu", "bfloat16", "xla"),
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("cuda", "bfloat16", "cudnn"),
        ("cuda", "float32", "xla"),
        ("rocm", "bfloat16", "xla"),
    ],
)
def test_auto_is_the_kernel_of_the_hardware(platform, dtype, kernel):
    assert attend.resolve("auto", platform, dtype) == kernel


@pytest.mark.parametrize(
    ("backend", "platform"), [("splash", "cpu"), ("splash", "gpu"), ("cudnn", "cpu"), ("cudnn", "rocm")]
)
def test_the_wrong_kernel_is_an_error(backend, platform):
    with pytest.raises(UserError, match=f"{backend} does not run on {platform}"):
        attend.resolve(backend, platform, "bfloat16")


@pytest.mark.parametrize("width", [12, 136])
def test_cudnn_needs_heads_that_it_knows(arrays, width):
    *_, keys = arrays
    q, k, v = (jnp.zeros((B, T, heads, width)) for heads in (H, G, G))
    with pytest.raises(UserError, match=f"heads of a multiple of 8, up to 128, not {width}"):
        attend.attend("cudnn", q, k, v, keys, None)


def test_splash_needs_whole_lanes(arrays):
    q, k, v, keys = arrays
    short = partial(jax.tree.map, lambda a: a[:, :100] if a.ndim > 1 else a)
    with pytest.raises(UserError, match="a multiple of 128 positions per device, not 100"):
        attend.attend("splash", short(q), short(k), short(v), short(keys), None)
