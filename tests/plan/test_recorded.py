"""What the recipes' headers say of memory is what `make plans` recorded."""

import json
from pathlib import Path

import pytest
import yaml

from maxllm import recipe
from maxllm.plan.hardware import hardware_of

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = [
    path for path in CONFIGS.glob("*/*.yaml") if yaml.safe_load(path.read_text())["run"].get("hardware")
]
RECORDED = json.loads((CONFIGS / "plans.json").read_text())


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
