"""Numbers and stages in words."""

from __future__ import annotations

STAGE_TITLES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning (SFT)",
    "reward": "Reward model",
    "dpo": "DPO",
    "ppo": "PPO",
}

STAGE_MEANINGS = {
    "pretrain": "The model reads text and learns to predict the next token; it has not seen a question yet.",
    "sft": "The pretrained model is shown questions with their answers and learns to reply.",
    "reward": "A copy of the SFT model learns to give the better of two replies the higher score.",
    "dpo": "The SFT model learns to give the better of two replies more probability than it did at first, "
    "and the other one less.",
    "ppo": "The SFT model writes replies, the reward model scores them, and replies that score above "
    "expectation become likelier.",
}


def title_of(stage: str) -> str:
    """A stage's name as a heading."""
    return STAGE_TITLES.get(stage, stage)


def bits(value: float) -> str:
    """Bits per byte, scores, losses: two digits."""
    return f"{value:.2f}"


def percent(share: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * share:.1f}%"


def whole(value: float) -> str:
    """A count with thousands separators."""
    return f"{value:,.0f}"


def count(value: float, noun: str) -> str:
    """`1 document`, `47 documents`."""
    return f"{whole(value)} {noun}{'' if value == 1 else 's'}"


def duration(seconds: float) -> str:
    """`9.5 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(amount: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("bytes", "KB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def joined(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
