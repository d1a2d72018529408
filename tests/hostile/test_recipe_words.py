"""Whatever stands in a recipe or behind it on the command line is a configuration or one sentence."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.errors import UserError

KEYS = st.sampled_from(recipe.field_names(Config)) | st.text(max_size=20)
ODD = """
0b_|2024-99-99|1_|!!python/object/apply:os.system [ls]|!!binary '*'|!!int ''|!!float x|!!timestamp x|!!bool x|
&a [*a]|? a|<<: 1|null|{}|[]|~|.nan|-.inf|1:2:3|0o8|true|{a: 1}|s3:///|gs://|ftp://x|\ud800|\0
"""
DEEP = ("[" * 5000, "{a: " * 3000, "9" * 5000)
VALUES = (
    st.text(max_size=20)
    | st.sampled_from([*ODD.replace("\n", "").split("|"), *DEEP])
    | st.integers().map(str)
    | st.floats().map(str)
)
WORDS = st.lists(st.builds("{}={}".format, KEYS, VALUES) | st.text(max_size=30), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tree():
    found = recipe.read_yaml(recipe.find_recipe("pretrain/tiny_slice_cpu"))
    return {name: section for name, section in found.items() if name != recipe.INCLUDE}


@given(words=WORDS)
def test_words(tree, words):
    try:
        config = recipe.apply_overrides(tree, words)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), "one sentence"
    else:
        assert recipe.validate(yaml.safe_load(recipe.dump(config))) == config, "and is read back as it was"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=4),
    max_leaves=8,
)
SECTIONS = st.dictionaries(
    st.sampled_from(list(Config.model_fields)) | st.text(max_size=8), PLAIN, max_size=5
)


@given(sections=SECTIONS)
def test_trees(tree, sections):
    try:
        recipe.validate(recipe.merge(tree, sections))
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
def test_files(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "hostile.yaml"
    file.write_bytes(content)
    try:
        recipe.load_recipe(str(file))
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.mark.parametrize("word", ["a." * 5000 + "b=1", "model=" + DEEP[1], "=", "model.=1", ".=", "..=1"])
def test_depths_and_gaps(tree, word):
    with pytest.raises(UserError):
        recipe.apply_overrides(tree, [word])
