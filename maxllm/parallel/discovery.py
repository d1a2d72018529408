"""Where a process stands among those of its job, from the variables that launchers set.

    settings      MAXLLM_COORDINATOR, MAXLLM_NUM_PROCESSES, MAXLLM_PROCESS_ID: what scripts in launch/ set
    Slurm         inside of a job step, which srun makes
    Open MPI      under mpirun; its variables tell everything but the coordinator on a version later than 4
    Kubernetes    an indexed Job or a JobSet of one: the pod's index; the rest is set by the manifest
    Cloud TPU     with MAXLLM_DISTRIBUTED=auto, the machine itself is asked (parallel/cloud_tpu.py)

A setting wins over what a launcher says of the same thing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from maxllm.errors import UserError
from maxllm.parallel.cloud_tpu import worker_of

COORDINATOR, COUNT, INDEX = "MAXLLM_COORDINATOR", "MAXLLM_NUM_PROCESSES", "MAXLLM_PROCESS_ID"

AUTO = "MAXLLM_DISTRIBUTED"
"""With the value `auto`, a Cloud TPU is asked which of its hosts this is."""

HOSTS = "MAXLLM_HOSTS"
"""Machines of the job, as a supervisor has counted them for its process."""

PORTS = range(61_440, 65_536)
"""Where a coordinator's port is taken from, by the number of the job: two jobs of one host seldom collide."""

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """One process among those of its job."""

    launcher: str
    """Who said so, for messages."""
    coordinator: str
    """host:port of process 0, where all meet."""
    processes: int
    index: int
    hosts: int | None = None
    """Machines of the job; None where nobody says."""
    local_devices: tuple[int, ...] | None = None
    """GPUs of this process among those that it sees; None for all."""
    gpus: int | None = None
    """GPUs that the job gives to this process; None where nobody says."""


@dataclass(frozen=True)
class Launcher:
    """What a launcher says; None of what it does not."""

    name: str
    coordinator: str | None = None
    processes: str | None = None
    index: str | None = None
    hosts: int | None = None
    local_devices: tuple[int, ...] | None = None
    gpus: int | None = None
    variables: tuple[str, str, str] = (COORDINATOR, COUNT, INDEX)
    """Where the coordinator, the number and the index come from, for messages."""


def place_of(environment: Environment) -> Place | None:
    """This process's place; None for one that is alone.

    Raises:
      UserError: naming the variable that is missing, or that cannot be right.
      RunFailed: a Cloud TPU is to be asked, and does not answer.
    """
    launcher = (
        cloud_tpu(environment)
        or slurm(environment)
        or open_mpi(environment)
        or kubernetes(environment)
        or Launcher("settings")
    )
    values = {
        COORDINATOR: environment.get(COORDINATOR, launcher.coordinator),
        COUNT: environment.get(COUNT, launcher.processes),
        INDEX: environment.get(INDEX, launcher.index),
    }
    given = [name for name, value in values.items() if value is not None]
    if not given or (launcher.name == "settings" and values[COUNT] == "1" and given == [COUNT]):
        return None
    missing = [name for name in values if name not in given]
    if missing:
        names = ", ".join(missing)
        by = "" if launcher.name == "settings" else f"{launcher.name} started this process, but "
        raise UserError(f"{by}{names} is not set, as the scripts in launch/ set it")
    coordinator = values[COORDINATOR]
    assert coordinator is not None, "all are given"
    processes, index = (
        whole_number(values[name], name if name in environment else variable)
        for name, variable in ((COUNT, launcher.variables[1]), (INDEX, launcher.variables[2]))
    )
    if processes < 1 or not 0 <= index < processes:
        raise UserError(f"{INDEX}={index} is not one of the {processes} processes that {COUNT} says")
    hosts = whole_number(environment[HOSTS], HOSTS) if HOSTS in environment else launcher.hosts
    check_address(coordinator, hosts)
    return Place(
        launcher=launcher.name,
        coordinator=coordinator,
        processes=processes,
        index=index,
        hosts=hosts,
        local_devices=launcher.local_devices,
        gpus=launcher.gpus,
    )


# --- launchers ---------------------------------------------------------------------------------------------


def cloud_tpu(environment: Environment) -> Launcher | None:
    """A host of a Cloud TPU, where MAXLLM_DISTRIBUTED=auto has the machine asked.

    Raises:
      UserError, RunFailed: see `cloud_tpu.worker_of`.
    """
    if AUTO not in environment:
        return None
    if environment[AUTO] != "auto":
        raise UserError(f"{AUTO}={environment[AUTO]}, where `auto` is all that it can be")
    worker = worker_of(environment)
    return Launcher(
        name="Cloud TPU",
        coordinator=worker.coordinator,
        processes=str(worker.processes),
        index=str(worker.index),
        hosts=worker.processes,
    )


def slurm(environment: Environment) -> Launcher | None:
    """A task of a Slurm job step. The batch script itself is none: there, `srun` has still to come.

    Raises:
      UserError: the GPUs that the tasks of a node see cannot be shared out among them.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    job = whole_number(environment.get("SLURM_JOB_ID", "0"), "SLURM_JOB_ID")
    tasks = tasks_here(environment)
    return Launcher(
        name="Slurm",
        coordinator=f"{first_host(nodes)}:{PORTS[job % len(PORTS)]}" if nodes else None,
        processes=environment["SLURM_STEP_NUM_TASKS"],
        index=environment["SLURM_PROCID"],
        hosts=whole_number(environment.get("SLURM_STEP_NUM_NODES", "1"), "SLURM_STEP_NUM_NODES"),
        local_devices=own_gpus(environment, tasks),
        gpus=gpus_of_task(environment, tasks),
        variables=("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    )


def open_mpi(environment: Environment) -> Launcher | None:
    """A process of Open MPI's mpirun."""
    if "OMPI_COMM_WORLD_SIZE" not in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    size = whole_number(environment["OMPI_COMM_WORLD_SIZE"], "OMPI_COMM_WORLD_SIZE")
    local = whole_number(
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", str(size)), "OMPI_COMM_WORLD_LOCAL_SIZE"
    )
    return Launcher(
        name="Open MPI",
        processes=str(size),
        index=environment["OMPI_COMM_WORLD_RANK"],
        hosts=-(-size // max(1, local)),
        local_devices=shared_out(environment, local, "OMPI_COMM_WORLD_LOCAL_RANK"),
        variables=(COORDINATOR, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    )


def kubernetes(environment: Environment) -> Launcher | None:
    """A pod of an indexed Job, which has its index from Kubernetes and the rest from the manifest."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    processes = environment.get(COUNT)
    return Launcher(
        name="Kubernetes",
        index=environment["JOB_COMPLETION_INDEX"],
        hosts=int(processes) if processes is not None and processes.isdigit() else None,
        variables=(COORDINATOR, COUNT, "JOB_COMPLETION_INDEX"),
    )


# --- what their variables mean -----------------------------------------------------------------------------


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: node[01-03,07],other -> node01."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]\-]+)[^\]]*\])?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no node")
    return match[1] + (match[2] or "")


def tasks_here(environment: Environment) -> int:
    """Tasks of the step on this node: of `2(x3),1`, two on each of the first three nodes and one on the last.

    Raises:
      UserError: the list has no entry for this node.
    """
    each = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    counts: list[int] = []
    for part in each.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={each!r} is not a list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = whole_number(environment.get("SLURM_NODEID", "0"), "SLURM_NODEID")
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={each!r} has no such node")
    return counts[node]


def visible_gpus(environment: Environment) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES lets a process see; None where it is not set."""
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    return None if devices is None else len([name for name in devices.split(",") if name.strip()])


def own_gpus(environment: Environment, tasks: int) -> tuple[int, ...] | None:
    """The GPUs of a Slurm task among those that it sees; None for all of them."""
    return shared_out(environment, tasks, "SLURM_LOCALID")


def shared_out(environment: Environment, processes: int, variable: str) -> tuple[int, ...] | None:
    """A node's GPUs in equal parts, that of this process; None where each sees its own, or there are none.

    Raises:
      UserError: they cannot be shared out evenly.
    """
    seen = visible_gpus(environment)
    if processes == 1 or seen is None or seen <= 1:
        return None
    if seen % processes:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES has {seen} GPUs for {processes} processes of this host, which cannot "
            "share them evenly: start one process per host, or one per GPU"
        )
    each, local = seen // processes, whole_number(environment.get(variable, "0"), variable)
    return tuple(range(local * each, (local + 1) * each))


def gpus_of_task(environment: Environment, tasks: int) -> int | None:
    """GPUs that Slurm gives to each task of this node; None for a job without."""
    on_node = environment.get("SLURM_GPUS_ON_NODE")
    return None if on_node is None else whole_number(on_node, "SLURM_GPUS_ON_NODE") // tasks


def whole_number(value: str | None, variable: str) -> int:
    """The number in a variable.

    Raises:
      UserError: it is none.
    """
    if value is None or not re.fullmatch(r"\d+", value.strip()):
        raise UserError(f"{variable}={value} is not a whole number")
    return int(value)


def check_address(coordinator: str, hosts: int | None) -> None:
    """A coordinator must be host:port, and of several hosts one that the others can reach.

    Raises:
      UserError: it is not.
    """
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise UserError(f"{COORDINATOR}={coordinator} is not host:port")
    if hosts is not None and hosts > 1 and is_loopback(host.strip("[]")):
        raise UserError(
            f"{COORDINATOR}={coordinator} is this host alone, where the job has {hosts}: give the name or "
            "address of the first host, as the others reach it"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address means the machine that asks."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
