"""The base of every section of a recipe, and what changing one of its fields changes."""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator

from maxllm.storage import CLIENTS, scheme_of

NO_SECRETS = "keys do not belong in a recipe, which every run writes down"
"""Of a message, which does not repeat what it refuses."""


def without_key(name: str) -> str:
    """A path or source, as it is.

    Raises:
      ValueError: it has a key in it, as in s3://KEY:SECRET@BUCKET/….
    """
    if "@" in name.partition("://")[2].partition("/")[0]:
        raise ValueError(f"{NO_SECRETS}: the client of the bucket finds them in the environment")
    return name


def place(name: str) -> str:
    """A local path or one in a bucket, as it is.

    Raises:
      ValueError: it lies in storage of another kind.
    """
    if scheme_of(name) not in (None, *CLIENTS):
        raise ValueError(f"{name} is neither a local path nor in a bucket (gs://BUCKET/…, s3://BUCKET/…)")
    return name


Name = Annotated[str, StringConstraints(min_length=1), AfterValidator(without_key)]
"""The name of a file, folder or source."""

Place = Annotated[Name, AfterValidator(place)]
"""A folder or file, local or in a bucket."""


class Effect(Enum):
    """What another value of a field changes; said at the field, or once for all fields of a section.

    Resuming, inheriting a model and converting one read it here, and nowhere else.
    """

    MODEL = "the function that the model's weights compute: another value is another model"
    TRAINING = "the numbers of a run: another value is another run of the same model"
    COMPUTATION = "how the same numbers are computed, up to rounding and the draw of dropout masks"
    RECORD = "what a run writes, and when"


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, validate_default=False
    )

    effect: ClassVar[Effect] = Effect.TRAINING
    """What the section's fields change that say nothing themselves."""

    @classmethod
    def effects(cls, prefix: str = "") -> dict[str, Effect]:
        """What each field changes, by its dotted name; those of sections within are among them."""
        found = {}
        for name, field in cls.model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, Effect)]
            found[prefix + name] = marks[0] if marks else cls.effect
            if (below := section_in(field.annotation)) is not None:
                found |= below.effects(f"{prefix}{name}.")
        return found

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "validators of fields know their field"
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"was given {value}, which is neither a number nor a text")
        return value


def section_in(annotation: Any) -> type[Section] | None:
    """The section class in the type `Section` or `Section | None` of a field; None in any other type."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None
