"""The cleaner's rules on texts small enough to count by hand, in English and in Chinese."""

import random
import unicodedata

import pytest

from maxllm.data.clean import clean_text, in_canonical_order, reason_to_drop, repeated_shares, symbol_share
from maxllm.data.dedup import text_key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301", "\u00e9"),  # NFC
        ("e\u200b\u0301", "\u00e9"),  # composed only once what stood between is gone
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\x0cb\u2028c\x85d", "a\nb\nc\nd"),
        ("\ufeffa\x00b\x1bc\x7fd\x9fe\u200bf\u2060g", "abcdefg"),
        ("a\tb", "a\tb"),
        ("a \t\u3000\nb\u00a0", "a\nb"),
        ("a\n \n\t\n\nb", "a\n\nb"),
        ("a\n\nb\nc", "a\n\nb\nc"),
        ("\n\n  indented\n", "  indented"),
        ("می\u200cخواهم 👨\u200d👩", "می\u200cخواهم 👨\u200d👩"),  # joiners are part of the spelling
        ("“床前明月光，”　疑是地上霜。", "“床前明月光，”　疑是地上霜。"),
        ("a\ud800b", "ab"),
        (" \n\t\n", ""),
    ],
)
def test_clean_text(text, expected):
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("abc d\n", 0.0),
        ("ab, 1", 2 / 4),  # the comma and the digit of four non-blank characters
        ("白日依山尽，", 1 / 6),
        ("नमस्ते", 0.0),  # vowel signs are marks, not symbols
        ("###", 1.0),
    ],
)
def test_symbol_share(text, share):
    assert symbol_share(text) == pytest.approx(share)


def test_repeated_shares_by_hand():
    text = "the same long line\n\nanother long line\n  the same long line  \nthe same long line"
    # Lines of 18, 17, 18 and 18 characters; the third and the fourth came before.
    assert repeated_shares(text) == (pytest.approx(2 / 4), pytest.approx(36 / 71))
    assert repeated_shares("") == (0.0, 0.0)


def test_labels_count_among_the_characters_only():
    line, other = "O, that this too too solid flesh", "would melt, thaw and resolve it"
    text = f"Ham.\n{line}\nHam.\n{other}\nHam."
    assert repeated_shares(text) == (0.0, pytest.approx(8 / (3 * 4 + 32 + 31)))
    # 5 Chinese characters and a comma are 18 bytes: a line; 5 characters alone are 15: a label.
    assert repeated_shares("白日依山尽，\n白日依山尽，")[0] == 0.5
    assert repeated_shares("白日依山尽\n白日依山尽")[0] == 0.0


def test_reasons_and_their_thresholds():
    def reason(text, min_chars=3, symbols=0.5, repeated=0.3):
        return reason_to_drop(text, min_chars, symbols, repeated)

    assert reason("ab c") is None
    assert reason("ab \n c", min_chars=4) == "too short"
    assert reason("白日依山", min_chars=4) is None
    assert reason("ab12") is None  # exactly half
    assert reason("ab123") == "few letters"
    assert reason("ab123", symbols=0.6) is None
    assert reason("") == "too short"
    assert reason("", min_chars=0) is None


def test_repeated_lines_by_lines_and_by_characters():
    def reason(lines, share):
        return reason_to_drop("\n".join(lines), 0, 1.0, share)

    different = [f"{letter * 20}" for letter in "abcdefg"]
    # 3 of 10 lines, each of 20 characters, came before: 0.30 of lines and of characters.
    repeated = [*different, *different[:3]]
    assert reason(repeated, 0.46) is None  # characters: 0.30 <= 2/3 of 0.46
    assert reason(repeated, 0.44) == "repeated lines"  # by characters alone
    # A repeated line among longer ones: 1 of 3 lines, 20 of 240 characters.
    assert reason(["a" * 20, "b" * 200, "a" * 20], 0.34) is None
    assert reason(["a" * 20, "b" * 200, "a" * 20], 0.33) == "repeated lines"


def test_boilerplate_is_dropped_in_both_languages():
    english = "\n".join(["Accept all cookies to continue", "A line that is new"] * 20)
    chinese = "\n".join(["请接受所有饼干以继续浏览本网站", "这一行是新的而且足够长"] * 20)
    for text in (english, chinese):
        assert reason_to_drop(text, 20, 0.5, 0.3) == "repeated lines"


AWKWARD = {
    "blanks": " ",
    "tabs": "\t",
    "no-break spaces": "\u00a0",
    "wide spaces": "\u3000",
    "newlines": "\n",
    "carriage returns": "\r",
    "line separators": "\u2028",
    "blanks and newlines": " \n",
    "blanks and letters": " " * 1000 + "a",
    "invisible": "\u200b",
    "half a pair": "\ud800",
    "acute": "\u0301",
    "marks of two classes": "\u0301\u0323",
    "marks that decompose": "\u0344\u0323",
    "Hangul": "\u1100\u1161\u11a8",
    "letters": "a",
    "Chinese": "\u6f22",
    "nothing but joiners": "\u200d",
}


@pytest.mark.parametrize("character", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("around", ["{}", "word{}word", "word{}"], ids=["alone", "inside", "last"])
def test_a_megabyte_of_an_awkward_character_takes_no_longer_than_its_length(character, around):
    """What is quadratic here would take hours, not the tenth of a second that a megabyte takes."""
    text = around.format(character * (10**6 // len(character)))
    once = clean_text(text)
    assert clean_text(once) == once
    reason_to_drop(once, 20, 0.4, 0.3)
    text_key(once)


def test_sorting_long_runs_of_marks_first_changes_nothing():
    """Against `unicodedata` alone, on runs that it can still sort."""
    marks = [chr(code) for code in range(0x300, 0x36F)] + list("\u0344\u0f73\u05b0\u3099")
    rng = random.Random(0)
    for _ in range(50):
        text = "a" + "".join(rng.choices(marks, k=rng.randint(30, 90))) + "b"
        assert unicodedata.normalize("NFC", in_canonical_order(text)) == unicodedata.normalize("NFC", text)
