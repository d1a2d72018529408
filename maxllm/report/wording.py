"""Numbers in words."""

from __future__ import annotations


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
