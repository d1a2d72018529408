"""`maxllm sft` on rows of several forms, and on texts alone, of which no answer can be right."""

import json
import math
import re
import shutil

import pytest
import yaml

from maxllm.cli import main

TEXTS = [{"text": f"Once upon a time there were {n} mice, and a cat.", "id": n} for n in range(24)]
CALLS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} + 2?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
            },
            {"role": "tool", "content": str(n + 2)},
            {"role": "assistant", "content": "Seen."},
        ],
        "tools": [{"name": "add"}],
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory, policy_at):
    """The folder of a model to start from."""
    return policy_at(tmp_path_factory.mktemp("rows") / "policy", max_seq_len=256)


@pytest.mark.parametrize("rows", [TEXTS, CALLS], ids=["texts", "calls"])
def test_two_steps(policy, tmp_path, capsys, rows):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"start.policy={policy}",
        f"data.sources=['{source}']",
        "data.heldout_share=0.3",
        "data.heldout_sources=[]",
    ]
    words += [f"run.dir={tmp_path / 'run'}", "run.steps=2", "run.eval_every=2", "run.checkpoint_every=2"]
    words += [
        "batch.rows=8",
        "batch.sequence_length=256",
        "generation.max_new_tokens=4",
        "optimizer.warmup_steps=0",
    ]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert ("exact_match" in summary["heldout_last"]) is (rows is CALLS)
    assert ("fields that are not read, with the number of rows: id (24)" in said.err) is (rows is TEXTS)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(summary["heldout_last"]["loss"], rel=1e-6)
    assert main(["report", str(tmp_path / "run")]) == 0
    strict = [
        "data",
        "show",
        "sft/tiny_tasks_cpu_fast",
        *words,
        f"run.dir={tmp_path / 'other'}",
        "data.strict=true",
    ]
    assert main(strict) == (2 if rows is TEXTS else 0)


def test_epochs_are_counted_in_steps(policy, tmp_path, capsys):
    """One and a half passes over the packed rows, said and recorded; the same command finds them complete,
    and goes on where its last checkpoint is gone."""
    source, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    source.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    words = [f"start.policy={policy}", f"data.sources=['{source}']", "data.heldout_sources=[]"]
    words += ["data.heldout_share=0.3", f"run.dir={folder}", "run.epochs=1.5", "run.checkpoint_every=1"]
    words += ["batch.rows=8", "mesh.fsdp=2", "batch.sequence_length=32", "generation.max_new_tokens=4"]
    words += ["optimizer.warmup_steps=0.25"]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    rows = int(re.search(r"1.5 epochs of (\d+) rows, 8 in a batch, are run.steps=(\d+)", said.err)[1])
    assert summary["steps"] == math.ceil(1.5 * rows / 8) > 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["steps"] == summary["steps"]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    loss = summary["heldout_last"]["loss"]
    shutil.rmtree(folder / "checkpoints" / str(summary["steps"]))
    (folder / "summary.json").unlink()
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heldout_last"]["loss"] == loss
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "run.epochs=2"]) == 2
    assert "holds a run with run.epochs=1.5, not 2" in capsys.readouterr().err
    assert main(["plan", "sft/tiny_tasks_cpu_fast", *words, "--hardware", "v5e:2x2"]) == 2
    assert "give run.epochs=null and run.steps" in capsys.readouterr().err
