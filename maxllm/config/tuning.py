"""What a stage trains of the model it starts from: all of it, the upper layers, or adapters beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import Field

from maxllm.config.section import Section

LoraTarget = Literal["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"]


FrozenType = Literal["float32", "bfloat16", "int8", "nf4"]


class LoraConfig(Section):
    """Low-rank adapters: they are trained, the model stays as it is (Hu et al. 2021)."""

    rank: int = Field(16, gt=0, description="Rank r of every adapter.")
    alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / r.")
    rank_stabilized: bool = Field(
        False, description="Scale by alpha / sqrt(r) instead, which suits high ranks (Kalajdzievski 2023)."
    )
    dora: bool = Field(
        False,
        description="Train the length of each output's weights apart from their direction (DoRA; Liu et al. "
        "2024).",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget), min_length=1, description="Weights that have one; all linear layers by default."
    )

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class BottleneckConfig(Section):
    """Two small layers after attention and after the feed-forward block (Houlsby et al. 2019)."""

    width: int = Field(64, gt=0, description="Width between the two layers.")


class PrefixConfig(Section):
    """Keys and values that every token sees, of each layer (Li & Liang 2021)."""

    length: int = Field(16, gt=0, description="How many.")


class PromptConfig(Section):
    """Embeddings that stand before every text (Lester et al. 2021)."""

    length: int = Field(16, gt=0, description="How many.")


class FreezeConfig(Section):
    """Parts of the model that are not trained, and have no optimizer state."""

    layers: int = Field(0, ge=0, description="The first so many layers; gradients end there.")
    embeddings: bool = Field(
        False, description="The embedding table, and with tied embeddings the output projection that it is."
    )
    dtype: FrozenType = Field(
        "float32",
        description="Beside adapters: type in which the frozen matrices are kept. int8 and nf4 make QLoRA of "
        "LoRA (Dettmers et al. 2023); they are multiplied in the compute type.",
    )


@dataclass(frozen=True)
class Tuning:
    """How a model is trained where not all of it is: the sections of a recipe that say so, together."""

    lora: LoraConfig | None = None
    bottleneck: BottleneckConfig | None = None
    prefix: PrefixConfig | None = None
    prompt: PromptConfig | None = None
    freeze: FreezeConfig | None = None

    @property
    def adapters(self) -> bool:
        """Whether there are weights beside the model's own, which are then all that is trained."""
        return any((self.lora, self.bottleneck, self.prefix, self.prompt))

    @property
    def frozen_layers(self) -> int:
        """The first so many layers stay while those after them are trained."""
        return self.freeze.layers if self.freeze else 0

    @property
    def frozen_embeddings(self) -> bool:
        """The embedding table stays."""
        return self.freeze.embeddings if self.freeze else False

    @property
    def frozen_dtype(self) -> FrozenType:
        """Type in which the matrices are kept that adapters are trained beside."""
        return self.freeze.dtype if self.freeze else "float32"

    @property
    def before(self) -> int:
        """How many keys every token sees besides those of its own text."""
        return (self.prefix.length if self.prefix else 0) + (self.prompt.length if self.prompt else 0)

    @property
    def beside(self) -> Tuning | None:
        """What is left once everything that has a place in the model's own weights is in them."""
        left = replace(self, lora=None, freeze=None)
        return left if left.adapters else None

    def named(self) -> str:
        """The sections that are given, for people."""
        given = [name for name, value in vars(self).items() if value is not None]
        return " and ".join(given)

    def words(self) -> str:
        """The settings as a command line takes them."""
        found = []
        for name, section in vars(self).items():
            if section is not None:
                fields = section.model_dump(mode="json", exclude_defaults=True)
                found += [f"{name}.{field}={value}" for field, value in fields.items()] or [f"{name}={{}}"]
        return " ".join(word.replace("'", "").replace(", ", ",") for word in found)
