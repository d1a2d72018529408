"""What lies in a run folder, and the one place that knows its files' names and the type of its path.

    config.yaml                 the resolved recipe: what the run is
    tokenizer.model, …          the tokenizer's files
    hf_config.json              config.json of the Hugging Face model that the run's model descends from
    hf_generation_config.json   that model's generation_config.json
    metrics.jsonl               one line for each log line and each evaluation
    summary.json                the run's final figures; there once the run is complete
    heldout/                    rows that the run is measured on, where they are in no files of their own
    data.json                   fingerprints of the data that the run is made of
    parents.json                the checkpoints that the run began from
    dependents/                 one file for each run that began from a checkpoint of this one
    passed.json                 batches that the run passed over, and why (run/bad_numbers.py)
    bad/STEP.npz                the rows of a step whose numbers were bad
    sittings.jsonl              what the processes that trained here spent their time on (run/goodput.py)
    changes.jsonl               settings of how the run computes that were changed, and at which step
    .lock                       held by the process that trains here; in a bucket, a lease
    checkpoints/STEP/           params, rest (what only resuming needs) and metrics (the rank)

Everything is written whole or not at all; what ends in .jsonl grows by whole lines. The folder may lie in a
bucket (storage.py), where a checkpoint is complete once Orbax's mark is in it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import xxhash

from maxllm.errors import UserError, listed
from maxllm.files import (
    append_json_lines,
    json_line,
    read_json,
    read_json_lines,
    read_yaml,
    write_bytes,
    write_json,
    write_text,
)
from maxllm.journal import Journal
from maxllm.lease import leased
from maxllm.rank import UNRANKED, read_rank
from maxllm.storage import (
    absolute,
    along,
    children,
    is_remote,
    path_of,
    reachable,
    remove_folder,
    resolved,
    way,
    written_at,
)

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
HF_CONFIG, HF_GENERATION = "hf_config.json", "hf_generation_config.json"
DATA, PARENTS, DEPENDENTS, CHANGES = "data.json", "parents.json", "dependents", "changes.jsonl"
SITTINGS, PASSED, BAD = "sittings.jsonl", "passed.json", "bad"
LOCK, CHECKPOINTS, HELDOUT = ".lock", "checkpoints", "heldout"

UNFINISHED = "*.orbax-checkpoint-tmp*"
"""What Orbax calls the folder of a checkpoint that is being written."""

COMMITTED = "commit_success.txt"
"""Orbax's mark in a complete checkpoint and in each of its items, written last."""

Which = Literal["latest", "best"] | int
"""Which checkpoint of a run: its newest, its best, or that of a step."""


class RunFolder:
    """A run folder, which need not exist yet. Whatever only reads changes nothing in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Names the folder; touches no file."""
        self.path = path_of(path)
        self._metrics: Journal | None = None

    def __str__(self) -> str:
        return str(self.path)

    def shown(self) -> str:
        """The folder for people: relative to the working directory where it lies below that."""
        if is_remote(self.path):
            return str(self.path)
        path = Path(os.path.abspath(self.path))
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

    def way_to(self, other: RunFolder) -> str:
        """The path that leads from this folder to another one, which stays true when both move together."""
        return way(resolved(other.path), resolved(self.path))

    def along(self, way: str) -> RunFolder:
        """The folder that a path from `way_to` leads to."""
        return RunFolder(resolved(along(resolved(self.path), way)))

    # --- config.yaml and what comes with it ----------------------------------------------------------------

    @property
    def has_config(self) -> bool:
        """Whether a run was begun or converted here."""
        return (self.path / CONFIG).is_file()

    def config_text(self) -> str | None:
        """The text of config.yaml, whatever it is worth; None where there is none."""
        return (self.path / CONFIG).read_bytes().decode("utf-8", "replace") if self.has_config else None

    def settings(self) -> dict[str, Any]:
        """The plain data in config.yaml; `recipe.of_run` makes a `Config` of it.

        Raises:
          UserError: this is no run folder, or its config.yaml is damaged.
        """
        if not self.has_config:
            raise UserError(f"{self} is not a run folder: it has no {CONFIG}")
        return read_yaml(self.path / CONFIG)

    def write_config(self, text: str) -> None:
        """Writes the resolved recipe."""
        write_text(self.path / CONFIG, text)

    def write_tokenizer(self, files: Mapping[str, bytes]) -> None:
        """Writes a tokenizer's files; `load_tokenizer(folder.path)` reads them."""
        for name, content in files.items():
            write_bytes(self.path / name, content)

    def read_hf(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Hugging Face's config.json and generation_config.json, None for one that is not kept."""
        config, generation = self.path / HF_CONFIG, self.path / HF_GENERATION
        return (
            read_json(config) if config.is_file() else None,
            read_json(generation) if generation.is_file() else None,
        )

    def write_hf(self, config: Mapping[str, Any] | None, generation: Mapping[str, Any] | None) -> None:
        """Keeps Hugging Face's config.json and generation_config.json, as far as there are any."""
        if config is not None:
            write_json(self.path / HF_CONFIG, dict(config))
        if generation is not None:
            write_json(self.path / HF_GENERATION, dict(generation))

    # --- records -------------------------------------------------------------------------------------------

    @property
    def has_metrics(self) -> bool:
        """Whether anything was recorded."""
        return (self.path / METRICS).is_file()

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out.

        Raises:
          UserError: another line is damaged.
        """
        yield from read_json_lines(self.path / METRICS, {"step", "seconds"})

    def write_records(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replaces all of metrics.jsonl."""
        self.flush()
        self._metrics = None
        write_text(self.path / METRICS, "".join(map(json_line, records)))

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl, where a reader of a bucket sees it a second later."""
        if not is_remote(self.path):
            append_json_lines(self.path / METRICS, [record])
            return
        self._metrics = self._metrics or Journal(self.path / METRICS)
        with reachable(self.path / METRICS):
            self._metrics.append(json_line(record))

    def flush(self) -> None:
        """Waits until every record is written."""
        if self._metrics is not None:
            with reachable(self.path / METRICS):
                self._metrics.flush()

    def sittings(self) -> Iterator[dict[str, Any]]:
        """The lines of sittings.jsonl, as `records` gives those of metrics.jsonl."""
        yield from read_json_lines(self.path / SITTINGS, {"sitting", "began", "first", "step", "seconds"})

    def append_sitting(self, account: Mapping[str, Any]) -> None:
        """Adds a line to sittings.jsonl."""
        append_json_lines(self.path / SITTINGS, [account])

    def summary(self) -> dict[str, Any] | None:
        """What summary.json says of a complete run, or None.

        Raises:
          UserError: it is damaged.
        """
        return read_json(self.path / SUMMARY) if (self.path / SUMMARY).is_file() else None

    def summary_bytes(self) -> bytes:
        """A complete run's summary.json as it was written."""
        return (self.path / SUMMARY).read_bytes()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which makes the run complete."""
        self.flush()
        write_json(self.path / SUMMARY, dict(summary))

    def remove_summary(self) -> None:
        """The run is not complete any more: it is given more steps."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def data(self) -> dict[str, Any]:
        """{name of the data: fingerprint} as the run began; nothing where it was not recorded."""
        return read_json(self.path / DATA) if (self.path / DATA).is_file() else {}

    def write_data(self, fingerprints: Mapping[str, Any]) -> None:
        """Records which data the run is made of."""
        write_json(self.path / DATA, dict(fingerprints))

    @property
    def heldout(self) -> Path:
        """The folder of held-out rows, which `data/store.py` writes and reads."""
        return self.path / HELDOUT

    def passed(self) -> list[dict[str, Any]]:
        """{"first", "after", "step", "why"} of the batches that were passed over, in the order of time."""
        return read_json(self.path / PASSED)["passed"] if (self.path / PASSED).is_file() else []

    def append_changes(self, changes: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines {"step", "setting", "from", "to"} to changes.jsonl."""
        append_json_lines(self.path / CHANGES, changes)

    def remove_changes(self) -> None:
        """Forgets changes of settings: the run begins anew."""
        (self.path / CHANGES).unlink(missing_ok=True)

    def written(self) -> float | None:
        """When the configuration, metrics or summary was last written, in seconds since the epoch."""
        files = [self.path / name for name in (CONFIG, METRICS, SUMMARY)]
        return max((written_at(file) for file in files if file.is_file()), default=None)

    # --- family --------------------------------------------------------------------------------------------

    @property
    def has_parents(self) -> bool:
        """Whether the folder records what its run began from."""
        return (self.path / PARENTS).is_file()

    def parents(self) -> dict[str, dict[str, str | int]]:
        """{role: {"run", "path", "step", "hash"}} of a run that has begun; nothing where no record is.

        "run" is for people; "path" leads from the run's folder to its parent's.
        """
        return read_json(self.path / PARENTS) if self.has_parents else {}

    def write_parents(self, parents: Mapping[Any, Mapping[str, str | int]]) -> None:
        """Records what the run begins from."""
        write_json(self.path / PARENTS, dict(parents))

    def dependents(self) -> list[tuple[int, RunFolder]]:
        """(step, run folder) of the runs that began from a checkpoint of this one and are still there."""
        files = (file for file in children(self.path / DEPENDENTS) if file.name.endswith(".json"))
        entries = [read_json(file) for file in sorted(files)]
        runs = [(entry["step"], RunFolder(along(self.path, entry["run"]))) for entry in entries]
        return [(step, run) for step, run in runs if run.has_parents]

    def add_dependent(self, step: int, run: RunFolder) -> None:
        """Records that a run begins from a checkpoint of this one.

        Raises:
          OSError: this folder cannot be written to.
        """
        there = way(absolute(run.path), absolute(self.path))
        (self.path / DEPENDENTS).mkdir(exist_ok=True)
        name = f"{xxhash.xxh3_64_hexdigest(there.encode())}.json"
        write_json(self.path / DEPENDENTS / name, {"run": there, "step": step})

    def copy_dependents(self, former: RunFolder) -> None:
        """Takes over what another folder records of the runs that began from it."""
        for file in children(former.path / DEPENDENTS):
            (self.path / DEPENDENTS).mkdir(exist_ok=True)
            write_bytes(self.path / DEPENDENTS / file.name, file.read_bytes())

    # --- the lock ------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
        """Makes the folder and keeps other processes from training in it; however this one ends, it is free.

        In a bucket it is so half a minute after a process that was killed.

        Args:
          say: told while another process holds it that may be gone.

        Raises:
          UserError: another process is training in it.
        """
        if is_remote(self.path):
            with leased(self.path / LOCK, str(self), say):
                try:
                    yield
                except BaseException:
                    with suppress(Exception):  # what went wrong first is told
                        self.flush()
                    raise
                self.flush()
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is training in {self}") from None
            yield

    # --- checkpoints ---------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return absolute(self.path / CHECKPOINTS)

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint; it need not be there."""
        return self.checkpoints / str(step)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder:
        """The run folder that a checkpoint's folder lies in."""
        return cls(checkpoint.parent.parent)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order; a half-written one has another kind of name."""
        there = (entry for entry in children(self.checkpoints) if entry.name.isdigit())
        return sorted(int(entry.name) for entry in there if not self._is_unfinished(entry))

    def _is_unfinished(self, checkpoint: Path) -> bool:
        """Whether a checkpoint with a final name is half-written: a bucket gives that from the start."""
        return is_remote(checkpoint) and not (checkpoint / COMMITTED).is_file()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest rank; of equal ones, the first.

        Raises:
          RunFailed: a rank is damaged.
        """
        found = {step: rank for step, rank in self.ranks().items() if rank > UNRANKED}
        return max(found, key=lambda step: found[step], default=None)

    def ranks(self) -> dict[int, float]:
        """{step: rank} of the checkpoints.

        Raises:
          RunFailed: a rank is damaged.
        """
        return {step: read_rank(self.checkpoint(step)) for step in self.steps()}

    def find(self, which: Which = "latest") -> Path:
        """The folder of the newest or best checkpoint, or of that of a step.

        Raises:
          UserError: there is none, with those that are there.
        """
        there = self.steps()
        if not there:
            raise UserError(f"{self} holds no checkpoint; train that stage first")
        if isinstance(which, int):
            step = which if which in there else None
        else:
            step = there[-1] if which == "latest" else self.best_step()
        if step is None:
            missing = f"checkpoint of step {which}" if isinstance(which, int) else f"{which} checkpoint"
            steps = listed([str(number) for number in there], limit=20)
            raise UserError(f"{self} holds no {missing}: it holds steps {steps}")
        return self.checkpoint(step)

    def remove_unfinished(self) -> None:
        """Removes checkpoints that a kill or a full disk left half-written; the caller holds the lock."""
        for folder in children(self.checkpoints):
            if fnmatch(folder.name, UNFINISHED) or (folder.name.isdigit() and self._is_unfinished(folder)):
                remove_folder(folder)
