"""Runs whose folder and data lie in a bucket, against emulators: whole commands, each in its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from storage.emulators import BUCKET, KINDS, REFUSALS, SECRET, clean_environment, emulator

pytestmark = pytest.mark.storage

SMALL = (
    *("run.steps=12", "run.checkpoint_every=4", "run.eval_every=6", "run.log_every=2", "model.n_layers=1"),
    *("model.d_model=32", "model.d_ff=48", "model.scan_unroll=1", "batch.rows=2", "batch.sequence_length=64"),
    *("optimizer.warmup_steps=2", "tokenizer.vocab_size=512", "model.vocab_size=512"),
    *("data.sources=[slice:shakespeare]", "tokenizer.algorithm=bpe"),
)

TEXTS = (".yaml", ".json", ".jsonl")

SHOWN = """
import sys
from maxllm.folder import RunFolder
from maxllm.run.hashes import content_hash
folder = RunFolder(sys.argv[1])
step = folder.latest_step()
items = [content_hash(folder.checkpoint(step) / item) for item in ("params", "rest")] if step else []
timed = ("seconds", "steps_per_second", "tokens_per_second", "data_seconds", "mfu")
records = [{k: v for k, v in record.items() if k not in timed} for record in folder.records()]
print(folder.steps(), items, records, bool(folder.summary()))
"""


class Place:
    """A bucket and a folder of this disk for one kind of storage."""

    def __init__(self, kind, gate, local):
        self.kind, self.gate, self.local = kind, gate, local
        self.url = f"{kind}://{BUCKET}"
        self.environment = clean_environment() | gate.environment() | {"XDG_CACHE_HOME": str(local / "cache")}

    def command(self, verb, folder, *words):
        data = (f"tokenizer.path={self.local}/tokenizer.model", f"data.prepared_dir={self.local}/corpus")
        recipe = "configs/pretrain/tiny_slice_cpu.yaml"
        line = [sys.executable, "-m", "maxllm.cli", verb, recipe]
        return [*line, *SMALL, *data, f"run.dir={folder}", *words]

    def start(self, verb, folder, *words):
        return subprocess.Popen(
            self.command(verb, folder, *words),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb, folder, *words, environment=None):
        return subprocess.run(
            self.command(verb, folder, *words),
            env=environment or self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def shown(self, folder):
        """Steps, hashes of the newest checkpoint, records without times, and whether the run is complete."""
        line = [sys.executable, "-c", SHOWN, str(folder)]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, check=True).stdout

    def files(self, prefix):
        """Names of the objects below a folder."""
        with self.client() as fs:
            return fs.find(f"{self.url}/{prefix}")

    def text(self, name):
        """What an object says."""
        with self.client() as fs:
            return fs.cat_file(name).decode()

    @contextmanager
    def client(self):
        """fsspec's, with the environment of the emulator."""
        import fsspec

        ours = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield fsspec.filesystem(self.kind, use_listings_cache=False)
        finally:
            os.environ.clear()
            os.environ.update(ours)


@pytest.fixture(scope="module", params=KINDS)
def at(request, tmp_path_factory):
    """A place, with a corpus and a tokenizer on this disk."""
    local = tmp_path_factory.mktemp(request.param)
    with emulator(request.param, local) as gate:
        place = Place(request.param, gate, local)
        done = place.run("prepare", local / "run")
        assert done.returncode == 0, done.stderr
        yield place


@pytest.fixture(scope="module")
def expected(at):
    """What a run on this disk comes to."""
    done = at.run("pretrain", at.local / "run")
    assert done.returncode == 0, done.stderr
    return at.shown(at.local / "run")


def test_a_run_killed_in_the_middle_of_a_save_continues_bit_for_bit(at, expected):
    process = at.start("pretrain", f"{at.url}/killed")
    prefix = f"{BUCKET}/killed/checkpoints/8/"
    while process.poll() is None:
        there = [name for name in at.files("killed") if name.startswith(prefix)]
        if len(there) > 6 and f"{prefix}commit_success.txt" not in there:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the save was over before it was seen"
    assert at.shown(f"{at.url}/killed").startswith("[4, 6] ")
    done = at.run("pretrain", f"{at.url}/killed")
    assert done.returncode == 0, done.stderr
    assert "watching whether that is alive" in done.stderr
    assert "continues from the checkpoint of step 6" in done.stderr
    assert at.shown(f"{at.url}/killed") == expected
    written = [at.text(name) for name in at.files("killed") if name.endswith(TEXTS)]
    assert len(written) > 3 and not any(SECRET in text for text in (done.stderr, done.stdout, *written))


def test_two_processes_do_not_train_in_one_folder(at):
    first = at.start("pretrain", f"{at.url}/two", "run.steps=100000")
    try:
        while f"{BUCKET}/two/config.yaml" not in at.files("two"):
            assert first.poll() is None
            time.sleep(0.1)
        second = at.run("pretrain", f"{at.url}/two", "run.steps=100000")
        assert second.returncode == 2
        assert f"another process is training in {at.url}/two: process {first.pid} of " in second.stderr
    finally:
        first.kill()
        first.communicate()


def test_corpus_and_sources_in_the_bucket_give_the_same_run(at, expected):
    done = at.run("prepare", f"{at.url}/there", f"data.prepared_dir={at.url}/corpus")
    assert done.returncode == 0, done.stderr
    assert not list((at.local / "cache" / "maxllm" / "prepared").iterdir())
    done = at.run("pretrain", f"{at.url}/there", f"data.prepared_dir={at.url}/corpus")
    assert done.returncode == 0, done.stderr
    assert at.shown(f"{at.url}/there") == expected


def test_a_bit_that_changed_in_the_bucket_is_noticed_and_passed_over_by_choice(at, expected):
    folder = f"{at.url}/damaged"
    done = at.run("pretrain", folder)
    assert done.returncode == 0, done.stderr
    with at.client() as fs:
        fs.rm_file(f"{BUCKET}/damaged/summary.json")
        sizes = fs.find(f"{folder}/checkpoints/12/params", detail=True)
        largest = max(sizes, key=lambda name: sizes[name]["size"])
        content = bytearray(fs.cat_file(largest))
        content[len(content) // 2] ^= 1
        fs.pipe_file(largest, bytes(content))
    done = at.run("pretrain", folder)
    assert done.returncode == 1, done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("maxllm: ")]
    assert "is not as it was written" in sentence and "run.fall_back=true continues from step" in sentence
    done = at.run("pretrain", folder, "run.fall_back=true")
    assert done.returncode == 0, done.stderr
    assert "it is set aside, and the run continues from step" in done.stderr
    assert at.shown(folder) == expected


@pytest.mark.parametrize("trouble", ["missing", "expired", "forbidden"])
def test_credentials_that_do_not_serve_are_one_sentence_and_nothing_begins(at, trouble):
    folder, environment = f"{at.url}/refused", dict(at.environment)
    if at.kind == "s3" and trouble == "missing":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del environment[name]
    else:
        at.gate.refusal = trouble
    try:
        done = at.run("pretrain", folder, environment=environment)
    finally:
        at.gate.refusal = None
    assert done.returncode == 2, done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("maxllm: ")]
    assert "cannot be reached" in sentence and "objects there" in sentence
    told = {"missing": "no credentials", "expired": "have expired", "forbidden": "lacks the permission"}
    assert told[trouble] in sentence
    assert not at.files("refused")


@pytest.mark.parametrize("trouble", ["expired", "forbidden"])
def test_credentials_lost_in_the_middle_end_the_run_and_the_same_command_continues(at, expected, trouble):
    assert (at.kind, trouble) in REFUSALS
    folder = f"{at.url}/lost-{trouble}"
    at.gate.refuse_writes_of, at.gate.refusal = "checkpoints/8", trouble
    try:
        done = at.run("pretrain", folder)
    finally:
        at.gate.refuse_writes_of, at.gate.refusal = "", None
    assert done.returncode == 1, done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("maxllm: ")]
    assert "a checkpoint cannot be written to" in sentence and "the same command continues" in sentence
    assert at.shown(folder).startswith("[4, 6] ")
    done = at.run("pretrain", folder)
    assert done.returncode == 0, done.stderr
    assert at.shown(folder) == expected


def test_a_corpus_that_cannot_be_copied_stays_here_and_is_copied_the_next_time(at):
    shutil.rmtree(at.local / "cache" / "maxllm" / "prepared", ignore_errors=True)
    words = (f"data.prepared_dir={at.url}/copied",)
    at.gate.refuse_writes_of, at.gate.refusal = "copied", "forbidden"
    try:
        done = at.run("prepare", at.local / "run", *words)
    finally:
        at.gate.refuse_writes_of, at.gate.refusal = "", None
    assert done.returncode == 1 and "is prepared but could not be copied" in done.stderr
    done = at.run("prepare", at.local / "run", *words)
    assert done.returncode == 0 and "is prepared already" in done.stderr + done.stdout
    assert f"{BUCKET}/copied/manifest.json" in at.files("copied")


def road(at, folder):
    """Every stage after pretraining in a folder, from the run there: what each came to, and what is read."""
    small = (
        *("run.steps=4", "run.checkpoint_every=2", "run.eval_every=2", "batch.rows=8"),
        *("batch.sequence_length=160", "optimizer.warmup_steps=0", "data.heldout_sources=[tasks:heldout:16]"),
    )

    def run(verb, *words):
        line = [sys.executable, "-m", "maxllm.cli", verb, *words]
        done = subprocess.run(line, env=at.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = {}
    parents = {"sft": "pretrain", "reward": "sft", "dpo": "sft", "ppo": "sft"}
    for stage, parent in parents.items():
        start = (f"start.policy={folder}/{parent}", f"run.dir={folder}/{stage}")
        start += (f"start.reward={folder}/reward",) if stage == "ppo" else ()
        run(stage, f"configs/{stage}/tiny_tasks_cpu_fast.yaml", *small, *start)
        shown[stage] = at.shown(f"{folder}/{stage}")
        evaluated = json.loads(run("evaluate", f"{folder}/{stage}", "--json"))
        shown[f"evaluate {stage}"] = {name: value for name, value in evaluated.items() if name != "run"}
    prompt = ("--prompt", "What is the last digit?\n47", "generation.temperature=0", "--json")
    return shown | {"generate": json.loads(run("generate", f"{folder}/ppo", *prompt))}


def test_every_stage_in_the_bucket_comes_to_what_it_does_here(at):
    """SFT, reward model, DPO and PPO start from runs in the bucket and write theirs there, evaluate and
    generate read them: bit for bit as on this disk."""
    for folder in (at.url, at.local):
        done = at.run("pretrain", f"{folder}/pretrain")
        assert done.returncode == 0, done.stderr
    assert road(at, at.url) == road(at, at.local)
