"""How long to train a model of a size, and what training one takes: the laws that recipes are held against.

C = 6 N D    FLOPs of training N parameters on D tokens (Kaplan et al. 2020, §2.1)
"""

from __future__ import annotations

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal by Hoffmann et al. 2022 ("Chinchilla", table 3: about 20 at every size)."""

KAPLAN_TOKENS_PER_PARAMETER = 1.7
"""What the older law came to at GPT-3's size: 300 B tokens for 175 B parameters (Kaplan et al. 2020; Brown et
al. 2020)."""

TRAINED_BYTES = 2 + 2 + 4 + 4 + 4
"""Bytes per parameter of classic mixed-precision Adam: parameters and gradients in half precision, a float32
copy, two moments (Rajbhandari et al. 2020, "ZeRO", §3.1)."""

INFERENCE_BYTES = 2
"""Bytes per parameter of a model that is only run, in half precision."""


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D."""
    return 6.0 * parameters * tokens


def optimal_tokens(parameters: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> float:
    """Tokens for which a model of this size is the best that their FLOPs buy."""
    return tokens_per_parameter * parameters


def optimal_parameters(flops: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> float:
    """The size that is best for a budget: C = 6 N D with D = 20 N gives N = sqrt(C / 120)."""
    return (flops / (6.0 * tokens_per_parameter)) ** 0.5


def classic_bytes(parameters: float, trained: int = 1, only_run: int = 0, shards: int = 1) -> float:
    """Bytes per device of models in the classic recipe, without activations.

    Args:
      parameters: of each model.
      trained: models with gradients and Adam, 16 bytes a parameter: PPO's actor and critic are two.
      only_run: models without, 2 bytes: PPO's reference and reward model are two, DPO's reference is one.
      shards: devices that share everything evenly (ZeRO-3).
    """
    return parameters * (trained * TRAINED_BYTES + only_run * INFERENCE_BYTES) / shards
