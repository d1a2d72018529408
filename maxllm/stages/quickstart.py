"""Quickstart: take the whole road, from text to a Hugging Face folder and a report.

    maxllm quickstart --out runs/quickstart

    prepare -> pretrain -> SFT -> reward model -> PPO -> export -> report

Each stage is the ordinary one with an ordinary recipe from configs/, in its own run folder below --out. A
stage that is complete is not run again, one that was interrupted continues: run the same command again.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.data import tasks
from maxllm.files import write_json
from maxllm.folder import RunFolder
from maxllm.report.figures import NO_VERDICT, NOT_YET, Facts, Row, Verdict
from maxllm.report.runs import number
from maxllm.report.stage import Road
from maxllm.report.wording import count, duration, percent, whole
from maxllm.run.machine import hardware
from maxllm.stages import export, prepare
from maxllm.stages.chat import generate
from maxllm.stages.registry import stage_of

RECIPES = {
    "pretrain": "pretrain/tiny_slice_cpu",
    "sft": "sft/tiny_tasks_cpu",
    "reward": "reward/tiny_tasks_cpu",
    "ppo": "ppo/tiny_tasks_cpu",
}
"""The stages in the order in which they run."""

FAST = "_fast"
"""Suffix of the recipes that take the same road in under two minutes, for tests."""

TEXT_PROMPTS = ("To be, or not to be", "It is a truth universally acknowledged", "李白\n\n")
SAMPLE_TASKS = 12


def run(out: Path, fast: bool = False) -> dict[str, Any]:
    """Takes the whole road, or what is left of it; returns `out/summary.json`'s content."""
    configs = {stage: stage_config(stage, out, fast) for stage in RECIPES}
    manifest = prepare.run(configs["pretrain"])
    seconds = {"prepare": manifest["seconds"]}
    summaries: dict[str, dict[str, Any]] = {}
    for stage in RECIPES:
        summaries[stage] = stage_of(stage).run(configs[stage])
        seconds[stage] = summaries[stage]["seconds"]
    own = RunFolder(out)  # which holds a summary of its own, though no run
    former = own.summary() or {}
    if former.get("runs") == fingerprint(out) and (out / "hf" / "config.json").is_file():
        return former
    started = time.perf_counter()
    rows = list(tasks.prompt_rows("heldout", SAMPLE_TASKS, seed=configs["ppo"].run.seed))
    exported = export.run(RunFolder(out / "ppo"), out / "hf", [row["prompt"] for row in rows])
    write_json(out / "samples.json", samples(out, rows))
    seconds["export"] = round(time.perf_counter() - started, 3)
    seconds["total"] = round(sum(seconds.values()), 3)
    summary = figures(summaries, exported) | {"fast": fast, "seconds": seconds, "hardware": hardware()}
    summary["runs"] = fingerprint(out)
    own.write_summary(summary)
    return summary


def fingerprint(out: Path) -> str:
    """sha256 over the stages' summaries: a stage that was run again makes what came after it stale."""
    contents = b"".join(RunFolder(out / stage).summary_bytes() for stage in RECIPES)
    return hashlib.sha256(contents).hexdigest()


def stage_config(stage: str, out: Path, fast: bool) -> Config:
    """The stage's recipe, with its folders below `out`."""
    overrides = [f"run.dir={out / stage}"]
    if stage == "pretrain":
        overrides += [f"tokenizer.path={out / 'tokenizer.model'}", f"data.prepared_dir={out / 'corpus'}"]
    else:
        overrides.append(f"start.policy={out / ('pretrain' if stage == 'sft' else 'sft')}")
    if stage == "ppo":
        overrides.append(f"start.reward={out / 'reward'}")
    return recipe.load_recipe(RECIPES[stage] + (FAST if fast else ""), overrides)


def figures(summaries: dict[str, dict[str, Any]], exported: dict[str, Any]) -> dict[str, Any]:
    """Every number of the before/after table, and how many held-out items stand behind it."""
    pretrained, tuned = summaries["pretrain"], summaries["sft"]
    rewarded, aligned = summaries["reward"], summaries["ppo"]
    before, after = aligned["heldout_first"], aligned["heldout_last"]
    return {
        "bits_per_byte": pretrained["heldout_last"]["bits_per_byte"],
        "bits_per_byte_unigram": pretrained["bits_per_byte_unigram"],
        "bits_per_byte_bigram": pretrained["bits_per_byte_bigram"],
        "sft_exact_match_before": tuned["heldout_first"]["exact_match"],
        "sft_exact_match_after": tuned["heldout_last"]["exact_match"],
        "reward_pair_accuracy": rewarded["heldout_last"]["accuracy"],
        "ppo_score_before": before["score"],
        "ppo_score_after": after["score"],
        "ppo_exact_match_before": before["exact_match"],
        "ppo_exact_match_after": after["exact_match"],
        "ppo_exact_match_greedy_before": before["exact_match_greedy"],
        "ppo_exact_match_greedy_after": after["exact_match_greedy"],
        "ppo_kl": after["kl"],
        "export_greedy_identical": exported["greedy_identical"],
        "heldout_items": {
            "bits_per_byte_bytes": pretrained["heldout_bytes"],
            "bits_per_byte_documents": pretrained["heldout_documents"],
            "sft_exact_match": tuned["heldout_items"],
            "reward_pair_accuracy": rewarded["heldout_items"],
            "ppo": aligned["heldout_items"],
            "export_prompts": exported["greedy_prompts"],
        },
        "parameters": pretrained["parameters"],
    }


def samples(out: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """What the models say: continuations of texts, and greedy replies to held-out tasks after each stage."""
    greedy = ["generation.temperature=0", "generation.max_new_tokens=16"]
    prompts = [row["prompt"] for row in rows]
    replies = {
        stage: [reply["text"] for reply in generate(RunFolder(out / stage), prompts, greedy)]
        for stage in ("sft", "ppo")
    }
    # The pretrained model has never seen a chat turn; the same question stands before it as plain text.
    replies["pretrained"] = [
        reply["text"]
        for reply in generate(RunFolder(out / "pretrain"), [f"{prompt}\n" for prompt in prompts], greedy)
    ]
    sampled = ["generation.temperature=0.8", "generation.top_p=0.95", "generation.max_new_tokens=80"]
    return {
        "text": [
            {"prompt": reply["prompt"], "continuation": reply["text"]}
            for reply in generate(RunFolder(out / "pretrain"), TEXT_PROMPTS, sampled)
        ],
        "tasks": [
            {**row, **{stage: texts[number] for stage, texts in replies.items()}}
            for number, row in enumerate(rows)
        ],
    }


# --- what a report shows -----------------------------------------------------------------------------------


def rows(facts: Facts) -> list[Row]:
    """Whether `transformers` decodes as we do."""
    prompts = number(facts.get("heldout_items", {}).get("export_prompts"))
    match facts.get("export_greedy_identical", NOT_YET):
        case True:
            after, verdict = "identical", Verdict("better", "same text")
        case False:
            after, verdict = "differs", Verdict("worse", "not the same text")
        case None:
            after, verdict = "not checked: torch is missing", NO_VERDICT
        case _:
            after, verdict = NOT_YET, NO_VERDICT
    row = Row(
        "Exported model, greedy text",
        ("the checkpoint",),
        after,
        count(prompts, "prompt") if prompts else "",
        "Whether the Hugging Face folder, run by transformers, writes the same tokens as this checkpoint.",
        verdict,
    )
    return [row]


def lead(facts: Facts, seconds: float | None) -> str:
    """What the road did, in its own numbers."""
    parameters = number(facts.get("parameters"))
    model = f"A LLaMA of {whole(parameters)} parameters" if parameters else "A LLaMA"
    took = f" in {duration(seconds)}" if seconds else ""
    sentence = (
        f"{model} was pretrained on text, taught to answer and tuned by PPO against a reward model{took}"
    )
    before = number(facts.get("sft_exact_match_before"))
    after = number(facts.get("ppo_exact_match_greedy_after"))
    if before is not None and after is not None:
        sentence += (
            f"; of held-out questions it answered {percent(before)} right before SFT and "
            f"{percent(after)} after PPO"
        )
    return f"{sentence}."


ROAD = Road(
    title="From text to a tuned LLaMA",
    stages=tuple(RECIPES),
    models={"pretrained": "after pretraining", "sft": "after SFT", "ppo": "after PPO"},
    lead=lead,
    rows=rows,
)
