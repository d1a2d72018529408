"""What a run starts from stays what it is, or is refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllm import recipe
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.run.checkpoint import Checkpoints, Keep, save_params
from maxllm.run.parents import check_parents, in_use, parent_of, record_parents
from maxllm.run.restore import load_params
from maxllm.steps.state import TrainState


def save(folder, *steps, start=0.0, keep=2, say=lambda line: None):
    """Checkpoints of a parent run, each of its own values."""
    checkpoints = Checkpoints(folder, Keep(keep), in_use=lambda: in_use(folder), say=say)
    for step in steps:
        checkpoints.save(step, TrainState(jnp.int32(step), {"w": jnp.full(3, start + step)}, {}))
    checkpoints.close()


@pytest.fixture
def family(tmp_path):
    """A parent of two checkpoints, and the recipe of a child that has not begun."""
    parent, child = RunFolder(tmp_path / "parent"), RunFolder(tmp_path / "child")
    save(parent, 20, 41)
    words = [f"start.policy={parent}", f"run.dir={child}"]
    return parent, child, recipe.load_recipe("sft/tiny_tasks_cpu", words)


def begin(child, config):
    """What training does when it begins: records its parents, and saves."""
    said = []
    parents = {"policy": parent_of(child, config, "policy")}
    child.path.mkdir(exist_ok=True)
    record_parents(child, parents, said.append)
    save(child, 1)
    return parents["policy"], said


def test_a_parent_that_trains_on_stays_the_one_that_was_begun_from(family):
    parent, child, config = family
    began, _ = begin(child, config)
    assert began.name == "41"
    said = []
    save(parent, 60, 80, 100, say=said.append)
    assert parent.steps() == [41, 80, 100]  # two to keep, and the one in use
    assert [
        line for line in said if "keeps the checkpoint of step 41" in line and "child began" in line
    ] == said
    assert len(said) == 1
    assert parent_of(child, config, "policy") == began
    check_parents(child, {"policy": began})


def test_a_parents_checkpoint_that_is_gone_is_named(family):
    parent, child, config = family
    begin(child, config)
    save(parent, 60)
    shutil.rmtree(parent.checkpoint(41))
    with pytest.raises(UserError, match=r"child began from step 41 of .*parent .*holds steps 60 now"):
        parent_of(child, config, "policy")


def test_another_content_of_the_same_step_is_refused_with_both_named(family):
    parent, child, config = family
    begin(child, config)
    former = child.parents()["policy"]["hash"]
    shutil.rmtree(parent.checkpoints)
    save(parent, 41, start=1.0)
    with pytest.raises(UserError, match=rf"content {former}\).* has the content [0-9a-f]{{32}} now"):
        parent_of(child, config, "policy")


def test_a_run_that_began_meanwhile_from_another_parent_is_refused(family):
    """Its folder may have been filled by another process after this one looked."""
    parent, child, config = family
    begin(child, config)
    with pytest.raises(UserError, match=r"began from step 41 .* not from step 20"):
        check_parents(child, {"policy": parent.checkpoint(20)})


def test_a_run_without_a_checkpoint_begins_from_the_newest(family):
    parent, child, config = family
    child.path.mkdir()
    record_parents(child, {"policy": parent_of(child, config, "policy")}, print)
    save(parent, 60)
    assert parent_of(child, config, "policy").name == "60"


def test_a_run_whose_record_is_gone_does_not_begin_from_another(family):
    parent, child, config = family
    begin(child, config)
    save(parent, 60)
    (child.path / "parents.json").unlink()
    with pytest.raises(
        UserError, match=r"parents\.json does not say which checkpoint of .*parent this run began"
    ):
        parent_of(child, config, "policy")


def test_a_child_that_is_gone_holds_nothing(family):
    parent, child, config = family
    begin(child, config)
    assert list(in_use(parent)) == [41]
    shutil.rmtree(child.path)
    assert in_use(parent) == {}
    save(parent, 60, 80)
    assert parent.steps() == [60, 80]


def test_folders_that_move_together_still_know_each_other(family, tmp_path):
    parent, child, config = family
    begin(child, config)
    moved = tmp_path / "moved"
    moved.mkdir()
    for folder in (parent, child):
        folder.path.rename(moved / folder.path.name)
    words = [f"start.policy={moved / 'parent'}", f"run.dir={moved / 'child'}"]
    config = recipe.load_recipe("sft/tiny_tasks_cpu", words)
    assert (
        parent_of(RunFolder(moved / "child"), config, "policy")
        == (moved / "parent/checkpoints/41").absolute()
    )
    assert list(in_use(RunFolder(moved / "parent"))) == [41]


def test_a_parent_is_found_from_wherever_the_folders_are_opened(family, tmp_path, monkeypatch):
    """The recipe names it from the folder that training was started in; both moved since, and where they are
    opened, another run has the parent's name."""
    parent, child, _ = family
    monkeypatch.chdir(tmp_path)
    config = recipe.load_recipe("sft/tiny_tasks_cpu", ["start.policy=parent", "run.dir=child"])
    begin(child, config)
    moved = tmp_path / "elsewhere" / "moved"
    moved.mkdir(parents=True)
    for folder in (parent, child):
        folder.path.rename(moved / folder.path.name)
    began = moved / "parent" / "checkpoints" / "41"
    for place in (moved, tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        assert parent_of(RunFolder(moved / "child"), config, "policy") == began
    save(RunFolder(tmp_path / "parent"), 41, start=1.0)
    monkeypatch.chdir(tmp_path)
    assert parent_of(RunFolder(moved / "child"), config, "policy") == began


def test_a_parent_that_cannot_be_written_to_is_told(family, monkeypatch):
    _, child, config = family

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("maxllm.folder.write_json", refuse)
    from maxllm.run.parents import mark_in_use

    said = []
    mark_in_use(parent_of(child, config, "policy"), child, said.append)
    assert len(said) == 1 and "Permission denied" in said[0] and "may delete" in said[0]


def test_the_values_of_the_recorded_checkpoint_are_read(family):
    parent, child, config = family
    begin(child, config)
    save(parent, 60, 80)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one)}
    np.testing.assert_array_equal(
        load_params(parent_of(child, config, "policy"), wanted)["w"], np.full(3, 41.0)
    )
    alone = RunFolder(parent.path.parent / "alone")
    save_params(alone, {"w": jnp.ones(3)})
    assert alone.find().name == "0"


def test_a_checkpoint_is_found_by_its_step(family):
    parent, _, _ = family
    assert parent.find(20).name == "20"
    with pytest.raises(UserError, match=r"parent holds no checkpoint of step 30: it holds steps 20, 41$"):
        parent.find(30)
    with pytest.raises(UserError, match=r"holds no best checkpoint: it holds steps 20, 41$"):
        parent.find("best")
    with pytest.raises(UserError, match="nobody holds no checkpoint; train that stage first"):
        RunFolder(parent.path.parent / "nobody").find(30)
