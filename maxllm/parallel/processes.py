"""Several processes as one JAX program, and global arrays from what each process holds."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from maxllm.config.launch import NO_SETTINGS, LaunchConfig
from maxllm.errors import UserError
from maxllm.parallel.compiler import keep_compiled
from maxllm.parallel.discovery import Place, is_loopback, place_of
from maxllm.parallel.rendezvous import meet
from maxllm.parallel.settings import platform_here, set_variables
from maxllm.phases import PHASES

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""XLA flag without which simulated devices may each begin another of two exchanges that do not wait for each
other, and keep their few threads waiting for ever (seen with a ring inside a pipeline)."""


HEARTBEAT_SECONDS = 3600
"""After so long JAX gives up a process from which nothing comes, by an abort; supervisors know far sooner."""


def initialize(launch: LaunchConfig = NO_SETTINGS) -> None:
    """Before anything is computed: says what the libraries below JAX read and where compiled programs are
    kept, and joins the other processes, if the environment says that there are any. Idempotent.

    Args:
      launch: how long the others are waited for, and what libraries are told.

    Raises:
      UserError: the environment cannot be right, or gives this process other GPUs than JAX finds.
      RunFailed: the others did not come.
    """
    keep_compiled()
    set_variables(platform_here(), launch)
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Simulated devices share one thread pool: two programs in flight, each with a collective, can starve
        # each other for ever (seen with 2 devices on 2 cores). One program at a time cannot.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if IN_ORDER not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += f" {IN_ORDER}"
    if jax.distributed.is_initialized():
        return
    place = place_of(os.environ)
    if place is not None:
        join(place, launch.rendezvous_seconds)


def join(place: Place, seconds: int) -> None:
    """Meets the other processes of a job.

    Raises:
      UserError: see `rendezvous.meet`; or JAX finds other GPUs than the job gives to this process.
      RunFailed: the others did not come.
    """
    if place.processes > 1:  # one alone takes no port, which another command of the same job step may have
        hosts = place.hosts if PHASES.supervised else hosts_met(place, seconds)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            place.coordinator,
            num_processes=place.processes,
            process_id=place.index,
            local_device_ids=place.local_devices,
            # Left to itself, JAX takes one GPU of a Slurm node whose one process is to have all.
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS if PHASES.supervised else 100,
        )
        if (hosts or 1) > 1 and jax.default_backend() == "cpu":
            check_own_address()
    found = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    if place.gpus is not None and found != place.gpus:
        raise UserError(
            f"{place.launcher} gives process {place.index} {place.gpus} GPUs, and JAX finds {found}: "
            "see CUDA_VISIBLE_DEVICES, and whether maxllm[cuda] is installed"
        )


def hosts_met(place: Place, seconds: int) -> int:
    """Meets the other processes, where no supervisor has done so; on how many hosts they are.

    Raises:
      UserError, RunFailed: see `rendezvous.meet`.
    """

    def say(sentence: str) -> None:
        print(f"maxllm: {sentence}", file=sys.stderr, flush=True)

    meeting = meet(place, seconds, say)
    meeting.close()
    say(f"process {place.index} of {place.processes} on {socket.gethostname()} ({place.launcher})")
    return meeting.hosts


def check_own_address() -> None:
    """Gloo, which exchanges arrays between CPUs, tells the others the address that this host's name has here.

    Raises:
      UserError: it is one that they cannot reach.
    """
    name = socket.gethostname()
    address = str(socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)[0][4][0])
    if is_loopback(address):
        raise UserError(
            f"{name} knows itself as {address}, where other hosts cannot reach it to exchange arrays: "
            f"/etc/hosts must have {name} with its own address"
        )


def is_main() -> bool:
    """Whether this process writes the run's text files and speaks to the console."""
    return jax.process_index() == 0


def from_all(numbers: Sequence[float]) -> np.ndarray:
    """The numbers of every process, float32 [processes, numbers]; all must ask at the same point."""
    from jax.experimental import multihost_utils

    own = np.array(numbers, np.float32)
    return np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), len(numbers))


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process; every process must ask at the same point."""
    return flag if jax.process_count() == 1 else bool(from_all([float(flag)]).any())


def agreed(number: int) -> int:
    """The main process's number, in every process, for clocks and disks may differ between machines; all must
    ask at the same point."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def peer_lost(error: BaseException) -> bool:
    """Whether an error tells, in the words of JAX's libraries, that another process of this run is gone."""
    signs = ("Gloo", "closed by peer", "reset by peer", "coordination service", "heartbeat", "Barrier")
    return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def to_global(batch: Any, sharding: Sharding) -> Any:
    """Global arrays from a batch that every process computes alike; each device gets its rows only."""

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)


def own_rows(rows_at: Callable[[slice], Any], abstract: Any, sharding: Sharding) -> Any:
    """Global arrays of which each process builds the rows that its own devices hold, and no others.

    Args:
      rows_at: some rows of the record of arrays, the same in every process.
      abstract: shapes of the whole record, rows first.
      sharding: splits rows, and nothing else.
    """
    leaves: list[jax.ShapeDtypeStruct] = jax.tree.leaves(abstract)
    structure: Any = jax.tree.structure(abstract)
    built: dict[tuple[int, int], list[np.ndarray]] = {}  # several devices may hold the same rows

    def part(number: int, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(leaves[number].shape[0])
        if (start, stop) not in built:
            record = rows_at(slice(start, stop))
            assert jax.tree.structure(record) == structure, "data has the form that was compiled for"
            built[start, stop] = jax.tree.leaves(record)
        return built[start, stop][number]

    arrays = [
        jax.make_array_from_callback(leaf.shape, sharding, partial(part, number))
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)
