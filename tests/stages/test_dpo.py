"""`maxllm dpo` on a model of two layers: what a run leaves, that it continues, and what it measures."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxllm.cli import main
from maxllm.folder import RunFolder
from maxllm.run.checkpoint import Checkpoints, Keep
from maxllm.run.restore import load_params
from maxllm.steps.state import TrainState

STEPS, BETA = 8, 0.1


@pytest.fixture(scope="module")
def policy(tmp_path_factory, policy_at):
    """The folder of a model to start from."""
    return policy_at(tmp_path_factory.mktemp("dpo") / "policy")


@pytest.fixture
def dpo(policy, capsys):
    """dpo(run folder, *words): the summary of the command, here on eight simulated devices."""

    def run(folder, *words):
        words = (f"start.policy={policy}", f"run.dir={folder}", f"run.steps={STEPS}", *words)
        few = ["data.sources=[tasks:train:64]", "data.heldout_sources=[tasks:heldout:64]"]
        small = ["batch.rows=8", "batch.sequence_length=48", "run.checkpoint_every=4", "run.eval_every=4"]
        rate = ["dpo.nll=0", "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=0"]
        code = main(["dpo", "dpo/tiny_tasks_cpu_fast", "mesh.fsdp=2", *few, *small, *rate, *words, "--json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    return run


def arrays(folder, step=STEPS):
    """Every array of a checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {
            item: checkpointer.restore((folder / "checkpoints" / str(step) / item).absolute())
            for item in ("params", "rest")
        }
    return {
        jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(trees)
    }


def train_on(policy):
    """Another checkpoint in the folder of a model, of other weights."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(RunFolder(policy).find() / "params").item_metadata.tree
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), saved)
    params = jax.tree.map(lambda w: 1.5 * w, load_params(RunFolder(policy).find(), wanted))
    checkpoints = Checkpoints(RunFolder(policy), Keep(3))
    checkpoints.save(60, TrainState(jnp.int32(60), params, {"m": jnp.zeros(())}))
    checkpoints.close()


def test_adapters_stay_beside_the_weights_they_were_trained_on(policy_at, tmp_path, capsys, monkeypatch):
    """The parent trains on, and both folders are opened from elsewhere: evaluation, replies and export are
    those of before; and it says what is gone."""
    monkeypatch.chdir(tmp_path)
    policy, folder = policy_at(Path("policy")), Path("lora")
    words = [f"start.policy={policy}", f"run.dir={folder}", "lora.rank=2", "run.steps=2", "batch.rows=8"]
    few = ["data.sources=[tasks:train:64]", "data.heldout_sources=[tasks:heldout:16]", "mesh.fsdp=2"]
    few += ["batch.sequence_length=48", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.1"]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, *few]) == 0
    generate = ["generate", str(folder), "--prompt", "What?", "generation.temperature=0", "--json"]
    said = []
    for turn in range(2):
        capsys.readouterr()
        for command in (["evaluate", str(folder), "--json"], generate):
            assert main(command) == 0
        said.append(capsys.readouterr().out)
        if turn == 0:
            train_on(policy)
            monkeypatch.chdir(tmp_path.parent)
            policy, folder = tmp_path / "policy", tmp_path / "lora"
            generate[1] = str(folder)
    assert said[0] == said[1].replace(str(folder), "lora")
    shutil.rmtree(policy / "checkpoints" / "0")
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "began from step 0 of" in error and "holds steps 60 now" in error


def test_a_run_and_its_continuation(dpo, policy, tmp_path, capsys):
    """Rewards are measured from where the policy began, to float32's rounding of log-probabilities of some
    tens. What is trained is measured, for this model only learns by heart. A run without its last checkpoint
    comes to the same one again, bit for bit, though its reference's folder holds a newer checkpoint now."""
    folder = tmp_path / "run"
    summary = dpo(folder)
    first, last = summary["heldout_first"], summary["heldout_last"]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert first["margin"] == first["reward_chosen"] == first["accuracy"] == 0
    for name in ("chosen", "rejected"):
        moved = BETA * (last[f"logp_{name}"] - first[f"logp_{name}"])
        assert abs(moved) > 1e-2
        assert last[f"reward_{name}"] == pytest.approx(moved, abs=1e-5)
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.5
    assert (summary["heldout_items"], summary["heldout_questions"]) == (64, 64)
    assert summary["tokens"] == STEPS * 2 * 8 * 48

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    train_on(policy)
    assert dpo(again)["heldout_last"] == last
    ours, wanted = arrays(again), arrays(folder)
    assert ours.keys() == wanted.keys() and len(wanted) > 20
    for name, array in wanted.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)

    code = main(["evaluate", str(folder), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert code == 0 and {name: figures[name] for name in last} == last
    recorded = {r["step"]: r["heldout"] for r in RunFolder(folder).records() if "heldout" in r}
    assert main(["evaluate", str(folder), "--checkpoint", "4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["step"] == 4 and {name: figures[name] for name in last} == recorded[4] != last


def test_rows_without_answers_have_no_exact_match(dpo, tmp_path):
    rows = [{"prompt": f"Sort {i}", "chosen": "good", "rejected": "bad"} for i in range(24)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    words = (f"data.sources=['{path}']", "data.heldout_sources=[]", "data.heldout_share=0.3")
    summary = dpo(tmp_path / "run", *words, "run.steps=1")
    assert summary["heldout_questions"] == 0 and "exact_match" not in summary["heldout_last"]
