"""`maxllm plan`: TPU's own compiler is asked, on this machine without one."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml

from maxllm.cli import main
from maxllm.config.mesh import MeshConfig
from maxllm.model import llama
from maxllm.parallel.mesh import make_mesh
from maxllm.plan.compile import topology_devices
from maxllm.plan.hardware import hardware_of

pytest.importorskip("libtpu", reason="TPU's compiler is made for Linux on x86-64")

RECIPE = {
    "stage": "pretrain",
    "run": {"dir": "runs/unused", "steps": 10, "hardware": "v5e:2x2"},
    "model": {
        "vocab_size": 512,
        "d_model": 512,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 1024,
        "max_seq_len": 256,
        "remat": "full",
    },
    "tokenizer": {"path": "unused"},
    "data": {"prepared_dir": "unused"},
    "batch": {"rows": 8, "sequence_length": 256},
}
D, L, F, V = 512, 4, 1024, 512
PARAMETERS = 2 * V * D + D + L * (D * D * (1 + 0.5 + 0.5 + 1) + 3 * D * F + 2 * D)


@pytest.fixture
def plan(tmp_path, capsys):
    """plan(*words, **changes of the recipe's sections): exit code, figures, stderr."""

    def run(*words, **changes):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | changes))
        code = main(["plan", str(recipe), "--json", *words])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


def test_a_mesh_that_is_no_product_of_the_slice_is_laid_out():
    """4 x 4 x 8 chips have no dimensions that make 64 and 2: one is laid along half of another."""
    devices = topology_devices(hardware_of("v5p-256"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=64, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 64, "stage": 1, "context": 1, "tensor": 2}
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)
    for one, other in mesh.devices.reshape(64, 2):  # who share a layer's heads are linked to each other
        assert sum(a != b for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_a_plan_has_the_figures(plan):
    """The state has 12 bytes a parameter, over the shards; weights are gathered twice, scattered once."""
    code, figures, _ = plan("mesh.fsdp=4", "--tokens", "1e6", "--price", "2")
    assert code == 0 and figures["fits"]
    assert (figures["hardware"], figures["devices"], figures["links"]) == ("v5e:2x2", 4, "open")
    assert figures["mesh"] == {"data": 1, "fsdp": 4, "stage": 1, "context": 1, "tensor": 1}
    assert figures["parameters"] == PARAMETERS
    state = 12 * PARAMETERS / 4
    assert state <= figures["argument_bytes"] < 1.1 * state  # norms are whole, rows of the batch are small
    assert figures["argument_bytes"] < figures["peak_bytes"] <= figures["hbm_bytes"]
    assert figures["host_bytes"] == 0 and figures["compile_seconds"] > 0
    weights = L * (3 * D * D + 3 * D * F)
    gathered, scattered = (figures["collectives"][kind]["bytes"] for kind in ("all-gather", "reduce-scatter"))
    assert gathered >= 2 * 2 * weights * 3 / 4
    # v5e has no SparseCore: some gradients are reduced whole, at twice the bytes.
    assert scattered + figures["collectives"]["all-reduce"]["bytes"] / 2 >= 2 * weights * 3 / 4
    # The head is gathered once, and both tables' gradients are scattered in float32.
    assert gathered + scattered < 3 * 2 * weights * 3 / 4 + (2 + 4 + 4) * V * D
    assert figures["flops_per_token"] == 6 * (weights + D * V) + 6 * L * D * 256
    # With full remat all matmuls are done four times but w_down's and the head's.
    multiplied = 8 * (weights - L * D * F) + 6 * (L * D * F + D * V)
    assert figures["matmul_flops"] == multiplied * 8 * 256 / 4
    assert figures["tokens_per_second"] == pytest.approx(8 * 256 / figures["step_seconds_bound"])
    assert figures["mfu_bound"] == pytest.approx(
        figures["flops_per_token"] * figures["tokens_per_second"] / (4 * 197e12)
    )
    assert figures["days"] == pytest.approx(1e6 / figures["tokens_per_second"] / 86400)
    assert figures["cost"] == pytest.approx(figures["days"] * 24 * 4 * 2)


@pytest.mark.slow
def test_ironwood_has_two_devices_a_chip(plan):
    """Each with half of the chip's 192 GiB; what its SparseCores gather and scatter is counted as well."""
    code, figures, error = plan("--hardware", "tpu7x:2x2x1", "mesh.data=1", "mesh.fsdp=8")
    assert code == 0 and figures["devices"] == 8, error
    assert 94 * 2**30 < figures["hbm_bytes"] < 96 * 2**30
    assert figures["argument_bytes"] < 1.1 * 12 * PARAMETERS / 8
    weights = L * (3 * D * D + 3 * D * F)
    gathered, scattered = (figures["collectives"][kind]["bytes"] for kind in ("all-gather", "reduce-scatter"))
    assert gathered >= 2 * 2 * weights * 7 / 8 and scattered >= 2 * weights * 7 / 8


@pytest.mark.slow
def test_data_parallelism_reduces_gradients_and_keeps_the_state_whole(plan):
    code, figures, _ = plan()
    assert code == 0 and figures["mesh"]["data"] == 4
    assert figures["argument_bytes"] >= 12 * PARAMETERS
    assert set(figures["collectives"]) == {"all-reduce"}


@pytest.mark.slow
def test_zero_trades_memory_for_exchanges(plan):
    """Bytes of state per parameter on each of four devices: 12, 4 + 8/4, 12/4. Gradients are reduced whole at
    stage 0 and scattered at 2; at 1 the compiler may do either, as only shares of them are used."""
    each = {0: 12, 2: 6, 3: 3}
    figures = {zero: plan("mesh.fsdp=4", f"mesh.zero={zero}")[1] for zero in each}
    for zero, expected in each.items():
        assert figures[zero]["argument_bytes"] == pytest.approx(expected * PARAMETERS, rel=0.1), zero
    scattered = [figures[zero]["collectives"].get("reduce-scatter", {"bytes": 0})["bytes"] for zero in each]
    assert scattered[0] == 0 < min(scattered[1:])
    assert figures[0]["collectives"].keys() == {"all-reduce"}


@pytest.mark.slow
def test_products_compile(plan):
    code, figures, _ = plan("mesh.fsdp=2", "mesh.tensor=2")
    assert code == 0 and figures["fits"]
    assert figures["argument_bytes"] < 1.1 * 12 * PARAMETERS / 4


@pytest.mark.slow
def test_over_positions_keys_and_values_are_gathered_and_nothing_wider(plan):
    """Each layer's weights twice, the head once, keys and values of four rows twice; ids and segments."""
    code, figures, _ = plan("mesh.context=2", "mesh.fsdp=2")
    assert code == 0 and figures["argument_bytes"] < 1.1 * 12 * PARAMETERS / 4
    weights, head = 2 * L * (3 * D * D + 3 * D * F), 2 * V * D
    keys_and_values = 2 * L * (4 * 256) * D  # two of half the width, two bytes each
    expected = (2 * weights + head) * 3 / 4 + 2 * keys_and_values / 2
    assert 0 <= figures["collectives"]["all-gather"]["bytes"] - expected <= 16 * 8 * 256


@pytest.mark.slow
def test_what_lies_in_the_hosts_memory_is_counted_there(plan):
    """Of four chips each has a quarter of the moments and of the layers' matrices, the norms' moments, and
    gate and up of its two rows; on the device embedding, head and batch are left of the arguments."""
    words = ("mesh.fsdp=4", "mesh.offload=parameters", "model.keep_in_host=[gate,up]")
    code, figures, _ = plan(*words)
    assert code == 0 and figures["fits"]
    weights, tables, norms = L * (3 * D * D + 3 * D * F), 2 * V * D, D + 2 * L * D
    kept = L * 2 * (2 * 256 * F) * 2
    assert figures["host_bytes"] == 8 * (weights + tables) / 4 + 8 * norms + 4 * weights / 4 + kept
    assert 4 * tables / 4 <= figures["argument_bytes"] < 1.1 * 4 * tables / 4


@pytest.mark.slow
def test_two_slices_exchange_their_shares_of_gradients(plan):
    """Each chip of a slice sends its quarter of the gradients: in bfloat16 those of layers, at least."""
    code, figures, _ = plan("--hardware", "2xv5e:2x2", "mesh.slices=2", "mesh.data=2", "mesh.fsdp=4")
    assert code == 0 and figures["devices"] == 8
    between = figures["collectives"]["between slices"]["bytes"]
    assert 2 * PARAMETERS / 4 <= between <= 4 * 1.1 * PARAMETERS / 4
    assert figures["argument_bytes"] < 1.1 * 12 * PARAMETERS / 4
    code, _, error = plan("--hardware", "2xv5e:2x2", "mesh.data=2", "mesh.fsdp=4")
    assert code == 2 and "these devices are 2 slices: give mesh.slices=2" in error


@pytest.mark.slow
def test_a_pipeline_hands_on_its_rows(plan):
    """Of three steps of two stages one is idle; each hands two rows on, and their gradient back."""
    code, figures, _ = plan("mesh.fsdp=2", "mesh.stage=2")
    assert code == 0 and figures["bubble"] == pytest.approx(1 / 3)
    handed_on = figures["collectives"]["collective-permute"]["bytes"]
    assert 2 * 3 * (2 * 256 * D * 2) <= handed_on < 1.5 * 2 * 3 * (2 * 256 * D * 2)
    assert figures["argument_bytes"] < 1.1 * 12 * PARAMETERS / 4


def test_an_array_made_whole_is_a_fault(plan, monkeypatch):
    """The lookup, left to the partitioner."""
    naive = lambda table_VD, tokens_BT, dtype: jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)  # noqa: E731
    monkeypatch.setattr(llama, "lookup", naive)
    code, figures, error = plan("mesh.fsdp=2", "mesh.context=2")
    assert code == 1 and figures["fits"] and figures["made_whole"]
    assert "arrays whole on every device (" in error


def test_what_does_not_fit_is_exit_3_and_says_how_much(plan):
    large = RECIPE["model"] | {"d_model": 8192, "n_layers": 8, "n_heads": 64, "n_kv_heads": 64, "d_ff": 28672}
    code, figures, error = plan("mesh.fsdp=4", model=large)
    assert code == 3 and not figures["fits"]
    # 8 layers of 0.97 B parameters: 12 bytes each, over four devices of 16.9 GB.
    assert figures["peak_bytes"] > 12 * 8 * 0.97e9 / 4 > figures["hbm_bytes"]
    assert figures["largest"] and figures["step_seconds_bound"] is None
    assert "GB per device are needed on v5e:2x2, which has 16.91" in error


@pytest.mark.slow
def test_dpo_holds_its_reference_and_counts_it(plan):
    """The policy 12 bytes a parameter, the reference 4, over the shards; both rows of a pair are read, by the
    reference forward alone. Logits are so few here that the policy's are kept for its backward pass."""
    start, data = {"policy": "not/here"}, {"sources": ["unused.jsonl"]}
    code, figures, error = plan("mesh.fsdp=4", stage="dpo", start=start, data=data)
    assert code == 0, error
    wanted = 16 * PARAMETERS / 4
    assert wanted <= figures["argument_bytes"] < 1.1 * wanted
    assert any(line.split()[2].startswith("frozen/") for line in figures["largest"])
    assert figures["tokens_per_step"] == 2 * 8 * 256
    weights, head = L * (3 * D * D + 3 * D * F), D * V
    assert figures["flops_per_token"] == pytest.approx((6 * (weights + head) + 6 * L * D * 256) * 4 / 3)
    multiplied = 8 * (weights - L * D * F) + 6 * (L * D * F + head) + 2 * (weights + head)
    assert figures["matmul_flops"] == multiplied * 2 * 8 * 256 / 4
    assert figures["classic_state_bytes"] == 18 * PARAMETERS


def test_adapters_cost_no_gradients_of_the_model(plan):
    """4 of the model's 6 FLOPs per weight and token, and all 6 of the adapters'; remat computes again all but
    the last matmul. The compiled program has as many products, and where the bytes of the update are alone
    those of adapters, the weights are read twice and once more for remat."""
    code, figures, error = plan(
        "mesh.fsdp=4",
        stage="sft",
        start={"policy": "not/here"},
        data={"sources": ["unused.jsonl"]},
        generation={"max_new_tokens": 128},
        lora={"rank": 8, "targets": ["wq", "w_down"]},
    )
    assert code == 0 and figures["fits"], error
    weights, down, head = L * (3 * D * D + 3 * D * F), L * D * F, D * V
    low_rank, last = L * 8 * (2 * D + F + D), L * 8 * D
    assert figures["trained_parameters"] == low_rank
    assert figures["parameters"] == PARAMETERS + low_rank
    assert figures["flops_per_token"] == 4 * (weights + head) + 6 * low_rank + 6 * L * D * 256
    multiplied = 6 * (weights - down) + 4 * (down + head) + 8 * (low_rank - last) + 6 * last
    assert figures["matmul_flops"] == multiplied * 8 * 256 / 4


@pytest.mark.slow
def test_a_reward_model_has_no_language_head(plan):
    code, figures, error = plan(
        "mesh.fsdp=4", stage="reward", start={"policy": "not/here"}, data={"sources": ["unused.jsonl"]}
    )
    assert code == 0 and figures["fits"], error
    weights, attention = L * (3 * D * D + 3 * D * F), 6 * L * D * 256
    assert figures["flops_per_token"] == 6 * (weights + D) + attention
    assert figures["flops_per_token_full_attention"] == 6 * (weights + D) + 2 * attention


@pytest.mark.slow
def test_four_models_of_ppo_hold_what_they_should(plan):
    """Actor and critic 12 bytes a parameter, reference and reward model 4: 32 in all, over the shards."""
    _, figures, _ = plan(
        "mesh.fsdp=4",
        stage="ppo",
        start={"policy": "not/here", "reward": "not/here"},
        data={"sources": ["unused.jsonl"]},
        generation={"max_new_tokens": 128, "temperature": 1.0},
    )
    scalar = PARAMETERS - V * D + D
    wanted = (16 * PARAMETERS + 16 * scalar) / 4
    assert wanted <= figures["argument_bytes"] < 1.1 * wanted


# What cannot be planned


def test_a_machine_must_be_named(plan):
    code, _, error = plan(run={"dir": "runs/unused", "steps": 10})
    assert code == 2 and "give --hardware" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--hardware", "v5x-8"], "v5x-8 is not known"),
        (["--hardware", "v5e:3x3"], "TPU's compiler refuses v5e:3x3"),
        (["mesh.fsdp=3"], "3 does not divide the 4 devices"),
        (["mesh.tensor=4"], "model.n_kv_heads=2 is not divisible by mesh.tensor=4"),
        (["batch.sequence_length=200"], "a multiple of 128 positions per device, not 200"),
        (["stage=sft", "start.policy=not/here", "model=null"], "train that stage first, or give the section"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_planned_is_told(plan, words, sentence):
    code, figures, error = plan(*words)
    assert (code, figures) == (2, None)
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_search_is_confirmed_by_the_compiler(plan, monkeypatch):
    """All but the mesh is held; of the candidates, the first two are compiled and no more."""
    monkeypatch.setattr("maxllm.stages.plan.CONFIRMED", 2)
    held = ["model.remat=full", "batch.rows=8", "batch.microbatches=1"]
    code, figures, error = plan("--search", *held)
    assert code == 0, error
    compiled = [row["compiled"] for row in figures["best"] if "compiled" in row]
    assert len(compiled) == 2 < len(figures["best"]) and all(said["compile_seconds"] > 0 for said in compiled)
    assert [said["mesh"] for said in compiled] == [row["mesh"] for row in figures["best"][:2]]
    assert figures["chosen"] == figures["best"][0]["words"]
    # n_kv_heads=2 keeps tensor=4 out.
    assert {row["lost"] for row in figures["others"]} >= {"n_kv_heads 2 is not divisible by 4"}


def test_without_the_compiler_the_extra_is_named(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    code, _, error = plan()
    assert code == 2 and "pip install 'maxllm[tpu]'" in error
    monkeypatch.setitem(sys.modules, "jax_cuda12_plugin", None)
    code, _, error = plan("--hardware", "h100x8")
    assert code == 2 and "pip install 'maxllm[cuda]'" in error


def test_people_get_tables(tmp_path: Path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model": RECIPE["model"] | {"n_layers": 1}}))
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    for word in (
        "fits",
        "4 devices, links open",
        "peak",
        "all-reduce",
        "model FLOPs utilization",
        "compiling took",
    ):
        assert word in said
