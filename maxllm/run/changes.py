"""changes.jsonl of a run folder: from which step on a run was computed with other settings than before.

Such settings change nothing but rounding, yet who looks for why two runs differ in the last digits finds it
here; config.yaml tells the newest settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from maxllm.folder import RunFolder


def record_changes(
    folder: RunFolder, step: int | None, changes: Mapping[str, tuple[Any, Any]], say: Callable[[str], None]
) -> None:
    """Appends what is changed now, and tells it.

    Args:
      folder: the run's folder, whose lock the caller holds.
      step: of the checkpoint that the run continues from; None where it begins anew, so that nothing was
        computed otherwise.
      changes: {setting: (former value, value from now on)}.
      say: told each change.
    """
    if step is None:
        folder.remove_changes()
        return
    for name, (former, now) in changes.items():
        say(f"goes on from step {step} on with {name}={now} instead of {former}")
    folder.append_changes(
        {"step": step, "setting": name, "from": former, "to": now} for name, (former, now) in changes.items()
    )


def is_of(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of some fields, or in one of some sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
