"""Conversion of a model of a billion parameters: the same bytes back, and a kill leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxllm.config.data import TokenizerConfig
from maxllm.config.model import ModelConfig
from maxllm.data.spm import train
from maxllm.files import write_json
from maxllm.folder import RunFolder
from maxllm.hf import mapping
from maxllm.hf.config import hf_config_of
from maxllm.hf.tokenizer import save_tokenizer
from maxllm.hf.write import WEIGHTS, Slot, write_file
from maxllm.run.checkpoint import save_params
from maxllm.run.restore import open_array

BILLION = ModelConfig(
    vocab_size=32_000, d_model=2048, n_layers=20, n_heads=32, n_kv_heads=8, d_ff=5632, max_seq_len=2048
)
IDS: Any = SimpleNamespace(bos=1, pad=5, stop_tokens=(2, 4))
BF16 = np.dtype(ml_dtypes.bfloat16)
pytestmark = pytest.mark.real
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def slots(config: ModelConfig) -> list[Slot]:
    """Every tensor of the model in bfloat16."""
    shapes = mapping.hf_shapes(config)
    names = [name for row in mapping.rows(config) for name in mapping.hf_names(row, config)]
    return [Slot(name, shapes[name], BF16) for name in names]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights, 2 GB."""
    return write_model(tmp_path_factory.mktemp("billion"), BILLION)


def write_model(folder: Path, config: ModelConfig) -> Path:
    """Random weights, written tensor by tensor."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(BF16)
    tensors = ((slot.name, np.resize(np.roll(noise, i), slot.shape)) for i, slot in enumerate(slots(config)))
    write_file(folder / WEIGHTS, slots(config), tensors, lambda size: None)
    write_json(folder / "config.json", hf_config_of(config, IDS, "bfloat16"))
    texts = [path.read_text() for path in Path(mapping.__file__).parent.glob("*.py")]
    save_tokenizer(train(texts, TokenizerConfig(path="unused", vocab_size=600)), folder)
    return folder


def command(direction: str, source: Path, target: Path) -> list[str]:
    """The conversion in its own process."""
    return [sys.executable, "-m", "maxllm.cli", "convert", direction, str(source), str(target), "--json"]


def run(words: list[str]) -> subprocess.CompletedProcess:
    """To its end."""
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)


def figures(direction: str, source: Path, target: Path) -> dict[str, Any]:
    """What a conversion tells of itself; the former one at the same place is replaced."""
    done = run(command(direction, source, target))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def there_and_back(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of both directions, and where the results are; four gigabytes of disk."""
    folder = tmp_path_factory.mktemp("converted")
    return {
        "from-hf": figures("from-hf", source, folder / "run"),
        "to-hf": figures("to-hf", folder / "run", folder / "hf"),
        "folder": folder,
    }


def test_bytes_come_back(source: Path, there_and_back: dict[str, Any]) -> None:
    size = sum(slot.nbytes for slot in slots(BILLION))
    assert size > 2 * 10**9
    assert there_and_back["from-hf"]["bytes"] == there_and_back["to-hf"]["bytes"] == size
    assert same_tensors(source / WEIGHTS, there_and_back["folder"] / "hf" / WEIGHTS)


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_memory_is_what_the_destination_needs_and_little_more(
    there_and_back: dict[str, Any], direction: str
) -> None:
    """1.5 x the largest tensor and 1 GB, libraries included; and the model where it goes through devices."""
    sizes = [slot.nbytes for slot in slots(BILLION)]
    peak = there_and_back[direction]["peak_rss_bytes"]
    destination = sum(sizes) if direction == "from-hf" else 0
    print(f"{direction}: peak {peak / 1e9:.2f} GB, model {sum(sizes) / 1e9:.2f} GB")
    assert peak < destination + 1.5 * max(sizes) + 10**9


def test_an_array_of_more_than_a_gigabyte_is_saved(tmp_path: Path) -> None:
    """Stacked feed-forward weights of a model of 3 B parameters have 1.4 GB."""
    array = jnp.arange(11 * 10**8, dtype=jnp.uint8).reshape(11, -1)
    save_params(RunFolder(tmp_path), {"decoder": {"layers": {"w": array}}})
    saved = open_array(RunFolder(tmp_path).find(), "decoder/layers/w")
    assert saved.shape == array.shape
    np.testing.assert_array_equal(np.asarray(saved[10]), array[10])


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes after their headers, and name them alike."""
    contents = []
    for path in (one, other):
        with path.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
            contents.append((json.loads(header), stream.tell()))
    if contents[0][0] != contents[1][0]:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        a.seek(contents[0][1]), b.seek(contents[1][1])
        while True:
            first, second = a.read(1 << 26), b.read(1 << 26)
            if first != second:
                return False
            if not first:
                return True


def test_a_killed_conversion_leaves_nothing_and_a_rerun_finishes_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    process = subprocess.Popen(
        command("from-hf", source, target),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    while not (tmp_path / ".run.partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    done = run(command("from-hf", source, target))
    assert done.returncode == 0, done.stderr
    assert (target / "config.yaml").is_file() and not (tmp_path / ".run.partial").exists()
