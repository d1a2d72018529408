"""Training and decoding of Llama-1B on one NVIDIA GPU, beside `transformers` with torch on the same card.

    python tools/bench_gpu.py                       both frameworks, training and decoding: a table
    python tools/bench_gpu.py --remat none full     which activations training computes again
    python tools/bench_gpu.py --frameworks ours --json
    python tools/bench_gpu.py --tiny                a toy on the CPU: tries the tool, its figures say nothing

The shapes are those of Llama-3.2-1B (1.24 billion parameters, tied embeddings). A training step is 4 rows of
2,048 tokens: bfloat16 matmuls on float32 weights, clipping, AdamW; ours with cuDNN's attention, theirs with
SDPA, torch.compile, autocast and the fused AdamW (`full` is their gradient checkpointing). Decoding is
greedy, weights in bfloat16, 16 rows after prompts of 128 tokens; theirs has a static cache and is compiled.
Each measurement is a process of its own. It prints

    a step needs      FLOPs by the model's formula (plan/flops.py); bytes that weights, gradients and moments,
                      or in decoding weights and cache, must move at least; and by the card's data sheet
                      (plan/hardware.py) the floor, which no program is below
    seconds           median of a step after warm-up, waited for; decoding: of one token of all rows
    gap               seconds over the floor
    MFU               FLOPs of the model, without what remat computes again, over the card's peak
    peak              most bytes that the framework's allocator had in use, without the CUDA context

Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_jobs import Job
from rich.console import Console
from rich.table import Table

from maxllm.plan.flops import matmul_parameters, train_flops_per_token
from maxllm.plan.hardware import CHIPS, KINDS, Chip
from maxllm.plan.roofline import step_bound

LLAMA_1B = {
    "vocab_size": 128256,
    "d_model": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_ff": 8192,
    "max_seq_len": 2048,
    "rope_theta": 500_000.0,
    "tie_embeddings": True,
}
TINY = LLAMA_1B | {
    "vocab_size": 512,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 128,
    "max_seq_len": 64,
}


NO_GPU = (
    "there is no NVIDIA GPU here that JAX can use (pip install 'maxllm[cuda]'); --tiny tries the tool on CPU"
)

ONE = Chip("gpu", flops=1.0, hbm_bytes=0, hbm_bandwidth=1.0, link_bandwidth=1.0)
"""A chip of one FLOP/s and one byte/s, whose seconds are FLOPs and bytes."""


# --- the two numbers, and the floor ------------------------------------------------------------------------


def needs(job: Job) -> tuple[float, float]:
    """FLOPs and bytes of a training step, or of one token of all rows, that no program is without."""
    c = job.model
    multiplied = matmul_parameters(c, c.vocab_size)
    if job.work == "train":
        table = 0 if c.tie_embeddings else c.vocab_size * c.d_model
        parameters = multiplied + table + (2 * c.n_layers + 1) * c.d_model
        bound = step_bound(
            ONE,
            model=c.model_copy(update={"remat": "none"}),
            sequence_length=job.length,
            tokens_per_device=job.rows * job.length,
            parameter_shard=parameters,
            gathered_parameters=multiplied,
            sent_bytes=0.0,
            passes=3,
        )
        return bound.compute, bound.memory
    # The mean over the tokens that are timed. In training a token sees half of its row: twice as long a row.
    context = job.length + (job.tokens // 4 + job.tokens) // 2
    cache = 2 * c.n_layers * c.n_kv_heads * c.k_dim * context
    return job.rows * train_flops_per_token(c, 2 * context) / 3, 2 * (multiplied + job.rows * cache)


def figures_of(job: Job, measured: dict[str, float], chip: Chip | None) -> dict[str, Any]:
    """What is printed of a measurement; None where the card is not in plan/hardware.py."""
    (flops, moved), seconds = needs(job), measured["seconds"]
    floor = None if chip is None else max(flops / chip.flops, moved / chip.hbm_bandwidth)
    return {
        "flops": flops,
        "bytes": moved,
        "floor_seconds": floor,
        "seconds": seconds,
        "gap": None if floor is None else seconds / floor,
        "tokens_per_second": job.rows * (job.length if job.work == "train" else 1) / seconds,
        "mfu": None if chip is None else flops / seconds / chip.flops,
        "peak_bytes": measured["peak_bytes"] or None,
        "first_seconds": measured["first_seconds"],
    }


# --- measuring ---------------------------------------------------------------------------------------------


def in_process(asked: Any, platform: str) -> subprocess.CompletedProcess[str]:
    """`gpu_jobs.py` by itself, with nearly all of the card's memory."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    environment["JAX_PLATFORMS"] = platform if platform == "cpu" else f"{platform},cpu"
    tool = Path(__file__).with_name("gpu_jobs.py")
    return subprocess.run(
        [sys.executable, str(tool), json.dumps(asked)], env=environment, capture_output=True, text=True
    )


def measure(job: Job, chip: Chip | None) -> dict[str, Any]:
    """The figures of a job, or an `error`, the last that it said."""
    named = {"framework": job.framework, "work": job.work, "remat": job.remat}
    done = in_process(asdict(job), job.platform)
    if done.returncode == 0:
        return named | figures_of(job, json.loads(done.stdout.splitlines()[-1]), chip)
    if "RESOURCE_EXHAUSTED" in done.stderr or "OutOfMemoryError" in done.stderr:
        return named | {"error": "out of memory"}
    return named | {"error": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]}


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All measurements that are asked for; torch has no `dots`."""
    tiny = options.tiny
    jobs: list[Job] = []
    batch: dict[str, Any]
    for framework in options.frameworks:
        shared: dict[str, Any] = {
            "framework": framework,
            "platform": "cpu" if tiny else "cuda",
            "shapes": TINY if tiny else LLAMA_1B,
            "steps": 3 if tiny else options.steps,
        }
        if "train" in options.work:
            batch = {"rows": 2, "length": 32} if tiny else {"rows": 4, "length": 2048}
            jobs += [
                Job(**shared, **batch, work="train", remat=remat, tokens=0)
                for remat in options.remat
                if framework == "ours" or remat != "dots"
            ]
        if "decode" in options.work:
            batch = (
                {"rows": 2, "length": 8, "tokens": 8} if tiny else {"rows": 16, "length": 128, "tokens": 256}
            )
            jobs.append(Job(**shared, **batch, work="decode", remat="none"))
    return jobs


# --- the command -------------------------------------------------------------------------------------------


def table_of(rows: Sequence[dict[str, Any]], work: str) -> Table:
    """For people: what a step needs above, and then one line for each measurement."""
    table = Table("", "remat", "seconds", "gap", "tokens/s", "MFU", "peak GB", "compiling s")
    for row in rows:
        if "error" in row:
            table.add_row(row["framework"], row["remat"], row["error"])
            continue
        floor = "unknown" if row["floor_seconds"] is None else f"{row['floor_seconds'] * 1e3:,.2f} ms"
        needed = f"{row['flops'] / 1e12:,.3f} TFLOP, {row['bytes'] / 1e9:,.2f} GB: floor {floor}"
        table.title = f"{'a step of training' if work == 'train' else 'a token of all rows'} needs {needed}"
        table.add_row(
            row["framework"],
            row["remat"],
            f"{row['seconds']:.4f}",
            "-" if row["gap"] is None else f"{row['gap']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['first_seconds']:.1f}",
        )
    return table


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The words of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--frameworks", **several, choices=["ours", "torch"], default=["ours", "torch"])
    parser.add_argument("--work", **several, choices=["train", "decode"], default=["train", "decode"])
    parser.add_argument(
        "--remat",
        **several,
        choices=["none", "dots", "full"],
        default=["none", "full"],
        help="none, dots (ours alone) or full: what training computes again (none and full)",
    )
    parser.add_argument("--steps", type=int, default=10, help="that are timed, after two that are not (10)")
    parser.add_argument("--json", action="store_true", help="one object: the device, and a row for each")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU, to try the tool")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 where a measurement failed."""
    options = options_of(words)
    platform = "cpu" if options.tiny else "cuda"
    found = in_process(platform, platform)
    if found.returncode == 2:
        print(f"bench_gpu: {NO_GPU}", file=sys.stderr)
        return 2
    kind = json.loads(found.stdout.splitlines()[-1])["kind"]
    chip = CHIPS[KINDS[kind]] if kind in KINDS else None
    rows = [measure(job, chip) for job in jobs_of(options)]
    if options.json:
        print(json.dumps({"device": kind, "rows": rows}))
    else:
        console = Console()
        console.print(
            f"{kind}{'' if chip else ', whose peaks are not in plan/hardware.py: no floor, no MFU'}"
        )
        for work in options.work:
            console.print(table_of([row for row in rows if row["work"] == work], work))
    return 1 if any(row.get("error", "out of memory") != "out of memory" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
