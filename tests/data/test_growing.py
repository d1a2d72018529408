"""Files that grow by batches: killed at every moment, torn at every place, and told from others'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maxllm.data.growing import Growing, open_growing, progress_path
from maxllm.errors import UserError

BATCHES = [[{"n": 1, "text": "一"}], [{"n": 2}, {"n": 3}], [], [{"n": 4, "text": "\u2028"}]]
DROPPED = [[], [{"d": 1}], [{"d": 2}], []]
SETTINGS = {"run.seed": 0, "--novelty": None}


def fill(folder: Path, settings: dict[str, Any] = SETTINGS) -> None:
    """Writes what is missing, as `generate` does."""
    with open_growing([folder / "made.jsonl", folder / "made.rejected.jsonl"], settings) as growing:
        assert growing.facts.get("batches", 0) == growing.batches
        assert [row["n"] for row in growing.rows()] == [
            row["n"] for rows in BATCHES[: growing.batches] for row in rows
        ]
        for number in range(growing.batches, len(BATCHES)):
            growing.append([BATCHES[number], DROPPED[number]], {"batches": number + 1})


def contents(folder: Path) -> dict[str, bytes]:
    """What lies there, but for locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder with complete files."""
    fill(tmp_path / "whole")
    return tmp_path / "whole"


def test_lines_are_rows(whole: Path) -> None:
    lines = (whole / "made.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [row for rows in BATCHES for row in rows]
    assert "一" in lines[0] and lines[-1] == ""
    before = contents(whole)
    fill(whole)
    assert contents(whole) == before and len(before) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import test_growing
from maxllm.data import growing
calls, write, fsync = [0], growing.write_json, os.fsync
def counted(function):
    def call(*words):
        calls[0] += 1
        if calls[0] == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words)
    return call
growing.write_json, os.fsync = counted(write), counted(fsync)
test_growing.fill(Path(sys.argv[2]))
"""


def test_killed_at_every_moment(whole: Path, tmp_path: Path) -> None:
    """Before each time that the progress is written, and before each fsync of the two files: thirteen."""
    for moment in range(1, 14):
        folder = tmp_path / str(moment)
        script = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), str(moment)]
        assert subprocess.run(script, capture_output=True).returncode == -9
        assert contents(folder) != contents(whole)
        fill(folder)
        assert contents(folder) == contents(whole)


@pytest.mark.parametrize("batches", range(len(BATCHES)))
def test_torn_at_every_byte(
    whole: Path, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the next batches stands behind what was written down."""
    wanted, files = contents(whole), ("made.jsonl", "made.rejected.jsonl")
    with open_growing([tmp_path / "part" / name for name in files], SETTINGS) as growing:
        for number in range(batches):
            growing.append([BATCHES[number], DROPPED[number]], {"batches": number + 1})
    part = contents(tmp_path / "part")
    for name in files:
        for more in range(1, len(wanted[name]) - len(part[name]) + 1):
            for kept, content in part.items():
                (tmp_path / "part" / kept).write_bytes(content)
            (tmp_path / "part" / name).write_bytes(wanted[name][: len(part[name]) + more])
            fill(tmp_path / "part")
            assert contents(tmp_path / "part") == wanted


def refused(folder: Path, settings: dict[str, Any] = SETTINGS) -> str:
    """The sentence with which files are refused, unchanged."""
    before = contents(folder)
    with pytest.raises(UserError) as error:
        fill(folder, settings)
    assert contents(folder) == before
    return str(error.value)


def test_what_others_made_is_refused(whole: Path) -> None:
    said = refused(whole, SETTINGS | {"--novelty": 0.7})
    assert "made.jsonl was begun with --novelty=None, not 0.7; give another --out, or remove" in said
    assert "begun with --more=None, not 1" in refused(whole, SETTINGS | {"--more": 1})
    for damage in (b"", b"x", (whole / "made.jsonl").read_bytes()[:-1]):
        former = (whole / "made.jsonl").read_bytes()
        (whole / "made.jsonl").write_bytes(damage)
        assert "made.jsonl is not what was written to it; give another" in refused(whole)
        (whole / "made.jsonl").write_bytes(former)
    (whole / "made.rejected.jsonl").unlink()
    assert "made.rejected.jsonl is not what was written to it" in refused(whole)


def test_a_file_without_its_progress_is_refused(whole: Path) -> None:
    progress_path(whole / "made.jsonl").unlink()
    assert "made.jsonl exists, and no made.jsonl.progress says how it was made" in refused(whole)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_growing([tmp_path / "made.jsonl"], SETTINGS) as growing:
        assert isinstance(growing, Growing)
        with pytest.raises(UserError, match="another process is writing"), open_growing(growing.paths, {}):
            pass
