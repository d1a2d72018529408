"""Manifest: write out a recipe's job for a cluster: Kubernetes' JobSet, or SkyPilot.

maxllm manifest jobset   pretrain pretrain/llama2-7b_synthetic_v5p-16 --image IMAGE --bucket BUCKET
maxllm manifest skypilot pretrain pretrain/llama3-8b_synthetic_h100x8

launch/gke.sh and launch/skypilot.sh apply them. A JobSet carries its recipe, overrides included, in a
ConfigMap; SkyPilot carries the folder that maxllm is in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.parallel.discovery import AUTO, COORDINATOR, COUNT, INDEX
from maxllm.plan.clouds import Machine
from maxllm.stages.machine import machine_of

PORT = 61_500
"""Of the coordinator, in a pod that has all ports to itself."""

RECIPE_FOLDER = "/etc/maxllm"
"""Where a pod finds its recipe."""

GRACE_SECONDS = 120
"""A pod that is evicted has so long to save."""

FINAL_CODES = (1, 2, 3)
"""Exit codes that a restart does not mend; after any other the JobSet starts again."""

CHECKOUT = "~/sky_workdir"
"""Where SkyPilot puts the folder that it was started in."""


@dataclass(frozen=True)
class Job:
    """What is to run, and where."""

    words: tuple[str, ...]
    """VERB RECIPE key=value …"""
    config: Config
    """What the words say."""
    name: str
    restarts: int
    spot: bool
    image: str | None = None
    """Container image with maxllm (JobSet)."""
    bucket: str | None = None
    """Google Cloud Storage bucket that is mounted at /data (JobSet)."""
    service_account: str | None = None
    """Kubernetes' account of the pods, which may read and write the bucket (JobSet)."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(f"--name {self.name}: lower-case letters, digits and dashes, at most 40 of them")

    @property
    def machine(self) -> Machine:
        """The recipe's machine."""
        return machine_of(self.config)


def run(kind: str, job: Job) -> str:
    """A manifest as YAML: of a JobSet or of SkyPilot.

    Raises:
      UserError: what the kind needs is missing, or it has no such machine.
    """
    return as_yaml(jobset(job) if kind == "jobset" else skypilot(job))


class Readable(yaml.SafeDumper):
    """YAML in which a text of several lines stands as it is."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A string; of several lines, as a literal block."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Readable.add_representer(str, Readable.represent_text)


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """Manifests as one YAML file."""
    return yaml.dump_all(documents, Dumper=Readable, sort_keys=False, allow_unicode=True)


# --- Kubernetes --------------------------------------------------------------------------------------------


def jobset(job: Job) -> list[dict[str, Any]]:
    """A ConfigMap with the recipe, and a JobSet with one pod on each host, one job for each slice.

    Raises:
      UserError: no image was named.
    """
    if job.image is None:
        raise UserError("a JobSet needs a container image: give --image (launch/Dockerfile builds one)")
    labels = {"app.kubernetes.io/name": "maxllm", "app.kubernetes.io/instance": job.name}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name, "labels": labels},
        "data": {"recipe.yaml": recipe.dump(job.config)},
    }
    hosts = job.machine.hosts_per_slice
    worker = {
        "name": "workers",
        "replicas": job.machine.hardware.slices,
        "template": {
            "spec": {
                "parallelism": hosts,
                "completions": hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podFailurePolicy": {
                    "rules": [
                        {
                            "action": "FailJob",
                            "onExitCodes": {
                                "containerName": "maxllm",
                                "operator": "In",
                                "values": list(FINAL_CODES),
                            },
                        }
                    ]
                },
                "template": pod(job, labels),
            }
        },
    }
    annotations = {}
    if job.machine.is_tpu:
        # A slice is a node pool, and has one job alone.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    spec = {
        "failurePolicy": {
            "maxRestarts": job.restarts,
            "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [worker],
    }
    metadata = {"name": job.name, "labels": labels} | ({"annotations": annotations} if annotations else {})
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return [config_map, kind | {"metadata": metadata, "spec": spec}]


def pod(job: Job, labels: Mapping[str, str]) -> dict[str, Any]:
    """The template of a JobSet's pods: one process, with all the accelerators of its host."""
    machine = job.machine
    kind = "google.com/tpu" if machine.is_tpu else "nvidia.com/gpu"
    selector = {"cloud.google.com/gke-accelerator": machine.names.gke}
    if machine.is_tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": machine.names.gke,
            "cloud.google.com/gke-tpu-topology": str(machine.topology),
        }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    mounts = [{"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True}]
    volumes: list[dict[str, Any]] = [{"name": "recipe", "configMap": {"name": job.name}}]
    annotations = {}
    if not machine.is_tpu:  # NCCL's shared memory; a container's own is 64 MB
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if job.bucket is not None:
        annotations["gke-gcsfuse/volumes"] = "true"
        mounts.append({"name": "data", "mountPath": "/data"})
        fuse = {"bucketName": job.bucket, "mountOptions": "implicit-dirs"}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": fuse}
        volumes.append({"name": "data", "csi": driver})
    container = {
        "name": "maxllm",
        "image": job.image,
        "command": ["maxllm", job.words[0], f"{RECIPE_FOLDER}/recipe.yaml"],
        "workingDir": "/data" if job.bucket is not None else "/tmp",
        "env": [{"name": name, "value": value} for name, value in environment(job).items()],
        # Of TPUs: the runtime's, its metrics', and between slices.
        "ports": [
            {"containerPort": port, "protocol": "TCP"}
            for port in ((8471, 8431, 8080) if machine.is_tpu else (PORT,))
        ],
        "resources": {"limits": {kind: machine.chips_per_host}},
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "tolerations": [{"key": kind, "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    }
    if job.service_account is not None:
        spec["serviceAccountName"] = job.service_account
    metadata: dict[str, Any] = {"labels": dict(labels)}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def environment(job: Job) -> dict[str, str]:
    """How a pod's process finds the others: TPUs by variables that GKE sets and JAX asks, GPUs by ours."""
    unbuffered = {"PYTHONUNBUFFERED": "1"}
    if job.machine.is_tpu:
        return unbuffered | {AUTO: "auto"}
    # JobSet's headless service gives each pod the name JOBSET-REPLICATEDJOB-REPLICA-INDEX.JOBSET.
    coordinator = f"{job.name}-workers-0-0.{job.name}:{PORT}"
    return unbuffered | {COORDINATOR: coordinator, COUNT: str(job.machine.hosts)}


# --- SkyPilot ----------------------------------------------------------------------------------------------


def skypilot(job: Job) -> list[dict[str, Any]]:
    """A SkyPilot task: this folder on every host, installed, and one process on each.

    Raises:
      UserError: the machine is several TPU slices, which SkyPilot does not start as one.
    """
    machine = job.machine
    if machine.hardware.slices > 1:
        raise UserError(f"SkyPilot starts no {machine.hardware.name}: one slice, or GPUs")
    if machine.is_tpu:
        # A slice is one node, on whose hosts SkyPilot runs the same.
        accelerators, extra, nodes = f"tpu-{machine.tpu_type}", "tpu", 1
        place = [f"export {AUTO}=auto"]
    else:
        accelerators, extra = f"{machine.names.sky}:{machine.chips_per_host}", "cuda"
        nodes = machine.hosts
        place = [
            f'export {COORDINATOR}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
            f'export {COUNT}="$SKYPILOT_NUM_NODES" {INDEX}="$SKYPILOT_NODE_RANK"',
        ]
    resources: dict[str, Any] = {"accelerators": accelerators, "use_spot": job.spot}
    if machine.is_tpu:
        resources["accelerator_args"] = {"runtime_version": machine.names.runtime}
    # After 75 a managed job starts again, as after a preemption.
    resources["job_recovery"] = {"recover_on_exit_codes": [75]}
    return [
        {
            "name": job.name,
            "workdir": str(Path(recipe.__file__).parents[1]),
            "num_nodes": nodes,
            "resources": resources,
            "setup": f"cd {CHECKOUT} && launch/worker.sh install {extra}\n",
            "run": "\n".join([f"cd {CHECKOUT}", *place, f"exec .venv/bin/maxllm {shlex.join(job.words)}"])
            + "\n",
        }
    ]
