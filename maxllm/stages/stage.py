"""What a stage is. Each module of this folder that is named after one ends in its `STAGE`.

To add a stage: a section in config/ with its rules, its name in config/stages.py, both of them in
config/root.py, and a module here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.data.shown import ShownRow
from maxllm.report.stage import StageReport
from maxllm.run.heldout import Evaluate
from maxllm.run.loop import Job, finished, train
from maxllm.run.program import Program
from maxllm.run.session import Session, open_session

Reply = Literal["text", "turns", "score"]
"""What a trained model does with a prompt: goes on with the text, answers in a conversation, or judges it."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that is particular to one way of training."""

    program: Callable[[Config, ModelConfig, Mesh], Program]
    """What is compiled for a recipe: training runs it, `plan` asks the compilers about it."""
    job: Callable[[Session], Job]
    """Data, start and held-out figures of a run: all that the loop needs."""
    replies: Callable[[Session], Reply]
    """What the model that it makes does with a prompt."""
    report: StageReport
    """What a report says and draws of a run."""
    shown: Callable[[Session, int], list[ShownRow]] | None = None
    """So many of the rows that are trained on, for people to look at."""
    evaluator: Callable[[Session, Path | None], Evaluate] | None = None
    """Measures exported parameters, as training computes them: over the rows stored in a folder,
    or, without one, over those of the session's data. Nothing that is only trained on is read; without such a
    way, `job` reads everything."""
    heldout: str = "data"
    """The section or field that names other held-out data, which `evaluate` may set."""

    def run(self, config: Config) -> dict[str, Any]:
        """Trains to the last step, or continues; returns summary.json's content."""
        session = open_session(config)
        return finished(session) or train(self.job(session))

    def figures(self, session: Session, stored: Path | None) -> Evaluate:
        """What measures a run's exported parameters on held-out rows; see `evaluator`."""
        return self.job(session).evaluate if self.evaluator is None else self.evaluator(session, stored)
