"""Floating-point operations of a model. The peaks they are measured against are in hardware.py."""

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import Tuning


def matmul_parameters(config: ModelConfig, head: int) -> int:
    """Parameters that every token is multiplied with: all but the embedding lookup, norms and biases.

    `head` is the output's width: the vocabulary, or 1 for a scalar model.
    """
    D, H, G, K, F = config.d_model, config.n_heads, config.n_kv_heads, config.k_dim, config.d_ff
    per_layer = D * H * K + 2 * D * G * K + H * K * D + 3 * D * F
    return config.n_layers * per_layer + D * head


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of a layer that every token is multiplied with."""
    return matmul_parameters(config, 0) // config.n_layers


def adapter_parameters(config: ModelConfig, tuning: Tuning) -> int:
    """Parameters of a model's adapters that every token is multiplied with: for each low-rank one, its rank
    times both sides of its matrix; for each bottleneck, twice its width times the model's."""
    D, F = config.d_model, config.d_ff
    H, G = config.n_heads * config.k_dim, config.n_kv_heads * config.k_dim
    sides = {"wq": D + H, "wk": D + G, "wv": D + G, "wo": H + D, "w_gate": D + F, "w_up": D + F}
    sides["w_down"] = F + D
    count = 0
    if tuning.lora is not None:
        count += tuning.lora.rank * sum(sides[name] for name in tuning.lora.targets)
    if tuning.bottleneck is not None:
        count += 2 * 2 * D * tuning.bottleneck.width
    return config.n_layers * count


def train_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    head: int | None = None,
    references: int = 0,
    tuning: Tuning | None = None,
) -> float:
    """Forward and backward: 6 per matmul parameter, plus causal attention; and a third of it, a forward pass,
    for each of the `references`, frozen models of the same shape.

    Of the 6, 2 are the forward pass, 2 the gradients of activations and 2 those of weights. What is not
    trained has none of the last, and layers below all that is trained have the forward pass alone.
    Attention's q k^T and p v cost 2 * 2 * H * K * T forward per token and layer, half of it under the causal
    mask, three times that with the backward pass (Chowdhery et al. 2022, appendix B, halved for causality);
    keys of a prefix or prompt are seen by all tokens.
    """
    tuning = tuning or Tuning()
    width = head if head is not None else config.vocab_size
    whole = matmul_parameters(config, width)
    keys = sequence_length + 2 * tuning.before
    attention = 6.0 * config.n_layers * config.n_heads * config.k_dim * keys
    reference = 2.0 * whole + 2 * config.n_layers * config.n_heads * config.k_dim * sequence_length
    if tuning.adapters:
        trained = 4.0 * whole + 6.0 * adapter_parameters(config, tuning)
    else:
        below = tuning.frozen_layers * layer_parameters(config)
        trained = 6.0 * whole - 2.0 * below
        if tuning.frozen_embeddings:
            trained -= 2.0 * below + 2.0 * config.d_model * width * (config.tie_embeddings and head is None)
            attention -= attention * tuning.frozen_layers / config.n_layers * 2 / 3
    return trained + attention + references * reference
