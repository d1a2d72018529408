"""The committed slice: whole, clean, as its provenance says, and readable by name."""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import pytest

from maxllm.data.clean import clean_text, reason_to_drop
from maxllm.data.dedup import drop_duplicates
from maxllm.data.sources import SLICES, read_documents
from maxllm.data.tally import Tally

FOLDER = Path(str(resources.files("maxllm.data"))) / "slice"
COUNTS = {"shakespeare": 109, "austen": 61, "tang": 813}


def lines(name: str) -> list[str]:
    return (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]


def documents(source: str) -> list[str]:
    tally = Tally(source)
    found = list(read_documents(source, "text", tally))
    tally.check(max_bad_share=0.0)
    return found


@pytest.mark.parametrize("name", SLICES)
def test_every_line_is_a_document_with_a_title(name):
    rows = [json.loads(line) for line in lines(name)]
    assert len(rows) == COUNTS[name]
    for row in rows:
        assert set(row) == {"text", "title"}
        assert row["title"].strip() and row["text"].strip() == row["text"] != ""


def test_the_size_is_one_to_two_megabytes():
    sizes = {name: (FOLDER / f"{name}.jsonl").stat().st_size for name in SLICES}
    assert 1_000_000 <= sum(sizes.values()) <= 2_000_000
    assert sizes["tang"] > 0.08 * sum(sizes.values())


def test_chinese_is_more_than_eight_percent_of_the_text():
    texts = "".join(documents("slice:all"))
    chinese = "".join(re.findall("[\u4e00-\u9fff]", texts))
    assert len(chinese.encode()) > 0.08 * len(texts.encode())


@pytest.mark.parametrize("name", SLICES)
def test_provenance_holds_the_sha256_and_the_counts(name):
    data = (FOLDER / f"{name}.jsonl").read_bytes()
    table = (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8")
    characters = sum(map(len, documents(f"slice:{name}")))
    digest = hashlib.sha256(data).hexdigest()
    row = f"| {name}.jsonl | {COUNTS[name]} | {characters} | {len(data)} | `{digest}` |"
    assert row in table.split("\n")


@pytest.mark.parametrize("name", SLICES)
def test_no_boilerplate_and_no_placeholders(name):
    text = "\n".join(lines(name))
    for phrase in ("gutenberg", "ebook", "etext", "copyright", "www.", "http", "public domain"):
        assert phrase not in text.lower(), phrase
    assert not re.search("[\ue000-\uf8ff\ufffd□○]", text)


def test_the_slice_passes_its_own_cleaner_nearly_whole():
    texts = documents("slice:all")
    tally = Tally("slice:all", rows=len(texts))
    for text in drop_duplicates(texts, tally):
        assert clean_text(text) == text
        if reason := reason_to_drop(text, min_chars=20, max_symbol_share=0.5, max_repeated_line_share=0.3):
            tally.drop(reason)
    assert tally.kept >= 0.99 * tally.rows, tally.dropped


def test_all_is_the_three_in_fixed_order():
    assert documents("slice:all") == [text for name in SLICES for text in documents(f"slice:{name}")]
    tally = Tally("slice:tang")
    assert len(list(read_documents("slice:tang", "content", tally))) == 813  # its field is `text`, always


def test_well_known_lines_are_where_they_belong():
    titles = {row["title"]: row["text"] for name in SLICES for row in map(json.loads, lines(name))}
    hamlet = titles["Hamlet, Act III, Scene I"]
    assert hamlet.startswith("HAMLET\n\nACT III\n\nScene I. A room in the Castle.\n\n")
    assert "\nHam.\nTo be, or not to be,--that is the question:--\n" in hamlet
    first = titles["Pride and Prejudice, Chapter 1"]
    assert first.startswith(
        "Chapter 1\n\nIt is a truth universally acknowledged, that a single man in possession of"
    )
    assert (
        titles["登鹳雀楼（王之涣）"]
        == "登鹳雀楼\n王之涣\n\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    )


def test_prose_is_unwrapped_and_verse_is_not():
    austen = [line for text in documents("slice:austen") for line in text.split("\n") if line]
    verse = [line for text in documents("slice:shakespeare") for line in text.split("\n") if line]
    assert sum(map(len, austen)) / len(austen) > 200
    assert max(map(len, verse)) < 100
