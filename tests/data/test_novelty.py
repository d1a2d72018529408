"""ROUGE-L against published values and against its formula; what counts as a word; what counts as new."""

from __future__ import annotations

import random

import pytest

from maxllm.data.novelty import Novelty, units


def rouge_l(a: list[str], b: list[str]) -> float:
    """The F-measure by its definition, with the subsequence by dynamic programming."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b, start=1):
            row[j] = before[j - 1] + 1 if x == y else max(before[j], row[j - 1])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(a), row[-1] / len(b)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("reference", "candidate", "score"),
    [
        # Lin 2004, section 3.1: the sentences, whose ROUGE-L with beta 1 is 3/4 and 2/4.
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("police killed the gunman", "the gunman kill police", 0.5),
        # What the package rouge-score 0.1.2 gives without its stemmer.
        (
            "The quick brown fox jumps over the lazy dog",
            "the quick brown dog jumps on the log.",
            0.5882352941176471,
        ),
        ("testing one two", "testing", 0.5),
        ("a b c", "d e", 0.0),
        ("写一首关于春天的诗", "写一首关于秋天的诗", 8 / 9),
    ],
)
def test_published_values(reference: str, candidate: str, score: float) -> None:
    found = Novelty(1e-9)
    found.add(reference)
    assert found.likeness(candidate) == pytest.approx(score, abs=1e-12)


def test_any_two_texts_as_the_formula_says() -> None:
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "写", "诗", "12"]
    for _ in range(300):
        a, b = (" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(2))
        found = Novelty(1e-9)
        found.add(a)
        assert found.likeness(b) == pytest.approx(rouge_l(units(a), units(b)), abs=1e-12)


def test_words_of_many_scripts() -> None:
    assert units("Don't STOP, café_x 3.5") == ["don", "t", "stop", "café", "x", "3", "5"]
    assert units("用Python 3写诗，好吗？") == ["用", "python", "3", "写", "诗", "好", "吗"]
    assert units("𠀀字") == ["𠀀", "字"] and units("…!") == []


def test_the_closest_of_many_decides_and_the_limit_itself_is_not_new() -> None:
    found = Novelty(0.75)
    assert found.is_new("police kill the gunman")
    for text in ("one two three", "police killed the gunman", "four five six"):
        assert found.is_new(text)
        found.add(text)
    assert not found.is_new("Police, kill the gunman!")
    assert found.is_new("police kill a gunman")
