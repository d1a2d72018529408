"""`maxllm sft` with figures by source and reply, a scorer of the user's, examples and kept samples."""

import json
import math

import pytest

from maxllm.cli import main
from maxllm.folder import RunFolder
from maxllm.stages.scoring import after_system

SHORT = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}", "level": n % 3} for n in range(30)]
LONG = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"{n}"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": f"{n}"},
        ]
    }
    for n in range(30)
]
SCORER = '''
def length(reply, row):
    """So many characters; more where the row is of a higher level."""
    assert row["messages"][-1]["role"] == "user"
    assert isinstance(row["answer"], str)
    import numpy as np
    return np.float32(len(reply) + 100 * row.get("level", 0))

def broken(reply, row):
    return 1 / 0

def loss(reply, row):
    return 0.0

def nothing(reply, row):
    return None

def text(reply, row):
    return "1.0"

def some_bytes(reply, row):
    return b"1"

def endless(reply, row):
    return 10**400

def leaves(reply, row):
    raise SystemExit(0)
'''


@pytest.fixture(scope="module")
def words(tmp_path_factory, policy_at):
    """The words of a run of two sources."""
    folder = tmp_path_factory.mktemp("scoring")
    policy = policy_at(folder / "policy", max_seq_len=256)
    for name, rows in (("short", SHORT), ("long", LONG)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(SCORER)
    return [
        f"start.policy={policy}",
        f"data.sources=['{folder / 'short.jsonl'}', '{folder / 'long.jsonl'}']",
        "data.heldout_sources=[]",
        "data.heldout_share=0.4",
        f"run.dir={folder / 'run'}",
        "run.steps=2",
        "run.eval_every=1",
        "batch.rows=8",
        "batch.sequence_length=192",
        "generation.max_new_tokens=4",
        "optimizer.warmup_steps=0",
        f"evaluation.scorer={folder / 'mine.py'}:length",
        "evaluation.shots=2",
    ]


def test_figures_and_samples_of_a_run(words, capsys):
    """The losses by source and by reply add up to the whole one; samples are those of the same prompts, with
    both examples before each; `evaluate` says what training said."""
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    folder = RunFolder(next(word.partition("=")[2] for word in words if word.startswith("run.dir=")))
    figures = summary["heldout_last"]
    sources = [f"loss/{folder.path.parent / name}.jsonl" for name in ("short", "long")]
    turns = ["loss/turn 1", "loss/turn 2"]
    for names in (sources, turns):
        parts = [figures[name] for name in names]
        assert min(parts) <= figures["loss"] <= max(parts) and parts[0] != parts[1]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    evaluations = [record for record in folder.records() if "heldout" in record]
    assert [record["step"] for record in evaluations] == [0, 1, 2]
    for record in evaluations:
        assert [sample["prompt"] for sample in record["samples"]] == [
            sample["prompt"] for sample in evaluations[0]["samples"]
        ]
        assert all(set(sample) == {"prompt", "reply", "answer"} for sample in record["samples"])
        assert len(record["samples"]) == 8
    # Two examples of a question and its reply, then the question: three of the user's turns at least.
    assert all(sample["prompt"].count("user\n") >= 3 for sample in evaluations[0]["samples"])
    assert "exact_match" in figures and figures["length"] > 0
    assert main(["evaluate", str(folder.path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in figures} == pytest.approx(figures, rel=1e-6)


def test_examples_stand_behind_the_system_and_functions_stay_in_the_first_turn():
    """A conversation is rendered with the functions of its first turn."""
    system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    shots = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert after_system([system, question], shots) == [system, *shots, question]
    assert after_system([question | {"tools": [1]}], shots)[0] == shots[0] | {"tools": [1]}
    assert after_system([question | {"tools": [1]}], []) == [question | {"tools": [1]}]
    assert after_system([system | {"tools": [1]}, question], shots)[0] == system | {"tools": [1]}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("evaluation.scorer=FOLDER/mine.py:broken", "mine.py line 10 failed at the reply"),
        ("evaluation.scorer=FOLDER/mine.py:nothing", "gave None for the reply"),
        ("evaluation.scorer=FOLDER/mine.py:text", "which is no finite number"),
        ("evaluation.scorer=FOLDER/mine.py:some_bytes", "which is no finite number"),
        ("evaluation.scorer=FOLDER/mine.py:endless", "which is no finite number"),
        ("evaluation.scorer=FOLDER/mine.py:leaves", "failed at the reply"),
        ("evaluation.scorer=FOLDER/mine.py:loss", "is that of a figure"),
        ("evaluation.scorer=FOLDER/mine.py:absent", "has no function absent"),
        ("evaluation.scorer=FOLDER/other.py:length", "does not exist"),
        ("evaluation.scorer=length", "is not FILE.py:FUNCTION"),
        ("evaluation.shots=99", "training conversations are a question and its reply"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, capsys, word, said):
    folder = next(word.partition("=")[2] for word in words if word.startswith("run.dir="))[: -len("/run")]
    words = [*words, f"run.dir={folder}/{word[-8:]}", word.replace("FOLDER", folder)]
    assert main(["sft", "sft/tiny_tasks_cpu_fast", *words]) == 2
    assert said in capsys.readouterr().err
