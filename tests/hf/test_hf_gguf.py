"""GGUF: every type of weights that the `gguf` library writes, beside `transformers` on the same file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
from random_models import abstract_params, random_params, tiny

from maxllm.data import bpe
from maxllm.data.bpe import FastTokenizer
from maxllm.errors import RunFailed, UserError
from maxllm.hf import gguf as ours
from maxllm.hf import mapping
from maxllm.hf.load import load
from maxllm.hf.verify import hf_logits
from maxllm.stages import convert
from maxllm.stages.convert import our_logits

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

CONFIG = tiny(vocab_size=96, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, rope_theta=5e4)
tokenizer_of = ours.tokenizer_of
TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
PIECES = [chr(33 + i) for i in range(93)] + ["Hi", "<s>", "</s>"]
"""One character each, a merge of two, and two control tokens."""


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """q and k as llama.cpp has them: neighbouring rotary pairs, where Hugging Face's halves are apart."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, kind: str, architecture: str = "llama", **changes: Any) -> Path:
    """A random model, its matrices of one type."""
    c, names = CONFIG, {hf: theirs for theirs, hf in ours.NAMES.items()}
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=changes.get("split", 0))
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.k_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(PIECES)
    writer.add_token_types([1] * 94 + [3, 3])
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    for name, tensor in mapping.to_hf(random_params(c), c).items():
        layer = name.split(".")[2] if ".layers." in name else ""
        theirs = names[name.replace(f".{layer}.", ".{}.", 1) if layer else name].format(layer)
        if "attn_q" in theirs or "attn_k" in theirs:
            tensor = interleaved(tensor, c.n_heads if "attn_q" in theirs else c.n_kv_heads)
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor, stored)
        writer.add_tensor(theirs, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def atol() -> float:
    """Rounding of the logits of a random model, whose quantized weights are of the same size."""
    logits = partial(our_logits, CONFIG, tokens_BT=np.arange(40)[None])
    return rounding.of_network(logits, random_params(CONFIG), terms=CONFIG.d_ff)


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path, atol: float) -> None:
    path = write(tmp_path / "model.gguf", kind)
    model = ours.open_gguf(path)
    assert (model.config.n_kv_heads, model.config.k_dim, model.config.rope_theta) == (2, 16, 5e4)
    params = load(model.source, model.config, abstract_params(model.config))
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 40))
    wanted = hf_logits(tmp_path, tokens_BT, path.name)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(our_logits(model.config, params, tokens_BT), wanted, rtol=0, atol=atol)


def test_quantized_weights_are_near_what_they_were(tmp_path: Path) -> None:
    """Not only the same as another reader's: a block of 32 values keeps its largest within half a step."""
    true = mapping.to_hf(random_params(CONFIG), CONFIG)
    for kind, steps in (("F16", 2**11), ("Q8_0", 127), ("Q5_0", 15), ("Q4_0", 7)):
        source = ours.open_gguf(write(tmp_path / f"{kind}.gguf", kind)).source
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
            off = np.abs(source.read(name) - true[name]).max()
            assert off < 1.1 * np.abs(true[name]).max() / steps, (kind, name)


def test_parts_are_read_together(tmp_path: Path) -> None:
    """From whichever part is named: the same tensors, configuration and tokenizer as from one file."""
    write(tmp_path / "parts.gguf", "Q8_0", split=9)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4 and names[1] == "parts-00002-of-00004.gguf"
    one = ours.open_gguf(write(tmp_path / "one.gguf", "Q8_0"))
    for name in names[:2]:
        model = ours.open_gguf(tmp_path / name)
        assert (model.config, model.source.shapes) == (one.config, one.source.shapes)
        for tensor in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
            np.testing.assert_array_equal(model.source.read(tensor), one.source.read(tensor))
        assert ours.tokenizer_of(tmp_path / name).encode("Hi!") == [93, 0]
    (tmp_path / names[2]).rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"one of 4 parts, and parts-00003-of-00004\.gguf is not beside it"):
        ours.open_gguf(tmp_path / names[0])
    with pytest.raises(UserError, match=r"other\.gguf is one of 4 parts"):
        ours.open_gguf(tmp_path / "other.gguf")


def test_its_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = ours.tokenizer_of(write(tmp_path / "model.gguf", "F32"))
    ids = tokenizer.encode("Hi!")
    assert ids == [PIECES.index("Hi"), PIECES.index("!")] and tokenizer.decode(ids) == "Hi!"
    assert tokenizer.bos == 94 and 95 in tokenizer.stop_tokens


@pytest.mark.parametrize(("pre", "texts"), [("gpt-2", 28), ("smollm", 24)])
def test_verification_compares_ids_too(
    pre: str, texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numerals are left out where they stand alone, a rule of the file that `transformers` does not read."""
    path = write(tmp_path / "model.gguf", "F32", pre=pre)
    figures = convert.run("from-gguf", str(path), tmp_path / "run", verify=True)
    assert figures["tokenized_alike"] == texts
    monkeypatch.setattr(ours, "tokenizer_of", with_two_pieces_swapped)
    with pytest.raises(RunFailed, match="the tokenizer does not say what transformers says: 'Hello'"):
        convert.run("from-gguf", str(path), tmp_path / "other", verify=True)
    assert not (tmp_path / "other").exists()


def with_two_pieces_swapped(path: Path) -> FastTokenizer:
    """Ours of a file, but with the ids of H and h the other way round."""
    tokenizer = tokenizer_of(path)
    backend = json.loads(tokenizer.files["tokenizer.json"])
    vocab = backend["model"]["vocab"]
    vocab["H"], vocab["h"] = vocab["h"], vocab["H"]
    return bpe.checked(json.dumps(backend).encode(), tokenizer.config, str(path))


@pytest.mark.parametrize(("pre", "begins"), [("gpt-2", False), ("qwen2", False), ("llama-bpe", True)])
def test_bos_begins_a_text_where_llama_cpp_lets_it(pre: str, begins: bool, tmp_path: Path) -> None:
    """No tokenizer.ggml.add_bos_token: llama.cpp asks the kind of tokenizer (src/llama-vocab.cpp)."""
    assert ours.tokenizer_of(write(tmp_path / "model.gguf", "F32", pre=pre)).adds_bos is begins


def test_what_is_not_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"architecture 'gptneox'.*closest is llama"):
        ours.open_gguf(write(tmp_path / "neox.gguf", "F32", "gptneox"))
    with pytest.raises(UserError, match="tokenizer of the kind 'rwkv'"):
        ours.tokenizer_of(write(tmp_path / "rwkv.gguf", "F32", tokenizer="rwkv"))
    whole = (tmp_path / "rwkv.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        ours.open_gguf(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match="does not exist"):
        ours.open_gguf(tmp_path / "none.gguf")
