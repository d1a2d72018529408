"""Kills runs with -9 at random moments, continues them, and compares their ends with undisturbed ones.

    python tools/chaos.py --kills 50
    python tools/chaos.py --kills 5 --stage ppo --json
    python tools/chaos.py --kills 12 --stage processes    two processes, of which one is lost or stuck

First the whole fast road is taken once, undisturbed: prepare, pretrain, sft, reward, ppo, dpo, export (to
Hugging Face) and import (back). Each disturbed run begins from what the road left before its stage; it is
killed at up to three moments, drawn from the seed over the time that the undisturbed one took, and then let
end. Its last checkpoint, files and figures must be those of the undisturbed run, bit for bit; a command that
takes five times as long as the undisturbed one, and a minute, has hung.

The stage `processes` trains with two, of which one is killed, aborted, stopped (SIGSTOP) or made to spin at a
random step, with run.hang_seconds=15. All must end by themselves, which takes the seconds that are printed as
seconds_to_detect, the longest of each kind (a save may take twelve times as long before it counts as a hang);
and the same command must then come to the undisturbed end.

Ends with 1 if anything was lost, differed or hung; the folders of such runs are kept, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from maxllm.files import file_hash, read_json
from maxllm.folder import RunFolder
from maxllm.report.table import print_table
from maxllm.supervise.verdict import LONG

MAXLLM = (sys.executable, "-m", "maxllm.cli")
LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
TIMES = {"seconds", "steps_per_second", "tokens_per_second", "data_seconds", "mfu"}
"""Of a record, what no two runs have in common."""

ROAD = ("prepare", "pretrain", "sft", "reward", "ppo", "dpo", "export", "import")
HANG_SECONDS = 15
SPIN = signal.SIGRTMIN
KINDS = {
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "aborted": signal.SIGABRT,
    "spinning": SPIN,
}
"""What befalls a process -> the signal that does it. No signal makes a program spin, hence SPINNING."""

SPINNING = f"""
import signal

def spin(number, frame):
    while True:
        pass

signal.signal({SPIN:d}, spin)
"""
"""A sitecustomize.py that makes every Python program spin, in its main thread, once it is asked to."""

PATIENCE = 5
"""A command has hung that takes so many times as long as the undisturbed one, and a minute."""


@dataclass
class Outcome:
    """What came of all disturbed runs."""

    kills: int = 0
    recovered: int = 0
    different: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    seconds_to_detect: dict[str, list[float]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The figures, for people and for machines."""
        return {
            "kills": self.kills,
            "recovered": self.recovered,
            "different": len(self.different),
            "hung": len(self.hung),
            "seconds_to_detect": {kind: max(seconds) for kind, seconds in self.seconds_to_detect.items()},
            "kept": [*self.different, *self.hung],
        }


def command_of(stage: str, home: Path) -> list[str]:
    """The command of a stage of the road in a folder."""
    words = {
        "prepare": ["prepare", "pretrain/tiny_slice_cpu_fast", f"run.dir={home / 'pretrain'}"],
        "pretrain": ["pretrain", "pretrain/tiny_slice_cpu_fast", f"run.dir={home / 'pretrain'}"],
        "export": ["export", str(home / "ppo"), str(home / "export"), "--no-verify"],
        "import": ["convert", "from-hf", str(home / "export"), str(home / "import")],
    }.get(stage) or [
        *(stage, f"{stage}/tiny_tasks_cpu_fast", f"run.dir={home / stage}"),
        f"start.policy={home / ('pretrain' if stage == 'sft' else 'sft')}",
    ]
    if stage in ("prepare", "pretrain"):
        words += [f"tokenizer.path={home / 'tokenizer.model'}", f"data.prepared_dir={home / 'corpus'}"]
    return [*MAXLLM, *words, *([f"start.reward={home / 'reward'}"] if stage == "ppo" else [])]


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code of a command; None for one that was killed after so many seconds."""
    with log.open("a") as out:
        return patiently(subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True), seconds)


def patiently(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that leads a session; None where that was killed after so many seconds."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def traces(stage: str, home: Path) -> dict[str, Any]:
    """What a stage left that must be the same: {name: hash, or figures}."""
    if stage == "prepare":
        files = [file for file in (home / "corpus").rglob("*") if file.suffix != ".json" and file.is_file()]
        return {str(file.relative_to(home)): file_hash(file) for file in [*files, home / "tokenizer.model"]}
    if stage == "export":
        return {file.name: file_hash(file) for file in (home / stage).iterdir() if file.is_file()}
    folder = RunFolder(home / stage)
    newest = folder.find()
    found: dict[str, Any] = {"step": newest.name}
    for item in sorted(newest.glob("*/hashes.json")):
        arrays = read_json(item).items()
        found |= {f"{item.parent.name}/{file}": value for file, value in arrays if "/" in file}
    records = [{key: value for key, value in r.items() if key not in TIMES} for r in folder.records()]
    return found | {"records": records}


class Chaos:
    """The undisturbed road, and what is disturbed of it."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random, self.outcome = home, random.Random(seed), Outcome()
        self.undisturbed = home / "undisturbed"
        self.undisturbed.mkdir(parents=True)
        self.took: dict[str, float] = {}
        self.number = 0
        (home / "sitecustomize.py").write_text(SPINNING)
        paths = filter(None, (str(home), os.environ.get("PYTHONPATH")))
        launcher = str(Path(sys.executable).parent / "maxllm")
        self.environment = os.environ | {"MAXLLM": launcher, "PYTHONPATH": os.pathsep.join(paths)}

    def take_road(self, until: str, progress: Progress) -> None:
        """Takes the road once, as far as the stage `until` needs it."""
        needed = ROAD[: ROAD.index(until) + 1]
        task = progress.add_task("the undisturbed road", total=len(needed))
        for stage in needed:
            began = time.perf_counter()
            log = self.undisturbed / "log"
            if run(command_of(stage, self.undisturbed), log, 3600) != 0:
                raise SystemExit(f"chaos: {stage} fails undisturbed:\n{log.read_text()[-2000:]}")
            self.took[stage] = time.perf_counter() - began
            progress.advance(task)

    def disturb(self, stage: str, kills: int) -> None:
        """Runs a stage, killed so many times, to its end, and compares."""
        home = self.begin(stage)
        command, limit = command_of(stage, home), PATIENCE * self.took[stage] + 60
        done = 0
        while done < kills and run(command, home / "log", self.moment(stage)) is None:
            done += 1  # else it was complete before
        self.outcome.kills += done
        code = run(command, home / "log", limit)
        self.end(home, stage, self.undisturbed, code, done)

    def begin(self, stage: str) -> Path:
        """A folder with what a stage finds."""
        self.number += 1
        home = self.home / f"{self.number:03d}-{stage}"
        home.mkdir()
        for name in self.before(stage):
            copy = shutil.copytree if (self.undisturbed / name).is_dir() else shutil.copy
            copy(self.undisturbed / name, home / name)
        return home

    def end(self, home: Path, stage: str, like: Path, code: int | None, kills: int) -> None:
        """Compares what a stage left in a folder with what it left in another.

        Args:
          home: the folder, which goes unless there is something to look at.
          stage: the stage.
          like: the folder of the undisturbed run.
          code: the command's, None for one that hung.
          kills: how many it has survived.
        """
        if code is None:
            self.outcome.hung.append(str(home))
        elif code != 0 or traces(stage, home) != traces(stage, like):
            self.outcome.different.append(str(home))
        else:
            self.outcome.recovered += kills
            shutil.rmtree(home)

    def moment(self, stage: str) -> float:
        """Seconds until a kill."""
        return self.random.uniform(0.0, self.took[stage])

    def before(self, stage: str) -> list[str]:
        """The files and folders that a stage finds."""
        there = {"pretrain": ["corpus", "tokenizer.model"], "sft": ["pretrain"], "import": ["export"]}
        there |= {"prepare": [], "export": ["ppo", "sft", "reward"], "ppo": ["sft", "reward"]}
        return there.get(stage, ["sft"])

    def train(self, home: Path) -> subprocess.Popen[bytes]:
        """Starts pretraining with two processes in a folder."""
        settings = [f"run.hang_seconds={HANG_SECONDS}", "mesh.data=2", "run.log_every=1"]
        words = command_of("pretrain", home)[len(MAXLLM) :]
        with (home / "log").open("a") as out:
            command = [str(LOCAL), "--grace-seconds=60", *words, *settings]
            return subprocess.Popen(
                command, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )

    @cached_property
    def together(self) -> Path:
        """A folder in which two processes have trained undisturbed."""
        home = self.begin("pretrain")
        if self.train(home).wait() != 0:
            raise SystemExit(f"chaos: two processes fail undisturbed:\n{(home / 'log').read_text()[-2000:]}")
        return home

    def lose_a_process(self, kind: str) -> None:
        """Sends a signal of KINDS to one of two processes at a random step; both must end, and go on."""
        like, home = self.together, self.begin("pretrain")
        step, log = self.random.randint(2, 30), home / "log"
        process = self.train(home)
        while f"step {step}/" not in log.read_text() and process.poll() is None:
            time.sleep(0.02)
        os.kill(self.random.choice(trainers(home)), KINDS[kind])
        began = time.perf_counter()
        self.outcome.kills += 1
        code = patiently(process, LONG * HANG_SECONDS + 60)
        if code is not None:
            kind += " while saving" * ("saving a checkpoint (run.hang_seconds)" in log.read_text())
            self.outcome.seconds_to_detect.setdefault(kind, []).append(round(time.perf_counter() - began, 2))
            code = patiently(self.train(home), 600)
        self.end(home, "pretrain", like, code, 1)


def trainers(home: Path) -> list[int]:
    """The processes that train below a folder, without their supervisors."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if f"run.dir={home / 'pretrain'}".encode() in words and b"python" in words[0]:
            parents[int(entry.name)] = int(stat[1])
    return [process for process, parent in parents.items() if parent in parents]


def main() -> None:
    """Parses the words, disturbs, and tells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="how many (10)")
    parser.add_argument("--stage", choices=[*ROAD, "processes"], help="this one alone")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--home", type=Path, help="a folder for the runs (a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="maxllm-chaos-"))
    chaos = Chaos(home, options.seed)
    stages = [options.stage] if options.stage else [*ROAD, "processes"]
    with Progress(disable=options.json or not sys.stderr.isatty()) as progress:
        last = max((ROAD.index(stage) for stage in stages if stage in ROAD), default=0)
        chaos.take_road(ROAD[last], progress)
        task = progress.add_task("kills", total=options.kills)
        turn = 0
        while chaos.outcome.kills < options.kills:
            stage, left = stages[turn % len(stages)], options.kills - chaos.outcome.kills
            if stage == "processes":
                chaos.lose_a_process([*KINDS][turn // len(stages) % len(KINDS)])
            else:
                chaos.disturb(stage, min(left, chaos.random.randint(1, 3)))
            turn += 1
            progress.update(task, completed=chaos.outcome.kills)
    figures = chaos.outcome.figures()
    if options.json:
        print(json.dumps(figures))
    else:
        print_table(figures, "chaos")
    if not figures["kept"] and options.home is None:
        shutil.rmtree(home)
    sys.exit(1 if figures["kept"] else 0)


if __name__ == "__main__":
    main()
