"""generate and chat with an imported model: what people type, what models answer, and how much of it fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from maxllm import cli
from maxllm.data.bpe import STOP_KEY, FastTokenizer
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.hf.export import export
from maxllm.hf.verify import has_torch
from maxllm.model.llama import Llama
from maxllm.run.checkpoint import save_params
from maxllm.run.restore import load_params, stored_tree
from maxllm.stages import chat, convert
from maxllm.stages import export as stage

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if 'refuse' in messages[-1]['content'] %}{{ raise_exception('not that') }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END, V = 256, 257, 320
"""A table of 320 rows, of which 258 have a piece."""


@pytest.fixture(scope="module")
def run_dir(tiny_model: Any, params_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose bytes and two control tokens, not called special, are all its pieces."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", STOP_KEY: [END]}
    tokenizer = FastTokenizer(backend.to_str().encode(), config)
    model, place = tiny_model(vocab_size=V, max_seq_len=128), tmp_path_factory.mktemp("chat")
    params = jax.tree.map(np.array, params_of(Llama(model)))
    params["lm_head"][:, 258:] *= 3  # the rows without a piece are the likeliest
    export(params, model, tokenizer, place / "hf")
    convert.run("from-hf", str(place / "hf"), place / "run")
    return place / "run"


SHORT = ["generation.max_new_tokens=8"]


def test_a_prompt_may_spell_control_tokens(run_dir: Path) -> None:
    policy = chat.Policy(RunFolder(run_dir), SHORT)
    ids = policy.prompt_ids("What does <|im_end|> mean?")
    assert [ids.count(START), ids.count(END)] == [2, 1]
    [reply] = chat.generate(RunFolder(run_dir), ["What does <|im_end|> mean?"], SHORT)
    assert isinstance(reply["text"], str)


def test_ids_without_a_piece_are_never_sampled(run_dir: Path) -> None:
    """Two thirds of the probability lie on them, greedily and at any temperature."""
    for words in (["generation.temperature=0"], ["generation.temperature=1.5"]):
        replies = chat.generate(RunFolder(run_dir), ["a", "b"], ["generation.max_new_tokens=32", *words])
        assert max(token for reply in replies for token in reply["tokens"]) < 258


def test_a_conversation_survives_whatever_is_said(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control text from both sides, a message that the template refuses, one that is too long: all in one."""
    seen: list[list[int]] = []
    reply = chat.Policy.reply

    def forging(self: chat.Policy, ids: list[int]) -> dict[str, Any]:
        reply(self, ids)
        seen.append(ids)
        return {"text": "<|im_end|>\n<|im_start|>"}

    monkeypatch.setattr(chat.Policy, "reply", forging)
    said: list[str] = []
    chat.converse(RunFolder(run_dir), ["<|im_end|>", "refuse this", "x" * 500, "y"], said.append, SHORT)
    assert said[1] == "(the chat template refuses it: not that)"
    assert said[2].startswith("(the prompt has 5") and "leaves 120" in said[2]
    assert said[0] == said[3] == "<|im_end|>\n<|im_start|>"
    assert [seen[-1].count(START), seen[-1].count(END)] == [4, 3]  # two questions, and the reply between


def test_replies_longer_than_the_context_are_refused_at_once(run_dir: Path) -> None:
    with pytest.raises(
        UserError, match=r"=500 leaves no room for a prompt in the context of model.max_seq_len=128"
    ):
        chat.Policy(RunFolder(run_dir), ["generation.max_new_tokens=500"])


def test_a_longer_context_may_be_set_and_is_warned_of(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "x" * 150
    with pytest.raises(UserError, match=r"generation\.context=… sets a longer one"):
        chat.generate(RunFolder(run_dir), [prompt], SHORT)
    chat.generate(RunFolder(run_dir), [prompt], [*SHORT, "generation.context=256"])
    assert "generation.context=256 is more than the 128 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaling_stretches_the_context(run_dir: Path, tmp_path: Path, kind: str) -> None:
    """Hugging Face's max_position_embeddings stays the original length there."""
    fields = json.loads((run_dir.parent / "hf" / "config.json").read_text())
    for name in (run_dir.parent / "hf").iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    fields |= {"rope_parameters": rope, "rope_theta": 1e4, "rope_scaling": {"rope_type": kind, "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    convert.run("from-hf", str(tmp_path), tmp_path / "run")
    policy = chat.Policy(RunFolder(tmp_path / "run"), SHORT)
    assert (policy.session.model.max_seq_len, policy.context, policy.prompt_limit) == (128, 512, 504)
    chat.generate(RunFolder(tmp_path / "run"), ["x" * 196], SHORT)


@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_stages_of_a_pipeline_take_rows_too(run_dir: Path, tmp_path: Path, layout: tuple[int, ...]) -> None:
    """Greedily the same replies as without stages, from chat and in the check of an export."""
    words = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "stage"), layout, strict=True)]
    plain = chat.generate(RunFolder(run_dir), ["a"], SHORT)
    assert chat.generate(RunFolder(run_dir), ["a"], [*SHORT, *words]) == plain
    written = stage.run(RunFolder(run_dir), tmp_path / "hf", ("a",), overrides=words)
    assert written["greedy_prompts"] == (1 if has_torch() else 0)


def test_readers_take_the_checkpoint_they_are_told(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second checkpoint in the folder, of a model whose head says nothing but one byte."""
    shutil.copytree(run_dir, tmp_path / "run")
    folder = tmp_path / "run"
    shapes = stored_tree(RunFolder(folder).find())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        RunFolder(folder).find(),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes),
    )
    save_params(RunFolder(tmp_path / "other"), jax.tree.map(lambda w: 0 * w, params))
    (tmp_path / "other" / "checkpoints" / "0").rename(folder / "checkpoints" / "5")

    def said(*words: str) -> Any:
        assert cli.main(["generate", str(folder), "--prompt", "a", *SHORT, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]["tokens"]

    assert said() == said("--checkpoint", "latest") == said("--checkpoint", "5") == [0] * 8
    assert said("--checkpoint", "0") != [0] * 8
    assert cli.main(["export", str(folder), str(tmp_path / "hf"), "--no-verify", "--checkpoint", "0"]) == 0
    exported = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert exported == (run_dir.parent / "hf" / "model.safetensors").read_bytes()
    for verb in (["chat"], ["generate", "--prompt", "a"], ["export", str(tmp_path / "no")]):
        assert cli.main([verb[0], str(folder), *verb[1:], "--checkpoint", "3"]) == 2
        assert "holds no checkpoint of step 3: it holds steps 0, 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["chat", str(folder), "--checkpoint", "newest"])
    assert "newest is none of best, latest and the number of a step" in capsys.readouterr().err
