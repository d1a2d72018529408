"""Which host of which Cloud TPU slice this is, asked of the machine itself.

    GKE         TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, which GKE's webhook sets in a pod
    TPU VM      agent-worker-number and worker-network-endpoints of the machine's metadata server
    slices      MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES and _SLICE_ID, of either: variables or tpu-env

JAX reads the same (jax/_src/clusters/cloud_tpu_cluster.py). Here supervisors have it before JAX begins, so
that they meet, and know which process is on which host.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maxllm.errors import RunFailed, UserError

PORT = 8482
"""Where JAX's own coordinator listens on a TPU; that of the slices' transport, 8080, is another."""

METADATA, METADATA_HOST = "GCE_METADATA_IP", "metadata.google.internal"
"""Where the metadata server is, and JAX's variable for another address."""

TRIES, TRY_SECONDS, PAUSE_SECONDS = 6, 10.0, 0.5


@dataclass(frozen=True)
class Worker:
    """A host among those of all slices, with one process on each."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    index: int


Ask = Callable[[str], str | None]
"""The text of an attribute of this machine; None where there is none."""


def worker_of(environment: Mapping[str, str], ask: Ask | None = None) -> Worker:
    """This host's number among those of its slices.

    Args:
      environment: the variables of this process.
      ask: the metadata server; by default, the machine's.

    Raises:
      UserError: this is no host of a Cloud TPU, or it does not say enough.
      RunFailed: the metadata server does not answer.
    """
    ask = ask or metadata_server(environment.get(METADATA, METADATA_HOST))
    names = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if names is not None:
        number, said_by = environment.get("TPU_WORKER_ID"), "TPU_WORKER_ID"
        settings: Mapping[str, str] = environment
    else:
        names, number = ask("worker-network-endpoints"), ask("agent-worker-number")
        said_by = "agent-worker-number of the metadata server"
        settings = tpu_env(ask("tpu-env") or "") | dict(environment)
    if names is None:
        raise UserError(
            "MAXLLM_DISTRIBUTED=auto asks a Cloud TPU which of its hosts this is, and this is none: neither "
            "TPU_WORKER_HOSTNAMES nor worker-network-endpoints of a metadata server is there"
        )
    hosts = [address_of(name) for name in names.split(",")]
    worker = counted(number, said_by, len(hosts))
    slices = counted(settings.get("MEGASCALE_NUM_SLICES") or "1", "MEGASCALE_NUM_SLICES")
    own = counted(settings.get("MEGASCALE_SLICE_ID") or "0", "MEGASCALE_SLICE_ID", slices)
    first = settings.get("MEGASCALE_COORDINATOR_ADDRESS", "").rpartition("://")[2].partition(":")[0]
    if slices > 1 and not first:
        raise UserError(f"MEGASCALE_NUM_SLICES={slices}, but MEGASCALE_COORDINATOR_ADDRESS is not set")
    return Worker(f"{first or hosts[0]}:{PORT}", slices * len(hosts), own * len(hosts) + worker)


def address_of(endpoint: str) -> str:
    """A host of worker-network-endpoints: a name, or name:number:address; GKE's may have ports."""
    parts = endpoint.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def counted(value: str | None, name: str, below: int | None = None) -> int:
    """A number that the machine says.

    Raises:
      UserError: it says none, or one that cannot be.
    """
    if value is None or not value.strip().isdigit():
        raise UserError(f"{name} is {value!r}, where a whole number is expected")
    number = int(value)
    if below is not None and number >= below:
        raise UserError(f"{name} is {number}, of {below} that are counted from 0")
    if below is None and number < 1:
        raise UserError(f"{name} is {number}, where 1 or more is expected")
    return number


def tpu_env(text: str) -> dict[str, str]:
    """The settings of a TPU VM, lines such as MEGASCALE_NUM_SLICES: '2'."""
    rows = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip().strip("'") for name, colon, value in rows if colon}


def metadata_server(host: str) -> Ask:
    """Asks Google's metadata server for attributes of this machine, a few times where it does not answer."""

    def ask(attribute: str) -> str | None:
        why: Exception | None = None
        for number in range(TRIES):
            if number:
                time.sleep(PAUSE_SECONDS)
            try:
                return metadata(host, f"attributes/{attribute}", TRY_SECONDS)
            except OSError as error:  # no such host, or it does not answer
                why = error
        raise RunFailed(
            f"MAXLLM_DISTRIBUTED=auto asks {host} which host of a Cloud TPU this is, and it does not answer: "
            f"{why}"
        )

    return ask


def metadata(host: str, key: str, seconds: float) -> str | None:
    """What Google's metadata server says of this machine under a key; None where it has no such key.

    Raises:
      OSError: it does not answer within the seconds.
    """
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == http.client.NOT_FOUND:
            return None
        raise
