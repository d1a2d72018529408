"""Every stage trains adapters or a part of the model: runs, their continuation, and what is made of them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from maxllm.cli import main
from maxllm.folder import RunFolder
from maxllm.model.llama import Llama
from maxllm.recipe import load_recipe
from maxllm.run.session import open_session, reopen
from maxllm.stages.chat import Policies, converse
from maxllm.stages.registry import stage_of
from maxllm.stages.start import abstract_params, checkpoint_weights, load_params
from maxllm.steps.state import parameter_count

FEW = ["data.sources=['tasks:train:64']", "data.heldout_sources=['tasks:heldout:16']", "run.steps=2"]
FEW += [
    "batch.rows=8",
    "batch.sequence_length=48",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=0.05",
]
FEW += ["run.checkpoint_every=1", "run.eval_every=1", "mesh.fsdp=2"]
PPO = ["ppo.minibatches=1", "generation.max_new_tokens=4"]

# Matrices in few bits are gathered as values and scales, both at once: eight simulated devices on two cores
# can run out of threads there, and wait for each other for ever. So runs with them have replicas here.
WHOLE = "mesh.fsdp=1"
WITHIN = ["prefix.length=3", "bottleneck.width=4", "freeze.dtype=int8", WHOLE]
RUNS = {
    "sft-lora": ("sft", "policy", ["lora.rank=2"]),
    "sft-prefix": ("sft", "policy", WITHIN),
    "reward-lora": ("reward", "sft-lora", ["lora.rank=2", "lora.dora=true", "freeze.dtype=int8", WHOLE]),
    "dpo-prefix": ("dpo", "sft-prefix", [*WITHIN, "start.adapters=continue"]),
    "dpo-frozen": ("dpo", "policy", ["freeze.layers=1", "freeze.embeddings=true"]),
    "ppo-lora": ("ppo", "sft-lora", ["lora.rank=2", "lora.targets=[wq, w_down]", "freeze.dtype=nf4", WHOLE]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy_at):
    """All of RUNS, each after what it starts from."""
    folder = tmp_path_factory.mktemp("tuned")
    policy_at(folder / "policy")
    for name in RUNS:
        assert main(command(folder, name)) == 0, name
    return folder


def command(folder, name, *words):
    stage, start, settings = RUNS[name]
    own = [f"start.policy={folder / start}", f"run.dir={folder / name}"]
    if stage == "ppo":
        own += [f"start.reward={folder / 'reward-lora'}", *PPO]
    return [stage, f"{stage}/tiny_tasks_cpu_fast", *FEW, *own, *settings, *words]


def said(capsys, *words):
    """What a command that succeeds prints as JSON."""
    capsys.readouterr()
    assert main([str(word) for word in (*words, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
def test_evaluated_as_in_training(folder, capsys, name):
    recorded = {r["step"]: r["heldout"] for r in RunFolder(folder / name).records() if "heldout" in r}
    figures = said(capsys, "evaluate", folder / name, "--checkpoint", 1)
    assert {key: figures[key] for key in recorded[1]} == recorded[1]
    assert recorded[0] != recorded[2], "something was learnt"


@pytest.mark.parametrize("name", ["dpo-frozen", "ppo-lora"])
def test_goes_on_bit_for_bit(folder, name, tmp_path):
    """Without its last checkpoint a run comes to the same one again."""
    run = RunFolder(folder / name)
    shutil.copytree(run.checkpoint(2), tmp_path / "former")
    former = leaves(tmp_path / "former")
    shutil.rmtree(run.checkpoint(2))
    (folder / name / "summary.json").unlink()
    assert main(command(folder, name)) == 0
    again = leaves(run.checkpoint(2))
    assert former.keys() == again.keys() and former
    for path, content in former.items():
        np.testing.assert_array_equal(content, again[path])


def leaves(checkpoint):
    """Every array of a checkpoint."""
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "rest"):
        tree = ocp.StandardCheckpointHandler().restore(checkpoint / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def test_adapters_by_name_answer_as_their_own_runs_do(folder, capsys):
    """Beside one model, whose weights are held once: merged ones, a prefix, and one that went on from it."""
    names, ask = (
        ("sft-lora", "sft-prefix", "dpo-prefix"),
        ["--prompt", "1 2 3", "generation.max_new_tokens=6"],
    )
    words = [word for name in names for word in ("--adapter", f"{name}={folder / name}")]
    together = said(capsys, "generate", folder / "policy", *words, *ask)
    alone = [
        {"adapter": name} | reply for name in names for reply in said(capsys, "generate", folder / name, *ask)
    ]
    assert together == alone and len({tuple(reply["tokens"]) for reply in alone}) > 1
    few = ["generation.max_new_tokens=4"]
    lines = ["Hello", "/adapter dpo-prefix", "/adapter", "Hello", "/adapter none"]
    heard: list[str] = []
    adapters = [(name, RunFolder(folder / name)) for name in names]
    converse(RunFolder(folder / "policy"), lines, heard.append, few, adapters=adapters)
    assert heard[1:3] == [
        "(dpo-prefix answers)",
        "(/adapter NAME has others answer: base, sft-lora, sft-prefix, dpo-prefix; now dpo-prefix)",
    ]
    assert heard[4] == "(there is no adapter 'none'; there are base, sft-lora, sft-prefix, dpo-prefix)"
    policies, places = Policies(RunFolder(folder / "policy"), adapters, few), []
    for name in ("base", "sft-lora"):
        policies.use(name)
        shard = policies.current.weights.base["lm_head"].addressable_shards[0]
        places.append(shard.data.unsafe_buffer_pointer())
    assert len(set(places)) == 1


def test_adapters_of_another_model_are_refused(folder, capsys):
    """PPO began from a merged model."""
    words = ["generate", folder / "policy", "--prompt", "1", "generation.max_new_tokens=4"]
    assert "was trained beside" in refused(capsys, *words, "--adapter", f"a={folder / 'ppo-lora'}")
    assert "trained no adapters" in refused(capsys, *words, "--adapter", f"a={folder / 'dpo-frozen'}")
    twice = ["--adapter", f"a={folder / 'sft-lora'}"] * 2
    assert "there is a a already" in refused(capsys, *words, *twice)


def test_a_checkpoint_holds_what_is_trained(folder):
    """Counted in summary.json: of LoRA much less than a tenth, of an upper layer about its share."""
    whole = RunFolder(folder / "sft-lora").summary()
    assert whole["trained_parameters"] < whole["parameters"] / 5
    for name in RUNS:
        summary, saved = RunFolder(folder / name).summary(), leaves(RunFolder(folder / name).find())
        count = sum(array.size for path, array in saved.items() if path.startswith("params"))
        assert count == summary["trained_parameters"] < summary["parameters"], name


def test_the_reference_is_where_the_policy_began(folder):
    """The first figures of DPO are those of a policy that is its reference, adapters included: rewards of 0,
    to float32's rounding of log-probabilities of some tens."""
    for name in ("dpo-prefix", "dpo-frozen"):
        figures = [r["heldout"] for r in RunFolder(folder / name).records() if "heldout" in r]
        for reward in ("reward_chosen", "reward_rejected", "margin"):
            assert figures[0][reward] == pytest.approx(0, abs=1e-4), name
            assert abs(figures[-1][reward]) > 1e-3
    session = reopen(RunFolder(folder / "dpo-prefix"))
    kept = checkpoint_weights(session, RunFolder(folder / "sft-prefix").find())
    wanted = abstract_params(session, Llama(session.model, session.config.tuning))
    trained = load_params(RunFolder(folder / "dpo-prefix").find(), wanted)
    assert jax.tree.structure(trained) == jax.tree.structure(kept.adapters)


@pytest.mark.parametrize(("stage", "whole", "adapters"), [("dpo", 4, 1), ("ppo", 8, 2)])
def test_no_second_model_is_kept_for_the_reference(folder, stage, whole, adapters):
    """A run of DPO with adapters holds one model, where else it holds the policy, two moments and the
    reference; of PPO one policy and one reward model, instead of two trained and two frozen ones."""
    words = [f"start.policy={folder / 'policy'}", f"start.reward={folder / 'reward-lora'}"]
    words += [*FEW, *(PPO if stage == "ppo" else ())]
    for tuning, models in (("lora=null", whole), ("lora={rank: 1, targets: [wq]}", adapters)):
        session = open_session(
            load_recipe(f"{stage}/tiny_tasks_cpu_fast", [*words, "run.dir=unused", tuning])
        )
        program = stage_of(stage).program(session.config, session.model, session.mesh)
        held = parameter_count((program.abstract_state, program.frozen))
        assert held == pytest.approx(models * program.parameters, rel=0.2)  # scalar models have no lm_head


@pytest.mark.parametrize("name", ["sft-lora", "dpo-frozen", "ppo-lora"])
def test_exported_whole(folder, capsys, tmp_path, name):
    """As Hugging Face's own model, which decodes token for token as we do."""
    pytest.importorskip("torch")
    written = said(capsys, "export", folder / name, tmp_path / "hf")
    assert written["greedy_identical"] is True
    if name == "ppo-lora":
        written = said(capsys, "export", folder / name, tmp_path / "critic", "--critic")
        assert written["max_abs_score_diff"] < 1e-3


def test_exported_for_peft(folder, capsys, tmp_path):
    for name in ("sft-lora", "ppo-lora"):
        written = said(capsys, "export", folder / name, tmp_path / name, "--base", "some/base")
        assert written["parameters"] == RunFolder(folder / name).summary()["trained_parameters"]
    assert "PEFT has no bottleneck adapters" in refused(
        capsys, "export", folder / "sft-prefix", tmp_path / "x", "--base", "b"
    )
    assert "trained no adapters" in refused(
        capsys, "export", folder / "dpo-frozen", tmp_path / "x", "--base", "b"
    )
    assert not (tmp_path / "x").exists()


def test_adapters_of_peft_beside_a_run(folder, capsys, tmp_path):
    """Exported and read again, they say the same as the run that trained them, and are trained on."""
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    said(capsys, "export", folder / "sft-lora", adapter, "--base", "some/base")
    figures = said(capsys, "convert", "from-peft", adapter, run, "--base", folder / "policy")
    assert figures["adapters"] == "lora" and figures["beside"].endswith("policy, step 0")
    prompt = ["--prompt", "What is 1 + 1?", "generation.temperature=0", "generation.max_new_tokens=8"]
    texts = [said(capsys, "generate", each, *prompt)[0]["text"] for each in (folder / "sft-lora", run)]
    assert texts[0] == texts[1]
    start = [f"start.policy={run}", f"run.dir={tmp_path / 'on'}", "start.adapters=continue", "lora.rank=2"]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *FEW, *start]) == 0
    first = next(r["heldout"] for r in RunFolder(tmp_path / "on").records() if "heldout" in r)
    last = RunFolder(folder / "sft-lora").summary()["heldout_last"]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert "needs --base RUN" in refused(capsys, "convert", "from-peft", adapter, tmp_path / "other")
    error = refused(capsys, "convert", "from-hf", adapter, tmp_path / "other", "--base", folder / "policy")
    assert "nothing else has it" in error and not (tmp_path / "other").exists()


def test_what_lies_beside_the_weights_is_used_and_never_dropped(folder, capsys, tmp_path):
    """Generation has it; whole models without it are refused, and stages that would leave it behind."""
    prompt = ["--prompt", "What is 1 + 1?", "generation.temperature=0", "generation.max_new_tokens=8"]
    texts = [said(capsys, "generate", folder / name, *prompt) for name in ("policy", "sft-prefix")]
    assert texts[0] != texts[1]
    error = refused(capsys, "export", folder / "sft-prefix", tmp_path / "hf")
    assert "bottleneck and prefix" in error and "no weight of the model can take up" in error
    error = refused(capsys, "convert", "to-hf", folder / "sft-prefix", tmp_path / "hf")
    assert "no weight of the model can take up" in error
    start = [f"start.policy={folder / 'sft-prefix'}", f"run.dir={tmp_path / 'next'}"]
    error = refused(capsys, "sft", "sft/tiny_tasks_cpu_fast", *FEW, *start)
    words = "bottleneck.width=4 prefix.length=3 freeze.dtype=int8"
    assert f"train them on with start.adapters=continue {words}" in error
    error = refused(
        capsys, "sft", "sft/tiny_tasks_cpu_fast", *FEW, *start, "prefix.length=4", "start.adapters=continue"
    )
    assert f"give this recipe the settings that it had, {words}, in place of prefix.length=4" in error
    start[0] = f"start.policy={folder / 'policy'}"
    error = refused(
        capsys, "sft", "sft/tiny_tasks_cpu_fast", *FEW, *start, "lora.rank=4", "start.adapters=continue"
    )
    assert "trained no adapters to continue" in error
    error = refused(capsys, "sft", "sft/tiny_tasks_cpu_fast", *FEW, *start, "freeze.layers=2")
    assert "leaves none of the model's 2 layers to train" in error
    few = ["lora.rank=2", "freeze.dtype=nf4"]
    error = refused(capsys, "sft", "sft/tiny_tasks_cpu_fast", *FEW, *start, *few)
    assert "can wait for ever on simulated CPU devices; give mesh.fsdp=1 mesh.context=1" in error
    assert not Path(tmp_path / "next" / "checkpoints").exists()
