"""The pad token of an export: no stop token where the vocabulary has another, and one in all files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from random_models import random_params, tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer
from transformers import GenerationConfig as HfGenerationConfig

from maxllm.hf.config import config_of
from maxllm.hf.export import export
from maxllm.hf.tokenizer_read import find_tokenizer, read_generation

SMOLLM2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>")
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
LLAMA31 = (*LLAMA3[:2], "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", *LLAMA3[4:])
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_pad|>", "<|image_pad|>")
Files = dict[str, dict[str, Any]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def folder_of(
    folder: Path, tokens: tuple[str, ...], bos: str | None, eos: list[str], pad: str | None
) -> Path:
    """A model's folder as its makers publish it: bytes are ids 0 to 255, then `tokens`."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    ids = {token: backend.token_to_id(token) for token in tokens}
    named = {"bos_token": bos, "eos_token": eos[0], "pad_token": pad}
    special = {f"{name}_id": ids[token] for name, token in named.items() if token is not None}
    files: Files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}
        | {name: token for name, token in named.items() if token is not None},
        "config.json": AutoConfig.for_model(
            "llama",
            vocab_size=300,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            **special,
        ).to_dict(),
        "generation_config.json": special | {"eos_token_id": [ids[token] for token in eos], "top_k": 7},
    }
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields))
    return folder


def exported(source: Path, target: Path) -> dict[str, Any]:
    """Read and written again, as `maxllm convert` does; what is told of it."""
    fields = read(source / "config.json")
    found, config = find_tokenizer(source, fields), config_of(fields, "config.json")
    written = export(
        random_params(config),
        config,
        found.tokenizer,
        target,
        base=fields,
        base_generation=read_generation(source),
    )
    assert found.report().get("padding") == written.get("padding")
    return written


def pads(folder: Path) -> tuple[Any, ...]:
    """The pad token by each of the files, as `transformers` reads them."""
    return (
        AutoTokenizer.from_pretrained(folder).pad_token_id,
        AutoConfig.from_pretrained(folder).pad_token_id,
        HfGenerationConfig.from_pretrained(folder).pad_token_id,
    )


@pytest.mark.parametrize(
    ("tokens", "bos", "eos", "pad", "wanted"),
    [
        (SMOLLM2, "<|im_start|>", ["<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
        (QWEN, None, ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>", "<|vision_pad|>"),
        (LLAMA3, LLAMA3[0], ["<|eot_id|>", "<|end_of_text|>"], None, "<|reserved_special_token_0|>"),
        (LLAMA31, LLAMA3[0], ["<|eot_id|>", "<|end_of_text|>"], None, "<|finetune_right_pad_id|>"),
        (("<unk>", "</s>", "[PAD]"), None, ["</s>"], "[PAD]", "[PAD]"),
        (("<unk>", "</s>", "[PAD]"), None, ["</s>", "[PAD]"], "[PAD]", "<unk>"),
        (("</s>", "[PAD]", "[X]"), None, ["</s>", "[PAD]"], "[PAD]", None),
        (("<|endoftext|>",), "<|endoftext|>", ["<|endoftext|>"], None, None),
        (("<|endoftext|>",), "<|endoftext|>", ["<|endoftext|>"], "<|endoftext|>", None),
    ],
    ids=[
        "SmolLM2",
        "Qwen2.5",
        "LLaMA 3",
        "LLaMA 3.1",
        "its own",
        "unknown",
        "all stop",
        "one, no pad",
        "one",
    ],
)
def test_one_pad_that_stops_nothing(
    tokens: tuple[str, ...],
    bos: str | None,
    eos: list[str],
    pad: str | None,
    wanted: str | None,
    tmp_path: Path,
) -> None:
    source = folder_of(tmp_path / "source", tokens, bos, eos, pad)
    written = exported(source, tmp_path / "out")
    assert HfGenerationConfig.from_pretrained(tmp_path / "out").top_k == 7
    found = set(pads(tmp_path / "out"))
    ids = {token: 256 + number for number, token in enumerate(tokens)}
    if wanted is None:
        assert found == {ids[pad or eos[0]]}
        assert written["padding"].startswith(f"{pad or eos[0]} (id {ids[pad or eos[0]]}) both pads and stops")
        return
    assert found == {ids[wanted]} and not found & {ids[token] for token in eos} and "padding" not in written
    assert exported(tmp_path / "out", tmp_path / "again")["parameters"] == written["parameters"]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert read(tmp_path / "again" / name) == read(tmp_path / "out" / name)


def test_a_models_own_pad_stays(tmp_path: Path) -> None:
    """Where it stops nothing, the files come out as they came."""
    source = folder_of(tmp_path / "source", (*SMOLLM2, "<pad>"), None, ["<|im_end|>"], "<repo_name>")
    exported(source, tmp_path / "out")
    assert set(pads(tmp_path / "out")) == {256 + SMOLLM2.index("<repo_name>")}
    kept = read(source / "generation_config.json")
    assert read(tmp_path / "out" / "generation_config.json") == {"bos_token_id": None} | kept


def test_a_changed_model_has_the_same_pad(tmp_path: Path) -> None:
    """Its config.json is made anew, not kept."""
    source = folder_of(tmp_path / "source", SMOLLM2, "<|im_start|>", ["<|im_end|>"], "<|im_end|>")
    fields = read(source / "config.json")
    config = tiny(vocab_size=300, rope_theta=5e5)
    tokenizer = find_tokenizer(source, fields).tokenizer
    base = {"base": fields, "base_generation": read_generation(source)}
    export(random_params(config), config, tokenizer, tmp_path / "out", **base)
    assert set(pads(tmp_path / "out")) == {256 + SMOLLM2.index("<|endoftext|>")}
