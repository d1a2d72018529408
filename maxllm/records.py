"""The PyTrees that flow between the parts of maxllm, and the legend of their dims.

An array's name ends in its dims, one letter each; einsum strings use the same letters in lower case.

    B  batch rows                 D  model width              L  layers
    T  time: query positions      H  query heads              F  feed-forward width
    S  time: key positions        G  key/value heads          V  vocabulary
    P  prompt positions           K  head width               C  completions per prompt
    R  response positions         Q  query heads per key/value head (H = G * Q)

A segment id of 0 marks padding; documents packed into one row carry 1, 2, …, and attention never crosses
them. A metric is a `(sum, count)` pair: it is divided once, over the global batch, by whoever prints it.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Array = jax.Array | Any
"""A jax.Array under jit; on the host, a numpy array of the same shape."""

Params = Any
"""A PyTree of parameters (nested dict of arrays)."""

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Metric name -> (sum, count)."""


class LmBatch(struct.PyTreeNode):
    """Next-token prediction: pretraining (weights on all tokens) and SFT (weights on replies)."""

    tokens_BT: Array
    """int32 input ids."""
    targets_BT: Array
    """int32 id to predict after each input."""
    loss_weights_BT: Array
    """float32; 0 where the target does not count."""
    segment_ids_BT: Array
    """int32; 0 is padding."""
    positions_BT: Array
    """int32 position inside its document."""


class PairBatch(struct.PyTreeNode):
    """C completions of each prompt, best first (C = 2: chosen, rejected); right-padded."""

    tokens_BCT: Array
    """int32 prompt followed by completion."""
    lengths_BC: Array
    """int32 tokens before the padding; the score is read at lengths - 1."""
    weights_B: Array
    """float32 weight of the prompt in the loss; 0 for a filler row."""


class ReplyPairBatch(struct.PyTreeNode):
    """Pairs, and where their completions begin: the tokens from there on count, the prompt's do not."""

    pairs: PairBatch
    starts_BC: Array
    """int32 tokens before each completion."""


class PromptBatch(struct.PyTreeNode):
    """Prompts to be completed; left-padded so that every row continues at the same slot."""

    tokens_BP: Array
    """int32 ids, padding first."""
    lengths_B: Array
    """int32 real tokens at the end of each row."""
    row_B: Array | None = None
    """int32 number of each prompt's row in the data, where there is somebody to look it up."""


class Rollout(struct.PyTreeNode):
    """Prompts and what was generated after them."""

    tokens_BT: Array
    """int32, T = P + R: left-padded prompt, then the response, then padding."""
    segment_ids_BT: Array
    """int32; 1 on prompt and response, 0 on padding."""
    positions_BT: Array
    """int32 position inside the row's real tokens."""
    logps_BR: Array
    """float32 log-probability of each response token under the sampling distribution before top-k/top-p."""
    mask_BR: Array
    """float32; 1 on response tokens, the stop token included."""
    finished_B: Array
    """bool; the response ended with a stop token."""
    row_B: Array | None = None
    """int32 number of each prompt's row in the data, if the prompts had one."""


class Experience(struct.PyTreeNode):
    """Rollouts with everything PPO's update needs; each `_BR` array is float32."""

    rollout: Rollout
    old_logps_BR: Array
    """Log-probabilities under the policy that made the rollout, recomputed by the training graph."""
    old_values_BR: Array
    """The critic's values at rollout time."""
    advantages_BR: Array
    """GAE advantages, whitened over all response tokens."""
    returns_BR: Array
    """Advantages before whitening, plus old values."""
