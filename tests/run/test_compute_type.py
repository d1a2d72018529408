"""model.dtype=auto: bfloat16 on machines that have it, float32 on this CPU, and it is said."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from maxllm import recipe
from maxllm.cli import main
from maxllm.folder import RunFolder
from maxllm.parallel.mesh import compute_type
from maxllm.plan.estimate import model_of


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        ({"platform": "cpu"}, "float32"),
        ({"platform": "tpu"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "float32"),  # T4
        ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16"),  # A100
        ({"platform": "gpu", "compute_capability": "12.0"}, "bfloat16"),
    ],
    ids=str,
)
def test_the_type_that_a_device_has_in_hardware(device, wanted):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(**device)], object))
    assert compute_type(mesh) == wanted


def test_a_named_type_is_left_alone(tiny_model):
    assert tiny_model(dtype="auto").computed_in("bfloat16").dtype == "bfloat16"
    assert tiny_model(dtype="float32").computed_in("bfloat16").dtype == "float32"


def test_a_run_on_this_machine_says_its_type_and_keeps_what_was_asked_for(tmp_path, policy_at, capsys):
    """Its folder says auto, so that another machine chooses for itself; evaluating chooses alike."""
    policy, run = policy_at(tmp_path / "policy", max_seq_len=256, dtype="auto"), tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{n}?", "completion": f"{n}"}) for n in range(40)]
    rows.write_text("\n".join(lines))
    words = [
        f"start.policy={policy}",
        f"run.dir={run}",
        f"data.sources=['{rows}']",
        "data.heldout_sources=[]",
    ]
    words += ["data.heldout_share=0.3", "run.steps=2", "batch.rows=8", "batch.sequence_length=64"]
    words += ["generation.max_new_tokens=4", "optimizer.warmup_steps=0"]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    said = capsys.readouterr()
    assert "sft: computes in float32, as fits cpu; model.dtype=… names another type" in said.err
    assert recipe.of_run(RunFolder(run)).model.dtype == "auto"
    wanted = json.loads(said.out)["heldout_last"]["loss"]
    for words in ([], ["model.dtype=float32"]):
        assert main(["generate", str(run), "--prompt", "3?", *words]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(wanted, rel=1e-6)


def test_a_plan_is_for_machines_that_have_bfloat16():
    config = recipe.load_recipe("pretrain/llama2-7b_synthetic_v5e-256")
    assert config.model.dtype == "auto" and model_of(config).dtype == "bfloat16"
