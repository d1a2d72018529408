"""Compiles variations of the recipes, for `maxllm plan --estimate` to be held against.

    python tools/estimates.py             those that are not recorded yet
    python tools/estimates.py NAME ...    these, again

The figures are in tests/plan/compiled.json; tests/plan/test_estimate.py compares, and compiles nothing. A
point takes half a minute to four on two cores. Depths are small: a scan makes all layers one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).parent.parent / "tests" / "plan" / "compiled.json"

SEVEN, EIGHT = "pretrain/llama2-7b_synthetic_v5p-16", "pretrain/llama3-8b_synthetic_v6e-256"
SMALL = ["--hardware", "v6e-16", "batch.rows=16", "model.n_layers=8"]
POINTS: dict[str, list[str]] = {
    "no remat": [SEVEN, "model.n_layers=4", "model.remat=none"],
    "dots": [SEVEN, "model.n_layers=4", "model.remat=dots"],
    "tensor": [SEVEN, "model.n_layers=8", "mesh.fsdp=4", "mesh.tensor=2"],
    "replicas": [SEVEN, "model.n_layers=8", "mesh.data=2", "mesh.fsdp=4"],
    "zero 1": [SEVEN, "model.n_layers=4", "mesh.zero=1"],
    "microbatches": [SEVEN, "model.n_layers=8", "batch.microbatches=2"],
    "float32 gradients": [SEVEN, "model.n_layers=8", "optimizer.gradient_dtype=float32"],
    "data": [SEVEN, "model.n_layers=4", "mesh.data=8", "mesh.fsdp=1"],
    "llama 3": [EIGHT, *SMALL],
    "context": [EIGHT, *SMALL, "mesh.fsdp=4", "mesh.context=4"],
    "few chips": [
        EIGHT,
        "--hardware",
        "v5e:2x2",
        "batch.rows=4",
        "batch.sequence_length=2048",
        "model.n_layers=4",
    ],
    "float32": [SEVEN, "model.n_layers=4", "model.dtype=float32", "optimizer.gradient_dtype=float32"],
    "bfloat16 moments": [SEVEN, "model.n_layers=8", "optimizer.moment_dtype=bfloat16"],
    "adafactor": [SEVEN, "model.n_layers=8", "optimizer.name=adafactor"],
    "muon": [SEVEN, "model.n_layers=8", "optimizer.name=muon"],
}
"""Name -> the words of `maxllm plan`."""


def main() -> int:
    """Writes each figure down as it comes."""
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    wanted = sys.argv[1:] or [name for name in POINTS if name not in recorded]
    for name in wanted:
        command = [sys.executable, "-m", "maxllm.cli", "plan", *POINTS[name], "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 3):
            return done.returncode
        figures = json.loads(done.stdout)
        sent = sum(exchange["bytes"] for exchange in (figures["collectives"] or {}).values())
        recorded[name] = {
            "words": POINTS[name],
            "argument_bytes": figures["argument_bytes"],
            "peak_bytes": figures["peak_bytes"],
            "sent_bytes": sent,
        }
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
        print(f"{name}: peak {figures['peak_bytes'] / 1e9:.2f} GB, sent {sent / 1e9:.1f} GB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
