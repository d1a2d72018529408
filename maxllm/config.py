"""The configuration of a run: typed, frozen, nested, every field described.

A recipe is a YAML file with these sections; `key=value` words on the command line override it
(`optimizer.learning_rate=3e-4`). The parsing and its error messages are in `recipe.py`.
"""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

Name = Annotated[str, StringConstraints(min_length=1)]
"""The name of a file, folder or source."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, validate_default=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "validators of fields know their field"
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"was given {value}, which is neither a number nor a text")
        return value


class RopeScaling(Section):
    """Stretches rotary embeddings to a longer context; `type` decides which of the fields are read."""

    type: Literal["linear", "dynamic", "llama3", "yarn"] = Field(
        "llama3", description="Rule: position interpolation, dynamic NTK, Llama 3.1's, or YaRN."
    )
    factor: float = Field(8.0, ge=1, description="How many times the original context is stretched.")
    original_max_seq_len: int = Field(
        8192, gt=0, description="Context the model was first trained with, tokens (llama3, yarn)."
    )
    low_freq_factor: float = Field(
        1.0, gt=0, description="Wavelengths above original/low are fully scaled (llama3)."
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="Wavelengths below original/high stay unscaled (llama3)."
    )
    beta_fast: float = Field(
        32.0, gt=0, description="Pairs that turn more often in the original context stay unscaled (yarn)."
    )
    beta_slow: float = Field(1.0, gt=0, description="Pairs that turn less often are fully scaled (yarn).")
    attention_factor: float | None = Field(
        None, gt=0, description="Multiplies cos and sin; 0.1 ln(factor) + 1 when absent (yarn)."
    )
    truncate: bool = Field(True, description="Round the bounds of the blend to whole pairs (yarn).")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        if self.beta_fast < self.beta_slow:
            raise ValueError("beta_fast must not be less than beta_slow")
        return self


Activation = Literal["q", "k", "v", "gate", "up"]
"""What a layer computes on its way and may keep: q and k as attention reads them, after RoPE. Not attention's
result: its kernels' backward passes need their forward pass again all the same, for the log-sum-exp."""


class ModelConfig(Section):
    """A LLaMA-architecture decoder."""

    vocab_size: int = Field(gt=0, description="Rows of the embedding table; must equal the tokenizer's size.")
    d_model: int = Field(gt=0, description="Width of the residual stream (D).")
    n_layers: int = Field(gt=0, description="Decoder layers (L).")
    n_heads: int = Field(gt=0, description="Query heads (H).")
    n_kv_heads: int = Field(gt=0, description="Key/value heads (G): equal to n_heads for MHA, 1 for MQA.")
    head_dim: int | None = Field(
        None, gt=0, description="Width of a head (K); d_model / n_heads when absent."
    )
    d_ff: int = Field(gt=0, description="Hidden width of the SwiGLU feed-forward (F).")
    max_seq_len: int = Field(
        gt=0,
        description="Longest sequence the model is meant for, tokens; before the stretching of "
        "rope_scaling.type=linear and dynamic, after that of llama3 and yarn (as in Hugging Face).",
    )
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon inside RMSNorm's square root.")
    position: Literal["rope", "alibi"] = Field(
        "rope",
        description="How attention knows positions: rotary embeddings, or a penalty on the distance, linear "
        "with a slope for each head (ALiBi), which the kernel xla alone has.",
    )
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Context extension; absent for none.")
    attention_bias: Literal["none", "qkv", "qkvo"] = Field(
        "none", description="Biases on the attention's projections: qkv as in Qwen2, qkvo with the output's."
    )
    mlp_bias: bool = Field(False, description="Biases on the feed-forward's projections.")
    qk_norm: bool = Field(False, description="RMSNorm on every query and key head before RoPE (Qwen3).")
    sliding_window: int | None = Field(
        None, gt=0, description="A token sees this many tokens, itself included; all when absent (Mistral)."
    )
    tie_embeddings: bool = Field(False, description="Use the embedding table as the output projection.")
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of initial weights; of wo and w_down: init_std / sqrt(2 n_layers).",
    )
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the token embeddings.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the attention probabilities.")
    residual_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on each branch before it joins the residual."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Compute type of matmuls; parameters, norms, softmax and logits are float32.",
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        "auto",
        description="Kernel: splash on TPU, cudnn on NVIDIA's GPUs in bfloat16, xla anywhere; auto takes the "
        "hardware's, or xla where attention_dropout or position=alibi is on, or on GPUs in float32.",
    )
    context_attention: Literal["gather", "ring"] = Field(
        "gather",
        description="Over mesh.context: every device gathers all keys and values, or they travel around, and "
        "no device holds more than its share.",
    )
    remat: Literal["none", "dots", "full", "offload"] = Field(
        "none",
        description="The backward pass keeps all activations (none), matmuls' results (dots), each layer's "
        "input (full), or that in host memory (offload), and recomputes the rest.",
    )
    keep: tuple[Activation, ...] = Field(
        (), description="With remat=full or offload: results in each layer that are kept on the device too."
    )
    keep_in_host: tuple[Activation, ...] = Field(
        (), description="With remat=full or offload: results in each layer that are kept in host memory."
    )
    pipeline_microbatches: int | None = Field(
        None,
        gt=0,
        description="Parts of a (micro)batch that pass through the stages of mesh.stage one after another; "
        "a multiple of them. As many as stages when absent.",
    )
    pipeline_rounds: int = Field(
        1,
        gt=0,
        description="Times that a microbatch passes around mesh.stage; each stage has as many blocks of "
        "layers. More make the bubble smaller and exchanges more frequent; each block is then recomputed in "
        "the backward pass, beside what `remat` says of its layers.",
    )
    scan_unroll: int = Field(
        1, ge=1, description="Layers unrolled per iteration of the layer scan; n_layers is fastest on CPU."
    )

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}; give head_dim")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.k_dim % 2 and self.position == "rope":
            raise ValueError(f"head_dim={self.k_dim} is odd; rotary embeddings need pairs")
        if self.attention in ("splash", "cudnn") and self.kernel == "xla":
            missing = "attention_dropout" if self.attention_dropout else "position=alibi"
            raise ValueError(f"attention={self.attention} has no {missing}; give attention=xla")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError("attention=cudnn knows no float32; give dtype=bfloat16 or attention=xla")
        if self.context_attention == "ring" and (self.sliding_window or self.attention_dropout):
            raise ValueError(
                "context_attention=ring has no sliding_window and no attention_dropout; give gather"
            )
        if self.position == "alibi" and self.context_attention == "ring":
            raise ValueError("context_attention=ring has no position=alibi; give gather")
        if self.position == "alibi" and self.rope_scaling is not None:
            raise ValueError("rope_scaling stretches rotary embeddings; leave it out with position=alibi")
        if (self.keep or self.keep_in_host) and self.remat not in ("full", "offload"):
            raise ValueError(
                f"keep and keep_in_host are exceptions from remat=full, not from remat={self.remat}"
            )
        for name, count in Counter((*self.keep, *self.keep_in_host)).items():
            if count > 1:
                raise ValueError(f"{name} is named more than once in keep and keep_in_host; give it once")
        if self.n_layers % self.scan_unroll:
            raise ValueError(f"scan_unroll={self.scan_unroll} does not divide n_layers={self.n_layers}")
        return self

    @property
    def k_dim(self) -> int:
        """Width of one head (K)."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def context(self) -> int:
        """Tokens that the model reads, stretched as `rope_scaling` says.

        Hugging Face's configurations keep the original length beside linear and dynamic scaling, and state
        the stretched one beside llama3; beside yarn both are seen, and the longer is meant.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.type == "llama3":
            return self.max_seq_len
        original = scaling.original_max_seq_len if scaling.type == "yarn" else self.max_seq_len
        return max(self.max_seq_len, int(original * scaling.factor))

    @property
    def kernel(self) -> Literal["auto", "xla", "splash", "cudnn"]:
        """`attention`, but xla where no other kernel has what the model asks for."""
        return "xla" if self.attention_dropout or self.position == "alibi" else self.attention


class RunConfig(Section):
    """One run of one stage: its folder, length and cadence."""

    dir: Name = Field(description="Run folder: config.yaml, metrics.jsonl, summary.json, checkpoints/.")
    hardware: Name | None = Field(
        None, description="The machine that the recipe is meant for, as `plan` names it: v5p-16, h100x8."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seeds initialization, data order, dropout and sampling."
    )
    day: datetime.date | None = Field(
        None,
        description="What chat templates take for today, YYYY-MM-DD; the day on which the run began when "
        "absent.",
    )
    steps: int = Field(gt=0, description="Optimizer steps (PPO: rollout-and-update iterations).")
    log_every: int = Field(10, gt=0, description="Steps between two lines of metrics.jsonl.")
    eval_every: int = Field(100, gt=0, description="Steps between two evaluations on held-out data.")
    checkpoint_every: int = Field(100, gt=0, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(
        2, gt=0, description="Latest checkpoints kept; the best evaluated one is kept besides."
    )
    max_nonfinite_steps: int = Field(
        5, ge=0, description="Consecutive skipped (non-finite) updates after which the run fails."
    )

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"{value} is not a local path; mount the bucket (gcsfuse) and give its folder")
        return value


class StartConfig(Section):
    """Run folders this stage starts from."""

    policy: Name | None = Field(
        None,
        description="Run folder of the language model to start from (SFT: pretrain's; RM, DPO, PPO: SFT's; "
        "any: a converted one).",
    )
    reward: Name | None = Field(None, description="Run folder of the reward model (PPO).")
    checkpoint: Literal["latest", "best"] = Field(
        "latest",
        description="Which checkpoint of those runs: the newest, or the best by its held-out figure.",
    )


class TokenizerConfig(Section):
    """The SentencePiece tokenizer."""

    path: Name = Field(
        description="A tokenizer.model, or a folder with tokenizer.json; `prepare` trains it if absent."
    )
    vocab_size: int = Field(4096, ge=512, description="Pieces to train, special tokens included.")
    algorithm: Literal["bpe", "unigram", "byte_bpe"] = Field(
        "bpe", description="SentencePiece BPE or unigram, or byte-level BPE (then `path` is a folder)."
    )
    character_coverage: float = Field(
        0.9995,
        gt=0.5,
        le=1,
        description="Share of characters that get a piece of their own; the rest fall back to bytes.",
    )
    sample_bytes: int = Field(
        16_000_000,
        gt=0,
        description="UTF-8 bytes of training documents, evenly spread over all, that the tokenizer is "
        "trained on; that takes 4 times as much memory for bpe, 20 times for unigram.",
    )


class CleanConfig(Section):
    """What makes a document unfit; the thresholds are explained in data/clean.py."""

    min_chars: int = Field(20, ge=0, description="Documents with fewer non-blank characters are dropped.")
    max_symbol_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest share of non-blank characters that are not letters of any script.",
    )
    max_repeated_line_share: float = Field(
        0.3, gt=0, le=1, description="Largest share of lines that repeat an earlier line (Gopher)."
    )


class DataConfig(Section):
    """Where the stage's data comes from."""

    sources: tuple[Name, ...] = Field(
        (),
        description="Files, folders, slice:NAME, tfds:NAME@SPLIT; after pretrain JSONL, tasks:SPLIT:COUNT.",
    )
    heldout_sources: tuple[Name, ...] = Field(
        (), description="Held-out data of the same form; empty: a share of `sources` is held out."
    )
    heldout_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of documents or rows held out when heldout_sources is empty."
    )
    text_field: str = Field("text", description="Field that holds a document in JSONL and TFDS rows.")
    prepared_dir: Name | None = Field(
        None, description="Folder of the packed corpus that `prepare` writes and `pretrain` reads."
    )
    clean: CleanConfig = Field(default_factory=CleanConfig, description="Document filters (pretrain).")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="Largest share of unusable rows before the run refuses to start."
    )


class BatchConfig(Section):
    """The shape of a global batch."""

    rows: int = Field(gt=0, description="Sequences (PPO: prompts) per step over all devices.")
    sequence_length: int = Field(gt=1, description="Tokens per sequence (T).")
    microbatches: int = Field(1, gt=0, description="Parts a batch is split into for gradient accumulation.")


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "muon"] = Field(
        "adamw",
        description="AdamW; Adafactor, whose second moment is a row and a column of each matrix and which "
        "has no first; or Muon for the layers' matrices with AdamW for the rest.",
    )
    learning_rate: float = Field(
        3e-4,
        gt=0,
        description="Peak learning rate; adafactor's is a share of each matrix's root mean square (1e-2).",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after warmup.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warmup from 0.")
    final_share: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, on matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's decay of its one moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which AdamW's two moments and Muon's one are kept; updates are computed in "
        "float32. With bfloat16, beta2 is 0.98 at most: above that, rounding undoes the decay.",
    )
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the layers' gradients until they are summed or clipped; bfloat16 halves them.",
    )

    @model_validator(mode="after")
    def _moments(self) -> Self:
        if self.moment_dtype == "float32":
            return self
        if self.name == "adafactor":
            raise ValueError("adafactor keeps no moment that moment_dtype=bfloat16 could halve; leave it out")
        if self.beta2 > 0.98:
            raise ValueError(
                f"moment_dtype=bfloat16 rounds the decay of beta2={self.beta2} away; give beta2=0.98 or less"
            )
        return self


Offload = Literal["none", "optimizer", "parameters"]


class MeshConfig(Section):
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    data: int = Field(-1, ge=-1, description="Replicas that each see other rows.")
    fsdp: int = Field(1, ge=-1, description="Shards of the state, as `zero` says; rows are split here too.")
    stage: int = Field(1, ge=-1, description="Stages of a pipeline, each with a share of the layers.")
    context: int = Field(
        1, ge=-1, description="Shards of every row's positions, for long sequences; state is split too."
    )
    tensor: int = Field(1, ge=-1, description="Shards of heads, feed-forward and vocabulary.")
    slices: int = Field(
        1, gt=0, description="TPU slices, or groups of nodes, that only a slow network joins; 1 for none."
    )
    across: Literal["data", "stage"] = Field(
        "data", description="Axis that goes over the slow network; each slice has an equal part of it."
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3,
        description="What fsdp and context split (ZeRO): nothing (0), optimizer state (1), gradients too "
        "(2), parameters too (3).",
    )
    offload: Offload = Field(
        "none",
        description="What lies in the host's memory until a step reads it: nothing, the optimizer's state, "
        "or the layers' matrices too, which are fetched layer by layer.",
    )

    @property
    def sizes(self) -> list[int]:
        """Sizes in the order of the mesh's axes."""
        return [self.data, self.fsdp, self.stage, self.context, self.tensor]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if 0 in self.sizes or self.sizes.count(-1) > 1:
            raise ValueError("axis sizes are positive, and at most one is -1")
        return self


class GenerationConfig(Section):
    """Decoding."""

    max_new_tokens: int = Field(
        64,
        gt=0,
        description="Most tokens generated (R); the prompt may take the rest of batch.sequence_length.",
    )
    context: int | None = Field(
        None,
        gt=1,
        description="Tokens of a prompt and its reply together, in generate and chat; the model's context "
        "when absent, and beyond it only with a warning.",
    )
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; otherwise logits are divided by it, from 1e-6 on."
    )
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0 for all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample within the smallest set of this probability.")

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        # Logits of some thousands, and the -1e30 of ids without a token, stay finite in float32.
        if 0 < value < 1e-6:
            raise ValueError(f"{value:g} is too small to divide logits by; 0 is greedy, 1e-6 the least")
        return value


LoraTarget = Literal["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"]


class LoraConfig(Section):
    """Low-rank adapters: SFT trains them alone, the model stays as it is (Hu et al. 2021)."""

    rank: int = Field(16, gt=0, description="Rank r of every adapter.")
    alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget), min_length=1, description="Weights that have one; all linear layers by default."
    )

    @property
    def scale(self) -> float:
        """alpha / r"""
        return self.alpha / self.rank


class RewardConfig(Section):
    """Reward-model training."""

    margin: float = Field(
        0.0, ge=0, description="Subtracted from every score difference inside the pairwise loss."
    )
    centering: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)^2, which keeps scores near 0."
    )


class DpoConfig(Section):
    """DPO, which needs no reward model (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0, description="How dearly departing from the reference is paid for.")
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="Loss of a pair: DPO's, or IPO's square, which has a margin of 1 / (2 beta) to reach.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled the wrong way round (sigmoid)."
    )
    nll: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen completion's negative log-likelihood, a mean over its tokens: it "
        "keeps that from becoming less likely (Pang et al. 2024).",
    )

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("loss=ipo has no label_smoothing; leave it at 0, or give loss=sigmoid")
        return self


class PpoConfig(Section):
    """PPO on a reward model (Schulman 2017; Ziegler 2019; Ouyang 2022)."""

    epochs: int = Field(2, gt=0, description="Passes over each batch of rollouts.")
    minibatches: int = Field(1, gt=0, description="Updates per pass.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    clip: float = Field(0.2, gt=0, description="Half-width of the ratio clip.")
    value_clip: float = Field(0.2, gt=0, description="Half-width of the value clip.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty (k1) in the reward.")
    score_clip: float = Field(10.0, gt=0, description="Scores of the reward model are clipped to +- this.")
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a response that never stops."
    )
    critic_learning_rate: float = Field(
        1e-4, gt=0, description="Peak learning rate of the critic; its other settings are the optimizer's."
    )


Stage = Literal["pretrain", "convert", "sft", "reward", "dpo", "ppo"]


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
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Decoding.")
    lora: LoraConfig | None = Field(None, description="Train adapters instead of the model (SFT).")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="Reward-model loss.")
    dpo: DpoConfig = Field(default_factory=DpoConfig, description="DPO.")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="PPO.")

    @model_validator(mode="after")
    def _stage_needs(self) -> Self:
        if self.stage == "pretrain":
            if self.start.policy is None and (self.model is None or self.tokenizer is None):
                raise ValueError("a pretrain recipe needs the sections model and tokenizer, or start.policy")
            if self.data.prepared_dir is None:
                raise ValueError("a pretrain recipe needs data.prepared_dir")
        elif self.stage == "convert":
            if self.model is None:
                raise ValueError("a converted model's folder needs the section model")
        elif self.start.policy is None:
            raise ValueError(f"a {self.stage} recipe needs start.policy, the run folder it starts from")
        if self.lora is not None and self.stage != "sft":
            raise ValueError(f"lora trains adapters in sft; a {self.stage} recipe cannot have it yet")
        if self.stage == "ppo" and self.start.reward is None:
            raise ValueError("a ppo recipe needs start.reward, the reward model's run folder")
        if self.mesh.stage != 1 and self.optimizer.gradient_dtype != "float32":
            raise ValueError(
                "the stages of a pipeline sum gradients over microbatches: mesh.stage needs "
                "optimizer.gradient_dtype=float32"
            )
        if self.mesh.offload != "none" and self.stage == "ppo":
            raise ValueError("ppo keeps its four models on the device: give mesh.offload=none")
        if self.mesh.offload == "parameters" and (self.lora is not None or self.mesh.stage != 1):
            raise ValueError(
                "mesh.offload=parameters is for training a whole model without a pipeline; with lora or "
                "mesh.stage give mesh.offload=optimizer"
            )
        if self.batch.rows % self.batch.microbatches:
            raise ValueError(
                f"batch.microbatches={self.batch.microbatches} does not divide batch.rows={self.batch.rows}"
            )
        return self

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        updates = self.updates
        if self.optimizer.warmup_steps >= updates and self.optimizer.warmup_steps > 0:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not less than the run's {updates} "
                "updates, so the peak learning rate is never reached"
            )
        return self

    @model_validator(mode="after")
    def _ppo(self) -> Self:
        if self.stage != "ppo":
            return self
        if self.batch.rows % (self.ppo.minibatches * self.batch.microbatches):
            raise ValueError(
                f"ppo.minibatches={self.ppo.minibatches} x batch.microbatches={self.batch.microbatches} "
                f"does not divide batch.rows={self.batch.rows}"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        if self.stage != "ppo":
            return self.run.steps
        return self.run.steps * self.ppo.epochs * self.ppo.minibatches
