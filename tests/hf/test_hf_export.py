"""Export: the tensor table, the configuration both ways, whole folders, and their verification."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_models import SCALING, TINY, hf_config, random_params, read_folder, tiny
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig as HfGenerationConfig
from transformers import GPT2Config, LlamaConfig

from maxllm import __version__
from maxllm.config.data import TokenizerConfig
from maxllm.config.generation import GenerationConfig
from maxllm.config.model import RopeScaling
from maxllm.data.spm import SpmTokenizer, train
from maxllm.data.tokenizer import EOS, IM_END, PAD
from maxllm.errors import UserError
from maxllm.hf import export as export_module
from maxllm.hf import mapping
from maxllm.hf.config import LOCAL_FIELDS, model_config_from_hf
from maxllm.hf.export import export
from maxllm.hf.verify import verify_greedy
from maxllm.model.llama import Llama


@pytest.fixture(scope="module")
def tokenizer() -> SpmTokenizer:
    texts = [path.read_text() for path in Path(export_module.__file__).parent.glob("*.py")]
    return train(texts, TokenizerConfig(path="unused", vocab_size=TINY.vocab_size))


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_table_covers_the_models_own_tree(tied: bool) -> None:
    config = tiny(tie_embeddings=tied)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    abstract = jax.eval_shape(Llama(config).init, jax.random.key(0), ids, ids, ids)["params"]
    params = random_params(config)
    assert jax.tree.map(lambda leaf: leaf.shape, nn.unbox(abstract)) == jax.tree.map(
        lambda a: a.shape, params
    )
    boxed = jax.tree.map(
        lambda box, a: box.replace_boxed(a),
        abstract,
        params,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
    back = mapping.from_hf(mapping.to_hf(boxed, config), config)  # as init gives them, and back
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_wrong_set_of_tensors_is_one_error_that_lists_all() -> None:
    tensors = mapping.to_hf(random_params(TINY), TINY)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)
    tensors["lm_head.bias"] = np.zeros(600, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    with pytest.raises(UserError) as error:
        mapping.from_hf(tensors, TINY)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.3.mlp.up_proj.weight is not part of the model",
        "lm_head.bias is not part of the model",
        "model.layers.0.self_attn.q_proj.weight is (32, 31), (32, 32) expected",
    ):
        assert part in str(error.value)


def test_parameters_of_another_configuration_are_refused() -> None:
    with pytest.raises(UserError, match=r"lm_head is missing.*decoder/layers/mlp/w_up is \(3, 32, 40\)"):
        mapping.to_hf(random_params(tiny(tie_embeddings=True)), tiny(d_ff=48))


# --- the configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "G, tied, scaling, head_dim",
    list(itertools.product([4, 2, 1], [False, True], [None, SCALING], [None, 12])),
)
def test_config_round_trip(G: int, tied: bool, scaling: RopeScaling | None, head_dim: int | None) -> None:
    config = tiny(n_kv_heads=G, tie_embeddings=tied, rope_scaling=scaling, head_dim=head_dim)
    config = config.model_copy(
        update={"attention_dropout": 0.1, "init_std": 0.03, "norm_eps": 1e-6, "rope_theta": 5e5}
        | {"embedding_dropout": 0.2, "residual_dropout": 0.3, "remat": "full", "scan_unroll": 3}
    )
    theirs = hf_config(config)
    assert model_config_from_hf(theirs, like=config) == config
    reread = LlamaConfig(**theirs.to_dict())
    assert model_config_from_hf(reread, like=config) == config
    carried = config.model_dump(exclude=set(LOCAL_FIELDS))
    assert model_config_from_hf(theirs).model_dump(exclude=set(LOCAL_FIELDS)) == carried


def test_config_names_its_special_tokens() -> None:
    theirs = hf_config(TINY)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, [2, 4], 5)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"mlp_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 64,
                    "long_factor": [1.0] * 64,
                }
            },
            "rope_type='longrope'",
        ),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
    ],
)
def test_what_we_do_not_carry_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        model_config_from_hf(LlamaConfig(**changes))
    assert named in str(error.value)


def test_another_model_type_is_refused() -> None:
    with pytest.raises(UserError, match="model_type='gpt2'"):
        model_config_from_hf(GPT2Config())


def test_heads_that_hugging_face_refuses_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"hidden size \(30\) is not a multiple"):
        hf_config(tiny(d_model=30, head_dim=8))


# --- folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_round_trip_is_byte_identical(tied: bool, tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    config = tiny(tie_embeddings=tied, rope_scaling=SCALING)
    params = random_params(config)
    summary = export(params, config, tokenizer, tmp_path / "a", description="A test.")
    read, read_config = read_folder(tmp_path / "a")
    assert read_config.model_copy(update={"dtype": "float32"}) == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    export(read, read_config, tokenizer, tmp_path / "b", description="A test.")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        if name != "README.md":  # it carries the folder's name
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert summary == {
        "path": str(tmp_path / "a"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tensors": len(mapping.hf_shapes(config)),
        "bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    }


def test_folder_holds_what_transformers_reads(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    generation = GenerationConfig(max_new_tokens=9, temperature=0.7, top_k=0, top_p=0.9)
    config = tiny(rope_theta=5e5, rope_scaling=SCALING)
    export(
        random_params(config), config, tokenizer, tmp_path / "x", generation=generation, description="Why."
    )
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    }
    fields = json.loads((tmp_path / "x" / "config.json").read_text())
    assert fields["rope_theta"] == 5e5 and fields["rope_scaling"]["rope_type"] == "llama3"  # for 4.x
    assert fields["rope_parameters"]["factor"] == 8 and fields["maxllm_version"] == __version__
    read = HfGenerationConfig.from_pretrained(tmp_path / "x")
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, [2, 4], 5)
    assert (read.max_new_tokens, read.do_sample) == (9, True)
    assert (read.temperature, read.top_k, read.top_p) == (0.7, 0, 0.9)
    card = (tmp_path / "x" / "README.md").read_text()
    assert "# x\n\nWhy.\n" in card and "| Layers | 3 |" in card
    names = load_file(tmp_path / "x" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in names.items()} == mapping.hf_shapes(config)


def test_greedy_generation_defaults_have_no_sampling_fields(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    fields = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    assert fields["do_sample"] is False and not {"temperature", "top_k", "top_p"} & fields.keys()


def test_killed_export_leaves_nothing(
    tokenizer: SpmTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "save_tokenizer", killed)
    with pytest.raises(KeyboardInterrupt):
        export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_the_former_one(
    tokenizer: SpmTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    (tmp_path / ".x.partial").mkdir()  # as kill -9 leaves it
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(random_params(TINY, seed=1), TINY, tokenizer, tmp_path / "x")
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    export(random_params(TINY, seed=1), TINY, tokenizer, tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_another_program_is_not_replaced(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not ours to replace"):
        export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["config.json"]


def test_another_tokenizer_is_refused(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    config = tiny(vocab_size=599)
    with pytest.raises(UserError, match="600 pieces, the model's vocab_size is 599"):
        export(random_params(config), config, tokenizer, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_sharded_bfloat16_folder(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    params, folder = random_params(TINY), tmp_path / "x"
    export(params, TINY, tokenizer, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # as LLaMA-2's folders
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read, _ = read_folder(folder)
    wanted = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read, wanted)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-1\.safetensors, which"):
        read_folder(folder)


def test_a_folder_with_wrong_tensors_is_one_error(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {"surplus": np.zeros(1), "lm_head.weight": np.zeros((32, 600), np.float32)}
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    wanted = (
        "model.norm.weight is missing; surplus is not part of the model; "
        r"lm_head.weight is \(32, 600\), \(600, 32\) expected"
    )
    with pytest.raises(UserError, match=wanted):
        read_folder(tmp_path / "x")


def test_folders_that_cannot_be_read(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_folder(tmp_path)
    export(random_params(TINY), TINY, tokenizer, tmp_path / "x")
    weights = tmp_path / "x" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_folder(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged: it holds no JSON object"):
        read_folder(tmp_path / "x")


# --- verification -----------------------------------------------------------------------------------------


def our_greedy(params: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Greedy decoding without a cache: the whole row again for each token."""
    length = max(map(len, prompts)) + n
    positions = jnp.arange(length)[None]
    apply = jax.jit(
        lambda tokens, segments: Llama(TINY).apply({"params": params}, tokens, segments, positions)
    )
    generated = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + n and not (len(ids) > len(prompt) and ids[-1] in (EOS, IM_END)):
            row = np.full((1, length), PAD)
            row[0, : len(ids)] = ids
            logits = apply(jnp.asarray(row), jnp.asarray(np.arange(length) < len(ids), jnp.int32)[None])
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        generated.append(ids[len(prompt) :])
    return generated


def test_verification_tells_a_true_export_from_a_perturbed_one(
    tokenizer: SpmTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    params = random_params(TINY)
    sampling = GenerationConfig(temperature=1.0, top_k=5)  # must not reach the verification
    export(params, TINY, tokenizer, tmp_path / "x", generation=sampling)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 600, length).tolist() for length in (3, 8, 5)]
    ours = our_greedy(params, prompts, 12)
    report = verify_greedy(tmp_path / "x", prompts, ours, 12, tokenizer)
    tokens = sum(map(len, ours))
    assert report == {"identical": True, "prompts": 3, "tokens": tokens, "first_difference": None}

    shorter = verify_greedy(tmp_path / "x", prompts[:1], [ours[0][:-1]], 12, tokenizer)
    assert shorter is not None and not shorter["identical"]
    assert shorter["first_difference"].startswith(f"prompt 0: ours has {len(ours[0]) - 1} tokens")

    params["decoder"]["layers"]["mlp"]["w_down"][1] += 5
    export(params, TINY, tokenizer, tmp_path / "x", generation=sampling)
    report = verify_greedy(tmp_path / "x", prompts, ours, 12, tokenizer)
    assert report is not None and not report["identical"]
    assert "Hugging Face" in report["first_difference"] and "logit" in report["first_difference"]


def test_verification_stops_at_a_stop_token(tokenizer: SpmTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    params = random_params(TINY)
    params["lm_head"][:] = 0
    params["lm_head"][:, EOS] = 1e-3  # every other logit is 0
    export(params, TINY, tokenizer, tmp_path / "x")
    prompts = [[7], [8], [9], [10], [11], [12]]
    ours = our_greedy(params, prompts, 4)
    assert [EOS] in ours  # the hidden states' sum is positive for some prompt
    report = verify_greedy(tmp_path / "x", prompts, ours, 4, tokenizer)
    assert report is not None and report["identical"], report


def test_without_torch_nothing_is_verified(
    tokenizer: SpmTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verify_greedy(tmp_path, [[1]], [[2]], 1, tokenizer) is None
