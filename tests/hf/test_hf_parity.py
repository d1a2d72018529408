"""Our model against `transformers`' LlamaForCausalLM: logits, gradients and parameter counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from random_models import SCALING, TINY, hf_config, random_params, tiny

from maxllm.config.model import ModelConfig
from maxllm.hf import mapping
from maxllm.model.llama import Llama

torch = pytest.importorskip("torch")

from transformers import LlamaForCausalLM  # noqa: E402

TOLERANCE = 3 * rounding.of_sum(64, magnitude=8.0)  # three layers of sums of 64 terms: 9e-5


def torch_model(params: Any, config: ModelConfig) -> LlamaForCausalLM:
    """The same model in `transformers`."""
    model = LlamaForCausalLM(hf_config(config)).eval()
    tensors = {name: torch.from_numpy(array) for name, array in mapping.to_hf(params, config).items()}
    report = model.load_state_dict(tensors, strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys == (["lm_head.weight"] if config.tie_embeddings else [])
    model.tie_weights()
    return model


def random_ids(shape: tuple[int, ...], config: ModelConfig = TINY, seed: int = 1) -> np.ndarray:
    """Ids without the special tokens, so that nothing is taken for padding."""
    return np.random.default_rng(seed).integers(6, config.vocab_size, shape)


def our_logits(
    params: Any,
    config: ModelConfig,
    tokens_BT: np.ndarray,
    segment_ids_BT: np.ndarray | None = None,
    positions_BT: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V]; one unpadded document per row unless told otherwise."""
    if segment_ids_BT is None:
        segment_ids_BT = np.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    inputs = [jnp.asarray(a, jnp.int32) for a in (tokens_BT, segment_ids_BT, positions_BT)]
    return np.asarray(jax.jit(Llama(config).apply)({"params": params}, *inputs))


def hf_logits(model: LlamaForCausalLM, tokens_BT: np.ndarray, **arrays: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of `transformers`."""
    with torch.no_grad():
        kwargs = {name: torch.tensor(array) for name, array in arrays.items()}
        return model(torch.tensor(tokens_BT), **kwargs).logits.numpy()


VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"n_kv_heads": 4},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "head_dim": {"head_dim": 12},
    "rope_theta": {"rope_theta": 500_000.0},
    "llama3_rope": {"rope_scaling": SCALING, "rope_theta": 1000.0},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_face(variant: str, tied: bool) -> None:
    config = tiny(tie_embeddings=tied, **VARIANTS[variant])
    params = random_params(config)
    tokens_BT = random_ids((2, 48))
    theirs = hf_logits(torch_model(params, config), tokens_BT)
    assert np.std(theirs) > 0.5
    np.testing.assert_allclose(our_logits(params, config, tokens_BT), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("remat, unroll", [("full", 1), ("none", 3)])
def test_remat_and_unrolling_change_nothing(remat: str, unroll: int) -> None:
    params, tokens_BT = random_params(TINY), random_ids((2, 9))
    other = tiny(remat=remat, scan_unroll=unroll)
    plain = partial(our_logits, config=TINY, tokens_BT=tokens_BT)
    atol = rounding.of_network(plain, params, terms=TINY.d_ff)
    np.testing.assert_allclose(our_logits(params, other, tokens_BT), plain(params), atol=atol, rtol=0)


def test_left_padded_batch_equals_hugging_face() -> None:
    params, lengths, T = random_params(TINY), np.array([12, 5, 1]), 12
    tokens_BT = random_ids((3, T))
    real_BT = np.arange(T) >= T - lengths[:, None]
    positions_BT = np.maximum(np.arange(T) - (T - lengths[:, None]), 0)
    tokens_BT = np.where(real_BT, tokens_BT, 5)
    theirs = hf_logits(
        torch_model(params, TINY), tokens_BT, attention_mask=real_BT.astype(int), position_ids=positions_BT
    )
    ours = our_logits(params, TINY, tokens_BT, real_BT.astype(int), positions_BT)
    np.testing.assert_allclose(ours[real_BT], theirs[real_BT], atol=TOLERANCE, rtol=0)
    assert np.isfinite(ours).all()


def test_packed_documents_equal_hugging_face_on_each_alone() -> None:
    params, first, second = random_params(TINY), random_ids((1, 7), seed=2), random_ids((1, 9), seed=3)
    padding = np.full((1, 4), 5)
    tokens_BT = np.concatenate([first, second, padding], axis=1)
    segment_ids_BT = np.array([[1] * 7 + [2] * 9 + [0] * 4])
    positions_BT = np.array([[*range(7), *range(9), *range(4)]])
    ours = our_logits(params, TINY, tokens_BT, segment_ids_BT, positions_BT)
    model = torch_model(params, TINY)
    np.testing.assert_allclose(ours[:, :7], hf_logits(model, first), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours[:, 7:16], hf_logits(model, second), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_equal_torchs(tied: bool) -> None:
    config = tiny(tie_embeddings=tied)
    params = random_params(config)
    tokens_BT, targets_BT = random_ids((2, 10), seed=4), random_ids((2, 10), seed=5)
    ones_BT, positions_BT = jnp.ones((2, 10), jnp.int32), jnp.tile(jnp.arange(10), (2, 1))

    def loss(params: Any) -> jax.Array:
        logits_BTV: Any = Llama(config).apply(
            {"params": params}, jnp.asarray(tokens_BT), ones_BT, positions_BT
        )
        logps_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(logps_BTV, jnp.asarray(targets_BT)[..., None], -1).mean()

    model = torch_model(params, config)
    logits = model(torch.tensor(tokens_BT)).logits
    their_loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, config.vocab_size), torch.tensor(targets_BT).reshape(-1)
    )
    their_loss.backward()
    named = {name: np.asarray(weight.grad) for name, weight in model.named_parameters()}
    graded = jax.jit(jax.value_and_grad(loss))
    our_loss, gradients = graded(params)
    terms = max(config.d_ff, config.vocab_size)
    of_loss, of_gradients = (rounding.of_network(lambda p, n=n: graded(p)[n], params, terms) for n in (0, 1))
    assert float(our_loss) == pytest.approx(their_loss.item(), abs=of_loss)
    theirs = mapping.from_hf(named, config)

    def compare(our_leaf: jax.Array, their_leaf: np.ndarray) -> None:
        assert np.abs(their_leaf).max() > 1e-3
        np.testing.assert_allclose(our_leaf, their_leaf, atol=of_gradients, rtol=0)

    jax.tree.map(compare, gradients, theirs)


def tutorial(d_model: int, n_layers: int) -> ModelConfig:
    """A model of the happy-llm tutorial: hidden = 64 ceil((8 dim / 3) / 64)."""
    d_ff = 64 * -(-(8 * d_model // 3) // 64)
    return ModelConfig(
        vocab_size=6144,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=16,
        n_kv_heads=8,
        d_ff=d_ff,
        max_seq_len=512,
        tie_embeddings=True,
    )


def llama(D: int, L: int, H: int, G: int, F: int, V: int = 32_000) -> ModelConfig:
    """A published LLaMA."""
    return ModelConfig(vocab_size=V, d_model=D, n_layers=L, n_heads=H, n_kv_heads=G, d_ff=F, max_seq_len=4096)


PUBLISHED = {
    "llama-2-7b": (llama(4096, 32, 32, 32, 11_008), 6_738_415_616),
    "llama-2-13b": (llama(5120, 40, 40, 40, 13_824), 13_015_864_320),
    "llama-2-70b": (llama(8192, 80, 64, 8, 28_672), 68_976_648_192),
    "llama-3-8b": (llama(4096, 32, 32, 8, 14_336, 128_256), 8_030_261_248),
    "tutorial-80m": (tutorial(768, 12), 82_594_560),
    "tutorial-215m": (tutorial(1024, 18), 215_127_040),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_without_memory(name: str) -> None:
    config, published = PUBLISHED[name]
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    abstract = jax.eval_shape(Llama(config.computed_in("bfloat16")).init, jax.random.key(0), ids, ids, ids)[
        "params"
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == published
    with torch.device("meta"):
        model = LlamaForCausalLM(hf_config(config))
    assert sum(weight.numel() for weight in model.parameters()) == published
    assert {n: tuple(w.shape) for n, w in model.named_parameters()} == mapping.hf_shapes(config)
