"""Adapters as `peft` loads them: the same logits as ours, beside the base and merged into it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import rounding
from random_models import IDS, TINY, random_params, tiny

from maxllm.config.tuning import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig, Tuning
from maxllm.errors import UserError
from maxllm.files import write_json
from maxllm.hf.config import hf_config_of
from maxllm.hf.peft import export_adapters, read_adapters
from maxllm.hf.write import write_weights
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.steps.state import init_params
from maxllm.weights import Weights

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402

LORA = LoraConfig(rank=4, alpha=6)
TUNINGS = {
    "paper": Tuning(LORA.model_copy(update={"targets": ("wq", "wv")})),
    "all": Tuning(LORA),
    "rslora": Tuning(LORA.model_copy(update={"rank_stabilized": True})),
    "dora": Tuning(LORA.model_copy(update={"dora": True})),
    "prefix": Tuning(prefix=PrefixConfig(length=5)),
    "prompt": Tuning(prompt=PromptConfig(length=5)),
}


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 12, "tie_embeddings": True}], ids=["plain", "wide heads"]
)
def test_peft_computes_what_we_do(name: str, changes: dict, tmp_path: Path) -> None:
    """Beside its own model, and merged where that can be."""
    config, tuning = tiny(**changes), TUNINGS[name]
    params, model = random_params(config), Llama(config, tuning)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: nn.unbox(init_params(model, key)), jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    (tmp_path / "base").mkdir()
    write_weights(tmp_path / "base", params, config)
    write_json(tmp_path / "base" / "config.json", hf_config_of(config, IDS))
    figures = export_adapters(adapters, config, tuning, str(tmp_path / "base"), tmp_path / "adapter")
    assert figures["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields.get("r", 4) == 4

    tokens = rng.integers(6, TINY.vocab_size, (2, 20))
    ones, positions = np.ones_like(tokens), np.tile(np.arange(20), (2, 1))
    logits = jax.jit(lambda weights: forward(model, weights, tokens, ones, positions))
    ours = logits(Weights(params, adapters))
    plain = forward(Llama(config), Weights(params), tokens, ones, positions)
    assert np.abs(ours - plain).max() > 0.5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close = partial(
        np.testing.assert_allclose,
        rtol=0,
        atol=rounding.of_network(logits, Weights(params, adapters), terms=config.d_ff),
    )
    with torch.no_grad():
        theirs = beside(torch.tensor(tokens)).logits.numpy()
        close(theirs[:, -tokens.shape[1] :], ours)
        if tuning.lora is not None:
            close(beside.merge_and_unload()(torch.tensor(tokens)).logits.numpy(), ours)


@pytest.mark.parametrize("name", TUNINGS)
def test_read_back(name: str, tmp_path: Path) -> None:
    """What was exported is read as it was, bit for bit, and says what it is."""
    config, tuning = tiny(), TUNINGS[name]
    shapes = jax.eval_shape(lambda key: nn.unbox(init_params(Llama(config, tuning), key)), jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    export_adapters(adapters, config, tuning, "base", tmp_path / "adapter")
    found, again = read_adapters(tmp_path / "adapter", config)
    assert found == tuning
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    with pytest.raises(UserError, match="is not of this model"):
        read_adapters(tmp_path / "adapter", tiny(d_model=2 * config.d_model, n_layers=1))


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix"])
def test_adapters_that_peft_made(kind: str, tmp_path: Path) -> None:
    """Made, filled with noise and saved by PEFT: the same logits here."""
    config = tiny()
    params, rng = random_params(config), np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    write_weights(tmp_path / "base", params, config)
    write_json(tmp_path / "base" / "config.json", hf_config_of(config, IDS))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if kind == "prefix":
        settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    else:
        modules = ["q_proj", "o_proj", "down_proj"]
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=9, use_dora=kind == "dora", target_modules=modules
        )
    beside = peft.get_peft_model(base, settings).eval()
    for parameter in beside.parameters():
        if parameter.requires_grad:
            noise = rng.normal(0, 0.2, parameter.shape).astype(np.float32)
            parameter.data = parameter.data + torch.from_numpy(noise)
    beside.save_pretrained(tmp_path / "adapter")
    tuning, adapters = read_adapters(tmp_path / "adapter", config)
    if tuning.lora is not None:
        assert set(tuning.lora.targets) == {"wq", "wo", "w_down"} and tuning.lora.dora is (kind == "dora")
    tokens = rng.integers(6, TINY.vocab_size, (2, 20))
    ones, positions = np.ones_like(tokens), np.tile(np.arange(20), (2, 1))
    logits = jax.jit(lambda weights: forward(Llama(config, tuning), weights, tokens, ones, positions))
    atol = rounding.of_network(logits, Weights(params, adapters), terms=config.d_ff)
    with torch.no_grad():
        theirs = beside(torch.tensor(tokens)).logits.numpy()[:, -20:]
    np.testing.assert_allclose(theirs, logits(Weights(params, adapters)), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 are none of ours"),
        ({"bias": "all"}, "bias=all is not what adapters can have here"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
)
def test_what_ours_cannot_be(fields: dict, why: str, tmp_path: Path) -> None:
    config, tuning = tiny(), TUNINGS["paper"]
    shapes = jax.eval_shape(lambda key: nn.unbox(init_params(Llama(config, tuning), key)), jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    folder = tmp_path / "adapter"
    export_adapters(adapters, config, tuning, "base", folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", written | fields)
    with pytest.raises(UserError, match=why):
        read_adapters(folder, config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        read_adapters(folder, config)
    with pytest.raises(UserError, match="is no folder of PEFT's adapters"):
        read_adapters(tmp_path, config)


@pytest.mark.parametrize(
    ("tuning", "why"),
    [
        (Tuning(bottleneck=BottleneckConfig()), "PEFT has no bottleneck adapters"),
        (Tuning(LORA, prefix=PrefixConfig()), "lora and prefix: PEFT's folders have adapters of one kind"),
    ],
)
def test_what_peft_does_not_have(tuning: Tuning, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        export_adapters({}, tiny(), tuning, "base", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
