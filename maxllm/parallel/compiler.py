"""XLA's compilers: where compiled programs are kept, and what compilers say while they work."""

import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def without_tpu() -> None:
    """Where no TPU is, keeps libtpu, installed for its compiler, from looking for one and complaining."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
    ):
        os.environ.setdefault(name, value)


CACHE_DIR, CACHE_BYTES, CACHE_SECONDS = "JAX_COMPILATION_CACHE_DIR", 4 << 30, 0.2
"""JAX's variable for the folder of compiled programs; what ours may hold (the least recently used goes), and
how long a program must have taken to compile to be worth a file."""


def keep_compiled() -> None:
    """Programs are compiled once and read from the user's cache folder after that.

    JAX's own variable names another folder, or none where it is empty. A program's key holds XLA's version
    and options, and the devices, on CPU with the processor's features: machines may share a folder.
    """
    if CACHE_DIR in os.environ:
        return
    import jax

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxllm" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: programs are compiled every time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHE_SECONDS)


@contextmanager
def made_whole() -> Iterator[list[str]]:
    """Collects what XLA's partitioner warns of while it compiles: arrays that it makes whole on every device.

    It says so on stderr alone ("Involuntary full rematerialization"), and TPU's compiler only where
    TPU_STDERR_LOG_LEVEL=1 was set before it was loaded. What else compilers say of errors is passed on.
    """
    found: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as messages:
        stderr = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            messages.seek(0)
            for line in messages.read().decode(errors="replace").splitlines():
                if match := _MADE_WHOLE.search(line):
                    found.append(f"{match[3]} from {match[1]} to {match[2]}")
                elif re.match(r"[EF]\d{4} ", line):
                    print(line, file=sys.stderr)


_MADE_WHOLE = re.compile(
    r"Involuntary full rematerialization.*? from sharding (\{.*?\}) to (\{.*?\}) efficiently for HLO "
    r"operation %?([\w.\-]+ = \w+\[[\d,]*\])"
)
