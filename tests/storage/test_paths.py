"""Paths of the one type, and what is refused; no bucket is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxllm import storage
from maxllm.errors import RunFailed, UserError
from maxllm.files import whole_folder
from maxllm.journal import Journal


@pytest.fixture
def installed(monkeypatch):
    """As if the clients of buckets were installed."""
    monkeypatch.setattr(storage, "client", lambda scheme: None)


def test_a_local_path_is_pathlibs(tmp_path):
    assert type(storage.path_of(str(tmp_path))) is type(Path())
    assert storage.path_of("a/b") == Path("a/b")


def test_paths_in_buckets_keep_their_scheme(installed):
    path = storage.path_of("gs://bucket/runs/a")
    assert str(path / "config.yaml") == "gs://bucket/runs/a/config.yaml"
    assert str(storage.resolved(storage.path_of("s3://b/x/../y/"))) == "s3://b/y"
    assert storage.absolute(path) == path


def test_the_way_from_one_run_to_another(installed, tmp_path):
    one, other = storage.path_of("gs://bucket/runs/a"), storage.path_of("gs://bucket/runs/b")
    assert storage.way(other, one) == "../b"
    assert storage.along(one, "../b") == other
    here = storage.path_of(tmp_path / "c")
    assert storage.way(other, here) == "gs://bucket/runs/b"
    assert storage.along(here, "gs://bucket/runs/b") == other
    assert storage.way(storage.path_of(tmp_path / "d"), here) == "../d"


def test_storage_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"hdfs://x/y is neither a local path nor in a bucket"):
        storage.path_of("hdfs://x/y")


def test_a_client_that_is_not_installed_is_one_sentence_with_the_extra(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage.client.cache_clear()
    with pytest.raises(UserError, match=r"^paths in s3:// need s3fs: pip install 'maxllm\[s3\]'$"):
        storage.path_of("s3://bucket/x")


def test_a_folder_that_must_appear_at_once_is_no_folder_of_a_bucket(installed):
    refused = pytest.raises(UserError, match="gs://bucket/out is not a local path; give a local folder")
    with refused, whole_folder(storage.path_of("gs://bucket/out")):
        pass


def test_local_runs_import_no_client_of_buckets():
    clients = ("gcsfs", "s3fs", "aiohttp", "botocore")
    code = "import sys, maxllm.run.loop, maxllm.stages.pretrain, maxllm.stages.prepare; "
    line = [sys.executable, "-c", code + f"print(*[name for name in {clients} if name in sys.modules])"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError("Forbidden: https://x\nno access"), "lacks the permission"),
        (PermissionError("Access Denied"), "lacks the permission"),
        (ValueError("UNAUTHENTICATED: x"), "have expired or are not valid"),
        (RuntimeError("Anonymous caller does not have access, 401"), "there are no credentials"),
    ],
)
def test_what_libraries_say_of_credentials_is_one_sentence(error, what):
    sentence = storage.refusal(error, "gs://bucket/x")
    assert sentence.startswith("gs://bucket/x cannot be reached") and what in sentence
    assert "gcloud auth application-default login" in sentence
    wrapped = RunFailed("other words")
    wrapped.__cause__ = error
    assert storage.refusal(wrapped, "gs://bucket/x") == sentence


def test_an_error_without_credentials_in_it_is_none():
    assert storage.refusal(OSError("disk full"), "gs://bucket/x") is None
    assert storage.refusal(PermissionError(13, "Permission denied")) is None


def test_a_journal_is_whole_lines_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("maxllm.journal.SECONDS_BETWEEN", 0.01)
    file = tmp_path / "metrics.jsonl"
    file.write_text("0\n")
    journal = Journal(file)
    for number in range(1, 200):
        journal.append(f"{number}\n")
    journal.flush()
    assert file.read_text() == "".join(f"{number}\n" for number in range(200))


def test_a_journal_that_cannot_be_written_says_so_at_the_next_line(tmp_path):
    journal = Journal(tmp_path / "gone" / "metrics.jsonl")
    journal.append("1\n")
    with pytest.raises(FileNotFoundError):
        journal.flush()
    with pytest.raises(FileNotFoundError):
        journal.append("2\n")
