"""One model trained in seven ways on the same rows: what each learns, and what it costs.

    pip install reasoning-gym peft
    python tools/sft_ways.py [--rows 2000] [--ways full,lora] [--json]

The model is SmolLM2-135M-Instruct, the task reasoning-gym's chain_sum with numbers of two digits: sums with
two and three terms, each with one right answer, which it answers with a sentence before it is trained. Every
way takes the same rows in the same order; learning rates differ, as the ways want them. Figures are exact
match of greedy replies to held-out questions before and after, seconds of training, the most memory that the
process had, and bytes of a checkpoint. The merged LoRA is exported and asked in `transformers`, the LoRA
alone in PEFT. Ways that are done are not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "sft" / "smollm2-135m_sums_cpu.yaml"

WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "freeze": ("freeze.layers=20", "freeze.embeddings=true", "optimizer.learning_rate=3e-4"),
    "lora": ("lora.rank=8", "lora.alpha=16", "optimizer.learning_rate=2e-3"),
    "dora": ("lora.rank=8", "lora.alpha=16", "lora.dora=true", "optimizer.learning_rate=2e-3"),
    "bottleneck": ("bottleneck.width=32", "optimizer.learning_rate=2e-3"),
    "prefix": ("prefix.length=16", "optimizer.learning_rate=2e-2"),
    "qlora": ("lora.rank=8", "lora.alpha=16", "freeze.dtype=nf4", "optimizer.learning_rate=2e-3"),
}
"""What is trained -> the settings that say so."""


UNROLLED = "model.scan_unroll=30"
"""Fastest on CPUs, and for frozen layers too: their part is unrolled by itself."""

FAR = 10**6
"""The seed of held-out questions: reasoning-gym seeds each question with its number and the seed together."""


def questions(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of chain_sum, with an empty system's turn in place of the model's own."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=2, max_terms=3, min_digits=2, max_digits=2
    )
    for item in made:
        turns = (("system", ""), ("user", item["question"]), ("assistant", item["answer"]))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(folder: Path, rows: int, heldout: int) -> None:
    """Training rows, and held-out ones none of whose questions is among them."""
    train = list(questions(rows, seed=1))
    asked = {row["messages"][1]["content"] for row in train}
    fresh = (row for row in questions(4 * heldout, seed=FAR) if row["messages"][1]["content"] not in asked)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (
        ("train", train),
        ("heldout", [row for row, _ in zip(fresh, range(heldout), strict=False)]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def maxllm(*words: object) -> Any:
    """What a command prints as JSON.

    Raises:
      CalledProcessError: it fails; its own words are on stderr.
    """
    command = [sys.executable, "-m", "maxllm.cli", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def checkpoint_bytes(run: Path) -> int:
    """Size of the newest checkpoint: trained weights and the optimizer's state."""
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())


def train(way: str, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The figures of one way, in a process of its own."""
    run = folder / way
    data = [
        f"data.{side}=['{folder / name}.jsonl']"
        for side, name in (("sources", "train"), ("heldout_sources", "heldout"))
    ]
    summary = maxllm(
        "sft",
        RECIPE,
        f"run.dir={run}",
        f"start.policy={folder / 'base'}",
        UNROLLED,
        *data,
        *WAYS[way],
        *words,
    )
    return {
        "trained": summary["trained_parameters"],
        "before": summary["heldout_first"]["exact_match"],
        "after": summary["heldout_last"]["exact_match"],
        "loss": summary["heldout_last"]["loss"],
        "seconds": summary["seconds"],
        "peak_bytes": summary["peak_rss_bytes"],
        "checkpoint_bytes": checkpoint_bytes(run),
    }


def asked_elsewhere(model: Any, tokenizer: Any, folder: Path) -> float:
    """Exact match of a torch model's greedy replies to the held-out questions."""
    import torch

    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        *prompt, answer = row["messages"]
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(said, skip_special_tokens=True).strip() == answer["content"]
    return right / len(rows)


def exported(folder: Path) -> dict[str, float]:
    """The LoRA run, merged in `transformers`, and alone in PEFT on the model that it was trained beside."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, merged, base, alone = (folder / name for name in ("lora", "merged", "base-hf", "peft"))
    for words in (
        ("export", run, merged),
        ("convert", "to-hf", folder / "base", base),
        ("export", run, alone, "--base", base),
    ):
        if not Path(str(words[-1] if words[0] == "convert" else words[2])).exists():
            maxllm(*words)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    adapted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(adapted, str(alone)).eval()
    return {
        "transformers": asked_elsewhere(model, tokenizer, folder),
        "peft": asked_elsewhere(beside, tokenizer, folder),
    }


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, default=Path("runs/sums"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_args()
    write_rows(options.out, options.rows, options.heldout)
    if not (options.out / "base").exists():
        fetched = subprocess.run(
            [ROOT / "tools" / "fetch_smollm2.sh"], check=True, capture_output=True, text=True
        )
        maxllm("convert", "from-gguf", fetched.stdout.strip(), options.out / "base")
    found: dict[str, Any] = {way: train(way, options.out, options.words) for way in options.ways.split(",")}
    elsewhere = exported(options.out) if "lora" in found else {}
    if options.json:
        print(json.dumps({"ways": found, "elsewhere": elsewhere}))
        return
    table = Table("", "trained", "before", "after", "held-out loss", "seconds", "peak memory", "checkpoint")
    for way, figures in found.items():
        table.add_row(
            way,
            f"{figures['trained']:,}",
            f"{figures['before']:.1%}",
            f"{figures['after']:.1%}",
            f"{figures['loss']:.3f}",
            f"{figures['seconds']:,.0f}",
            f"{figures['peak_bytes'] / 1e9:.2f} GB",
            f"{figures['checkpoint_bytes'] / 1e6:,.1f} MB",
        )
    console = Console()
    console.print(table)
    for where, share in elsewhere.items():
        console.print(f"lora in {where}: {share:.1%}")


if __name__ == "__main__":
    main()
