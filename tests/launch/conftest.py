"""What the tests of launch/ share: its scripts as commands, and stand-ins for programs of clouds."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import ENVIRONMENT, STEPS

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


@pytest.fixture(scope="module")
def recipe_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small recipe and its prepared corpus."""
    folder = tmp_path_factory.mktemp("multiprocess")
    words = ["pretrain/tiny_slice_cpu_fast", "run.steps=6", "run.log_every=1", "run.eval_every=3"]
    words += ["data.sources=['slice:tang']", "tokenizer.vocab_size=3000", "model.vocab_size=3000"]
    words += ["tokenizer.character_coverage=0.98", f"tokenizer.path={folder / 'tokenizer.model'}"]
    words += [f"data.prepared_dir={folder / 'corpus'}", "batch.sequence_length=64", "batch.rows=8"]
    words += ["mesh.data=2", "mesh.fsdp=2", "model.n_layers=2", "model.scan_unroll=1"]
    subprocess.run([sys.executable, "-m", "maxllm.cli", "prepare", *words], check=True, capture_output=True)
    return words


@pytest.fixture(scope="module")
def words(recipe_words: list[str]) -> list[str]:
    """VERB RECIPE key=value …, without the folder: two processes of one device each.

    Layers are unrolled: XLA runs a loop on CPU beside exchanges that do not wait for it, which gloo mixes up.
    """
    given = ("mesh.", "run.steps", "run.eval_every", "model.scan_unroll")
    own = [word for word in recipe_words if not word.startswith(given)]
    own += ["model.scan_unroll=2"]
    own += [f"run.steps={STEPS}", "run.eval_every=15", "run.checkpoint_every=4", "mesh.data=1", "mesh.fsdp=2"]
    return ["pretrain", *own]


@pytest.fixture(scope="module")
def reference(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    script = ["bash", str(ROOT / "launch" / "local.sh"), *words, f"run.dir={folder}"]
    subprocess.run(script, check=True, env=ENVIRONMENT, capture_output=True)
    return folder
