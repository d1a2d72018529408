"""`maxllm plan --layout`: how each parameter is split, without a compiler."""

import json

from maxllm.cli import main


def test_how_wq_is_split(capsys):
    words = ["--layout", "--json", "mesh.fsdp=4", "mesh.tensor=2", "mesh.data=1"]
    assert main(["plan", "pretrain/llama2-7b_synthetic_v5p-16", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    rows = {row["path"]: row for row in figures["layout"]}
    assert figures["mesh"] == {"data": 1, "fsdp": 4, "stage": 1, "context": 1, "tensor": 2}
    assert rows["decoder/layers/attention/wq"] == {
        "path": "decoder/layers/attention/wq",
        "axes": ["layers", "embed", "heads", "head_dim"],
        "mesh": [[], ["fsdp"], ["tensor"], []],
        "shape": [32, 4096, 32, 128],
        "device_shape": [32, 1024, 16, 128],
        "device_bytes": 32 * 1024 * 16 * 128 * 4,
        "memory": "device",
    }
    assert rows["decoder/final_norm/scale"]["device_shape"] == [4096]
    assert len(rows) == 12  # embedding, head and final norm, and nine of the layers


def test_zero_and_offload_are_seen(capsys):
    words = ["--layout", "--json", "mesh.zero=1"]
    assert main(["plan", "pretrain/llama2-7b_synthetic_v5p-16", *words]) == 0
    whole = json.loads(capsys.readouterr().out)["layout"]
    assert all(row["shape"] == row["device_shape"] for row in whole)
    words = ["--layout", "--json", "mesh.offload=parameters"]
    assert main(["plan", "pretrain/llama2-7b_synthetic_v5p-16", *words]) == 0
    offloaded = {row["path"]: row["memory"] for row in json.loads(capsys.readouterr().out)["layout"]}
    assert offloaded["decoder/layers/mlp/w_up"] == "pinned_host"
    assert offloaded["decoder/embedding"] == "device"


def test_people_get_a_table(capsys):
    assert main(["plan", "pretrain/llama2-7b_synthetic_v5p-16", "--layout"]) == 0
    said = capsys.readouterr().out
    assert "embed 4096 / fsdp" in said and "32 x 512 x 32 x 128" in said
