"""The rank of a checkpoint: what orders those of a run, and how it is kept in each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from maxllm.errors import RunFailed, UserError
from maxllm.files import read_json

UNRANKED = -math.inf
"""The rank of a state that was not evaluated, or whose figure was no number: it is never the best."""


def rank_record(rank: float) -> dict[str, Any]:
    """What a checkpoint records of its rank: that file is in no item with hashes, so it brings its own."""
    return {"rank": rank, "hash": xxhash.xxh3_64_hexdigest(repr(float(rank)).encode())}


def rank_of(record: Mapping[str, float]) -> float:
    """What orders checkpoints: larger is better."""
    return record["rank"]


def read_rank(checkpoint: Path) -> float:
    """The rank of a checkpoint.

    Raises:
      RunFailed: it is damaged.
    """
    file = checkpoint / "metrics" / "metrics"
    try:
        record = read_json(file) if file.is_file() else {}
    except UserError as error:
        raise damaged(checkpoint, str(error)) from None
    if not record:
        return UNRANKED
    rank = record.get("rank", math.nan)
    if record.get("hash") != rank_record(rank)["hash"]:
        raise damaged(checkpoint, f"{file} is not as it was written")
    return rank_of(record)


def damaged(checkpoint: Path, what: str) -> RunFailed:
    """The error for a checkpoint that must not be used."""
    return RunFailed(
        f"checkpoint {checkpoint} is damaged: {what}; remove that folder to use the checkpoint before it"
    )
