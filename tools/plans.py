"""Compiles every recipe that names its machine, and compares the peak with the figure recorded for it.

    python tools/plans.py               all of them; fails where one does not fit or moved by more than 3 %
    python tools/plans.py llama2-7b     those whose name has this in it
    python tools/plans.py --record      writes down what is found
    python tools/plans.py --growth      what more chips and more layers cost instead, see `growth`

The figures are in configs/plans.json. A recipe takes one to five minutes on two cores; one whose machine has
its compiler not installed here is skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from maxllm.plan.hardware import hardware_of

CONFIGS = Path(__file__).parent.parent / "configs"
RECORD = CONFIGS / "plans.json"
MOVED = 0.03
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "nvidia-cudnn-cu12")}
"""Platform -> the packages that its compiler is in, extras tpu and cuda."""


def main() -> int:
    """Prints a table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help="only recipes whose name has this in it")
    parser.add_argument("--record", action="store_true", help="write the figures down")
    parser.add_argument("--growth", action="store_true", help="from 8 to 512 chips, from 8 to 80 layers")
    options = parser.parse_args()
    if options.growth:
        return growth()
    recipes = [recipe for recipe in with_machines() if options.name in name_of(recipe)]
    if not recipes:
        print(f"no recipe that names its machine has {options.name!r} in its name", file=sys.stderr)
        return 2
    recipes = [recipe for recipe in recipes if can_be_compiled(recipe)]
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    table = Table("recipe", "machine", "peak GB", "of", "recorded", "sent GB", "compiled in", "")
    wrong = 0
    for recipe in recipes:
        figures, former = plan(recipe), recorded.get(name_of(recipe))
        verdict = verdict_on(figures, former)
        wrong += bool(verdict)
        sent = sent_bytes(figures)
        table.add_row(
            name_of(recipe),
            figures["hardware"],
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{figures['hbm_bytes'] / 1e9:.1f}",
            f"{former['peak_bytes'] / 1e9:.2f}" if former else "-",
            f"{sent / 1e9:.1f}",
            f"{figures['compile_seconds']:.0f} s",
            verdict or "fits",
        )
        if options.record and figures["fits"]:
            recorded[name_of(recipe)] = {"peak_bytes": figures["peak_bytes"], "sent_bytes": sent}
            RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=2) + "\n")
        print(f"{name_of(recipe)}: {verdict or 'fits'}", file=sys.stderr)
    Console(width=140).print(table)
    return int(wrong > 0 and not options.record)


def with_machines() -> list[Path]:
    """Recipes with run.hardware."""
    found = []
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if yaml.safe_load(path.read_text())["run"].get("hardware"):
            found.append(path)
    return found


def can_be_compiled(recipe: Path) -> bool:
    """Whether the compiler for its machine is installed; says so where it is not."""
    platform = hardware_of(yaml.safe_load(recipe.read_text())["run"]["hardware"]).chip.platform
    for package in COMPILERS[platform]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name_of(recipe)}: skipped, {package} is not installed", file=sys.stderr)
            return False
    return True


def name_of(recipe: Path) -> str:
    """pretrain/llama2-7b_synthetic_v5p-16"""
    return f"{recipe.parent.name}/{recipe.stem}"


def plan(recipe: Path, *overrides: str) -> dict[str, Any]:
    """What `maxllm plan --json` says, also of a recipe that does not fit; nothing is taken from a cache."""
    words = [sys.executable, "-m", "maxllm.cli", "plan", str(recipe), *overrides, "--json"]
    uncached = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=uncached)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name_of(recipe)} cannot be planned")
    return json.loads(done.stdout)


def sent_bytes(figures: dict[str, Any]) -> int:
    """By one chip in a step."""
    return sum(exchange["bytes"] for exchange in (figures["collectives"] or {}).values())


def verdict_on(figures: dict[str, Any], former: dict[str, Any] | None) -> str:
    """What is wrong; empty where nothing is."""
    if not figures["fits"]:
        return "DOES NOT FIT"
    if former is None:
        return "not recorded"
    change = figures["peak_bytes"] / former["peak_bytes"] - 1
    return f"moved by {change:+.1%}" if abs(change) > MOVED else ""


SEVEN = CONFIGS / "pretrain" / "llama2-7b_synthetic_v5p-16.yaml"
SEVENTY = CONFIGS / "pretrain" / "llama2-70b_synthetic_v5p-128.yaml"
CHIPS = {8: "v5p-16", 128: "v5p-256", 512: "v5p-1024"}


def growth() -> int:
    """Llama-2-7B with the same work on each chip: 4 rows, and an eighth of the state (FSDP over 8, replicas
    of that); then the depth of Llama-2-70B, whose layers are one loop to the compiler."""
    first = None
    for chips, name in CHIPS.items():
        words = (f"run.hardware={name}", f"batch.rows={4 * chips}", "mesh.data=-1", "mesh.fsdp=8")
        first = say(f"{chips} chips", plan(SEVEN, *words), first)
    first = None
    for layers in (8, 80):
        first = say(f"{layers} layers", plan(SEVENTY, f"model.n_layers={layers}"), first)
    return 0


def say(name: str, figures: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """Prints figures beside the first of their kind, and returns that."""
    first = first or figures
    peak, sent, seconds = (
        (find(figures), find(figures) / find(first))
        for find in (
            lambda f: f["peak_bytes"] / 1e9,
            lambda f: sent_bytes(f) / 1e9,
            lambda f: f["compile_seconds"],
        )
    )
    kinds = ", ".join(f"{kind} {e['bytes'] / 1e9:.2f}" for kind, e in figures["collectives"].items())
    print(
        f"{name}: peak {peak[0]:.2f} GB (x {peak[1]:.3f}), sent {sent[0]:.2f} GB (x {sent[1]:.3f}: {kinds}), "
        f"compiled in {seconds[0]:.0f} s (x {seconds[1]:.2f})",
        flush=True,
    )
    return first


if __name__ == "__main__":
    sys.exit(main())
