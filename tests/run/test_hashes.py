"""A checkpoint whose files are not as they were written is refused, by everything that reads checkpoints."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from maxllm.errors import RunFailed
from maxllm.folder import RunFolder
from maxllm.run import checkpoint, restore
from maxllm.run.hashes import COMMITTED, HASHES, STEP_METADATA, content_hash, read_hashes, verify_beside
from maxllm.steps.state import TrainState

FLIPS = 60


def described(tree):
    """Shapes and shardings of arrays."""
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def state_of(seed):
    """A small training state."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"decoder": {"layers": {"w": jax.random.normal(keys[0], (2, 16, 24))}, "bias": jnp.ones(5)}}
    moments = {"mu": jax.random.normal(keys[1], (2, 16, 24)), "count": jnp.int32(3)}
    return TrainState(jnp.int32(4), params, moments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with one checkpoint of training, and its state."""
    folder = RunFolder(tmp_path_factory.mktemp("trained"))
    state = state_of(0)
    checkpoints = checkpoint.Checkpoints(folder, checkpoint.Keep(1))
    checkpoints.save(4, state, -0.5)
    checkpoints.close()
    return folder, state


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A run folder with converted parameters alone, uncompressed and a layer a chunk, and these."""
    folder = RunFolder(tmp_path_factory.mktemp("converted"))
    params = state_of(1).params
    checkpoint.save_params(folder, params)
    return folder, params


@pytest.fixture
def copied(tmp_path):
    """copied(folder): a copy of a run folder, to damage."""

    def copy(folder):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return RunFolder(shutil.copytree(folder.path, tmp_path / "copy"))

    return copy


def data_files(item):
    """The files that hold values of arrays."""
    return sorted(path for path in item.glob("*/*") if path.name[0].isdigit())


def test_every_flipped_bit_of_a_training_checkpoint_is_noticed_and_its_array_named(trained, copied):
    folder, state = trained
    rng = random.Random(0)
    for _ in range(FLIPS):
        where = copied(folder).checkpoint(4)
        path = rng.choice(data_files(where / "params") + data_files(where / "rest"))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        array = path.parent.name.replace(".", "/")
        with pytest.raises(
            RunFailed, match=rf"checkpoints/4 is damaged: in {path.parts[-3]}, array {array} "
        ):
            restore.restore(where, described(state))


def test_every_flipped_bit_of_converted_weights_is_noticed_by_both_readers(converted, copied):
    folder, params = converted
    rng = random.Random(0)
    for _ in range(FLIPS):
        where = copied(folder).checkpoint(0)
        path = rng.choice(data_files(where / "params"))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        array = path.parent.name.replace(".", "/")
        with pytest.raises(RunFailed, match=f"array {array} .* is not as it was written"):
            restore.load_params(where, described(params))
        with pytest.raises(RunFailed, match=f"array {array} .* is not as it was written"):
            restore.open_array(where, array)


def test_what_tells_of_the_arrays_is_hashed_too(trained, copied):
    """A flip of `<f4` makes `>f4`, of a shape another shape: no value has changed and all are others."""
    folder, state = trained
    for name in ("_METADATA", "decoder.bias/.zarray", HASHES):
        where = copied(folder).checkpoint(4)
        content = bytearray((where / "params" / name).read_bytes())
        content[len(content) // 2] ^= 2
        (where / "params" / name).write_bytes(content)
        with pytest.raises(RunFailed, match="is damaged"):
            restore.restore(where, described(state))
        with pytest.raises(RunFailed, match="is damaged"):
            restore.load_params(where, described(state.params))


def test_a_chunk_of_zeros_or_none_is_no_chunk(converted, copied):
    folder, params = converted
    for missing in (False, True):
        where = copied(folder).checkpoint(0)
        path = where / "params" / "decoder.layers.w" / "1.0.0"
        size = path.stat().st_size
        path.unlink()
        if not missing:
            path.write_bytes(bytes(size))
        state = "is missing" if missing else "is not as it was written"
        for read in (
            lambda where=where: restore.load_params(where, described(params)),
            lambda where=where: restore.open_array(where, "decoder/layers/w"),
        ):
            with pytest.raises(RunFailed, match=rf"array decoder/layers/w \(file .*/1\.0\.0\) {state}"):
                read()
        restore.open_array(where, "decoder/bias")  # the others are whole


@pytest.mark.parametrize("name", [STEP_METADATA, COMMITTED, f"params/{COMMITTED}", f"params/{HASHES}"])
def test_a_checkpoint_without_its_marks_is_damaged_and_no_older_one_is_taken(trained, copied, name):
    folder, state = trained
    run_dir = copied(folder)
    (run_dir.checkpoint(4) / name).unlink()
    assert run_dir.latest_step() == 4
    with pytest.raises(RunFailed, match=f"is damaged: {name} is missing"):
        restore.load_params(run_dir.find(), described(state.params))


def test_sound_files_are_read_as_they_are(trained, converted):
    folder, state = trained
    jax.tree.map(np.testing.assert_array_equal, restore.restore(folder.find(), described(state)), state)
    folder, params = converted
    read = restore.load_params(folder.find(), described(params))
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_content_hash_is_that_of_the_values(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        checkpoint.save_params(RunFolder(tmp_path / name), state_of(seed).params)
    one, same, other = (
        content_hash(RunFolder(tmp_path / name).find() / "params") for name in ("one", "same", "other")
    )
    assert one == same != other


@pytest.mark.parametrize("content", [b"", b'{"rank": -0', b'{"rank": -0.5, "hash": "0"}'])
def test_a_damaged_rank_is_a_sentence_that_names_its_file(trained, copied, content):
    run_dir = copied(trained[0])
    (run_dir.checkpoint(4) / "metrics" / "metrics").write_bytes(content)
    for read in (lambda: run_dir.best_step(), lambda: checkpoint.Checkpoints(run_dir, checkpoint.Keep(1))):
        with pytest.raises(RunFailed, match=r"checkpoints/4 is damaged: .*metrics/metrics is"):
            read()


def test_lack_of_memory_is_not_the_checkpoints_fault(trained):
    where = trained[0].find()
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")):
        with (
            pytest.raises(RunFailed, match="there is not enough memory") as caught,
            restore.readable(where),
        ):
            raise error
        assert "remove" not in str(caught.value)


def test_what_another_process_cannot_read_is_used_in_none(trained, monkeypatch):
    """All have the files as they were written, and one of them fails to read them."""
    item = trained[0].checkpoint(4) / "params"
    expected, answers = read_hashes(item), iter([False, True])
    monkeypatch.setattr(checkpoint.processes, "anywhere", lambda flag: next(answers))
    with pytest.raises(RunFailed, match=r"another process cannot read .*params"):
        verify_beside(item, [list(expected)], expected, lambda number: None)
    with pytest.raises(StopIteration):  # both questions were asked
        next(answers)
