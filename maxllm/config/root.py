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
from maxllm.config.evaluation import EvaluationConfig
from maxllm.config.generation import GenerationConfig
from maxllm.config.launch import LaunchConfig
from maxllm.config.loss import LossConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.ppo import PpoConfig
from maxllm.config.reward import RewardConfig
from maxllm.config.rules import Rules
from maxllm.config.run import RunConfig, StartConfig
from maxllm.config.section import Section
from maxllm.config.stages import Stage
from maxllm.config.tuning import (
    BottleneckConfig,
    FreezeConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    Tuning,
)

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
    loss: LossConfig = Field(default_factory=LossConfig, description="The loss of pretraining and SFT.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="Device mesh.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="Several processes.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Decoding.")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Replies to held-out questions."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of the model.")
    bottleneck: BottleneckConfig | None = Field(None, description="Train small layers between the model's.")
    prefix: PrefixConfig | None = Field(None, description="Train keys and values that every token sees.")
    prompt: PromptConfig | None = Field(None, description="Train embeddings that stand before every text.")
    freeze: FreezeConfig | None = Field(None, description="Train the model but for some of its parts.")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="Reward-model loss.")
    dpo: DpoConfig = Field(default_factory=DpoConfig, description="DPO.")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="PPO.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        self.rules.check(self)
        self._check_tuning()
        self._check_sections()
        if self.mesh.stage != 1 and self.optimizer.gradient_dtype != "float32":
            raise ValueError(
                "the stages of a pipeline sum gradients over microbatches: mesh.stage needs "
                "optimizer.gradient_dtype=float32"
            )
        if self.mesh.offload == "parameters" and (self.tuning is not None or self.mesh.stage != 1):
            with_what = "mesh.stage" if self.tuning is None else self.tuning.named()
            raise ValueError(
                "mesh.offload=parameters is for training a whole model without a pipeline; with "
                f"{with_what} give mesh.offload=optimizer"
            )
        if self.batch.rows % self.batch.microbatches:
            raise ValueError(
                f"batch.microbatches={self.batch.microbatches} does not divide batch.rows={self.batch.rows}"
            )
        if self.run.epochs is None:
            self.check_schedule()
        return self

    def _check_sections(self) -> None:
        """Whether the stage has a use for every section in which something is set.

        Raises:
          ValueError: naming one that it would pass over.
        """
        for name, stages, passed_over in (
            ("loss", ("pretrain", "sft"), self.loss != LossConfig()),
            ("reward", ("reward",), self.reward != RewardConfig()),
            ("dpo", ("dpo",), self.dpo != DpoConfig()),
            ("ppo", ("ppo",), self.ppo != PpoConfig()),
        ):
            if passed_over and self.stage not in stages:
                raise ValueError(f"the section {name} is for {' and '.join(stages)}, not for {self.stage}")
        if self.evaluation.shots and self.stage != "sft":
            raise ValueError(f"evaluation.shots is for sft, not for {self.stage}")
        if self.evaluation.scorer and not self.rules.replies:
            raise ValueError(f"evaluation.scorer is for replies, and a {self.stage} model gives none")

    def _check_tuning(self) -> None:
        """Whether what is said of adapters and frozen parts goes together.

        Raises:
          ValueError: naming the settings that do not.
        """
        tuning = self.tuning
        if tuning is None:
            if self.start.adapters == "continue":
                raise ValueError("start.adapters=continue needs the settings of the adapters, as lora.rank")
            return
        if self.start.policy is None:
            raise ValueError(f"{tuning.named()} needs start.policy, the run whose model it leaves as it is")
        some = tuning.frozen_layers or tuning.frozen_embeddings
        if some and tuning.adapters:
            raise ValueError(
                f"{tuning.named()}: with adapters all of the model is frozen; leave freeze.layers and "
                "freeze.embeddings away"
            )
        if tuning.freeze and not some and not tuning.adapters:
            raise ValueError("freeze freezes nothing: give freeze.layers or freeze.embeddings=true")
        if some and tuning.frozen_dtype != "float32":
            raise ValueError(
                f"freeze.dtype={tuning.frozen_dtype} is for what adapters are trained beside: give lora.rank"
            )
        if tuning.frozen_layers and self.mesh.stage != 1:
            raise ValueError("freeze.layers would leave stages of the pipeline idle: give mesh.stage=1")
        if tuning.before and self.mesh.context != 1:
            raise ValueError(
                f"{tuning.named()}: keys that every token sees do not go around devices that split a text; "
                "give mesh.context=1"
            )

    def check_schedule(self) -> None:
        """Whether the run is long enough for its learning rates; with epochs, once its steps are counted.

        Raises:
          ValueError: with the numbers.
        """
        optimizer, updates = self.optimizer, self.updates
        warmup = optimizer.warmup_of(updates)
        falling = optimizer.decay_of(updates) if optimizer.schedule == "wsd" else 0
        if falling and updates < warmup + falling:
            raise ValueError(
                f"optimizer.warmup_steps={warmup} and optimizer.decay_steps={falling} are more than the "
                f"run's {updates} updates"
            )
        if updates <= warmup:
            raise ValueError(
                f"optimizer.warmup_steps={warmup} is not less than the run's {updates} updates, so the peak "
                "learning rate is never reached"
            )

    @property
    def tuning(self) -> Tuning | None:
        """What is trained where it is not all of the model; None where it is."""
        tuning = Tuning(self.lora, self.bottleneck, self.prefix, self.prompt, self.freeze)
        return None if tuning == Tuning() else tuning

    @property
    def rules(self) -> Rules:
        """What holds for the recipes of this stage."""
        return RULES[self.stage]

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.rules.updates(self)
