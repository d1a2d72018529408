"""Every option that an imported model may have: made by `transformers`, read here, same logits, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from random_models import IDS, abstract_params, read_folder
from safetensors import safe_open

from maxllm.errors import UserError
from maxllm.hf import mapping
from maxllm.hf.config import config_of, hf_config_of
from maxllm.hf.folder import open_model
from maxllm.hf.load import load
from maxllm.hf.write import write_weights
from maxllm.model.llama import Llama

torch = pytest.importorskip("torch")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama mha": {"num_key_value_heads": 4},
    "llama mqa": {"num_key_value_heads": 1},
    "llama head_dim": {"head_dim": 12},
    "llama attention_bias": {"attention_bias": True},
    "llama mlp_bias": {"mlp_bias": True},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 24,
    },
    "llama llama3": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1000.0}},
    "llama yarn": {"rope_parameters": YARN | {"rope_theta": 1e4}},
    "llama yarn all": {
        "rope_parameters": YARN
        | {"rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
B, T = 2, 40


def their_model(option: str, dtype: str, folder: Path) -> Any:
    """A random model of `transformers`, saved; biases and norms are not what they are at init."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**({"model_type": "llama"} | SIZES | OPTIONS[option]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            if "norm" in name:
                weight.normal_(1, 0.3)
    model.to(DTYPES[dtype]).save_pretrained(folder)
    return model.to(torch.float32).eval()  # of the rounded weights


def logits_of(config: Any, tokens_BT: np.ndarray) -> Callable[[Any], jax.Array]:
    """Parameters -> logits of our model in float32, compiled."""
    model = Llama(config.model_copy(update={"dtype": "float32"}))
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    inputs = tokens_BT, np.ones_like(tokens_BT), positions_BT
    return jax.jit(lambda params: model.apply({"params": params}, *inputs))


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_and_round_trip(option: str, tmp_path: Path) -> None:
    """In float32, and the weights byte for byte in bfloat16 and float16 too."""
    theirs = their_model(option, "float32", tmp_path / "float32")
    params, config = read_folder(tmp_path / "float32")
    tokens_BT = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (B, T))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens_BT)).logits.numpy()
    assert np.std(wanted) > 0.5
    logits = logits_of(config, tokens_BT)
    atol = rounding.of_network(logits, params, terms=config.d_ff)
    np.testing.assert_allclose(logits(params), wanted, atol=atol, rtol=0)
    for dtype in DTYPES:
        folder = tmp_path / dtype
        if dtype != "float32":
            their_model(option, dtype, folder)
        model = open_model(folder)
        kept = load(model.source, config, abstract_params(config, jnp.dtype(dtype)))
        back = tmp_path / f"back {dtype}"
        back.mkdir()
        write_weights(back, kept, config, max_shard_bytes=5000)
        assert len(list(back.glob("*.safetensors"))) > 1
        again = open_folder_tensors(back)
        assert again == open_folder_tensors(folder)
    fields = hf_config_of(config, IDS, base=model.fields)
    assert config_of(fields, "again").model_dump() == config.model_dump()
    for name, value in model.fields.items():  # nothing of the original is lost
        if name not in ("transformers_version", "architectures", "dtype", "torch_dtype"):
            assert fields[name] == (IDS.pad if name == "pad_token_id" else value), name


def open_folder_tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> (type, bytes), read by safetensors itself."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (it has no __iter__)
                tensor = stream.get_tensor(name)
                bits = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                tensors[name] = (str(tensor.dtype), bits)
    return tensors


@pytest.mark.parametrize("option", ["llama dynamic", "mistral window", "llama yarn"])
def test_decoding_with_a_cache_equals_the_whole_row(option: str, tmp_path: Path) -> None:
    """Windows and scalings that look at positions hold under the key/value cache too."""
    from maxllm.config.generation import GenerationConfig
    from maxllm.data.instruct import pad_prompts
    from maxllm.generate.decode import generate
    from maxllm.weights import Weights

    theirs = their_model(option, "float32", tmp_path)
    params, config = read_folder(tmp_path)
    config = config.model_copy(update={"dtype": "float32"})
    prompts = [list(range(3, 14)), [7, 5]]
    decode = jax.jit(
        lambda params, batch: generate(
            Llama(config),
            Weights(params),
            batch,
            jax.random.key(0),
            GenerationConfig(max_new_tokens=12),
            (119,),
            0,
        )
    )
    rollout = decode(params, pad_prompts(prompts, 11, 0))
    for row, prompt in enumerate(prompts if option != "llama dynamic" else prompts[:1]):
        greedy = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=119)
        mask_R = np.asarray(rollout.mask_BR[row]) > 0
        assert np.asarray(rollout.tokens_BT[row, 11:])[mask_R].tolist() == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"model_type": "gemma3"}, ("model_type='gemma3'", "closest is llama")),
        ({"model_type": "mixtral"}, ("model_type='mixtral'", "closest is mistral")),
        ({"model_type": "qwen2_moe"}, ("model_type='qwen2_moe'", "closest is qwen2")),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            ("mixes full_attention and sliding_attention layers", "max_window_layers=1"),
        ),
    ],
)
def test_an_architecture_that_is_not_ours_is_named(fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        config_of(SIZES | fields, "config.json")
    for part in parts:
        assert part in str(error.value)


def test_stored_tie(tmp_path: Path) -> None:
    """Tied embeddings that are stored twice are read once; if they differ, they are not tied."""
    from safetensors.numpy import load_file, save_file

    their_model("llama tied", "float32", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    params, _ = read_folder(tmp_path)
    assert "lm_head" not in params
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        read_folder(tmp_path)


def test_pickle_is_refused_unless_asked_for_and_then_read_safely(tmp_path: Path) -> None:
    import pickle

    theirs = their_model("llama", "bfloat16", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {f"module.{name}": weight.to(torch.bfloat16) for name, weight in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle \(pytorch_model.bin\).*--allow-pickle"):
        open_model(tmp_path)
    model = open_model(tmp_path, allow_pickle=True)
    params = load(model.source, model.config, abstract_params(model.config))
    wanted = mapping.from_hf({n: w.float().numpy() for n, w in theirs.state_dict().items()}, model.config)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "owned", "x"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(UserError, match="cannot be read safely"):
        open_model(tmp_path, allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("form", ["tutorial", "meta"])
def test_the_original_layout(form: str, tmp_path: Path) -> None:
    """w1/w2/w3 names and neighbouring rotary pairs, against that model written out here."""
    D, L, H, G, F, V, K = 32, 2, 4, 2, 64, 50, 8
    rng = np.random.default_rng(0)
    shapes = {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}
    for layer in range(L):
        at = f"layers.{layer}."
        shapes |= {f"{at}attention_norm.weight": (D,), f"{at}ffn_norm.weight": (D,)}
        shapes |= {f"{at}attention.{w}.weight": (n * K, D) for w, n in (("wq", H), ("wk", G), ("wv", G))}
        shapes |= {f"{at}attention.wo.weight": (D, H * K), f"{at}feed_forward.w2.weight": (D, F)}
        shapes |= {f"{at}feed_forward.{w}.weight": (F, D) for w in ("w1", "w3")}
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = {"dim": D, "n_layers": L, "n_heads": H, "n_kv_heads": G, "norm_eps": 1e-5, "max_seq_len": 64}
    if form == "tutorial":
        weights["output.weight"] = weights["tok_embeddings.weight"]
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "Tiny-K", "vocab_size": V, **sizes}))
    else:
        (tmp_path / "params.json").write_text(json.dumps(sizes))
    torch.save({name: torch.tensor(w) for name, w in weights.items()}, tmp_path / "model.pth")
    model = open_model(tmp_path, allow_pickle=True)
    assert model.config.tie_embeddings is (form == "tutorial")
    params = load(model.source, model.config, abstract_params(model.config))
    tokens_BT = rng.integers(0, V, (1, 12))
    logits = logits_of(model.config, tokens_BT)
    wanted = interleaved_llama(weights, tokens_BT[0], L, H, G, K)
    atol = rounding.of_network(logits, params, terms=F)
    np.testing.assert_allclose(logits(params)[0], wanted, atol=atol, rtol=0)


def interleaved_llama(w: dict[str, np.ndarray], tokens: np.ndarray, L: int, H: int, G: int, K: int) -> Any:
    """LLaMA's forward pass in NumPy with complex rotary pairs (2i, 2i + 1), as in Meta's model.py."""

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    T = len(tokens)
    angle = np.outer(np.arange(T), 10_000.0 ** (-np.arange(0, K, 2) / K))
    turn = np.exp(1j * angle)[:, None, :]

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["tok_embeddings.weight"][tokens].astype(np.float64)
    for layer in range(L):
        at = f"layers.{layer}."
        h = norm(x, w[f"{at}attention_norm.weight"])
        q = rotate((h @ w[f"{at}attention.wq.weight"].T).reshape(T, H, K))
        k = rotate((h @ w[f"{at}attention.wk.weight"].T).reshape(T, G, K)).repeat(H // G, axis=1)
        v = (h @ w[f"{at}attention.wv.weight"].T).reshape(T, G, K).repeat(H // G, axis=1)
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(K)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("hts,shk->thk", probs / probs.sum(-1, keepdims=True), v).reshape(T, H * K)
        x = x + o @ w[f"{at}attention.wo.weight"].T
        h = norm(x, w[f"{at}ffn_norm.weight"])
        gate = h @ w[f"{at}feed_forward.w1.weight"].T
        up = h @ w[f"{at}feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T
