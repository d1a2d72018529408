"""What a folder says in several places: which weights, which stop tokens, which tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_models import TINY, random_params, read_folder, tiny
from safetensors.numpy import load_file, save_file

from maxllm.config.data import TokenizerConfig
from maxllm.data.bpe import FastTokenizer
from maxllm.data.spm import SpmTokenizer, train
from maxllm.data.tokenizer import CHAT_TEMPLATE
from maxllm.errors import RunFailed, UserError, listed
from maxllm.hf import export as export_module
from maxllm.hf import generation, mapping
from maxllm.hf.export import export
from maxllm.hf.folder import open_model
from maxllm.hf.source import INDEX, WEIGHTS
from maxllm.hf.tokenizer_read import find_tokenizer, read_tokenizer
from maxllm.hf.verify import check_tensors
from maxllm.hf.verify_tokenizer import check_tokenization

TEXTS = [path.read_text() for path in Path(export_module.__file__).parent.glob("*.py")]


@pytest.fixture(scope="module")
def tokenizer() -> SpmTokenizer:
    return train(TEXTS, TokenizerConfig(path="unused", vocab_size=TINY.vocab_size))


@pytest.fixture(scope="module")
def exported(tokenizer: SpmTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "x"
    export(random_params(TINY), TINY, tokenizer, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "x"))


def change(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; None takes a field away."""
    fields = json.loads(file.read_text()) if file.is_file() else {}
    merged = {name: value for name, value in (fields | changes).items() if value is not None}
    file.write_text(json.dumps(merged))


# Weights


def shard(folder: Path, place: Callable[[int], str]) -> dict[str, str]:
    """The weights in several files, with their index."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: place(number) for number, name in enumerate(tensors)}
    (folder / WEIGHTS).unlink()
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_two_sets_of_weights_are_refused_by_name(exported: Path, folder: Path) -> None:
    """The single file of a newer save beside the shards of an older one, which transformers does not read."""
    shard(folder, lambda number: f"model-{number % 2}.safetensors")
    read_folder(folder)
    shutil.copy(exported / WEIGHTS, folder / WEIGHTS)
    says = (
        r"two sets of weights, model.safetensors and model-0.safetensors, model-1.safetensors of .*index.json"
    )
    with pytest.raises(UserError, match=says):
        open_model(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/elsewhere/b.safetensors", "a/../../b.safetensors"]
)
def test_an_index_stays_in_its_folder(folder: Path, name: str) -> None:
    weight_map = shard(folder, lambda number: "model-0.safetensors")
    shutil.copy(folder / "model-0.safetensors", folder.parent / "other.safetensors")
    outside = weight_map | {"model.norm.weight": name}
    (folder / INDEX).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(UserError, match="names files outside its folder") as error:
        open_model(folder)
    assert name in str(error.value)


@pytest.mark.parametrize("right", [0, 1])
def test_the_index_decides_where_a_tensor_lies(folder: Path, right: int) -> None:
    """It lies in both files, with other values in the one that the index does not name."""
    name = "model.norm.weight"
    params, _ = read_folder(folder)
    tensors = load_file(folder / WEIGHTS)
    shard(folder, lambda number: f"model-{number % 2}.safetensors")
    for number in (0, 1):
        file = folder / f"model-{number}.safetensors"
        scale = 1 if number == right else 7
        save_file(load_file(file) | {name: tensors[name] * scale}, file)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    weight_map[name] = f"model-{right}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, read_folder(folder)[0], params)
    weight_map["model.layers.0.mlp.up_proj.weight"] = "model-0.safetensors"
    weight_map["model.layers.0.mlp.gate_proj.weight"] = "model-0.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"has no model.layers.0.mlp.\w+_proj.weight in model-0.safetensors"):
        open_model(folder)


def test_a_decoder_alone_is_read_where_it_is_a_whole_model(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    """As `LlamaModel.save_pretrained` writes it: no prefix, no head."""
    for tied in (True, False):
        config, place = tiny(tie_embeddings=tied), tmp_path / str(tied)
        params = random_params(config)
        export(params, config, tokenizer, place)
        tensors = load_file(place / WEIGHTS)
        bare = {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}
        save_file(bare, place / WEIGHTS)
        if tied:
            jax.tree.map(np.testing.assert_array_equal, read_folder(place)[0], params)
            continue
        with pytest.raises(UserError, match=r"holds the decoder alone, without lm_head.weight"):
            open_model(place)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_hold_nan_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / WEIGHTS)
    params, config = read_folder(folder)
    says = r"the weights in .* hold NaN or infinity: in model.layers.1.mlp.up_proj.weight$"
    with pytest.raises(RunFailed, match=says):
        check_tensors(open_model(folder).source, params, config)


def test_sentences_name_a_few_of_many() -> None:
    assert listed(["a", "b"]) == "a, b" and listed(map(str, range(600)), 2) == "0, 1 and 598 more"
    found = {f"layer.{number}": (1,) for number in range(600)}
    with pytest.raises(UserError) as error:
        mapping.check_shapes(found, {f"x.{number}": (2,) for number in range(600)}, "it")
    assert "x.0 is missing" in str(error.value) and "layer.0 is not part of the model" in str(error.value)
    assert len(str(error.value)) < 600 and str(error.value).count("and 594 more") == 2


# Stop tokens


@pytest.mark.parametrize(
    "places",
    [
        {"generation_config.json": [2]},
        {"config.json": 2},
        {"tokenizer_config.json": "</s>"},
        {"special_tokens_map.json": {"content": "</s>"}},
        {"generation_config.json": 4, "config.json": [2, 7], "special_tokens_map.json": "</s>"},
    ],
)
def test_stop_tokens_are_found_wherever_they_stand(folder: Path, places: dict[str, Any]) -> None:
    (folder / "tokenizer.model").unlink()
    names = ("generation_config.json", "config.json", "tokenizer_config.json", "special_tokens_map.json")
    wanted: dict[int, list[str]] = {}
    for name in names:
        value = places.get(name)
        if name != "special_tokens_map.json" or value is not None:
            field = "eos_token" if name in names[2:] else "eos_token_id"
            change(folder / name, **{field: value, "stop_token_ids": None})
        for i in [2] if name in names[2:] and value else value if isinstance(value, list) else [value]:
            wanted.setdefault(i, []).append(name)
    wanted.pop(None, None)  # type: ignore[call-overload]
    found = find_tokenizer(folder, json.loads((folder / "config.json").read_text()))
    assert found.tokenizer.stop_tokens == tuple(wanted) and found.tokenizer.eos == 2
    told = {entry["id"]: entry["in"] for entry in found.report()["stop_tokens"]}
    assert told == wanted and found.report()["stop_tokens"][0]["token"] in ("</s>", "<|im_end|>")


def test_an_export_has_all_stop_tokens_and_no_pad_among_them(folder: Path, tmp_path: Path) -> None:
    """config.json names [2, 5, 7]; 5 was the pad token, and <unk> is free."""
    fields = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 5, 7]}
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer = read_tokenizer(folder, fields)
    assert set(tokenizer.stop_tokens) == {2, 4, 5, 7} and tokenizer.pad == 0
    kept = json.loads((folder / "generation_config.json").read_text())
    export(random_params(TINY), TINY, tokenizer, tmp_path / "y", base=fields, base_generation=kept)
    written = json.loads((tmp_path / "y" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {2, 4, 5, 7} and written["pad_token_id"] == 0


# generation_config.json and config.json


def test_generation_defaults_come_in_and_go_back(folder: Path, tmp_path: Path) -> None:
    kept = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "my_field": [1]}
    kept |= {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 5, "num_beams": 1}
    assert generation.settings_of(kept, 128) == {
        "max_new_tokens": 64,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 50,
    }
    assert generation.settings_of(kept | {"do_sample": False, "max_new_tokens": 9}, 128) == {
        "max_new_tokens": 9
    }
    assert generation.not_followed(kept) == ["repetition_penalty=1.1"]
    tokenizer, fields = read_tokenizer(folder, {}), json.loads((folder / "config.json").read_text())
    assert generation.fields_of(tokenizer, None, kept, fields) == kept


@pytest.mark.parametrize("names", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_the_type_of_the_weights_stands_once(folder: Path, tmp_path: Path, names: list[str]) -> None:
    base = json.loads((folder / "config.json").read_text())
    base.pop("dtype")
    base |= dict.fromkeys(names, "bfloat16")
    for number, config in enumerate((TINY, tiny(rope_theta=5e5))):  # the same model, and a changed one
        place = tmp_path / f"{number}"
        export(random_params(config), config, read_tokenizer(folder, {}), place, dtype="float16", base=base)
        fields = json.loads((place / "config.json").read_text())
        found = {name: fields[name] for name in ("dtype", "torch_dtype") if name in fields}
        assert list(found.values()) == ["float16"]


# Tokenizers


def test_a_folder_saved_again_is_still_ours(folder: Path, tokenizer: SpmTokenizer) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert read_tokenizer(folder, {}) == tokenizer
    assert find_tokenizer(folder, {}).report()["tokenizer"] == "tokenizer.model"


def test_a_folder_that_was_edited_is_read_as_it_is_now(folder: Path) -> None:
    """A token added and the template changed by transformers, which leaves our tokenizer.model as it was."""
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<tool>"])
    theirs.chat_template = CHAT_TEMPLATE.replace("'assistant\\n'", "'assistant\\n<tool>'")
    theirs.save_pretrained(folder)
    found = find_tokenizer(folder, {})
    assert isinstance(found.tokenizer, FastTokenizer) and found.tokenizer.vocab_size == 601
    assert found.tokenizer.chat_template == theirs.chat_template
    assert found.tokenizer.encode("a<tool>")[-1] == 600
    assert "tokenizer.model alone would say something else" in found.report()["tokenizer"]
    assert check_tokenization(found.tokenizer, folder) > 30


def test_a_wrong_tokenizer_is_noticed(folder: Path, tokenizer: SpmTokenizer) -> None:
    assert check_tokenization(tokenizer, folder) > 30
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        RunFailed, match=r"the tokenizer does not say what transformers says: '.*' has the ids"
    ):
        check_tokenization(tokenizer, folder)
