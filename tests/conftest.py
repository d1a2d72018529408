"""Eight simulated CPU devices for every test, and the small things that many tests need."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# Read when jax is imported, which no module may have done before this one.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # LLVM's effort, not the arithmetic: compiling takes half the time
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # see parallel/processes.py
)
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):
    # The former generator of fused loops, which later versions have no more: half the time again.
    _FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# Commands that tests start share what they compile, apart from the user's; workers inherit the folder.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="maxllm-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import itertools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402

from maxllm.config.data import TokenizerConfig  # noqa: E402
from maxllm.config.model import ModelConfig  # noqa: E402
from maxllm.data import tasks  # noqa: E402
from maxllm.data.sources import read_documents  # noqa: E402
from maxllm.data.spm import SpmTokenizer, train  # noqa: E402
from maxllm.data.tally import Tally  # noqa: E402
from maxllm.folder import RunFolder  # noqa: E402
from maxllm.model.llama import Llama  # noqa: E402
from maxllm.parallel import compiler  # noqa: E402
from maxllm.records import Params  # noqa: E402
from maxllm.run.checkpoint import save_params  # noqa: E402
from maxllm.steps.state import init_params  # noqa: E402

# As in parallel/processes.py: simulated devices run one program at a time, or they can starve each other.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# What tests compile in their own process is shared as well, among them and between the workers.
compiler.keep_compiled()

TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "max_seq_len": 64,
    "init_std": 0.2,  # large enough that predictions are far from uniform
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., ModelConfig]:
    """tiny_model(**changes): a two-layer float32 ModelConfig."""

    def make(**changes: Any) -> ModelConfig:
        return ModelConfig.model_validate(TINY | changes)

    return make


@pytest.fixture(scope="session")
def params_of() -> Callable[..., Params]:
    """params_of(model, seed=0): a model's fresh parameters, made once."""

    @cache
    def initializer(model: nn.Module) -> Callable[[jax.Array], Params]:
        return jax.jit(lambda key: nn.unbox(init_params(model, key)))

    @cache
    def make(model: nn.Module, seed: int = 0) -> Params:
        return initializer(model)(jax.random.key(seed))

    return make


@pytest.fixture(scope="session")
def policy_at(tiny_model, tiny_tokenizer, params_of) -> Callable[..., Path]:
    """policy_at(folder, **changes of the model): a converted tiny model's run folder, to start from."""

    def make(folder: Path, **changes: Any) -> Path:
        model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, **changes)
        tree = {
            "stage": "convert",
            "run": {"dir": str(folder), "steps": 1},
            "model": model.model_dump(mode="json"),
            "batch": {"rows": 1, "sequence_length": 64},
        }
        run = RunFolder(folder)
        save_params(run, params_of(Llama(model.computed_in("float32"))))
        run.write_tokenizer(tiny_tokenizer.files)
        run.write_config(yaml.safe_dump(tree))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> SpmTokenizer:
    """512 BPE pieces, trained on a little Shakespeare and the tasks' own wording in English and Chinese."""
    plays = itertools.islice(read_documents("slice:shakespeare", "text", Tally("slice:shakespeare")), 2)
    rows = ["\n".join(row.values()) for row in tasks.instruction_rows("train", 200, 0)]
    config = TokenizerConfig(path="unused", vocab_size=512, character_coverage=1.0)
    return train([*plays, *rows], config)


FIRST = ("test_road.py", "test_sharded.py", "test_tuned_runs.py", "test_resume.py", "test_tuning.py")
"""Files of several minutes: a worker that began one of them last would go on alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, all others as they are."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
