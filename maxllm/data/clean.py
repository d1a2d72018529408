"""Clean one document, and say why one should be dropped. Pure text in, text or a reason out.

The rules count characters, not words, and need no list of words, so that they hold for English and Chinese
alike. They are few on purpose: each names itself in the counts a corpus is prepared with.
"""

import re
import unicodedata
from collections import Counter
from functools import cache

# \v, \f, NEL and the Unicode separators end a line somewhere; deleting them would join two words.
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters except \n and \t, lone surrogates, and characters that show nothing: zero-width space,
# direction marks, word joiner, byte order mark. ZWNJ and ZWJ (U+200C, U+200D) stay: they change how Persian,
# Indic words and emoji are written.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\u200b\u200e\u200f\u2060\ufeff]")
_BLANK_LINES = re.compile(r"\n{3,}")

# A line shorter than this many UTF-8 bytes (16 Latin letters, 5 Chinese characters) is a label, such as a
# speaker's name in a play, and may come back; bytes because they weigh both scripts about alike.
_LABEL_BYTES = 16


def clean_text(text: str) -> str:
    """`text` in Unicode NFC with `\\n` line ends, without invisible characters and superfluous blanks.

    Spaces at line ends go, three or more newlines become two, newlines at both ends of the document go;
    indentation stays. Cleaning twice gives what cleaning once gives.
    """
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", in_canonical_order(text))
    # Not a pattern for blanks before a line's end: in a run of n blanks it would begin n times, and read to
    # the end of the run each time.
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def in_canonical_order(text: str) -> str:
    """Long runs of combining marks in the order that Unicode normalization gives them.

    `unicodedata.normalize` sorts a run by exchanging neighbours, which for a megabyte of marks takes hours.
    The order is that of UAX #15: by combining class, and as written where classes are equal.
    """
    return _long_runs_of_marks().sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)


@cache
def _long_runs_of_marks() -> re.Pattern[str]:
    marks = "".join(mark for code in range(0x300, 0x1F000) if unicodedata.combining(mark := chr(code)))
    return re.compile(f"[{re.escape(marks)}]{{32,}}")


def reason_to_drop(
    text: str, min_chars: int, max_symbol_share: float, max_repeated_line_share: float
) -> str | None:
    """Why the document should go, or None to keep it. `text` is what `clean_text` returned.

    - "too short": fewer than `min_chars` characters, blanks not counted;
    - "few letters": more than `max_symbol_share` (0..1) of its non-blank characters are not letters of any
      script (digits and punctuation are not; a Tang poem has about 0.17, English prose 0.05);
    - "repeated lines": more than `max_repeated_line_share` (0..1) of its lines repeat an earlier one, or
      these hold more than two thirds of that share of its characters. With 0.30 these are Gopher's two cuts,
      0.30 of lines and 0.20 of characters (Rae et al. 2021, arXiv:2112.11446, appendix A.1). Labels shorter
      than 16 bytes, such as a play's speakers, count among the characters only.
    """
    chars = len("".join(text.split()))
    if chars < min_chars:
        return "too short"
    if symbol_share(text) > max_symbol_share:
        return "few letters"
    of_lines, of_chars = repeated_shares(text)
    if of_lines > max_repeated_line_share or of_chars > max_repeated_line_share * 2 / 3:
        return "repeated lines"
    return None


def symbol_share(text: str) -> float:
    """Share (0..1) of non-blank characters that are neither letters nor marks; 0 for a blank text."""
    counts = Counter(text)  # each distinct character is looked up once, not each occurrence
    total = sum(count for char, count in counts.items() if not char.isspace())
    letters = sum(count for char, count in counts.items() if unicodedata.category(char)[0] in "LM")
    return 1 - letters / total if total else 0.0


def repeated_shares(text: str) -> tuple[float, float]:
    """Shares (0..1) of non-blank lines, and of their characters, in lines that came before.

    The first occurrence is not a repetition. Lines are compared without the blanks around them; the share of
    lines looks past labels (under 16 bytes), the share of characters does not.
    """
    counts = Counter(stripped for line in text.split("\n") if (stripped := line.strip()))
    long = {line: count for line, count in counts.items() if len(line.encode()) >= _LABEL_BYTES}
    lines = sum(long.values())
    chars = sum(len(line) * count for line, count in counts.items())
    repeated_lines = lines - len(long)
    repeated_chars = chars - sum(map(len, counts))
    return repeated_lines / max(lines, 1), repeated_chars / max(chars, 1)
