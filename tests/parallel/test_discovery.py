"""Where a process stands, from what Slurm, Open MPI, Kubernetes and our own scripts set."""

import pytest

from maxllm.errors import UserError
from maxllm.parallel import discovery
from maxllm.parallel.discovery import COORDINATOR, COUNT, INDEX, place_of

SETTINGS = {COORDINATOR: "node1:8476", COUNT: "4", INDEX: "2"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "3",
    "SLURM_LOCALID": "0",
}
"""What srun sets for the last of four tasks on four nodes (srun's manual, OUTPUT ENVIRONMENT VARIABLES)."""
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def test_alone():
    """Nothing is said, or only what a batch script has before it calls srun, or a pod of no indexed Job."""
    script = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    for environment in ({}, script, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {COUNT: "1"}):
        assert place_of(environment) is None


def test_settings():
    place = place_of(SETTINGS)
    assert (place.coordinator, place.processes, place.index) == ("node1:8476", 4, 2)
    assert place.local_devices is None and place.gpus is None


def test_slurm():
    place = place_of(SLURM)
    assert (place.launcher, place.processes, place.index, place.hosts) == ("Slurm", 4, 3, 4)
    assert place.coordinator == "gpu07:61441"  # 61440 + 4097 mod 4096
    assert place_of(SLURM | {"SLURM_JOB_ID": "1"}).coordinator == place.coordinator
    assert place_of(SLURM | {COORDINATOR: "10.1.2.3:5000"}).coordinator == "10.1.2.3:5000"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[001,007-9],m2", "n001"), ("gpu-a[10]", "gpu-a10")],
)
def test_first_host(nodes, first):
    assert discovery.first_host(nodes) == first


def test_a_task_alone_on_its_node_has_all_gpus():
    """MaxText's users saw one GPU of eight: JAX takes SLURM_LOCALID for the only one."""
    place = place_of(SLURM | EIGHT)
    assert place.local_devices is None and place.gpus == 8


def test_tasks_share_the_gpus_of_their_node():
    two = SLURM | EIGHT | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "1(x3),2"}
    place = place_of(two | {"SLURM_LOCALID": "1"})
    assert place.local_devices == (4, 5, 6, 7) and place.gpus == 4
    bound = two | {"CUDA_VISIBLE_DEVICES": "5", "SLURM_LOCALID": "1"}  # --gpus-per-task: each sees its own
    assert place_of(bound).local_devices is None
    with pytest.raises(UserError, match="8 GPUs for 3 processes of this host"):
        place_of(two | {"SLURM_STEP_TASKS_PER_NODE": "1(x3),3"})


def test_open_mpi():
    place = place_of(MPI | {COORDINATOR: "head:5000", "CUDA_VISIBLE_DEVICES": "0,1"})
    assert (place.processes, place.index, place.hosts, place.local_devices) == (4, 1, 2, (1,))
    with pytest.raises(UserError, match=f"Open MPI started this process, but {COORDINATOR} is not set"):
        place_of(MPI)


def test_kubernetes():
    place = place_of(POD | {COORDINATOR: "run-workers-0-0.run:8476", COUNT: "2"})
    assert (place.launcher, place.processes, place.index) == ("Kubernetes", 2, 1)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({COUNT: "4", INDEX: "0"}, f"{COORDINATOR} is not set"),
        ({COORDINATOR: "a:1"}, f"{COUNT}, {INDEX} is not set"),
        (SETTINGS | {COUNT: "four"}, f"{COUNT}=four is not a whole number"),
        (SETTINGS | {INDEX: "-1"}, f"{INDEX}=-1 is not a whole number"),
        (SETTINGS | {INDEX: "4"}, f"{INDEX}=4 is not one of the 4 processes"),
        (SETTINGS | {COORDINATOR: "node1"}, f"{COORDINATOR}=node1 is not host:port"),
        (SETTINGS | {COORDINATOR: "node1:99999"}, "is not host:port"),
        (SLURM | {COORDINATOR: "localhost:5000"}, "is this host alone, where the job has 4"),
        (SLURM | {COORDINATOR: "127.0.1.1:5000"}, "is this host alone, where the job has 4"),
        (SLURM | {COORDINATOR: "[::1]:5000"}, "is this host alone, where the job has 4"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x is not a whole number"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "one"}, "SLURM_STEP_TASKS_PER_NODE='one' is not a list"),
        (SLURM | {"SLURM_NODEID": "7"}, "SLURM_NODEID=7"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_named(environment, sentence):
    with pytest.raises(UserError) as caught:
        place_of(environment)
    assert sentence in str(caught.value)
