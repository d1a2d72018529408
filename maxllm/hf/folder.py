"""A Hugging Face folder, opened: its weights as a source, its configuration as ours, its tokenizer.

    model = open_model(Path("SmolLM2-135M-Instruct"))
    params = load(model.source, model.config, abstract)

Also folders of Meta's own layout and of the happy-llm tutorial (original.py). Nothing large is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxllm.config.model import ModelConfig
from maxllm.errors import UserError
from maxllm.files import read_json
from maxllm.hf import original
from maxllm.hf.config import config_of
from maxllm.hf.source import Source, open_folder

PREFIX, EMBEDDING, HEAD = "model.", "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class HfModel:
    """A model that has not been read."""

    source: Source
    config: ModelConfig
    fields: Mapping[str, Any]
    """config.json, as it was."""


def open_model(folder: Path, allow_pickle: bool = False) -> HfModel:
    """Opens a local folder; its configuration is checked, and so will be its tensors' names and shapes.

    Raises:
      UserError: not a model's folder, an architecture or a setting that ours does not have, broken files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    if original.is_original(folder):
        source = open_folder(folder, allow_pickle)
        fields = original.hf_fields(folder, source)
        config = config_of(fields, str(folder))
        return HfModel(
            original.as_hf(source, config.n_heads, config.n_kv_heads, config.tie_embeddings), config, fields
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face folder")
    fields = read_json(folder / "config.json")
    config = config_of(fields, str(folder / "config.json"))
    source = with_head(open_folder(folder, allow_pickle), config)
    return HfModel(without_stored_tie(source) if config.tie_embeddings else source, config, fields)


def with_head(source: Source, config: ModelConfig) -> Source:
    """The tensors under the names that they have in a language model.

    The decoder alone (`LlamaModel`) is saved without the prefix; its names get it here.

    Raises:
      UserError: it is the decoder alone of a model that does not use its embeddings as head.
    """
    if EMBEDDING in source.tensors or EMBEDDING.removeprefix(PREFIX) not in source.tensors:
        return source
    if HEAD not in source.tensors and not config.tie_embeddings:
        raise UserError(
            f"{source.origin} holds the decoder alone, without {HEAD}: with tie_word_embeddings=false in "
            "config.json there is no language model in it"
        )
    return Source(
        source.origin,
        {name if name == HEAD else f"{PREFIX}{name}": tensor for name, tensor in source.tensors.items()},
    )


def without_stored_tie(source: Source) -> Source:
    """Tied embeddings that are stored twice are read once.

    Raises:
      UserError: the two are not equal, so they are not tied.
    """
    if HEAD not in source.tensors or EMBEDDING not in source.tensors:
        return source
    rows = source.tensors[EMBEDDING].shape[0]
    for first in range(0, rows, 4096):
        part = (slice(first, min(first + 4096, rows)), slice(None))
        if not np.array_equal(source.read(HEAD, part), source.read(EMBEDDING, part)):
            raise UserError(f"{source.origin}: tie_word_embeddings is set, but {HEAD} is not {EMBEDDING}")
    return Source(source.origin, {name: t for name, t in source.tensors.items() if name != HEAD})
