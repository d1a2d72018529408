"""ALiBi against Bloom's slopes and a softmax written out in NumPy; packed, and in balanced order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from maxllm.config.mesh import MeshConfig
from maxllm.errors import UserError
from maxllm.hf.config import family_of
from maxllm.model import attend, xla
from maxllm.model.alibi import slopes
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.model.visible import Keys
from maxllm.parallel import context
from maxllm.parallel.mesh import make_mesh
from maxllm.weights import Weights

B, T, H, G, K = 2, 24, 6, 3, 8
SEGMENTS = np.repeat([1, 2, 3, 0], [9, 4, 8, 3])


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_slopes_are_blooms(heads):
    """Bloom's bias of a key is its slope times its position; theirs are float32 powers, whose exponents are
    rounded as well: up to 8, at a relative error of UNIT each."""
    theirs_HS = build_alibi_tensor(torch.ones(1, T), heads, torch.float32)[:, 0].numpy()
    np.testing.assert_allclose(
        slopes(heads)[:, None] * np.arange(T), theirs_HS, rtol=rounding.of_operations(8 + 2)
    )


def test_slopes_by_hand():
    """Three heads: the two of H = 2, then the first of H = 4."""
    assert slopes(3).tolist() == [2**-4, 2**-8, 2**-2]


@pytest.fixture(scope="module")
def arrays():
    """Queries, keys, values of rows with three documents and padding."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, G, G)]


def by_hand(q_BTHK, k_BSGK, v_BSGK):
    """One query after another, in float64, each with the keys of its own document up to itself."""
    o_BTHK = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if SEGMENTS[s] == SEGMENTS[t] != 0]
        if not seen:
            continue
        k_SK, v_SK = (a[b, seen, h // (H // G)].astype(np.float64) for a in (k_BSGK, v_BSGK))
        position = {s: number for number, s in enumerate(seen)}  # of the document's own
        behind_S = np.array([position[t] - position[s] for s in seen])
        scores_S = k_SK @ q_BTHK[b, t, h] / np.sqrt(K) - slopes(H)[h] * behind_S
        weights_S = np.exp(scores_S - scores_S.max())
        o_BTHK[b, t, h] = weights_S / weights_S.sum() @ v_SK
    return o_BTHK


def attended(arrays, keys):
    """Of real queries."""
    o_BTHK = attend.attend("xla", *arrays, keys, None, slopes_H=slopes(H))
    return o_BTHK * (keys.query_segments_BT != 0)[:, :, None, None]


def keys_of(shards=1):
    segments_BT = jnp.asarray(np.tile(SEGMENTS, (B, 1)))
    return Keys(segments_BT, segments_BT, jnp.int32(0), shards)


def atol_of(arrays):
    """Rounding of sums over the keys."""
    return rounding.of_network(lambda arrays: attended(arrays, keys_of()), arrays, terms=T)


@pytest.mark.parametrize("shortest", [6, 64], ids=["blocks", "block"])
def test_attention_is_the_softmax_by_hand(monkeypatch, arrays, shortest):
    """Float32 against float64, and not slopes left out."""
    monkeypatch.setattr(xla, "SHORTEST", shortest)  # four blocks of 6 queries, or one of 24
    wanted = by_hand(*arrays)
    np.testing.assert_allclose(attended(arrays, keys_of()), wanted, rtol=0, atol=atol_of(arrays))
    plain = attend.attend("xla", *arrays, keys_of(), None)
    assert np.abs(plain - wanted)[:, SEGMENTS != 0].max() > 0.1


def test_places_in_balanced_order(arrays):
    """Distances are those of slots in the row, wherever a device has them."""
    keys = jax.tree.map(lambda a: context.balanced(a, 2) if a.ndim else a, keys_of(2))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])):
        got = jax.jit(attended)([context.balanced(a, 2) for a in arrays], keys)
    got = context.unbalanced(jax.device_get(got), 2)
    np.testing.assert_allclose(got, by_hand(*arrays), rtol=0, atol=atol_of(arrays))


@pytest.fixture(scope="module")
def lm(tiny_model, params_of):
    model = Llama(tiny_model(position="alibi"))
    return model, Weights(params_of(model))


def test_a_document_does_not_see_its_place_in_the_row(lm):
    """Logits of two packed documents are those of each alone, though no position but the slot is read."""
    model, weights = lm
    tokens = np.random.default_rng(1).integers(6, 64, (1, 16)).astype(np.int32)
    segments = np.repeat([1, 2], [7, 9])[None].astype(np.int32)
    nowhere = np.zeros((1, 16), np.int32)
    packed = forward(model, weights, tokens, segments, nowhere)
    alone = forward(model, weights, tokens[:, 7:], segments[:, 7:], nowhere[:, 7:])
    row = tokens[:, 7:], segments[:, 7:], nowhere[:, 7:]
    atol = rounding.of_network(lambda weights: forward(model, weights, *row), weights, terms=48)
    np.testing.assert_allclose(packed[:, 7:], alone, rtol=0, atol=atol)
    moved = forward(model, weights, tokens[:, ::-1], segments * 0 + 1, nowhere)
    other = forward(model, weights, np.roll(tokens[:, ::-1], 1, axis=1), segments * 0 + 1, nowhere)
    assert np.abs(moved[:, -1] - other[:, -1]).max() > 1e-2  # order matters all the same


def test_hugging_face_has_no_such_llama(tiny_model):
    with pytest.raises(UserError, match="no Hugging Face architecture has position=alibi"):
        family_of(tiny_model(position="alibi"))
