"""Eight simulated CPU devices for every test, and the small things that many tests need."""

import os

# Read when jax is imported, which no module may have done before this one.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import itertools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

from maxllm.config import ModelConfig, TokenizerConfig  # noqa: E402
from maxllm.data import tasks  # noqa: E402
from maxllm.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402

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
def tiny_tokenizer() -> Tokenizer:
    """512 BPE pieces, trained on the tasks' own wording in English and Chinese."""
    rows = itertools.islice(tasks.instruction_rows("train", 400, 0), 400)
    texts = ["\n".join(row.values()) for row in rows] + ["user\nassistant\nsystem\n"] * 5
    return train_tokenizer(texts, TokenizerConfig(path="unused", vocab_size=512, character_coverage=1.0))
