"""Readers and their tally: what is read, what is counted as bad, and the sentence the user gets."""

import gzip
import json
from pathlib import Path

import pytest

from maxllm.data.row_files import place, read_rows
from maxllm.data.sources import read_documents
from maxllm.data.tally import Tally
from maxllm.errors import UserError


def write(path: Path, *lines: str | bytes) -> Path:
    data = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def rows(path: Path) -> tuple[list, Tally]:
    tally = Tally(str(path))
    return list(read_rows(path, tally)), tally


def documents(source: str | Path, text_field: str = "text") -> tuple[list[str], Tally]:
    tally = Tally(str(source))
    return list(read_documents(source, text_field, tally)), tally


# The tally


def test_kept_is_what_nobody_dropped():
    tally = Tally("a.jsonl", rows=10)
    tally.drop("too short")
    tally.drop("not JSON", "a.jsonl line 3 is not JSON")
    tally.drop("not JSON", "a.jsonl line 4 is not JSON")
    assert (tally.kept, tally.bad) == (7, 2)
    assert tally.dropped == {"too short": 1, "not JSON": 2}
    assert tally.first_bad == "a.jsonl line 3 is not JSON"


def test_check_names_the_first_bad_line_and_the_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("pairs.jsonl"), *['{"a": 1}'] * 6, "oops", *['{"a": 1}'] * 3)
    found, tally = rows(Path("pairs.jsonl"))
    assert len(found) == 9
    with pytest.raises(UserError) as error:
        tally.check(max_bad_share=0.01)
    assert str(error.value) == (
        "pairs.jsonl line 7 is not JSON (Expecting value at column 1); "
        "1 of 10 rows are bad, more than data.max_bad_share=0.01 allows"
    )


def test_check_allows_exactly_the_share():
    tally = Tally("a", rows=10)
    tally.drop("not JSON", "a line 1 is not JSON")
    tally.check(max_bad_share=0.1)
    with pytest.raises(UserError, match="1 of 10"):
        tally.check(max_bad_share=0.09)


def test_rows_dropped_by_a_filter_are_not_bad():
    tally = Tally("a", rows=2)
    tally.drop("too short")
    tally.check(max_bad_share=0.0)


def test_check_refuses_an_empty_source_and_one_of_which_nothing_is_left():
    with pytest.raises(UserError, match=r"^a\.jsonl is empty$"):
        Tally("a.jsonl").check(max_bad_share=1.0)
    tally = Tally("a.jsonl", rows=3)
    for reason in ("too short", "few letters", "too short"):
        tally.drop(reason)
    with pytest.raises(UserError) as error:
        tally.check(max_bad_share=1.0)
    assert str(error.value) == "a.jsonl: none of 3 rows was kept (too short: 2, few letters: 1)"


# Rows


def test_rows_keep_the_line_numbers_of_the_file(tmp_path):
    found, tally = rows(write(tmp_path / "a.jsonl", '{"n": 1}', "", "   ", '{"n": "二"}'))
    assert found == [(1, {"n": 1}), (4, {"n": "二"})]
    assert (tally.rows, tally.kept, tally.first_bad) == (2, 2, None)


@pytest.mark.parametrize(
    ("line", "reason", "what"),
    [
        ('{"a": 1', "not JSON", "is not JSON (Expecting ',' delimiter at column 8)"),
        (b'{"a": "\xff"}', "not UTF-8", "is not UTF-8 (byte 8 of the line)"),
        ("[1, 2]", "not an object", "is not a JSON object but a list"),
        ("null", "not an object", "is not a JSON object but null"),
        ("true", "not an object", "is not a JSON object but true or false"),
        ("1" * 5000, "not JSON", "is not JSON (Exceeds the limit"),
        ("[" * 200_000, "not JSON", "is not JSON (maximum recursion"),
    ],
)
def test_a_bad_line_is_counted_with_its_place(tmp_path, line, reason, what):
    path = write(tmp_path / "a.jsonl", "{}", "", line, "nor is this")
    found, tally = rows(path)
    assert found == [(1, {})]
    assert (tally.rows, tally.bad) == (3, 2)
    assert tally.dropped[reason] >= 1
    assert tally.first_bad is not None and tally.first_bad.startswith(f"{path} line 3 {what}")


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    assert rows(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}'))[0] == [(1, {"a": 1})]
    assert rows(write(tmp_path / "a.json", b'\xef\xbb\xbf[{"a": 1}]'))[0] == [(1, {"a": 1})]


def test_gzip_reads_as_the_plain_file_does(tmp_path):
    plain = write(tmp_path / "a.jsonl", '{"a": 1}', "bad", '{"a": 2}')
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    (expected, _), (found, tally) = rows(plain), rows(packed)
    assert found == expected == [(1, {"a": 1}), (3, {"a": 2})]
    assert tally.first_bad == f"{packed} line 2 is not JSON (Expecting value at column 1)"


def test_a_broken_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for data in (b"not gzip at all", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read \("):
            rows(path)


def test_a_json_file_may_hold_a_list_or_lines(tmp_path):
    listed = write(tmp_path / "list.json", '[{"a": 1},', '"x",', '{"a": 2}]')
    found, tally = rows(listed)
    assert found == [(1, {"a": 1}), (3, {"a": 2})]
    assert tally.first_bad == f"{listed} row 2 is not a JSON object but a string"
    lines = write(tmp_path / "lines.json", '{"a": 1}', '{"a": 2}')
    assert rows(lines)[0] == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_broken_json_list_is_an_error(tmp_path):
    path = write(tmp_path / "a.json", "[1,", "2")
    with pytest.raises(
        UserError, match=r"a\.json is not JSON \(Expecting ',' delimiter at column 1 on line 3\)"
    ):
        rows(path)


def test_a_missing_or_strange_file_fails_before_the_first_row(tmp_path):
    tally = Tally("a")
    with pytest.raises(UserError, match=r"missing\.jsonl does not exist"):
        read_rows(tmp_path / "missing.jsonl", tally)  # no iteration: the call itself fails
    with pytest.raises(UserError, match="is not a file"):
        read_rows(tmp_path, tally)
    with pytest.raises(UserError, match=r"a\.csv is not a \.jsonl, .* \.parquet or \.arrow file"):
        read_rows(write(tmp_path / "a.csv", "a,b"), tally)


def test_place_speaks_of_rows_in_a_json_list():
    assert place("a.jsonl.gz", 7) == "a.jsonl.gz line 7"
    assert place("a.json", 7) == "a.json row 7"


# Documents


def test_text_files_split_at_lines_that_hold_only_the_mark(tmp_path):
    mark = "<|endoftext|>"
    path = write(tmp_path / "a.txt", "one", f"not {mark} here", f" {mark} ", "", mark, "二", mark)
    found, tally = documents(path)
    assert found == [f"one\nnot {mark} here\n", "二\n"]
    assert (tally.rows, tally.kept) == (2, 2)


def test_a_text_document_that_is_not_utf8_is_bad_alone(tmp_path):
    path = write(tmp_path / "a.txt", "one", "<|endoftext|>", "two", b"\xff", "<|endoftext|>", "three")
    found, tally = documents(path)
    assert found == ["one\n", "three\n"]
    assert tally.first_bad == f"{path} line 4 is not UTF-8"


@pytest.mark.parametrize(
    ("row", "reason", "what"),
    [
        ({"txt": "a", "id": 1}, "field missing", " has no field 'text' (it has txt, id)"),
        ({}, "field missing", " has no field 'text' (it has nothing)"),
        ({"text": None}, "not a string", ": field 'text' is not a string but null"),
        ({"text": ["a"]}, "not a string", ": field 'text' is not a string but a list"),
        ({"text": " \n"}, "empty", ": field 'text' is empty"),
        ({"text": "\ud800"}, "not valid Unicode", " holds half of a surrogate pair"),
    ],
)
def test_a_row_without_usable_text_is_bad(tmp_path, row, reason, what):
    path = write(tmp_path / "a.jsonl", '{"text": "good"}', json.dumps(row))
    found, tally = documents(path)
    assert found == ["good"]
    assert tally.dropped == {reason: 1} and tally.rows == 2
    assert tally.first_bad == f"{path} line 2{what}"


def test_text_field_is_an_argument(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"content": "a", "text": "b"}')
    assert documents(path, "content")[0] == ["a"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "d.json", '[{"text": "d"}]')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "e"}'))
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "notes.md", "no")
    found, tally = documents(tmp_path)
    assert found == ["a", "b\n", "d", "e"]
    assert tally.rows == 4


def test_a_source_that_is_not_there_fails_before_the_first_document(tmp_path):
    for source, message in [
        (tmp_path / "missing", "missing does not exist"),
        (tmp_path, r"holds no \.txt, \.jsonl, .* \.parquet or \.arrow file"),
        (write(tmp_path / "a.pdf", ""), r"a\.pdf is not a \.txt"),
        ("slice:milton", "slice:milton does not exist; there are slice:shakespeare"),
    ]:
        with pytest.raises(UserError, match=message):
            read_documents(source, "text", Tally(str(source)))


# TensorFlow Datasets


@pytest.fixture
def tales(tmp_path, monkeypatch):
    """A prepared array_record data set `maxllm_tales/short` in TFDS_DATA_DIR."""
    import tensorflow_datasets as tfds

    splits = {"train": ["Once upon a time", "", "从前"], "test": ["End"]}
    # Not registered: it is read as a folder that was prepared elsewhere, without the code that made it.
    with tfds.core.registered.skip_registration():

        class MaxllmTales(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="short"),)

            def _info(self):
                features = {"story": tfds.features.Text(), "id": tfds.features.Text()}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(stories) for split, stories in splits.items()}

            def _generate_examples(self, stories):
                yield from ((number, {"story": story, "id": "x"}) for number, story in enumerate(stories))

    MaxllmTales(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def test_tfds_reads_the_named_feature_and_split(tales):
    found, tally = documents("tfds:maxllm_tales/short:1.0.0@train", "story")
    assert sorted(found) == ["Once upon a time", "从前"]  # TFDS shuffles when it writes
    assert (tally.rows, tally.kept, tally.dropped) == (3, 2, {"empty": 1})
    assert documents("tfds:maxllm_tales", "story")[1].rows == 3  # the train split, the first config
    assert documents("tfds:maxllm_tales/short@test", "story")[0] == ["End"]
    assert documents("tfds:maxllm_tales@train[:2]", "story")[1].rows == 2


def test_tfds_names_a_feature_that_is_not_there(tales):
    found, tally = documents("tfds:maxllm_tales@test", "text")
    assert found == []
    assert tally.first_bad == "tfds:maxllm_tales@test example 0 has no field 'text' (it has id, story)"


def test_tfds_errors_are_one_sentence(tales):
    for source, message in [
        ("tfds:maxllm_nonesuch", "maxllm_nonesuch not found"),
        ("tfds:maxllm_tales@nosplit", "Unknown split 'nosplit'"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            read_documents(source, "story", Tally(source))
        assert "\n" not in str(error.value)
