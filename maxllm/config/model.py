"""The model: its shape, and how it computes."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from maxllm.config.section import Effect, Section


class RopeScaling(Section):
    """Stretches rotary embeddings to a longer context; `type` decides which of the fields are read."""

    effect: ClassVar[Effect] = Effect.MODEL

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

    effect: ClassVar[Effect] = Effect.MODEL

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
    embedding_dropout: Annotated[float, Effect.TRAINING] = Field(
        0.0, ge=0, lt=1, description="Dropout on the token embeddings."
    )
    embedding_noise: Annotated[float, Effect.TRAINING] = Field(
        0.0,
        ge=0,
        description="NEFTune's alpha, 5 to 15: uniform noise of up to alpha / sqrt(tokens of the text x "
        "d_model) on the embeddings in training.",
    )
    attention_dropout: Annotated[float, Effect.TRAINING] = Field(
        0.0, ge=0, lt=1, description="Dropout on the attention probabilities."
    )
    residual_dropout: Annotated[float, Effect.TRAINING] = Field(
        0.0, ge=0, lt=1, description="Dropout on each branch before it joins the residual."
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Effect.TRAINING] = Field(
        "auto",
        description="Compute type of matmuls; auto is bfloat16 where the hardware has it, float32 elsewhere. "
        "Parameters, norms, softmax and logits are float32.",
    )
    attention: Annotated[Literal["auto", "xla", "splash", "cudnn"], Effect.COMPUTATION] = Field(
        "auto",
        description="Kernel: splash on TPU, cudnn on NVIDIA's GPUs in bfloat16, xla anywhere; auto takes the "
        "hardware's, or xla where attention_dropout or position=alibi is on, or on GPUs in float32.",
    )
    context_attention: Annotated[Literal["gather", "ring"], Effect.COMPUTATION] = Field(
        "gather",
        description="Over mesh.context: every device gathers all keys and values, or they travel around, and "
        "no device holds more than its share.",
    )
    remat: Annotated[Literal["none", "dots", "full", "offload"], Effect.COMPUTATION] = Field(
        "none",
        description="The backward pass keeps all activations (none), matmuls' results (dots), each layer's "
        "input (full), or that in host memory (offload), and recomputes the rest.",
    )
    keep: Annotated[tuple[Activation, ...], Effect.COMPUTATION] = Field(
        (), description="With remat=full or offload: results in each layer that are kept on the device too."
    )
    keep_in_host: Annotated[tuple[Activation, ...], Effect.COMPUTATION] = Field(
        (), description="With remat=full or offload: results in each layer that are kept in host memory."
    )
    pipeline_microbatches: Annotated[int | None, Effect.COMPUTATION] = Field(
        None,
        gt=0,
        description="Parts of a (micro)batch that pass through the stages of mesh.stage one after another; "
        "a multiple of them. As many as stages when absent.",
    )
    pipeline_rounds: Annotated[int, Effect.COMPUTATION] = Field(
        1,
        gt=0,
        description="Times that a microbatch passes around mesh.stage; each stage has as many blocks of "
        "layers. More make the bubble smaller and exchanges more frequent; each block is then recomputed in "
        "the backward pass, beside what `remat` says of its layers.",
    )
    scan_unroll: Annotated[int, Effect.COMPUTATION] = Field(
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

    def computed_in(self, dtype: Literal["float32", "bfloat16"]) -> ModelConfig:
        """The model with this compute type, unless it names one itself."""
        return self.model_copy(update={"dtype": dtype}) if self.dtype == "auto" else self

    @property
    def kernel(self) -> Literal["auto", "xla", "splash", "cudnn"]:
        """`attention`, but xla where no other kernel has what the model asks for."""
        return "xla" if self.attention_dropout or self.position == "alibi" else self.attention
