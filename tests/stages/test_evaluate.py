"""`maxllm evaluate` reads held-out rows and parameters alone, and says what training said at that step."""

import json
import shutil

import pytest

from maxllm.cli import main
from maxllm.data import tasks
from maxllm.folder import RunFolder

SMALL = ["mesh.fsdp=2", "batch.rows=8", "batch.sequence_length=48", "optimizer.warmup_steps=0", "run.steps=2"]
OFTEN = ["run.checkpoint_every=1", "run.eval_every=1", "optimizer.learning_rate=0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy_at):
    """Runs of every stage beside the files they were trained on; test_tuned_runs.py has those of adapters."""
    folder = tmp_path_factory.mktemp("evaluate")
    policy_at(folder / "policy")

    def write(kind, rows):
        for split, count in (("train", 32), ("heldout", 12)):
            path = folder / f"{kind}-{split}.jsonl"
            path.write_text("\n".join(json.dumps(row) for row in rows(split, count, 0)))

    write("instruction", tasks.instruction_rows)
    write("preference", tasks.preference_rows)
    write("prompt", tasks.prompt_rows)

    def train(name, stage, kind, *words):
        data = [f"data.sources=['{folder}/{kind}-train.jsonl']"]
        data += [f"data.heldout_sources=['{folder}/{kind}-heldout.jsonl']"]
        start = [f"start.policy={folder / 'policy'}", f"run.dir={folder / name}"]
        assert main([stage, f"{stage}/tiny_tasks_cpu_fast", *SMALL, *OFTEN, *data, *start, *words]) == 0

    share = ("data.heldout_sources=[]", "data.heldout_share=0.3")  # of the same file
    train("reward", "reward", "preference", *share)
    train("sft", "sft", "instruction")
    train("dpo", "dpo", "preference", *share)
    train("ppo", "ppo", "prompt", f"start.reward={folder / 'reward'}")
    return folder


@pytest.fixture
def evaluate(folder, capsys):
    """evaluate(run, *words): its figures, or the error."""

    def run(name, *words):
        capsys.readouterr()
        code = main(["evaluate", str(folder / name), *words, "--json"])
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else said.err

    return run


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_without_training_data_and_without_the_rest_of_a_checkpoint(folder, evaluate, name, tmp_path):
    """Sources are gone, and so is all of a checkpoint but the parameters: the same figures, bit for bit. What
    needs the data says that it is gone."""
    recorded = {r["step"]: r["heldout"] for r in RunFolder(folder / name).records() if "heldout" in r}
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    sources = sorted(folder.glob("*.jsonl"))
    rests = [folder / name / "checkpoints" / str(step) / "rest" for step in (1, 2)]
    assert len(sources) == 6 and all(rest.is_dir() for rest in rests)
    for number, path in enumerate([*sources, *rests]):
        path.rename(hidden / str(number))
    try:
        figures = evaluate(name, "--checkpoint", "1")
        assert figures == {"run": figures["run"], "stage": figures["stage"], "step": 1, **recorded[1]}
        assert "does not exist" in evaluate(name, "data.max_bad_share=0.5")
        if name != "reward":
            assert "does not exist" in evaluate(name, "generation.max_new_tokens=3")
    finally:
        for number, path in enumerate([*sources, *rests]):
            (hidden / str(number)).rename(path)
    assert recorded[0] != recorded[1] != recorded[2]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_other_data_is_read_where_it_is_named(folder, evaluate, name, tmp_path):
    """Held-out files alone: the training files may be gone."""
    kind = {"sft": "instruction", "ppo": "prompt"}[name]
    train, other = folder / f"{kind}-train.jsonl", tmp_path / "other.jsonl"
    other.write_text("\n".join((folder / f"{kind}-heldout.jsonl").read_text().splitlines()[:5]))
    former = evaluate(name)
    train.rename(tmp_path / "gone")
    try:
        figures = evaluate(name, f"data.heldout_sources=['{other}']")
    finally:
        (tmp_path / "gone").rename(train)
    assert figures.keys() == former.keys() and figures != former


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_folder_without_stored_rows_is_evaluated_from_its_data(folder, evaluate, name):
    figures = evaluate(name)
    shutil.move(folder / name / "heldout", folder / "aside")
    try:
        assert evaluate(name) == figures
        assert not (folder / name / "heldout").exists()  # whoever only reads writes nothing
    finally:
        shutil.move(folder / "aside", folder / name / "heldout")


def test_damaged_rows_are_an_error(folder, evaluate):
    file = folder / "reward" / "heldout" / "tokens_BCT.npy"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "heldout is damaged: its content is not what was written" in evaluate("reward")
        file.write_bytes(content[:-9])
        assert "heldout is damaged (" in evaluate("reward")
    finally:
        file.write_bytes(content)
