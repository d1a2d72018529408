"""What the tests of launch/ share: its scripts as commands, and stand-ins for programs of clouds."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAXLLM = Path(sys.executable).parent / "maxllm"

RECORDING = """#!{python}
import json, sys
words = sys.argv[1:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([{name!r}, *words]) + "\\n")
{body}
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """script(name, *words, environment): runs launch/name; programs in tmp_path/bin come first."""
    binaries = tmp_path / "bin"
    binaries.mkdir()

    def run(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        own = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        own |= {"MAXLLM": str(MAXLLM), "PATH": f"{binaries}:{os.environ['PATH']}"} | environment
        command = ["bash", str(ROOT / "launch" / name), *words]
        return subprocess.run(command, capture_output=True, text=True, env=own, cwd=ROOT, timeout=120)

    return run


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str, str], Callable[[], list[list[str]]]]:
    """stand_in(name, body): a program that writes its words down and runs `body`, Python that knows `words`.

    Returns what gives the calls so far, each with the program's name first.
    """

    def make(name: str, body: str = "") -> Callable[[], list[list[str]]]:
        calls = tmp_path / f"{name}.calls"
        calls.touch()
        program = tmp_path / "bin" / name
        program.write_text(RECORDING.format(python=sys.executable, calls=str(calls), name=name, body=body))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return make
