"""A run folder: what is written is read, whatever is broken is told or left out, and no other module knows
the names of its files."""

import ast
import math
from pathlib import Path

import pytest

import maxllm
from maxllm import folder as module
from maxllm.errors import RunFailed, UserError
from maxllm.folder import RunFolder
from maxllm.run.fall_back import check_not_lost

RECORDS = [
    {"step": 0, "seconds": 0.0, "heldout": {"loss": math.nan}},
    {"step": 5, "seconds": 1.5, "loss": 2.0},
]


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    with RunFolder(tmp_path / "run").locked():
        return RunFolder(str(tmp_path / "run"))


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    run = RunFolder(tmp_path / "none")
    assert not (run.has_config or run.has_metrics or run.has_parents)
    assert (run.config_text(), run.summary(), run.written()) == (None, None, None)
    assert (list(run.records()), run.data(), run.parents(), run.dependents()) == ([], {}, {}, [])
    assert (run.steps(), run.latest_step(), run.best_step()) == ([], None, None)
    assert run.read_hf() == (None, None)
    with pytest.raises(UserError, match=r"none is not a run folder: it has no config\.yaml"):
        run.settings()
    with pytest.raises(UserError, match="none holds no checkpoint"):
        run.find()
    check_not_lost(run)
    assert not run.path.exists()


def test_records_are_cut_back_and_grow(run):
    """No number is null in JSON."""
    run.write_records(RECORDS[:1])
    run.append_record(RECORDS[1])
    assert list(run.records()) == [RECORDS[0] | {"heldout": {"loss": None}}, RECORDS[1]]
    with run.path.joinpath("metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "sec')
    assert [record["step"] for record in run.records()] == [0, 5]  # a kill cut the last line short
    with run.path.joinpath("metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 7, "seconds": 2.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3 is damaged"):
        list(run.records())


def test_what_is_written_is_read(run):
    run.write_config("stage: sft\nrun: {steps: 3}\n")
    run.write_summary({"steps": 3, "loss": math.inf})
    run.write_data({"training": {"rows": 4}})
    run.write_hf({"model_type": "llama"}, None)
    run.write_tokenizer({"tokenizer.model": b"pieces"})
    assert run.settings() == {"stage": "sft", "run": {"steps": 3}}
    assert run.summary() == {"steps": 3, "loss": None} and b'"steps": 3' in run.summary_bytes()
    assert run.data() == {"training": {"rows": 4}} and run.read_hf() == ({"model_type": "llama"}, None)
    assert (run.path / "tokenizer.model").read_bytes() == b"pieces"
    assert run.written() == max((run.path / name).stat().st_mtime for name in ("config.yaml", "summary.json"))


def test_changes_are_added_and_forgotten(run):
    change = {"step": 6, "setting": "model.remat", "from": "none", "to": "full"}
    run.append_changes([])
    assert not (run.path / "changes.jsonl").exists()
    run.append_changes([change])
    run.append_changes([change])
    assert len((run.path / "changes.jsonl").read_text().splitlines()) == 2
    run.remove_changes()
    assert not (run.path / "changes.jsonl").exists()


def test_one_process_at_a_time(run):
    with run.locked(), pytest.raises(UserError, match=r"another process is training in .*run$"), run.locked():
        pass
    with run.locked():
        pass


def test_a_config_that_is_no_recipe_is_told_and_still_shown(run):
    run.write_config("- a list\n")
    with pytest.raises(UserError, match=r"config\.yaml holds no recipe"):
        run.settings()
    assert run.config_text() == "- a list\n"


def test_metrics_without_checkpoints_are_a_run_that_lost_them(run):
    run.write_records(RECORDS)
    with pytest.raises(RunFailed, match="has metrics but no checkpoints/"):
        check_not_lost(run)
    run.checkpoints.mkdir()
    check_not_lost(run)


def test_half_written_checkpoints_are_none(run):
    for name in ("3", "12", "15.orbax-checkpoint-tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.steps() == [3, 12] and run.find() == run.checkpoint(12)
    assert RunFolder.of_checkpoint(run.find(3)).path == run.path.absolute()
    run.remove_unfinished()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["12", "3"]


def test_no_other_module_names_a_file_of_a_run_folder():
    """A whole string literal that is such a name; that sentences speak of these files is another matter. The
    lock's is how other locks' names end, too."""
    constants = ("METRICS", "HF_CONFIG", "HF_GENERATION", "DATA", "PARENTS", "DEPENDENTS", "CHANGES")
    names = {vars(module)[each] for each in (*constants, "CONFIG", "SUMMARY", "CHECKPOINTS")}
    assert len(names) == 10
    root = Path(maxllm.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path != root / "folder.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []
