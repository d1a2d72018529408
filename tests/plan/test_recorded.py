"""What the recipes' headers say of memory is what `make plans` recorded."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from maxllm import recipe
from maxllm.model.llama import Llama
from maxllm.plan.hardware import hardware_of
from maxllm.steps.state import parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = [
    path for path in CONFIGS.glob("*/*.yaml") if yaml.safe_load(path.read_text())["run"].get("hardware")
]
RECORDED = json.loads((CONFIGS / "plans.json").read_text())

PARAMETERS = {
    "happy-llm-82m": 82_594_560,
    "happy-llm-215m": 215_127_040,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}
"""As those who made the models count them."""


def test_every_record_is_of_a_recipe_that_is_there():
    assert RECORDED.keys() == {f"{path.parent.name}/{path.stem}" for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_headers_say_what_was_recorded(path):
    """And the peak is below what the machine has, and the recipe is one that loads."""
    figures = RECORDED[f"{path.parent.name}/{path.stem}"]
    hardware = hardware_of(recipe.load_recipe(str(path), []).run.hardware)
    header = path.read_text().split("stage:")[0]
    assert f"peak {figures['peak_bytes'] / 1e9:.1f} GB per chip" in header
    assert f"{figures['sent_bytes'] / 1e9:.0f} GB sent per chip and step" in header
    assert figures["peak_bytes"] < hardware.chip.hbm_bytes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_of_the_models_they_name(path):
    model = Llama(recipe.load_recipe(str(path), []).model.computed_in("bfloat16"))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    made = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids)
    assert parameter_count(made) == PARAMETERS[path.stem.split("_")[0]]
