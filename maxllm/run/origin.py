"""Where a checkpoint comes from: what trained it, on what, by which versions; it stands in the checkpoint.

Whoever finds one without its run knows from it what it is, and a run that goes on says what has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import xxhash

import maxllm
from maxllm import recipe
from maxllm.files import read_json
from maxllm.run.hashes import STEP_METADATA
from maxllm.run.session import Session

KEY = "custom_metadata"
"""Where Orbax's record of a checkpoint has what its user gave."""

TOLD = ("maxllm", "jax", "orbax", "mesh", "processes")
"""What a run that goes on tells when it is another; the rest must be the same, and is checked elsewhere."""


def origin_of(session: Session, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoints of a run remember.

    Args:
      session: the run.
      data: fingerprints of its data.
    """
    return {
        "maxllm": maxllm.__version__,
        "jax": jax.__version__,
        "orbax": version("orbax-checkpoint"),
        "stage": session.config.stage,
        "recipe": xxhash.xxh3_128_hexdigest(recipe.dump(session.config).encode()),
        "data": dict(data),
        "parents": session.folder.parents(),
        "tokenizer": session.tokenizer.fingerprint,
        "mesh": {str(axis): size for axis, size in session.mesh.shape.items()},
        "processes": jax.process_count(),
    }


def read_origin(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint remembers; nothing for one from before checkpoints did.

    Raises:
      UserError: its record is damaged.
    """
    file = checkpoint / STEP_METADATA
    return (read_json(file).get(KEY) or {}) if file.is_file() else {}


def changes_since(former: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs from a checkpoint's origin, in words; None where nothing does."""
    other = [
        f"{name} {shown(former[name])}, now {shown(now[name])}"
        for name in TOLD
        if name in former and former[name] != now[name]
    ]
    return f"the checkpoint was saved with {'; '.join(other)}" if other else None


def shown(value: Any) -> str:
    """A value for people; of a mesh, the axes that split anything."""
    if isinstance(value, Mapping):
        return " x ".join(f"{axis}={size}" for axis, size in value.items() if size != 1) or "one device"
    return str(value)
