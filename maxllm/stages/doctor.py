"""Doctor: show what is here for a run, and what would fail.

    maxllm doctor
    srun -N2 maxllm doctor --json

Asks the environment where this process stands in its job, JAX which devices it finds, the system for its
addresses and for room on disk. It joins no other process, and computes nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from maxllm.errors import RunFailed, UserError
from maxllm.parallel.discovery import AUTO, Place, place_of
from maxllm.parallel.settings import SETTINGS

DEVICE_SECONDS = 120
"""JAX has so long to say which devices are here: it waits without end for a TPU that another has."""

ROOM_BYTES = 10 * 10**9
"""Less than this for checkpoints is said."""

ASK_JAX = """
import json, jax
devices = jax.local_devices()
print(json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}))
"""


def run() -> dict[str, Any]:
    """Looks around.

    Returns:
      {"host", "addresses", "job", "devices", "free_bytes", "versions", "extras", "problems"}: the last is a
      list of sentences.
    """
    problems: list[str] = []
    job = job_here(problems)
    devices = devices_here(problems)
    check_devices(job, devices, problems)
    free = shutil.disk_usage(Path.cwd()).free
    if free < ROOM_BYTES:
        problems.append(f"{free / 1e9:.1f} GB are free in this folder: checkpoints may not fit")
    return {
        "host": socket.gethostname(),
        "addresses": addresses(),
        "job": {"launcher": "none: one process"} if job is None else described(job),
        "devices": devices,
        "free_bytes": free,
        "versions": versions(),
        "extras": extras(),
        "problems": problems,
    }


# --- the job -----------------------------------------------------------------------------------------------


def job_here(problems: list[str]) -> Place | None:
    """This process's place in its job, as far as the environment says."""
    try:
        place = place_of(os.environ)
    except (UserError, RunFailed) as error:
        problems.append(str(error))
        return None
    if place is not None:
        host = place.coordinator.rpartition(":")[0].strip("[]")
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            problems.append(f"the coordinator's host {host} has no address here: {error.strerror or error}")
    return place


def described(place: Place) -> dict[str, Any]:
    """A place as figures; what nobody says is left out."""
    figures = {
        "launcher": place.launcher,
        "coordinator": place.coordinator,
        "processes": place.processes,
        "index": place.index,
        "hosts": place.hosts,
        "gpus": place.gpus,
        "local_devices": None if place.local_devices is None else list(place.local_devices),
    }
    return {name: value for name, value in figures.items() if value is not None}


# --- the machine -------------------------------------------------------------------------------------------


def devices_here(problems: list[str]) -> dict[str, Any]:
    """JAX's devices, asked in another process: a driver that hangs or aborts takes no doctor with it."""
    try:
        # A process by itself, whatever job this one is of.
        alone = {name: value for name, value in os.environ.items() if name != AUTO}
        asked = subprocess.run(
            [sys.executable, "-c", ASK_JAX], capture_output=True, text=True, timeout=DEVICE_SECONDS, env=alone
        )
    except subprocess.TimeoutExpired:
        problems.append(
            f"JAX does not say within {DEVICE_SECONDS} s which devices are here: another process may "
            "hold them"
        )
        return {}
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines() or ["it ended without a word"]
        problems.append(f"JAX finds no devices: {lines[-1][:300]}")
        return {}
    devices: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return devices


def check_devices(place: Place | None, devices: dict[str, Any], problems: list[str]) -> None:
    """Whether JAX uses the accelerators that are here, and those that the job gives."""
    if not devices:
        return
    for kind in ("gpu", "tpu"):
        nodes = SETTINGS[kind].devices
        extra = {"gpu": "cuda", "tpu": "tpu"}[kind]
        if devices["platform"] == "cpu" and any(Path(node).exists() for node in nodes):
            problems.append(
                f"this machine has a {kind.upper()}, and JAX uses the CPU: pip install 'maxllm[{extra}]', "
                "and see whether JAX_PLATFORMS says otherwise"
            )
    if place is not None and place.gpus is not None:
        found = devices["count"] if devices["platform"] == "gpu" else 0
        own = len(place.local_devices) if place.local_devices is not None and found else found
        if own != place.gpus:
            problems.append(f"{place.launcher} gives this process {place.gpus} GPUs, and JAX finds {found}")


def addresses() -> list[str]:
    """The addresses by which this host's name is known to itself."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, proto=socket.IPPROTO_TCP)
    except OSError:
        return []
    return sorted({str(address[4][0]) for address in found})


def versions() -> dict[str, str]:
    """Of Python and of what a run is made of."""
    names = ("maxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def extras() -> dict[str, str]:
    """Each extra of maxllm -> "installed", or which packages are missing."""
    found = {}
    for extra in importlib.metadata.metadata("maxllm").get_all("Provides-Extra") or []:
        missing = sorted(set(missing_of("maxllm", extra)))
        found[extra] = f"missing {', '.join(missing)}" if missing else "installed"
    return found


def missing_of(package: str, extra: str) -> Iterator[str]:
    """Packages that are not here, of those that an extra of a package needs besides the package itself."""
    for text in importlib.metadata.requires(package) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        if not is_installed(requirement.name):
            yield requirement.name
            continue
        for inner in requirement.extras:
            yield from missing_of(requirement.name, inner)


def is_installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
