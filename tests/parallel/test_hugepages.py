"""Training begins itself again where huge pages must be asked for: once, and nowhere else."""

import os
import subprocess
import sys

import pytest

from maxllm.parallel import hugepages


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """restarts(mode, variable): how the process would begin again, or None."""

    def run(mode, variable):
        enabled, begun = tmp_path / "enabled", []
        enabled.write_text(mode)
        monkeypatch.setattr(hugepages, "ENABLED", enabled)
        monkeypatch.setenv("GLIBC_TUNABLES", variable)
        monkeypatch.setattr(os, "execv", lambda program, words: begun.append((program, words)))
        hugepages.restart_with_huge_pages()
        return (*begun[0], os.environ["GLIBC_TUNABLES"]) if begun else None

    return run


def test_where_they_must_be_asked_for(restarts):
    words = [sys.executable, *sys.orig_argv[1:]]
    wanted = (sys.executable, words, "glibc.malloc.hugetlb=1")
    assert restarts("always [madvise] never", "") == wanted
    assert restarts("always [madvise] never", "glibc.malloc.arena_max=2") == (
        *wanted[:2],
        "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
    )


@pytest.mark.parametrize(
    ("mode", "variable"),
    [
        ("[always] madvise never", ""),
        ("always madvise [never]", ""),
        ("always [madvise] never", "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0"),
    ],
)
def test_where_they_are_there_or_refused(restarts, mode, variable):
    assert restarts(mode, variable) is None


def test_a_system_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr(hugepages, "ENABLED", tmp_path / "none")
    monkeypatch.setattr(os, "execv", None)
    hugepages.restart_with_huge_pages()


def test_the_command_says_what_it_was_asked():
    """Begun again or not, `maxllm pretrain` sees its own words."""
    given = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "maxllm.cli", "pretrain", "no/such recipe"]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 2 and "recipe 'no/such recipe' not found" in done.stderr
