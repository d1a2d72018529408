"""Preparing a corpus: what is written, what is counted, what is held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from maxllm import recipe
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.tokenizer import BOS, EOS
from maxllm.errors import UserError
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
    rows = prepare.read_rows(tmp_path / "corpus", "train")
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
    rows = prepare.read_rows(tmp_path / "corpus", "train")
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(rows.tokens_BT), len(opening), axis=1)
    assert not np.any(np.all(windows == opening, axis=-1))


def test_what_a_kill_left_behind_is_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".corpus.partial" / "train").mkdir(parents=True)
    (tmp_path / ".corpus.partial" / "train" / "tokens_BT.npy").write_bytes(b"half")
    manifest = prepare.run(config(tmp_path, source))
    assert len(prepare.read_rows(tmp_path / "corpus", "train").tokens_BT) == manifest["train"]["rows"]


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
