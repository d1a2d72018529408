"""Floating-point operations of a model. The peaks they are measured against are in hardware.py."""

from maxllm.config.lora import LoraConfig
from maxllm.config.model import ModelConfig


def matmul_parameters(config: ModelConfig, head: int) -> int:
    """Parameters that every token is multiplied with: all but the embedding lookup, norms and biases.

    `head` is the output's width: the vocabulary, or 1 for a scalar model.
    """
    D, H, G, K, F = config.d_model, config.n_heads, config.n_kv_heads, config.k_dim, config.d_ff
    per_layer = D * H * K + 2 * D * G * K + H * K * D + 3 * D * F
    return config.n_layers * per_layer + D * head


def adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of a model's adapters: for each matrix that has one, its rank times both of its sides."""
    D, F = config.d_model, config.d_ff
    H, G = config.n_heads * config.k_dim, config.n_kv_heads * config.k_dim
    sides = {"wq": D + H, "wk": D + G, "wv": D + G, "wo": H + D, "w_gate": D + F, "w_up": D + F}
    sides["w_down"] = F + D
    return config.n_layers * lora.rank * sum(sides[name] for name in lora.targets)


def train_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    head: int | None = None,
    references: int = 0,
    lora: LoraConfig | None = None,
) -> float:
    """Forward and backward: 6 per matmul parameter, plus causal attention; and a third of it, a forward pass,
    for each of the `references`, frozen models of the same shape.

    Of the 6, 2 are the forward pass, 2 the gradients of activations and 2 those of weights, which a model
    that trains adapters (`lora`) has for these alone. Attention's q k^T and p v cost 2 * 2 * H * K * T
    forward per token and layer, half of it under the causal mask, three times that with the backward pass
    (Chowdhery et al. 2022, appendix B, halved for causality).
    """
    attention = 6 * config.n_layers * config.n_heads * config.k_dim * sequence_length
    whole = matmul_parameters(config, config.vocab_size if head is None else head)
    multiplied = 6.0 * whole if lora is None else 4.0 * whole + 6.0 * adapter_parameters(config, lora)
    return multiplied + attention + references * (2.0 * whole + attention / 3)
