"""Checkpoints through Orbax: the parameters that other stages read, and the rest that only resuming needs.

A checkpoint has two items. `params` is what the next stage starts from; `rest` is the state without it (step,
optimizer state, the critic of PPO). A restore that does not fit is an error, never a fresh start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from maxllm.errors import RunFailed, UserError
from maxllm.records import Params

FOLDER = "checkpoints"


class State(Protocol):
    """A training state whose exported parameters can be taken out and put back."""

    def detach(self) -> tuple[Params, Self]:
        """(the parameters other stages read, the state without them)."""

    def attach(self, params: Params) -> Self:
        """The state with parameters put back."""


AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, keep: int, best_mode: str) -> None:
        """Opens `run_dir/checkpoints`.

        Args:
          run_dir: the run folder.
          keep: latest checkpoints to keep; the best one is kept besides.
          best_mode: "min" or "max" of the number given to `save`.
        """
        best = BestN(
            get_metric_fn=lambda metrics: metrics["best"],
            reverse=best_mode == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            (run_dir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # what a kill left half-written
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, best: float) -> None:
        """Starts saving in the background; `best` is the held-out figure that ranks the checkpoint."""
        params, rest = state.detach()
        self._manager.save(
            step,
            args=ocp.args.Composite(params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)),
            metrics={"best": best},
        )

    def restore(self, step: int, abstract_state: AnyState) -> AnyState:
        """The state saved at `step`, in the shardings of `abstract_state`.

        Raises:
          RunFailed: it cannot be read; nothing is changed.
        """
        params, rest = abstract_state.detach()
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
        )
        with readable(Path(self._manager.directory) / str(step)):
            restored = self._manager.restore(step, args=items)
        return restored["rest"].attach(restored["params"])

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(run_dir: Path, abstract_params: Params) -> Params:
    """The newest parameters of another run, in the shardings of `abstract_params`.

    Raises:
      UserError: no checkpoint there, or one of another model.
    """
    folder = run_dir / FOLDER
    steps = ocp.utils.checkpoint_steps(folder.absolute()) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{run_dir} holds no checkpoint; train that stage first")
    path = folder.absolute() / str(max(steps)) / "params"
    # The handler, not a Checkpointer: `params` is one item of a checkpoint, not a checkpoint of its own.
    handler = ocp.StandardCheckpointHandler()
    with readable(path.parent):
        problems = differences(handler.metadata(path).tree, abstract_params)
    if problems:
        raise UserError(f"{path.parent} is a checkpoint of another model: {'; '.join(problems[:5])}")
    with readable(path.parent):
        return handler.restore(path, args=ocp.args.StandardRestore(abstract_params))


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turns whatever Orbax raises while reading into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise RunFailed(
            f"checkpoint {checkpoint} cannot be restored ({type(error).__name__}: {reason}); nothing was "
            "changed: remove it to continue from the one before, or remove the run folder to start anew"
        ) from error


def differences(saved: Any, wanted: Any) -> list[str]:
    """Parameters that are missing, extra or of another shape, one phrase each."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
        }

    have, want = shapes(saved), shapes(wanted)
    found = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
    found += [f"{name} is extra" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if have[name] != want[name]:
            found.append(f"{name} is {have[name]}, not {want[name]}")
    return found
