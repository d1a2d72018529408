"""How alike two texts are by ROUGE-L, and which of many say something new.

ROUGE-L (Lin 2004) is the F-measure of the longest common subsequence of two texts' words:

    F = 2 P R / (P + R) = 2 LCS(a, b) / (|a| + |b|),   P = LCS / |a|,   R = LCS / |b|

Self-Instruct (Wang et al. 2022, section 2.2) keeps an instruction whose ROUGE-L with every earlier one is
below 0.7. RapidFuzz's normalised indel similarity is the same number, from bit-parallel subsequences.
"""

from __future__ import annotations

import re
import sys

from rapidfuzz import process
from rapidfuzz.distance import Indel

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana and Han."""

UNITS = re.compile(rf"[{UNSPACED}\U00020000-\U0003ffff]|[^\W_{UNSPACED}\U00020000-\U0003ffff]+")


def units(text: str) -> list[str]:
    """A text's words, without case and punctuation; single characters where there are no spaces."""
    return UNITS.findall(text.casefold())


class Novelty:
    """The texts that were kept so far, against which each new one is measured."""

    def __init__(self, limit: float) -> None:
        """Takes the ROUGE-L, above 0 and at most 1, from which a text is not new."""
        self.limit = limit
        self._numbers: dict[str, int] = {}
        self._kept: list[str] = []

    def is_new(self, text: str) -> bool:
        """Whether every kept text is less like this one than the limit."""
        return self.likeness(text) < self.limit

    def likeness(self, text: str) -> float:
        """ROUGE-L of a text and the kept one that is most like it; 0 where that is below the limit."""
        closest = process.extractOne(
            self._coded(text), self._kept, scorer=Indel.normalized_similarity, score_cutoff=self.limit
        )
        return 0.0 if closest is None else closest[1]

    def add(self, text: str) -> None:
        """Keeps a text."""
        self._kept.append(self._coded(text))

    def _coded(self, text: str) -> str:
        """A text with a character for each unit: strings are what is compared fastest.

        Units share characters from the 1,114,112th on, of which two hardly meet in one text.
        """
        numbers = (self._numbers.setdefault(unit, len(self._numbers)) for unit in units(text))
        return "".join(chr(number % (sys.maxunicode + 1)) for number in numbers)
