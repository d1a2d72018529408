"""Orbax's checkpoints in s3://, which its path to TensorStore leaves out.

Orbax lets TensorStore write to gs:// and to disks, and would take s3:// for a folder of the disk. TensorStore
itself has a driver for S3, and the place of an array is all that differs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

from maxllm.storage import kvstore, path_of, scheme_of


def teach_orbax(folder: Path) -> None:
    """Has Orbax write and read arrays in s3:// through TensorStore's driver, if a folder lies there."""
    if scheme_of(folder) == "s3":
        _teach()


@cache
def _teach() -> None:
    former = tensorstore_utils.build_kvstore_tspec

    def place(directory: str, name: str | None = None, **options: Any) -> Any:
        if not str(directory).startswith("s3:"):
            return former(directory, name, **options)
        folder = path_of(str(directory))
        return kvstore(folder if name is None else folder / name)

    tensorstore_utils.build_kvstore_tspec = place
