"""What clouds call a recipe's machine, and manifests against the published schemas."""

import json

import pytest
import yaml

from maxllm.cli import main
from maxllm.parallel.discovery import place_of
from maxllm.plan.clouds import Machine
from maxllm.plan.hardware import hardware_of

TPU, GPU = "pretrain/llama2-7b_synthetic_v5p-16", "pretrain/llama3-8b_synthetic_h100x8"


@pytest.mark.parametrize(
    ("name", "hosts", "chips", "tpu_type", "topology", "gke"),
    [
        ("v4-8", 1, 4, "v4-8", "2x2x1", "tpu-v4-podslice"),
        ("v4-32", 4, 4, "v4-32", "2x2x4", "tpu-v4-podslice"),
        ("v5e-4", 1, 4, "v5litepod-4", "2x2", "tpu-v5-lite-podslice"),
        ("v5e-8", 1, 8, "v5litepod-8", "2x4", "tpu-v5-lite-podslice"),
        ("v5e-256", 64, 4, "v5litepod-256", "16x16", "tpu-v5-lite-podslice"),
        ("v5p-16", 2, 4, "v5p-16", "2x2x2", "tpu-v5p-slice"),
        ("2xv5p-16", 4, 4, "v5p-16", "2x2x2", "tpu-v5p-slice"),
        ("v6e-8", 1, 8, "v6e-8", "2x4", "tpu-v6e-slice"),
        ("v6e-16", 4, 4, "v6e-16", "4x4", "tpu-v6e-slice"),
        ("tpu7x:4x4x4", 16, 4, "tpu7x-128", "4x4x4", "tpu7x"),
        ("h100x4", 1, 4, None, None, "nvidia-h100-80gb"),
        ("h100x64", 8, 8, None, None, "nvidia-h100-80gb"),
        ("h200x8", 1, 8, None, None, "nvidia-h200-141gb"),
    ],
)
def test_names_and_hosts(name, hosts, chips, tpu_type, topology, gke):
    """As Google's pages on each generation say."""
    facts = Machine(hardware_of(name)).facts()
    assert (facts["hosts"], facts["chips_per_host"], facts["tpu_type"]) == (hosts, chips, tpu_type)
    assert (facts["topology"], facts["gke_accelerator"]) == (topology, gke)
    assert facts["hosts"] * facts["chips_per_host"] == hardware_of(name).chips


@pytest.fixture
def manifest(capsys):
    """manifest(kind, recipe, *words): exit code, documents, stderr."""

    def run(kind, recipe, *words):
        code = main(["manifest", kind, "pretrain", recipe, "--name=seven", *words])
        said = capsys.readouterr()
        return code, list(yaml.safe_load_all(said.out)), said.err

    return run


@pytest.mark.parametrize("words", [(), ("--bucket=b", "--service-account=a", "--spot")])
@pytest.mark.parametrize("hardware", ["v5p-16", "2xv6e-16", "h100x16"])
def test_a_jobset_is_as_its_schema_says(manifest, hardware, words):
    """Models made of the schemas read it, and have all its fields: none is misspelled or in another place."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    code, documents, _ = manifest("jobset", GPU, "--image=i", f"--hardware={hardware}", *words)
    config_map, jobset = documents
    assert code == 0
    read = models.JobsetV1alpha2JobSet.from_dict(jobset)
    assert read is not None and read.to_dict() == jobset
    assert config_map["kind"] == "ConfigMap" and list(config_map["data"]) == ["recipe.yaml"]
    job = jobset["spec"]["replicatedJobs"][0]
    assert (job["replicas"], job["template"]["spec"]["completions"]) == {
        "v5p-16": (1, 2),
        "2xv6e-16": (2, 4),
        "h100x16": (1, 2),
    }[hardware]


def test_a_pod_finds_the_others_and_its_recipe(manifest, tmp_path):
    """With what Kubernetes adds to a pod of an indexed Job."""
    _, (config_map, jobset), _ = manifest("jobset", GPU, "--image=i", "--hardware=h100x16", "run.seed=7")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    added = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    place = place_of(environment | added)
    assert (place.processes, place.index, place.hosts) == (2, 1, 2)
    assert place.coordinator == "seven-workers-0-0.seven:61500"
    assert container["command"] == ["maxllm", "pretrain", "/etc/maxllm/recipe.yaml"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    recipe = yaml.safe_load(config_map["data"]["recipe.yaml"])
    assert recipe["run"]["seed"] == 7 and recipe["run"]["hardware"] == "h100x16"
    copied = tmp_path / "recipe.yaml"
    copied.write_text(config_map["data"]["recipe.yaml"])
    assert main(["pretrain", str(copied), "--print-config"]) == 0  # the recipe is whole


def test_what_a_restart_does_not_mend_ends_a_jobset(manifest):
    _, (_, jobset), _ = manifest("jobset", TPU, "--image=i", "--restarts=5")
    spec = jobset["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    [rule] = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2, 3]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_skypilot_has_a_process_on_each_host(manifest):
    code, [task], _ = manifest("skypilot", GPU, "--hardware=h100x16", "--spot", "run.dir=a b")
    assert code == 0 and task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"] is True
    assert task["run"].splitlines()[-1].endswith(f"pretrain {GPU} 'run.dir=a b' run.hardware=h100x16")
    _, [task], _ = manifest("skypilot", TPU)
    assert task["resources"]["accelerators"] == "tpu-v5p-16" and "MAXLLM_DISTRIBUTED=auto" in task["run"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("jobset", TPU), "give --image"),
        (("jobset", TPU, "--image=i", "--name=Seven"), "lower-case letters"),
        (("skypilot", TPU, "--hardware=2xv5p-16"), "SkyPilot starts no 2xv5p-16"),
        (("jobset", TPU, "--image=i", "--hardware=v9"), "v9 is not known"),
        (("jobset", "pretrain/tiny_slice_cpu", "--image=i"), "names no machine"),
        (("jobset", "sft/tiny_tasks_cpu", "--image=i"), "recipe for the stage sft"),
    ],
)
def test_wrong_words_are_one_sentence(manifest, words, says):
    code, documents, error = manifest(*words)
    assert code == 2 and documents == [] and says in error and len(error.splitlines()) == 1


def test_machine_as_json(capsys):
    assert main(["machine", TPU, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hosts"] == 2
