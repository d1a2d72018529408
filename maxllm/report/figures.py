"""The before/after table: each figure beside what it is measured against, and what may be said of the two.

A figure is called better only where the numbers hold it: shares of held-out items have to differ by more than
chance gives (two standard errors; not judged while the number of items is unknown), and anything else by more
than the digits that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from maxllm.report.runs import Folder, Run, number
from maxllm.report.wording import bits, count, percent

NOT_YET = "not there yet"

Facts = dict[str, Any]
"""The keys of a quickstart's summary.json, as far as they are known."""


@dataclass(frozen=True)
class Verdict:
    """What may be said of a figure."""

    kind: Literal["better", "worse", "same", "none"]
    text: str


NO_VERDICT = Verdict("none", "")
SIGNS = {"better": "✓", "worse": "✗", "same": "≈", "none": ""}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    before: tuple[str, ...]
    after: str
    items: str
    meaning: str
    verdict: Verdict
    so_far: str = ""
    """Where an unfinished run stands."""

    @property
    def sign(self) -> str:
        """The verdict without colour."""
        return SIGNS[self.verdict.kind]


def facts_of_run(run: Run) -> Facts:
    """A run's figures so far under the names of a quickstart's summary.json."""
    items = run.summary.get("heldout_items")
    match run.stage:
        case "pretrain":
            facts = {"bits_per_byte": run.after("bits_per_byte")}
            facts |= {
                name: run.summary.get(name) for name in ("bits_per_byte_unigram", "bits_per_byte_bigram")
            }
            heldout = {
                f"bits_per_byte_{name}": run.summary.get(f"heldout_{name}") for name in ("bytes", "documents")
            }
        case "sft":
            facts = both(run, {"exact_match": "sft_exact_match"})
            heldout = {"sft_exact_match": items}
        case "reward":
            facts = {"reward_pair_accuracy": run.after("accuracy")}
            heldout = {"reward_pair_accuracy": items}
        case "dpo":
            facts = both(run, {"exact_match": "dpo_exact_match"})
            facts |= {"dpo_pair_accuracy": run.after("accuracy")}
            heldout = {"dpo_pair_accuracy": items, "dpo_exact_match": run.summary.get("heldout_questions")}
        case "ppo":
            names = ("score", "exact_match", "exact_match_greedy")
            facts = both(run, {name: f"ppo_{name}" for name in names}) | {"ppo_kl": run.after("kl")}
            heldout = {"ppo": items}
        case _:
            return {}
    return facts | {"heldout_items": heldout, "parameters": run.summary.get("parameters")}


def both(run: Run, names: dict[str, str]) -> Facts:
    """Held-out figures before and after a run, under other names."""
    before = {f"{other}_before": run.before(name) for name, other in names.items()}
    return before | {f"{other}_after": run.after(name) for name, other in names.items()}


def facts_of(folder: Folder) -> Facts:
    """The figures of all runs together; a quickstart's own summary has the last word."""
    facts: Facts = {}
    for run in folder.runs:
        own = facts_of_run(run)
        own["heldout_items"] = facts.get("heldout_items", {}) | own.get("heldout_items", {})
        facts |= {name: value for name, value in own.items() if value is not None}
    items = folder.summary.get("heldout_items")
    items = items if isinstance(items, dict) else {}
    return facts | folder.summary | {"heldout_items": facts.get("heldout_items", {}) | items}


def rows(facts: Facts, stage: str) -> list[Row]:
    """The table's lines of one stage."""
    items = facts.get("heldout_items", {})
    match stage:
        case "pretrain":
            return [pretrain_row(facts, items)]
        case "sft":
            name = "Right answers after SFT"
            meaning = "Share of held-out questions whose reply is exactly the known answer."
            return [share_row(name, meaning, facts, "sft_exact_match", items.get("sft_exact_match"))]
        case "reward":
            name = "Pairs the reward model orders right"
            meaning = "How often the right reply gets a higher score than a wrong one."
            return [pairs_row(name, meaning, facts, "reward_pair_accuracy", items)]
        case "dpo":
            return dpo_rows(facts, items)
        case "ppo":
            return ppo_rows(facts, number(items.get("ppo")))
        case "export":
            return [export_row(facts, items)]
    return []


def pretrain_row(facts: Facts, items: Facts) -> Row:
    """Bits per byte against byte counts."""
    after = number(facts.get("bits_per_byte"))
    baselines = [
        (name, value)
        for name in ("unigram", "bigram")
        if (value := number(facts.get(f"bits_per_byte_{name}"))) is not None
    ]
    verdict = NO_VERDICT
    if after is not None and baselines:
        name, best = min(baselines, key=lambda baseline: baseline[1])
        verdict = compared(best, after, bits, lower_is_better=True, against=f"than the {name} baseline")
    behind = [
        count(value, noun)
        for noun in ("document", "byte")
        if (value := number(items.get(f"bits_per_byte_{noun}s"))) is not None
    ]
    return Row(
        "Bits per byte of unseen text",
        tuple(f"{name} {bits(value)}" for name, value in baselines) or (NOT_YET,),
        shown(after, bits),
        ", ".join(behind),
        "How many bits the model needs for each byte of text it has never seen: fewer is better. The "
        "baselines guess a byte from how often it occurs (unigram), or occurs after the one before (bigram).",
        verdict,
    )


def dpo_rows(facts: Facts, items: Facts) -> list[Row]:
    """Pair accuracy, and right answers where the held-out rows have them."""
    meaning = "How often the better reply has gained more probability since DPO began than the other one."
    pairs = pairs_row("Pairs the policy orders right, DPO", meaning, facts, "dpo_pair_accuracy", items)
    if number(facts.get("dpo_exact_match_after")) is None:
        return [pairs]
    meaning = "Share of held-out questions whose reply is exactly the known answer."
    questions = items.get("dpo_exact_match")
    return [pairs, share_row("Right answers after DPO", meaning, facts, "dpo_exact_match", questions)]


def pairs_row(name: str, meaning: str, facts: Facts, key: str, items: Facts) -> Row:
    """Pair accuracy against a coin."""
    after, behind = number(facts.get(key)), number(items.get(key))
    verdict = NO_VERDICT
    if after is not None and behind:
        chance = behind if abs(after - 0.5) <= 2 * 0.5 / math.sqrt(behind) else None
        verdict = compared(0.5, after, percent, chance_of=chance, against="than a coin")
    return Row(
        name,
        (f"coin {percent(0.5)}",),
        shown(after, percent),
        "" if behind is None else count(behind, "pair"),
        meaning,
        verdict,
    )


def ppo_rows(facts: Facts, items: float | None) -> list[Row]:
    """Score, right answers and the distance from the SFT model."""
    before, after = number(facts.get("ppo_score_before")), number(facts.get("ppo_score_after"))
    kl = number(facts.get("ppo_kl"))
    verdict = NO_VERDICT
    if before is not None and after is not None:
        verdict = compared(before, after, bits, words=("higher", "lower"))
    prompts = "" if items is None else count(items, "question")
    return [
        Row(
            "Reward model's score, PPO",
            (shown(before, bits),),
            shown(after, bits),
            prompts,
            "What PPO is trained to raise: the mean score of sampled replies. It is a model's opinion, so "
            "read it beside the right answers below.",
            verdict,
        ),
        share_row(
            "Right answers, sampled, PPO",
            "Replies that are exactly the known answer, when they are drawn at random as in training.",
            facts,
            "ppo_exact_match",
            items,
        ),
        share_row(
            "Right answers, greedy, PPO",
            "The same, when the likeliest token is taken at every place.",
            facts,
            "ppo_exact_match_greedy",
            items,
        ),
        Row(
            "KL to the SFT model, PPO",
            (bits(0.0),),
            shown(kl, bits),
            prompts,
            "How far PPO has moved from where it began, in nats per reply. It is a price paid for the score, "
            "neither good nor bad by itself.",
            NO_VERDICT,
        ),
    ]


def export_row(facts: Facts, items: Facts) -> Row:
    """Whether `transformers` decodes as we do."""
    prompts = number(items.get("export_prompts"))
    match facts.get("export_greedy_identical", NOT_YET):
        case True:
            after, verdict = "identical", Verdict("better", "same text")
        case False:
            after, verdict = "differs", Verdict("worse", "not the same text")
        case None:
            after, verdict = "not checked: torch is missing", NO_VERDICT
        case _:
            after, verdict = NOT_YET, NO_VERDICT
    return Row(
        "Exported model, greedy text",
        ("the checkpoint",),
        after,
        count(prompts, "prompt") if prompts else "",
        "Whether the Hugging Face folder, run by transformers, writes the same tokens as this checkpoint.",
        verdict,
    )


def share_row(name: str, meaning: str, facts: Facts, key: str, items: Any) -> Row:
    """A share of held-out questions before and after."""
    before, after = number(facts.get(f"{key}_before")), number(facts.get(f"{key}_after"))
    questions = number(items)
    verdict = NO_VERDICT
    if before is not None and after is not None and questions:
        chance = questions if may_be_chance(before, after, questions) else None
        verdict = compared(before, after, percent, chance_of=chance)
    return Row(
        name,
        (shown(before, percent),),
        shown(after, percent),
        "" if questions is None else count(questions, "question"),
        meaning,
        verdict,
    )


def may_be_chance(before: float, after: float, items: float) -> bool:
    """Whether two shares of `items` differ by no more than two standard errors (Agresti & Caffo 2000).

    As if different questions stood behind them; they are the same, which makes the true error smaller.
    """
    p, q = ((share * items + 1) / (items + 2) for share in (before, after))
    return abs(p - q) <= 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / (items + 2))


def compared(
    before: float,
    after: float,
    show: Callable[[float], str],
    *,
    lower_is_better: bool = False,
    chance_of: float | None = None,
    words: tuple[str, str] = ("better", "worse"),
    against: str = "",
) -> Verdict:
    """What may be said of a figure after beside one before.

    Args:
      before: the figure before, or the baseline.
      after: the figure after.
      show: how the table prints it; figures that print the same are not called different.
      lower_is_better: which way is good.
      chance_of: the number of held-out items, where with so few the difference may be chance.
      words: what an improvement and its opposite are called.
      against: what it is compared with, where that is no "before".
    """
    if show(before) == show(after):
        return Verdict("same", "no change" if not against else f"no better {against}")
    if chance_of is not None:
        return Verdict("same", f"within what chance gives with {chance_of:,.0f}")
    improved = (after < before) == lower_is_better
    return Verdict("better" if improved else "worse", f"{words[not improved]} {against}".strip())


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """A figure, or that it is not there yet."""
    return NOT_YET if value is None else show(value)


def remarks(table: list[Row]) -> list[str]:
    """What a reader should not miss."""
    kinds = {row.name: row.verdict.kind for row in table}
    said = []
    if kinds.get("Bits per byte of unseen text") in ("worse", "same"):
        said.append("The language model does not beat counting bytes: it needs more steps or more text.")
    if kinds.get("Pairs the reward model orders right") in ("worse", "same"):
        said.append("The reward model is no better than a coin, so its scores say little about PPO.")
    answers = [kinds.get(f"Right answers, {how}, PPO") for how in ("sampled", "greedy")]
    if kinds.get("Reward model's score, PPO") == "better" and set(answers) <= {"same", "worse"}:
        said.append(
            "PPO raised the score, but the share of right answers did not rise with it. A policy can learn "
            "what the reward model likes rather than what is right; this is called reward hacking."
        )
    return said
