"""A run that was interrupted ends with the parameters of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml
from environments import ONE_DEVICE
from jax.sharding import SingleDeviceSharding

import maxllm

STEPS = 24


def command(folder: Path, corpus: Path) -> list[str]:
    """A small pretraining run in its own process."""
    small = ["model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64", "model.n_layers=2"]
    small += ["model.scan_unroll=1", "model.residual_dropout=0.1", "model.vocab_size=600"]
    run = [f"run.dir={folder}", f"run.steps={STEPS}", "run.checkpoint_every=6", "run.eval_every=12"]
    data = [f"data.prepared_dir={corpus / 'corpus'}", f"tokenizer.path={corpus / 'tokenizer.model'}"]
    data += [f"data.sources=['{corpus / 'text.txt'}']", "tokenizer.vocab_size=600", "data.heldout_share=0.2"]
    batch = ["batch.rows=4", "batch.microbatches=2", "batch.sequence_length=32", "run.log_every=4"]
    batch += ["optimizer.warmup_steps=4"]
    return [
        sys.executable,
        "-m",
        "maxllm.cli",
        "VERB",
        "pretrain/tiny_slice_cpu",
        *small,
        *run,
        *data,
        *batch,
    ]


def verb(words: list[str], name: str) -> list[str]:
    """The command with its verb."""
    return [name if word == "VERB" else word for word in words]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus: the paragraphs of two chapters."""
    folder = tmp_path_factory.mktemp("corpus")
    slice_dir = Path(maxllm.__file__).parent / "data" / "slice"
    chapters = (slice_dir / "austen.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    paragraphs = [text for line in chapters for text in json.loads(line)["text"].split("\n\n")]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(paragraphs), encoding="utf-8")
    subprocess.run(
        verb(command(folder / "unused", folder), "prepare"), check=True, capture_output=True, env=ONE_DEVICE
    )
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> Path:
    """The run that nobody disturbed."""
    folder = corpus / "uninterrupted"
    subprocess.run(verb(command(folder, corpus), "pretrain"), check=True, capture_output=True, env=ONE_DEVICE)
    return folder


def final_state(folder: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, parameters and optimizer."""
    last = folder / "checkpoints" / str(STEPS)
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {item: checkpointer.restore((last / item).absolute()) for item in ("params", "rest")}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_end(one: Path, other: Path) -> None:
    """Same arrays, same held-out figures."""
    first, second = final_state(one), final_state(other)
    assert first.keys() == second.keys() and len(first) > 20
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["heldout_last"] == summaries[1]["heldout_last"]


def wait_for(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of at least that step is complete."""
    deadline = time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, "the run ended before it could be interrupted"
        done = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
        if any(number >= step for number in done):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint came")


@pytest.mark.slow
def test_a_warm_cache_is_read_and_changes_nothing(corpus: Path, uninterrupted: Path) -> None:
    """Two fresh processes with a cache of their own: the second compiles nothing that the first had kept,
    and both end as the run that had none."""
    cache = corpus / "cache"
    compiled = []
    for name in ("cold", "warm"):
        subprocess.run(
            verb(command(corpus / name, corpus), "pretrain"),
            check=True,
            capture_output=True,
            env=ONE_DEVICE | {"XDG_CACHE_HOME": str(cache)},
        )
        assert_same_end(uninterrupted, corpus / name)
        compiled.append(
            {file.name: file.stat().st_mtime_ns for file in (cache / "maxllm" / "xla").glob("*-cache")}
        )
    assert any(name.startswith("jit_train_step-") for name in compiled[0])
    # The second may keep more: what took the first too little time to compile to be worth a file.
    assert compiled[0].items() <= compiled[1].items()


def test_kill_9_then_the_same_command(corpus: Path, uninterrupted: Path) -> None:
    folder = corpus / "killed"
    words = verb(command(folder, corpus), "pretrain")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_DEVICE)
    wait_for(folder, 6, process)
    process.kill()
    process.wait()
    assert not (folder / "summary.json").exists()
    again = subprocess.run(words, check=True, capture_output=True, text=True, env=ONE_DEVICE)
    assert "continues from the checkpoint of step" in again.stderr
    assert_same_end(uninterrupted, folder)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "lines of the killed sitting were cut back"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_75(corpus: Path, uninterrupted: Path, number: int) -> None:
    folder = corpus / f"signal{number}"
    words = verb(command(folder, corpus), "pretrain")
    words.append("run.checkpoint_every=1000")  # only the signal makes it save
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_DEVICE
    )
    deadline = time.time() + 120
    while not (folder / "metrics.jsonl").exists() or '"loss"' not in (folder / "metrics.jsonl").read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "the same command continues" in errors
    subprocess.run(words, check=True, capture_output=True, env=ONE_DEVICE)
    assert_same_end(uninterrupted, folder)


def test_a_complete_run_is_not_run_again(corpus: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    subprocess.run(
        verb(command(uninterrupted, corpus), "pretrain"), check=True, capture_output=True, env=ONE_DEVICE
    )
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused(corpus: Path, uninterrupted: Path) -> None:
    words = [*verb(command(uninterrupted, corpus), "pretrain"), "optimizer.learning_rate=0.5"]
    result = subprocess.run(words, capture_output=True, text=True, env=ONE_DEVICE)
    assert result.returncode == 2
    assert "optimizer.learning_rate=0.003, not 0.5" in result.stderr


def test_a_broken_checkpoint_is_an_error_not_a_fresh_start(corpus: Path, uninterrupted: Path) -> None:
    folder = corpus / "broken"
    subprocess.run(["cp", "-r", str(uninterrupted), str(folder)], check=True)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / str(STEPS) / "params" / "decoder.embedding" / "0.0").write_bytes(b"")
    words = [word.replace("uninterrupted", "broken") for word in command(uninterrupted, corpus)]
    result = subprocess.run(verb(words, "pretrain"), capture_output=True, text=True, env=ONE_DEVICE)
    assert result.returncode == 1, result.stderr
    assert f"checkpoints/{STEPS} is damaged: in params, array decoder/embedding" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "summary.json").exists()


def test_best_and_latest_checkpoints_are_kept(uninterrupted: Path) -> None:
    kept = sorted(int(p.name) for p in (uninterrupted / "checkpoints").glob("*") if p.name.isdigit())
    assert kept[-2:] == [STEPS - 6, STEPS]
    assert len(kept) <= 3


def test_the_best_evaluated_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    """Ranks count only where the state was evaluated, and a resumed run still knows the former ones."""
    import jax.numpy as jnp

    from maxllm.folder import RunFolder
    from maxllm.run import checkpoint
    from maxllm.run.restore import load_params
    from maxllm.steps.state import TrainState

    def save(ranks: dict[int, float]) -> None:
        checkpoints = checkpoint.Checkpoints(RunFolder(tmp_path), checkpoint.Keep(2))
        for step, rank in ranks.items():
            state = TrainState(jnp.int32(step), {"w": jnp.full(3, float(step))}, {"m": jnp.zeros(3)})
            checkpoints.save(step, state, rank)
        checkpoints.close()

    none = checkpoint.UNRANKED
    save({1: -0.5, 2: none, 3: -0.1, 4: none, 5: -0.4})
    save({6: none, 7: -0.3, 8: none})
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [3, 7, 8]
    folder = RunFolder(tmp_path)
    assert (folder.latest_step(), folder.best_step()) == (8, 3)
    shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))}
    best = load_params(folder.find("best"), shapes)
    np.testing.assert_array_equal(best["w"], np.full(3, 3.0))


@pytest.mark.parametrize(
    "changes",
    [{"name": "adafactor"}, {"name": "muon", "moment_dtype": "bfloat16"}, {"moment_dtype": "bfloat16"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_every_optimizer_goes_through_a_checkpoint(tmp_path: Path, tiny_model, changes) -> None:
    """Saved after one step and restored into its shardings: the same arrays, and the same second step."""
    from maxllm.config.mesh import MeshConfig
    from maxllm.config.optimizer import OptimizerConfig
    from maxllm.folder import RunFolder
    from maxllm.model.llama import Llama
    from maxllm.optim import make_optimizer
    from maxllm.parallel.mesh import make_mesh
    from maxllm.run import checkpoint, restore
    from maxllm.steps.state import abstract, create, initializer, partition_of

    model = Llama(tiny_model())
    optimizer = make_optimizer(OptimizerConfig(**changes), 10, partition_of(model).declared)
    init = initializer(model, optimizer)
    description = abstract(init, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))

    @jax.jit
    def step(state):
        gradients = jax.tree.map(lambda p: p + 0.1, state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    once = step(create(init, description, jax.random.key(0)))
    checkpoints = checkpoint.Checkpoints(RunFolder(tmp_path), checkpoint.Keep(1))
    checkpoints.save(1, once)
    checkpoints.close()
    restored = restore.restore(RunFolder(tmp_path).checkpoint(1), description)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(restored, once)
    same(step(restored), step(once))
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, once)


LAYOUTS = [
    ({"data": 1, "fsdp": 8}, 3),
    ({"data": 1, "fsdp": 8}, 0),
    ({"data": 2, "stage": 4}, 3),
    ({"data": 1, "fsdp": 2, "stage": 2, "tensor": 2}, 1),
    ({"data": 1, "context": 4, "tensor": 2}, 2),
]


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_a_checkpoint_of_any_layout_restores_into_any_other(tmp_path: Path, tiny_model, number: int) -> None:
    """Bit for bit, parameters and moments, each into the shardings of its new mesh."""
    from maxllm.config.mesh import MeshConfig
    from maxllm.config.optimizer import OptimizerConfig
    from maxllm.folder import RunFolder
    from maxllm.model.llama import Llama
    from maxllm.optim import make_optimizer
    from maxllm.parallel.mesh import make_mesh
    from maxllm.run import checkpoint, restore
    from maxllm.steps.state import abstract, create, initializer, partition_of

    model = Llama(tiny_model(n_heads=16, n_kv_heads=8, head_dim=4, d_ff=64, n_layers=8))
    init = initializer(model, make_optimizer(OptimizerConfig(), 10, partition_of(model).declared))
    descriptions = [abstract(init, make_mesh(MeshConfig(**sizes)), zero) for sizes, zero in LAYOUTS]
    state = create(init, descriptions[number], jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(RunFolder(tmp_path), checkpoint.Keep(1))
    checkpoints.save(1, state)
    checkpoints.close()
    for description in descriptions:
        restored = restore.restore(RunFolder(tmp_path).checkpoint(1), description)
        jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state))
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(description), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


KINDS = ("none", "optimizer", "parameters")


@pytest.mark.parametrize("saved", KINDS)
def test_what_lies_in_the_hosts_memory_goes_through_a_checkpoint(tmp_path: Path, tiny_model, saved) -> None:
    """On eight devices: restored bit for bit, with every array in the memory that the restoring run wants."""
    from maxllm.config.mesh import MeshConfig
    from maxllm.config.optimizer import OptimizerConfig
    from maxllm.folder import RunFolder
    from maxllm.model.llama import Llama
    from maxllm.optim import make_optimizer
    from maxllm.parallel.mesh import make_mesh
    from maxllm.run import checkpoint
    from maxllm.run.restore import restore
    from maxllm.steps.state import abstract, create, initializer, partition_of

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Llama(tiny_model())
    init = initializer(model, make_optimizer(OptimizerConfig(), 10, partition_of(model).declared))
    described = {kind: abstract(init, mesh, offload=kind) for kind in KINDS}
    state = create(init, described[saved], jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(RunFolder(tmp_path), checkpoint.Keep(1))
    checkpoints.save(1, state)
    checkpoints.close()
    for kind, description in described.items():
        restored = restore(tmp_path / "checkpoints" / "1", description)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
            lambda leaf: leaf.sharding, description
        )
        in_host = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)} - {"device"}
        assert in_host == (set() if kind == "none" else {"pinned_host"})


@pytest.mark.slow
def test_a_run_may_go_on_with_its_state_in_the_hosts_memory(corpus: Path, uninterrupted: Path) -> None:
    """Parameters and optimizer in host memory for 6 of 24 steps; for the rest the optimizer's state alone,
    and layers are computed again. Held-out rows are evaluated on the way. Another program rounds otherwise,
    so the end is compared by its loss."""
    folder = corpus / "offloaded"
    words = verb(command(folder, corpus), "pretrain")
    process = subprocess.Popen(
        [*words, "mesh.offload=parameters"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_DEVICE,
    )
    wait_for(folder, 6, process)
    process.kill()
    process.wait()
    again = subprocess.run(
        [*words, "mesh.offload=optimizer", "model.remat=full"],
        check=True,
        capture_output=True,
        text=True,
        env=ONE_DEVICE,
    )
    assert "continues from the checkpoint of step" in again.stderr
    ends = [json.loads((run / "summary.json").read_text())["heldout_last"] for run in (folder, uninterrupted)]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-3)
    changes = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    assert [change["setting"] for change in changes] == ["mesh.offload", "model.remat"]


def test_a_run_that_is_older_than_a_setting_goes_on(tmp_path: Path) -> None:
    """Its config.yaml lacks what came later, and means the default; another value is another recipe."""
    from maxllm import recipe
    from maxllm.errors import UserError
    from maxllm.folder import CONFIG, RunFolder
    from maxllm.run.session import check_same_recipe

    def config(*words):
        return recipe.load_recipe("pretrain/tiny_slice_cpu", [f"run.dir={tmp_path}", *words])

    former = yaml.safe_load(recipe.dump(config()))
    del former["optimizer"]["name"], former["optimizer"]["moment_dtype"]
    (tmp_path / CONFIG).write_text(yaml.safe_dump(former))
    check_same_recipe(RunFolder(tmp_path), config())
    with pytest.raises(UserError, match=r"optimizer\.name=adamw, not muon"):
        check_same_recipe(RunFolder(tmp_path), config("optimizer.name=muon"))


def test_two_processes_do_not_train_in_one_folder(corpus: Path) -> None:
    folder = corpus / "twice"
    words = verb([*command(folder, corpus), "run.steps=2000"], "pretrain")
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_DEVICE)
    try:
        wait_for(folder, 6, first)
        second = subprocess.run(words, capture_output=True, text=True, env=ONE_DEVICE)
        assert second.returncode == 2
        assert f"another process is training in {folder}" in second.stderr
        assert first.poll() is None, "the second one must not disturb the first"
    finally:
        first.kill()
        first.wait()


def test_checkpoints_that_are_gone_are_an_error(corpus: Path, uninterrupted: Path) -> None:
    folder = corpus / "gone"
    subprocess.run(["cp", "-r", str(uninterrupted), str(folder)], check=True)
    (folder / "summary.json").unlink()
    subprocess.run(["rm", "-r", str(folder / "checkpoints")], check=True)
    before = (folder / "metrics.jsonl").read_bytes()
    words = [word.replace("uninterrupted", "gone") for word in command(uninterrupted, corpus)]
    result = subprocess.run(verb(words, "pretrain"), capture_output=True, text=True, env=ONE_DEVICE)
    assert result.returncode == 1 and "has metrics but no checkpoints/" in result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
