"""Exact deduplication: which of two documents stays, and what counts as the same."""

import hashlib

from maxllm.data.dedup import drop_duplicates, text_key
from maxllm.data.tally import Tally


def test_the_key_is_blake2b_of_the_normalised_text():
    assert text_key("  Straße\n\tA ") == hashlib.blake2b(b"strasse a", digest_size=16).digest()
    assert len(text_key("")) == 16


def test_case_and_white_space_do_not_distinguish_anything_else_does():
    same = ["To be, or not", "to  BE,\nor not ", "to be,\u3000or not"]
    assert len({text_key(text) for text in same}) == 1
    assert (
        len({text_key(text) for text in [same[0], "To be or not", "Tobe, or not", "To be, or n\u00f6t"]}) == 4
    )
    assert text_key("a\ud800") != text_key("a")  # not a crash


def test_the_first_occurrence_stays_in_order():
    tally = Tally("a", rows=6)
    texts = ["床前明月光", "B", "b", "A", " b ", "床前明月光"]
    assert list(drop_duplicates(texts, tally)) == ["床前明月光", "B", "A"]
    assert tally.dropped == {"duplicate": 3}
    assert (tally.kept, tally.bad) == (3, 0)


def test_one_set_of_keys_drops_across_sources():
    first, second = Tally("first", rows=2), Tally("second", rows=2)
    seen: set[bytes] = set()
    assert list(drop_duplicates(["a", "b"], first, seen)) == ["a", "b"]
    assert list(drop_duplicates(["B", "c"], second, seen)) == ["c"]
    assert (first.kept, second.kept) == (2, 1)
    assert list(drop_duplicates(["a"], Tally("alone", rows=1))) == ["a"]  # no set is shared by default
