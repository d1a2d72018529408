"""From a YAML recipe and `key=value` words to a `Config`, with errors that name the field.

config = load_recipe("configs/pretrain/tiny_slice_cpu.yaml", ["optimizer.learning_rate=3e-4"])
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from maxllm.config.root import Config
from maxllm.config.section import Section, section_in
from maxllm.errors import UserError
from maxllm.files import parse_yaml, read_yaml
from maxllm.folder import RunFolder

INCLUDE = "include"


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name below `configs/` (with or without .yaml), also when installed."""
    package = Path(__file__).parent
    for root in (Path(), package.parent / "configs", package / "configs"):
        for candidate in (root / name, root / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    raise UserError(f"recipe {name!r} not found: give a YAML file, or the name of one under configs/")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe with at most one `include` level, applies overrides in order, validates.

    Raises:
      UserError: naming the field, what was given and what is allowed.
    """
    path = find_recipe(name)
    tree = read_yaml(path)
    if INCLUDE in tree:
        base_path = path.parent / str(tree.pop(INCLUDE))
        base = read_yaml(base_path)
        if INCLUDE in base:
            raise UserError(f"{base_path} is itself included by {path.name}; one include level is the limit")
        tree = merge(base, tree)
    return validate(with_inherited_model(overridden(tree, overrides)))


def with_inherited_model(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the model of `start.policy` below what it says of its own model, such as model.remat.

    A section that says its vocabulary is a whole model, and inherits nothing.

    Raises:
      UserError: the recipe leaves its model's shape to a run that is not there.
    """
    own, start = tree.get("model"), tree.get("start")
    policy = start.get("policy") if isinstance(start, dict) else None
    if not isinstance(own, dict) or "vocab_size" in own or not isinstance(policy, str):
        return tree
    parent = RunFolder(policy)
    if not parent.has_config:
        raise UserError(
            f"the section model says {', '.join(own)} and leaves the rest to {policy}, which is not there: "
            "train that stage first, or give the whole model"
        )
    inherited = parent.settings().get("model")
    return tree | {"model": merge(inherited if isinstance(inherited, dict) else {}, own)}


def of_run(folder: RunFolder, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration in a run folder, with dotted `key=value` words on top of it.

    Raises:
      UserError: it is no run folder, or an override is not allowed.
    """
    return apply_overrides(folder.settings(), overrides)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Puts dotted `key=value` words into the tree, then validates it."""
    return validate(overridden(tree, overrides))


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with dotted `key=value` words put into it."""
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"override {word!r} is not of the form section.field=value")
        try:
            value = parse_yaml(text)
        except ValueError:
            value = text
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = merge(tree, nested)
    return tree


def validate(tree: dict[str, Any]) -> Config:
    """A `Config` from plain data, or one sentence about the first thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0])) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load_recipe` reads it back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def explain(error: ErrorDetails) -> str:
    """One sentence for one pydantic error: the field, what was given, what is allowed."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {where!r}; the nearest is {nearest_key(where)!r}"
        case "missing":
            return f"{where} is required and was not given"
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{where}: {reason}" if where else reason
    allowed = error["msg"][0].lower() + error["msg"][1:]
    field = field_at(error["loc"])
    meaning = f" ({field.description})" if field and field.description else ""
    return f"{where} was given {error['input']!r}: {allowed}{meaning}"


def nearest_key(where: str) -> str:
    """The known key most like an unknown one: within its section if that exists, else anywhere."""
    names = field_names(Config)
    section, dot, leaf = where.rpartition(".")
    siblings = {name[len(section) + 1 :]: name for name in names if name.rpartition(".")[0] == section}
    if dot and siblings:
        close = difflib.get_close_matches(leaf, [*siblings, *initials(siblings)], n=1, cutoff=0.0)[0]
        return siblings.get(close) or siblings[initials(siblings)[close]]
    return difflib.get_close_matches(where, names, n=1, cutoff=0.0)[0]


def initials(names: Iterable[str]) -> dict[str, str]:
    """`lr` for learning_rate: what people type for short."""
    return {"".join(word[0] for word in name.split("_")): name for name in names if "_" in name}


def field_names(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key below a section, sections themselves included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        below = section_in(field.annotation)
        if below is not None:
            names += field_names(below, f"{prefix}{name}.")
    return names


def field_at(location: tuple[int | str, ...]) -> Any:
    """The pydantic field at an error's location, or None."""
    section: type[Section] | None = Config
    field = None
    for part in location:
        if section is None or part not in section.model_fields:
            return field
        field = section.model_fields[str(part)]
        section = section_in(field.annotation)
    return field
