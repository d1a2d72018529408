"""Which checkpoints stay, what becomes of damaged ones, and what each remembers."""

import shutil

import jax
import pytest

import maxllm
from maxllm.errors import RunFailed
from maxllm.run import fall_back, loop
from maxllm.run.fall_back import set_aside
from maxllm.run.origin import changes_since, read_origin


def flip(path):
    """Changes one bit in the largest file of a checkpoint's item."""
    file = max((f for f in (path / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_only_where_that_is_allowed(build, capsys):
    words = ("run.checkpoint_every=4", "run.keep_checkpoints=3", "optimizer.schedule=constant")
    undisturbed = loop.train(build({}, *words)[1])
    session, job = build({}, *words)
    session.folder.remove_summary()
    for step in (8, 12):
        flip(session.folder.checkpoint(step))
    with pytest.raises(RunFailed, match=r"run\.fall_back=true continues from step 8"):
        loop.train(job)
    assert session.folder.steps() == [4, 8, 12]
    again = loop.train(build({}, *words, "run.fall_back=true")[1])
    said = capsys.readouterr().err
    assert "it is set aside, and the run continues from step 8" in said
    assert "continues from the checkpoint of step 4" in said
    assert session.folder.steps() == [4, 8, 12]
    assert {"8.damaged", "12.damaged"} <= {path.name for path in session.folder.checkpoints.iterdir()}
    assert again["heldout_last"] == undisturbed["heldout_last"]
    session.folder.remove_summary()
    for step in (4, 8, 12):
        flip(session.folder.checkpoint(step))
    with pytest.raises(RunFailed, match="damaged"):  # never a fresh start
        loop.train(build({}, *words, "run.fall_back=true")[1])


def test_checkpoints_of_every_so_many_steps_stay(build):
    session, job = build({}, "run.checkpoint_every=2", "run.keep_checkpoints=1", "run.keep_every_steps=4")
    loop.train(job)
    assert session.folder.steps() == [4, 8, 12]


def test_a_checkpoint_remembers_where_it_comes_from(build, monkeypatch, capsys):
    constant = "optimizer.schedule=constant"
    session, job = build({}, constant)
    loop.train(job)
    found = read_origin(session.folder.checkpoint(12))
    assert found["maxllm"] == maxllm.__version__ and found["jax"] == jax.__version__
    assert found["mesh"]["data"] == 8 and found["processes"] == 1 and found["stage"] == "pretrain"
    assert found["data"]["training"] == job.batches.fingerprint()
    assert found["tokenizer"] == session.tokenizer.fingerprint and len(found["recipe"]) == 32
    monkeypatch.setattr(maxllm, "__version__", "9.9")
    loop.train(build({}, constant, "run.steps=14")[1])
    was = f"the checkpoint was saved with maxllm {found['maxllm']}, now 9.9"
    assert was in capsys.readouterr().err
    assert changes_since({"jax": "1", "mesh": {"data": 1, "fsdp": 2}}, {"jax": "1", "mesh": {"data": 1}}) == (
        "the checkpoint was saved with mesh fsdp=2, now one device"
    )
    assert changes_since({}, found) is None


def test_means_of_a_log_line_are_of_all_its_steps_also_after_a_kill(build):
    """Lines of ten steps, checkpoints of four: the line of step 20 began before the checkpoint of step 16."""
    words = ("run.steps=24", "run.log_every=10", "run.checkpoint_every=4", "optimizer.schedule=constant")

    def lines(session):
        return [record["loss"] for record in session.folder.records() if "loss" in record]

    session, job = build({}, *words)
    loop.train(job)
    undisturbed = lines(session)
    session.folder.remove_summary()
    for step in (20, 24):
        set_aside(session.folder, step, "lost")
    loop.train(build({}, *words)[1])
    assert lines(session) == undisturbed and len(undisturbed) == 3


def test_a_run_in_a_bucket_whose_checkpoints_are_gone_does_not_start_anew(build, monkeypatch):
    """An empty folder is none there: what was recorded tells whether there must have been checkpoints."""
    monkeypatch.setattr(fall_back, "is_remote", lambda path: True)
    session, job = build({}, "run.checkpoint_every=6")
    loop.train(job)
    shutil.rmtree(session.folder.checkpoints)
    with pytest.raises(RunFailed, match="has metrics but no checkpoints/"):
        fall_back.check_not_lost(session.folder)
    session.folder.write_records([{"step": 11, "seconds": 1.0}])  # the save of step 6 may have been cut off
    fall_back.check_not_lost(session.folder)
