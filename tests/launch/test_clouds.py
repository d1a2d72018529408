"""What xpk and SkyPilot themselves make of what they are given; installed apart, by `make test-clouds`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".clouds" / "bin" / "python"
TPU, GPU = "pretrain/llama2-7b_synthetic_v5p-16", "pretrain/llama3-8b_synthetic_h100x8"

pytestmark = pytest.mark.clouds

XPK = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
for words in json.load(sys.stdin):
    read = vars(parser.parse_args(words))
    print(json.dumps({key: value for key, value in read.items() if not callable(value)}))
"""

SKY = """
import sys, jsonschema, yaml
from sky.task import Task
from sky.utils import schemas
task = yaml.safe_load(sys.stdin)
jsonschema.validate(task, schemas.get_task_schema())
made = Task.from_yaml_config(task)
[resources] = made.resources
print(made.num_nodes, resources.accelerators, resources.use_spot, resources.job_recovery)
"""


def theirs(program: str, given: str, home: Path) -> str:
    """What a program in their environment prints of something on its standard input."""
    assert PYTHON.exists(), "make test-clouds installs xpk and SkyPilot"
    result = subprocess.run(
        [PYTHON, "-c", program], input=given, capture_output=True, text=True, env={"HOME": str(home)}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("recipe", "more", "read"),
    [
        (
            TPU,
            ["--storage=data", "--zone=z", "--project=p"],
            {"tpu_type": "v5p-16", "num_slices": 1, "storage": ["data"]},
        ),
        (
            TPU,
            ["--hardware=2xv5p-16"],
            {"tpu_type": "v5p-16", "num_slices": 2, "env": ["MAXLLM_DISTRIBUTED=auto"]},
        ),
        (GPU, [], {"device_type": "h100-80gb-8", "num_nodes": 1}),
    ],
)
def test_xpk_reads_our_words(script, stand_in, tmp_path, recipe, more, read):
    """Its own parser takes every call of xpk.sh, and understands what was meant."""
    calls = stand_in("xpk")
    words = ["--name=seven", "--cluster=c", "--image=image", *more, "pretrain", recipe, "run.dir=a b"]
    assert script("xpk.sh", *words).returncode == 0
    given = json.dumps([words for _, *words in calls()])
    create, listed = map(json.loads, theirs(XPK, given, tmp_path).splitlines())
    assert create | read == create and create["restart_on_exit_codes"] == "75"
    assert create["command"].endswith(f"maxllm pretrain {recipe} 'run.dir=a b'")
    assert (create["workload"], listed["wait_for_job_completion"]) == ("seven", "seven")


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ([TPU], "1 {'tpu-v5p-16': 1} False"),
        ([GPU, "run.hardware=h100x16", "mesh.fsdp=16", "--spot"], "2 {'H100': 8} True"),
    ],
)
def test_skypilot_reads_our_task(tmp_path, words, read):
    """It is valid by its own schema, and becomes a task of its own with the machine that the recipe names."""
    command = [sys.executable, "-m", "maxllm.cli", "manifest", "skypilot", "pretrain", *words]
    manifest = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert manifest.returncode == 0, manifest.stderr
    assert theirs(SKY, manifest.stdout, tmp_path).startswith(read)
