"""The Hugging Face hub: only ever asked where the user said so (--hub, --push)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maxllm.errors import UserError

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja"]
"""What a model is read from."""


def download(name: str) -> Path:
    """A snapshot of a repository `OWNER/NAME`, from the cache where it is there.

    Raises:
      UserError: it cannot be fetched.
    """
    import huggingface_hub

    with in_one_sentence(f"{name} cannot be downloaded from the Hugging Face hub"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))


def upload(folder: Path, name: str) -> str:
    """Puts a finished folder into the repository `OWNER/NAME`, made (private) where there is none.

    Returns:
      The address of the commit.

    Raises:
      UserError: it cannot be written there; the folder stays as it is.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    with in_one_sentence(f"{folder} is written, but cannot be pushed to {name}"):
        hub.create_repo(name, private=True, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Exported by maxllm", ignore_patterns=[".*"]
        )
    return str(commit.commit_url)


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Offline, unknown, private, not logged in: the hub's own words say it best."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None
