"""Small LLaMAs with random weights, which the tests of this folder convert and compare."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from transformers import AutoConfig, PreTrainedConfig

from maxllm.config.model import ModelConfig, RopeScaling
from maxllm.hf import mapping
from maxllm.hf.config import hf_config_of
from maxllm.hf.folder import open_model
from maxllm.hf.load import load
from maxllm.records import Params

TINY = ModelConfig(
    vocab_size=600, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40, max_seq_len=64, dtype="float32"
)
SCALING = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=16)


def tiny(**changes: Any) -> ModelConfig:
    """TINY with other fields."""
    return ModelConfig.model_validate(TINY.model_dump() | changes)


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters large enough that logits spread over several units, norms not 1."""
    rng = np.random.default_rng(seed)
    return mapping.nest(
        (path, (rng.normal(1 if path.endswith("scale") else 0, 0.2, shape)).astype(np.float32))
        for path, shape in mapping.our_shapes(config).items()
    )


IDS: Any = SimpleNamespace(bos=1, pad=5, stop_tokens=(2, 4))
"""All that a configuration wants to know of a tokenizer."""


def hf_config(config: ModelConfig) -> PreTrainedConfig:
    """The configuration in `transformers`."""
    return AutoConfig.for_model(**hf_config_of(config, IDS))


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes of a model's parameters, all on the first device."""
    here = SingleDeviceSharding(jax.devices()[0])
    return mapping.nest(
        (path, jax.ShapeDtypeStruct(shape, dtype, sharding=here))
        for path, shape in mapping.our_shapes(config).items()
    )


def read_folder(folder: Path) -> tuple[Params, ModelConfig]:
    """A Hugging Face folder's parameters and configuration."""
    model = open_model(folder)
    return load(model.source, model.config, abstract_params(model.config)), model.config
