"""Which host of a Cloud TPU this is: GKE's variables, and a metadata server that stands in for Google's."""

import pytest
from metadata_server import metadata_server

from maxllm.errors import RunFailed, UserError
from maxllm.parallel import cloud_tpu
from maxllm.parallel.cloud_tpu import METADATA, Worker, worker_of
from maxllm.parallel.discovery import AUTO, place_of

GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "job-0-0.job,job-0-1.job"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}


@pytest.fixture
def metadata():
    """A TPU VM's attributes, as its metadata server tells them, and the variable with that one's address."""
    with metadata_server() as (answers, address):
        answers |= {
            "attributes/agent-worker-number": "1",
            "attributes/worker-network-endpoints": "a:b:127.0.0.4,a:b:127.0.0.5",
            "attributes/tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nWORKER_ID: '1'\n",
        }
        yield answers, {METADATA: address}


def test_gke_one_slice_and_several():
    place = place_of({AUTO: "auto"} | GKE)
    assert (place.launcher, place.coordinator) == ("Cloud TPU", "job-0-0.job:8482")
    assert (place.processes, place.index, place.hosts) == (2, 1, 2)
    place = place_of({AUTO: "auto"} | GKE | SLICES)
    assert (place.coordinator, place.processes, place.index) == ("job-0-0.job:8482", 6, 5)
    alone = place_of({AUTO: "auto", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert (alone.processes, alone.index) == (1, 0)


def in_lines(settings):
    return "\n".join(f"{name}: '{value}'" for name, value in settings.items())


def test_a_tpu_vm_by_its_metadata(metadata):
    """Both forms of worker-network-endpoints, and slices in tpu-env."""
    answers, address = metadata
    assert worker_of(address) == Worker("127.0.0.4:8482", 2, 1)
    answers["attributes/worker-network-endpoints"] = "t1v-n-a-w-0,t1v-n-a-w-1"
    assert worker_of(address) == Worker("t1v-n-a-w-0:8482", 2, 1)
    answers["attributes/tpu-env"] += in_lines(SLICES)
    assert worker_of(address) == Worker("job-0-0.job:8482", 6, 5)
    assert worker_of(address | {"MEGASCALE_SLICE_ID": "1"}).index == 3, "a variable wins"


def test_jax_reads_the_same(metadata, monkeypatch):
    """JAX's own reader of the same machine: process, number and address are what it says."""
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    answers, address = metadata
    slices = SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.3:8080"}
    for settings in ({}, slices):
        answers["attributes/tpu-env"] = in_lines(settings)
        monkeypatch.setenv(METADATA, address[METADATA])
        coordinator = GceTpuCluster.get_coordinator_address(1, None)
        seen = coordinator, GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()
        assert worker_of(address) == Worker(*seen)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2, of 2 that are counted from 0"),
        ({"TPU_WORKER_ID": "one"}, "TPU_WORKER_ID is 'one', where a whole number"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_COORDINATOR_ADDRESS is not set"),
        ({"MEGASCALE_NUM_SLICES": "0"}, "MEGASCALE_NUM_SLICES is 0, where 1 or more"),
        (SLICES | {"MEGASCALE_SLICE_ID": "3"}, "MEGASCALE_SLICE_ID is 3, of 3"),
        ({"TPU_WORKER_HOSTNAMES": "localhost,other"}, "is this host alone, where the job has 2"),
        ({AUTO: "yes"}, "MAXLLM_DISTRIBUTED=yes, where `auto` is all"),
    ],
)
def test_what_cannot_be(changes, why):
    with pytest.raises(UserError, match=why):
        place_of({AUTO: "auto"} | GKE | changes)


def test_no_tpu_and_no_server(metadata, monkeypatch):
    answers, address = metadata
    answers.clear()
    with pytest.raises(UserError, match="this is none: neither TPU_WORKER_HOSTNAMES"):
        worker_of(address)
    monkeypatch.setattr(cloud_tpu, "PAUSE_SECONDS", 0)
    with pytest.raises(RunFailed, match=r"asks 127.0.0.1:1 .* does not answer: .*refused"):
        worker_of({METADATA: "127.0.0.1:1"})
