"""A complete recipe: every section, and the rules of every stage.

A recipe is a YAML file with these sections; `key=value` words on the command line override it
(`optimizer.learning_rate=3e-4`). The parsing and its error messages are in `recipe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from maxllm.config import convert, dpo, ppo, pretrain, reward, sft
from maxllm.config.data import BatchConfig, DataConfig, TokenizerConfig
from maxllm.config.dpo import DpoConfig
from maxllm.config.generation import GenerationConfig
from maxllm.config.launch import LaunchConfig
from maxllm.config.lora import LoraConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.ppo import PpoConfig
from maxllm.config.reward import RewardConfig
from maxllm.config.rules import Rules
from maxllm.config.run import RunConfig, StartConfig
from maxllm.config.section import Section
from maxllm.config.stages import Stage

RULES: Mapping[Stage, Rules] = {
    "pretrain": pretrain.RULES,
    "convert": convert.RULES,
    "sft": sft.RULES,
    "reward": reward.RULES,
    "dpo": dpo.RULES,
    "ppo": ppo.RULES,
}


class Config(Section):
    """A complete recipe."""

    stage: Stage = Field(description="What the recipe trains; convert: nothing, the model was imported.")
    run: RunConfig = Field(description="Folder, length, cadence.")
    start: StartConfig = Field(default_factory=StartConfig, description="Checkpoints to start from.")
    model: ModelConfig | None = Field(None, description="The model; later stages take it from start.policy.")
    tokenizer: TokenizerConfig | None = Field(
        None, description="The tokenizer; later stages take it from start.policy."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="Data.")
    batch: BatchConfig = Field(description="Batch shape.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="Device mesh.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="Several processes.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Decoding.")
    lora: LoraConfig | None = Field(None, description="Train adapters instead of the model (SFT).")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="Reward-model loss.")
    dpo: DpoConfig = Field(default_factory=DpoConfig, description="DPO.")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="PPO.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        self.rules.check(self)
        if self.lora is not None and not self.rules.adapters:
            raise ValueError(f"lora trains adapters in sft; a {self.stage} recipe cannot have it yet")
        if self.mesh.stage != 1 and self.optimizer.gradient_dtype != "float32":
            raise ValueError(
                "the stages of a pipeline sum gradients over microbatches: mesh.stage needs "
                "optimizer.gradient_dtype=float32"
            )
        if self.mesh.offload == "parameters" and (self.lora is not None or self.mesh.stage != 1):
            raise ValueError(
                "mesh.offload=parameters is for training a whole model without a pipeline; with lora or "
                "mesh.stage give mesh.offload=optimizer"
            )
        if self.batch.rows % self.batch.microbatches:
            raise ValueError(
                f"batch.microbatches={self.batch.microbatches} does not divide batch.rows={self.batch.rows}"
            )
        falling = self.optimizer.decay_of(self.updates) if self.optimizer.schedule == "wsd" else 0
        if falling and self.updates < self.optimizer.warmup_steps + falling:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} and optimizer.decay_steps={falling} "
                f"are more than the run's {self.updates} updates"
            )
        if self.updates <= self.optimizer.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not less than the run's "
                f"{self.updates} updates, so the peak learning rate is never reached"
            )
        return self

    @property
    def rules(self) -> Rules:
        """What holds for the recipes of this stage."""
        return RULES[self.stage]

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.rules.updates(self)
