"""`maxllm plan` for GPUs: JAX's CUDA plugin is asked, on this machine without a GPU."""

import importlib.util
import json

import pytest
import yaml

from maxllm.cli import main

pytest.importorskip("jax_cuda12_plugin", reason="JAX's CUDA plugin is in the extra cuda")
# cuDNN is two gigabytes more.
HAS_CUDNN = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")

D, L, F, V, T = 512, 4, 1024, 512, 256
RECIPE = {
    "stage": "pretrain",
    "run": {"dir": "runs/unused", "steps": 10},
    "model": {
        "vocab_size": V,
        "d_model": D,
        "n_layers": L,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": F,
        "max_seq_len": T,
        "remat": "full",
        "attention": "xla",
    },
    "tokenizer": {"path": "unused"},
    "data": {"prepared_dir": "unused"},
    "batch": {"rows": 16, "sequence_length": T},
    "mesh": {"data": 1, "fsdp": -1},
    "optimizer": {"gradient_dtype": "bfloat16"},
}
WEIGHTS = L * (3 * D * D + 3 * D * F)
PARAMETERS = WEIGHTS + 2 * V * D + D + L * 2 * D


@pytest.fixture
def plan(tmp_path, capsys):
    """plan(*words): exit code, figures, stderr."""

    def run(*words):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        code = main(["plan", str(recipe), "--json", *words])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


@pytest.mark.parametrize("name", ["h100x8", "h200x8", "a100x8"])
def test_a_node(plan, name):
    """The state has 12 bytes a parameter, over the shards; every layer is gathered twice and scattered once
    in bfloat16, the head gathered once and scattered in float32."""
    code, figures, error = plan("--hardware", name)
    assert code == 0 and figures["fits"], error
    assert (figures["devices"], figures["mesh"]["fsdp"], figures["attention"]) == (8, 8, "xla")
    state = 12 * PARAMETERS / 8
    assert state <= figures["argument_bytes"] < 1.1 * state
    assert figures["argument_bytes"] < figures["peak_bytes"] <= figures["hbm_bytes"]
    sent = {kind: exchange["bytes"] for kind, exchange in figures["collectives"].items()}
    head = V * D
    # Beside the weights the segments of the rows are gathered, 4 bytes a token.
    assert 0 <= sent["all-gather"] - (2 * 2 * WEIGHTS + 2 * head) * 7 / 8 <= 3 * 4 * 16 * T
    assert sent["reduce-scatter"] == pytest.approx((2 * WEIGHTS + 4 * head) * 7 / 8, rel=1e-6)
    # XLA's attention is matmuls too: of the layers' four times, but w_down.
    multiplied = 8 * (WEIGHTS - L * D * F) + 6 * (L * D * F + head)
    assert figures["matmul_flops"] >= multiplied * 16 * T / 8


def test_two_nodes(plan):
    """Of what 16 GPUs exchange a fifteenth must leave each one for the other node."""
    code, figures, error = plan("--hardware", "h100x16")
    assert code == 0 and figures["devices"] == 16, error
    gathered = (2 * 2 * WEIGHTS + 2 * V * D) * 15 / 16
    assert 0 <= figures["collectives"]["all-gather"]["bytes"] - gathered <= 3 * 4 * 16 * T


@pytest.mark.skipif(not HAS_CUDNN, reason="cuDNN is not installed")
def test_attention_is_cudnns(plan):
    code, figures, error = plan("--hardware", "h100x8", "model.attention=auto", "mesh.context=2")
    assert code == 0 and figures["attention"] == "cudnn", error


@pytest.mark.skipif(bool(HAS_CUDNN), reason="cuDNN is installed")
def test_without_cudnn_the_extra_is_named(plan):
    code, _, error = plan("--hardware", "h100x8", "model.attention=auto")
    assert code == 2 and "pip install 'maxllm[cuda]', or give model.attention=xla" in error
