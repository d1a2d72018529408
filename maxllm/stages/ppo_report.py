"""What a report tells of a run of PPO."""

from __future__ import annotations

from maxllm.report.charts import Chart, Line, shares, training_and_heldout
from maxllm.report.figures import NO_VERDICT, Facts, Row, both, compared, share_row, shown
from maxllm.report.runs import Run, number
from maxllm.report.stage import StageReport, Verdicts
from maxllm.report.wording import bits, count

SCORE = "Reward model's score, PPO"
SAMPLED, GREEDY = "Right answers, sampled, PPO", "Right answers, greedy, PPO"


def facts(run: Run) -> Facts:
    """Score, right answers and KL."""
    names = ("score", "exact_match", "exact_match_greedy")
    before_and_after = both(run, {name: f"ppo_{name}" for name in names})
    items = {"ppo": run.summary.get("heldout_items")}
    return before_and_after | {"ppo_kl": run.after("kl"), "heldout_items": items}


def rows(facts: Facts) -> list[Row]:
    """Score, right answers and the distance from the SFT model."""
    items = number(facts.get("heldout_items", {}).get("ppo"))
    before, after = number(facts.get("ppo_score_before")), number(facts.get("ppo_score_after"))
    kl = number(facts.get("ppo_kl"))
    verdict = NO_VERDICT
    if before is not None and after is not None:
        verdict = compared(before, after, bits, words=("higher", "lower"))
    prompts = "" if items is None else count(items, "question")
    return [
        Row(
            SCORE,
            (shown(before, bits),),
            shown(after, bits),
            prompts,
            "What PPO is trained to raise: the mean score of sampled replies. It is a model's opinion, so "
            "read it beside the right answers below.",
            verdict,
        ),
        share_row(
            SAMPLED,
            "Replies that are exactly the known answer, when they are drawn at random as in training.",
            facts,
            "ppo_exact_match",
            items,
        ),
        share_row(
            GREEDY,
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


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Score, KL and right answers."""
    return [
        training_and_heldout(run, "Mean score", "the reward model's opinion", "score"),
        training_and_heldout(run, "KL to the SFT model", "nats per reply", "kl"),
        shares(
            "Right answers",
            Line("sampled", run.heldout_curve("exact_match")),
            Line("greedy", run.heldout_curve("exact_match_greedy")),
        ),
    ]


def remarks(verdicts: Verdicts) -> list[str]:
    """A score that rises alone."""
    if verdicts.get(SCORE) != "better" or not {verdicts.get(SAMPLED), verdicts.get(GREEDY)} <= {
        "same",
        "worse",
    }:
        return []
    return [
        "PPO raised the score, but the share of right answers did not rise with it. A policy can learn "
        "what the reward model likes rather than what is right; this is called reward hacking."
    ]


REPORT = StageReport(
    title="PPO",
    meaning="The SFT model writes replies, the reward model scores them, and replies that score above "
    "expectation become likelier.",
    facts=facts,
    rows=rows,
    charts=charts,
    remarks=remarks,
)
