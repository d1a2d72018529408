"""Preparing a corpus: what is written, what is counted, what is held out."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxllm import recipe
from maxllm.config.data import TokenizerConfig
from maxllm.data import bpe
from maxllm.data.corpus import check_settings, read_rows
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.sources import read_documents
from maxllm.data.spool import Spool
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import BOS, EOS
from maxllm.errors import UserError
from maxllm.files import whole_folder
from maxllm.stages import prepare

CHAPTERS = Path(prepare.__file__).parents[1] / "data" / "slice" / "austen.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """200 paragraphs, one of them twice, one far too short."""
    lines = CHAPTERS.read_text(encoding="utf-8").splitlines()[:12]
    paragraphs = [text for line in lines for text in json.loads(line)["text"].split("\n\n")]
    paragraphs = list(dict.fromkeys(text for text in paragraphs if len(text) > 60))[:200]
    rows = [{"text": text} for text in [*paragraphs, paragraphs[3].upper(), "short"]]
    path = tmp_path / "paragraphs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder: Path, source: Path, *more: str):
    """The recipe on this source."""
    words = [
        f"data.sources=['{source}']",
        f"data.prepared_dir={folder / 'corpus'}",
        "batch.sequence_length=64",
    ]
    words += [
        f"tokenizer.path={folder / 'tokenizer.model'}",
        "tokenizer.vocab_size=800",
        "data.heldout_share=0.2",
    ]
    return recipe.load_recipe("pretrain/tiny_slice_cpu", [*words, *more])


def test_counts_and_rows(tmp_path: Path, source: Path) -> None:
    manifest = prepare.run(config(tmp_path, source))
    [counts] = manifest["sources"]
    assert counts["rows"] == 202 and counts["dropped"] == {"too short": 1, "duplicate": 1}
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 200
    assert 15 <= manifest["heldout"]["documents"] <= 65  # 40 expected, 4 standard errors
    rows = read_rows(tmp_path / "corpus", "train")
    assert rows.tokens_BT.shape == (manifest["train"]["rows"], 64)
    # every document begins once with <s>, and </s> is a target once for each
    assert int(np.sum(rows.tokens_BT == BOS)) == manifest["train"]["documents"]
    assert int(np.sum(rows.targets_BT == EOS)) == manifest["train"]["documents"]
    assert manifest["bits_per_byte_bigram"] < manifest["bits_per_byte_unigram"] < 8


def test_again_is_the_same_and_free(tmp_path: Path, source: Path) -> None:
    first = prepare.run(config(tmp_path, source))
    assert prepare.run(config(tmp_path, source)) == first
    other = tmp_path / "other"
    again = prepare.run(config(other, source))
    assert again["tokenizer_sha256"] == first["tokenizer_sha256"]
    for name in ("tokens_BT", "segment_ids_BT"):
        one, two = (np.load(folder / "corpus" / "train" / f"{name}.npy") for folder in (tmp_path, other))
        np.testing.assert_array_equal(one, two)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, source: Path) -> None:
    prepare.run(config(tmp_path, source))
    with pytest.raises(UserError, match=r"prepared with data.clean.min_chars=20, not 50"):
        prepare.run(config(tmp_path, source, "data.clean.min_chars=50"))


def test_heldout_sources_are_never_trained_on(tmp_path: Path, source: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(source.read_text().splitlines(keepends=True)[:50]), encoding="utf-8")
    manifest = prepare.run(config(tmp_path, source, f"data.heldout_sources=['{heldout}']"))
    assert manifest["heldout"]["documents"] == 50
    assert manifest["train"]["documents"] == 150
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    first = json.loads(heldout.read_text().splitlines()[0])["text"]
    opening = tokenizer.encode(first)[:20]
    rows = read_rows(tmp_path / "corpus", "train")
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(rows.tokens_BT), len(opening), axis=1)
    assert not np.any(np.all(windows == opening, axis=-1))


def test_what_a_kill_left_behind_is_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".corpus.partial" / "train").mkdir(parents=True)
    (tmp_path / ".corpus.partial" / "train" / "tokens_BT.npy").write_bytes(b"half")
    manifest = prepare.run(config(tmp_path, source))
    assert len(read_rows(tmp_path / "corpus", "train").tokens_BT) == manifest["train"]["rows"]


def test_a_folder_of_the_users_is_never_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not ours to replace"):
        prepare.run(config(tmp_path, source))
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["mine.txt"]


def test_a_corpus_prepared_from_other_data_is_refused(tmp_path: Path, source: Path) -> None:
    prepare.run(config(tmp_path, source))
    with pytest.raises(UserError, match=r"was prepared with data.heldout_share=.* not 0.3"):
        prepare.run(config(tmp_path, source, "data.heldout_share=0.3"))
    elsewhere = f"{tmp_path}/../{tmp_path.name}/corpus"  # the same place, spelled differently
    prepare.run(config(tmp_path, source, f"data.prepared_dir={elsewhere}"))


def edited(source: Path) -> None:
    """Another text of the same size."""
    text = source.read_text()
    assert " the " in text
    source.write_text(text.replace(" the ", " THE ", 1))


def test_an_edit_of_the_same_size_is_another_source(tmp_path: Path, source: Path) -> None:
    """Also where the file's time is put back: `prepare` reads it; training trusts sizes and times."""
    manifest = prepare.run(config(tmp_path, source))
    times = source.stat()
    edited(source)
    with pytest.raises(UserError, match=r"paragraphs\.jsonl has changed since .*corpus was prepared from it"):
        prepare.run(config(tmp_path, source))
    with pytest.raises(UserError, match="has changed since"):
        check_settings(config(tmp_path, source), tmp_path / "corpus", manifest, read=False)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="has changed since"):
        prepare.run(config(tmp_path, source))
    source.unlink()
    prepare.run(config(tmp_path, source))  # the corpus outlives its sources


def test_a_touched_file_is_the_same(tmp_path: Path, source: Path) -> None:
    manifest = prepare.run(config(tmp_path, source))
    os.utime(source)
    for read in (True, False):
        check_settings(config(tmp_path, source), tmp_path / "corpus", manifest, read)


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("tokenizer.algorithm=unigram", r"algorithm=bpe, the recipe has tokenizer\.algorithm=unigram"),
        ("tokenizer.algorithm=byte_bpe", r"algorithm=bpe, the recipe has tokenizer\.algorithm=byte_bpe"),
        ("tokenizer.character_coverage=0.9", "character_coverage=0.995, the recipe has .*=0.9"),
        ("tokenizer.vocab_size=900", "vocab_size=800, the recipe has .*=900"),
    ],
)
def test_a_tokenizer_of_another_kind_that_lies_there_is_refused(
    tmp_path: Path, source: Path, word: str, what: str
) -> None:
    prepare.run(config(tmp_path, source))
    other = f"data.prepared_dir={tmp_path / 'other'}"
    with pytest.raises(UserError, match=what):
        prepare.run(config(tmp_path, source, other, word))
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_is_trained_on_a_sample_spread_over_all(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "texts")
    for number in range(1000):
        spool.append(f"text {number:04d}")
    assert (len(spool), spool.bytes) == (1000, 9000)
    assert list(spool) == list(spool.sample(9000)) == list(spool.sample(10**6))
    some = list(spool.sample(900))
    assert 99 <= len(some) <= 100
    numbers = [int(text.split()[1]) for text in some]
    assert max(later - earlier for earlier, later in itertools.pairwise(numbers)) <= 11
    spool.close()
    assert not (tmp_path / "texts").exists()


def test_two_that_prepare_one_folder_do_not_mix(tmp_path: Path, source: Path) -> None:
    with (
        whole_folder(tmp_path / "corpus") as folder,
        pytest.raises(UserError, match=r"another process is writing .*corpus"),
    ):
        (folder / "mine").write_text("1")
        prepare.run(config(tmp_path, source))
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["mine"]
    assert not (tmp_path / ".corpus.lock").exists()


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="exists and is not ours to replace"),
        whole_folder(tmp_path / "corpus") as folder,
    ):
        (folder / "ours").write_text("1")
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "theirs").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert (tmp_path / "corpus" / "theirs").read_text() == "2"


MEASURED = """
import re, sys, threading
from maxllm import recipe
from maxllm.stages import prepare

def own_memory():
    with open("/proc/self/status") as status:
        return int(re.search("RssAnon: *([0-9]+)", status.read().replace("\t", " "))[1]) * 1024

peak, over = 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, own_memory())

watcher = threading.Thread(target=watch)
watcher.start()
prepare.run(recipe.load_recipe("pretrain/tiny_slice_cpu", sys.argv[1:]))
over.set()
watcher.join()
print(peak)
"""
"""Prints the most memory of its own that `prepare` has, without pages of mapped files: the system may take
these back at any time, and counts them as the process's as long as it does not."""


def test_memory_does_not_grow_with_the_text(tmp_path: Path, source: Path) -> None:
    """Rows go to the disk as they are made: 8 MB more of text take less than three times as much memory more.
    The tokenizer is there: what training it takes, tokenizer.sample_bytes bounds."""
    prepare.run(config(tmp_path, source))
    words = re.findall(r"\w+", source.read_text())
    rng, peaks = random.Random(0), []
    for megabytes in (1, 9):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as stream:
            while stream.tell() < megabytes * 10**6:
                stream.write(json.dumps({"text": " ".join(rng.choices(words, k=300))}) + "\n")
        arguments = [f"data.sources=['{path}']", f"data.prepared_dir={tmp_path / str(megabytes)}"]
        arguments += [f"tokenizer.path={tmp_path / 'tokenizer.model'}", "tokenizer.vocab_size=800"]
        command = [sys.executable, "-c", MEASURED, *arguments]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(result.stdout))
    assert peaks[1] - peaks[0] < 3 * 8 * 10**6


@pytest.mark.parametrize(("settings", "begins"), [({}, False), ({"add_bos_token": True}, True)])
def test_the_tokenizers_own_rule_decides_whether_documents_begin_with_bos(settings, begins):
    """An imported tokenizer that names a bos_token, and says in one case only that texts begin with it."""
    asked = TokenizerConfig(path="unused", vocab_size=512, algorithm="byte_bpe")
    ours = bpe.train(read_documents("slice:tang", "text", Tally("slice:tang")), asked)
    named = {"chat_template": "{{ x }}", "pad_token": "<fill>"}
    foreign = bpe.FastTokenizer(
        ours.json_bytes.replace(b'"<pad>"', b'"<fill>"'), dict(ours.config) | named | settings
    )
    [piece] = prepare.pieces_of(foreign, ["to be"], 64)
    assert (piece.ids[0] == foreign.bos) == begins and piece.ids[-1] == foreign.eos
    assert foreign.decode(piece.ids) == "to be"
