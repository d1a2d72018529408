"""Drop documents that were seen before, exactly, up to case and white space.

Rule: **the first occurrence in reading order is kept**, every later one is dropped. Two documents are the
same when their texts agree after `casefold` and after each run of white space became one space.
Near-duplicates (an edited sentence, another spelling) are kept.
"""

import hashlib
from collections.abc import Iterable, Iterator

from maxllm.data.tally import Tally


def text_key(text: str) -> bytes:
    """16 bytes that two texts share when they are the same document: BLAKE2b-128 of the normalised text.

    128 bits: among 10^9 documents the chance of any false match is about 10^-21.
    """
    normalised = " ".join(text.casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def drop_duplicates(texts: Iterable[str], tally: Tally, seen: set[bytes] | None = None) -> Iterator[str]:
    """Yield each text at its first occurrence; later ones count in `tally` as "duplicate".

    `seen` holds the keys met so far (about 100 bytes of memory a document) and is added to: pass one set for
    several sources to drop duplicates across them, the earlier source keeping the document.
    """
    seen = set() if seen is None else seen
    for text in texts:
        key = text_key(text)
        if key in seen:
            tally.drop("duplicate")
        else:
            seen.add(key)
            yield text
