"""Floating-point operations of a model, and the peaks they are measured against."""

from maxllm.config import ModelConfig

PEAK_FLOPS = {
    # Dense bfloat16, per JAX device, from the vendors' data sheets.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}
"""`jax.Device.device_kind` -> peak FLOP/s. A device that is not here has no MFU."""


def matmul_parameters(config: ModelConfig, head: int) -> int:
    """Parameters that every token is multiplied with: all but the embedding lookup, norms and biases.

    `head` is the output's width: the vocabulary, or 1 for a scalar model.
    """
    D, H, G, K, F = config.d_model, config.n_heads, config.n_kv_heads, config.k_dim, config.d_ff
    per_layer = D * H * K + 2 * D * G * K + H * K * D + 3 * D * F
    return config.n_layers * per_layer + D * head


def train_flops_per_token(
    config: ModelConfig, sequence_length: int, head: int | None = None, references: int = 0
) -> float:
    """Forward and backward: 6 per matmul parameter, plus causal attention; and a third of it, a forward pass,
    for each of the `references`, frozen models of the same shape.

    Attention's q k^T and p v cost 2 * 2 * H * K * T forward per token and layer, half of it under the causal
    mask, three times that with the backward pass (Chowdhery et al. 2022, appendix B, halved for causality).
    """
    attention = 6 * config.n_layers * config.n_heads * config.k_dim * sequence_length
    trained = 6.0 * matmul_parameters(config, config.vocab_size if head is None else head) + attention
    return trained * (1 + references / 3)
