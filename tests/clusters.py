"""What the tests with real launchers share: looking at runs, and comparing how they end."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from environments import ONE_DEVICE

from maxllm.folder import RunFolder

ROOT = Path(__file__).parents[1]
MAXLLM = Path(sys.executable).parent / "maxllm"
STEPS = 30

ENVIRONMENT = ONE_DEVICE | {
    "MAXLLM": str(MAXLLM),
    "JAX_PLATFORMS": "cpu",
}


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint's state."""
    checkpoint = folder.absolute() / "checkpoints" / str(RunFolder(folder).latest_step())
    tree = {}
    for item in ("params", "rest"):  # by one process what two have written: as NumPy's, which lie nowhere
        with ocp.PyTreeCheckpointer() as checkpointer:
            shapes = checkpointer.metadata(checkpoint / item).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree[item] = checkpointer.restore(checkpoint / item, restore_args=plain)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def check_same_end(folder: Path, reference: Path) -> None:
    """Both runs have ended with the same state, bit for bit, and the same held-out figures."""
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    assert ours["steps"] == STEPS and ours["heldout_last"] == theirs["heldout_last"]
    one, other = arrays_of(folder), arrays_of(reference)
    assert one.keys() == other.keys() and one
    assert all(np.array_equal(one[name], other[name]) for name in one)


def check_alike(folder: Path, reference: Path) -> None:
    """Both runs have ended with the same held-out loss, up to the rounding of sums over other devices.

    A loss is a mean of numbers near 8 over some thousand tokens, and 30 steps of AdamW move weights by
    as much again where a gradient's sign is rounding: a thousandth of the loss is far above both.
    """
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    assert ours["steps"] == theirs["steps"]
    for name, value in theirs["heldout_last"].items():
        assert abs(ours["heldout_last"][name] - value) <= 1e-3 * abs(value), name


def step_of(log: Path) -> int:
    """The last step that a log tells of."""
    steps = re.findall(r"step (\d+)/", log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def await_step(log: Path, step: int, process: subprocess.Popen) -> None:
    """Waits until a run has come to a step."""
    while step_of(log) < step:
        assert process.poll() is None, log.read_text() if log.exists() else "no log"
        time.sleep(0.05)


def trainers(folder: Path, **variables: str) -> list[int]:
    """Processes that train in a folder, by what stands in their environment; not their supervisors."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        told = {f"{name}={value}".encode() for name, value in variables.items()}
        if b"python" in command[0] and f"run.dir={folder}".encode() in command and told <= set(environment):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            found[int(entry.name)] = int(parent)
    return [process for process, parent in found.items() if parent in found]
