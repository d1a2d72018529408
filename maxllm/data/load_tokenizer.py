"""A tokenizer of either kind from its files."""

from __future__ import annotations

import datetime
import os

from maxllm.data import bpe, spm
from maxllm.data.tokenizer import FAST_CONFIG_FILE, SPM_FILE, Tokenizer
from maxllm.errors import UserError
from maxllm.storage import path_of


def load_tokenizer(path: str | os.PathLike[str], day: datetime.date | None = None) -> Tokenizer:
    """Reads the tokenizer in a folder that holds `Tokenizer.files`, or a tokenizer.model by its own path.

    Args:
      path: the folder or file.
      day: what the chat template takes for today; whatever day it is when it is filled, when absent.

    Raises:
      UserError: nothing there, or not a tokenizer.
    """
    path = path_of(path)
    if path.is_dir() and (path / FAST_CONFIG_FILE).is_file():
        return bpe.load(path, day)
    file = path / SPM_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"tokenizer {file} does not exist; `maxllm prepare RECIPE` trains one")
    return spm.from_bytes(file.read_bytes(), str(file))
