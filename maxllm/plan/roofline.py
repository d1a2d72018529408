"""The least time that a step can take, from three floors: arithmetic, memory traffic, links.

A bound, not a prediction: it takes the three to overlap perfectly and each to run at its peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxllm.config.model import Activation, ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.tuning import Tuning
from maxllm.plan.flops import adapter_parameters, matmul_parameters, train_flops_per_token
from maxllm.plan.hardware import Chip

ADAMW_BYTES = 4 * 7
"""Bytes moved per parameter in an AdamW update in float32: gradient, parameter and two moments read, three
written."""


def update_bytes(optimizer: OptimizerConfig, matrices: float) -> float:
    """Bytes that an update moves per parameter: the gradient is read, parameter and moments are read and
    written. AdamW has two moments of every parameter; Muon one of the layers' matrices, whose share of all
    parameters is `matrices`, and AdamW's of the others; Adafactor's rows and columns are next to nothing.
    """
    moment = 2 * (2 if optimizer.moment_dtype == "bfloat16" else 4)
    match optimizer.name:
        case "adamw":
            moments = 2.0
        case "muon":
            moments = 2 - matrices
        case "adafactor":
            moments = 0.0
    return 4 * 3 + moments * moment


@dataclass(frozen=True)
class Bound:
    """Seconds of a step, at least."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The highest floor."""
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> str:
        """Which floor it is."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def step_bound(
    chip: Chip,
    *,
    model: ModelConfig,
    sequence_length: int,
    tokens_per_device: float,
    parameter_shard: float,
    gathered_parameters: float,
    sent_bytes: float,
    passes: int,
    between_nodes_bytes: float = 0.0,
    idle: float = 0.0,
    references: int = 0,
    head: int | None = None,
    tuning: Tuning | None = None,
    update_bytes: float = ADAMW_BYTES,
) -> Bound:
    """The bound of a training step on one device.

    Args:
      chip: the device.
      model: the model.
      sequence_length: tokens of a row.
      tokens_per_device: tokens of the batch divided by the devices.
      parameter_shard: parameters whose optimizer state this device holds.
      gathered_parameters: parameters that this device multiplies with, whoever holds them.
      sent_bytes: of collectives, by the compiled program.
      passes: times that the weights are read for matmuls: 3, or 4 with recomputation; one less for weights
        that have no gradients.
      between_nodes_bytes: those of sent_bytes that leave the node, over the slower network.
      idle: share of the step in which the device has nothing to do: the bubble of a pipeline.
      references: frozen models of the same shape, each with a forward pass of its own.
      head: the output's width; the vocabulary when absent.
      tuning: what is trained, where that is not all of the model.
      update_bytes: moved per parameter by the optimizer.
    """
    frozen = references * train_flops_per_token(model, sequence_length) / 3
    trained = hardware_flops_per_token(model, sequence_length, head, tuning)
    flops = (trained + frozen) * tokens_per_device
    memory = parameter_shard * update_bytes + gathered_parameters * 2 * (passes + references)
    links = sent_bytes / chip.link_bandwidth
    if chip.node_bandwidth is not None:
        links = max(links, between_nodes_bytes / chip.node_bandwidth)
    return Bound(flops / chip.flops / (1 - idle), memory / chip.hbm_bandwidth, links)


def hardware_flops_per_token(
    model: ModelConfig, sequence_length: int, head: int | None = None, tuning: Tuning | None = None
) -> float:
    """Forward, backward, and what `remat` computes again: each layer's forward but its last matmul (w_down,
    and the second of its adapter), whose result the backward pass does not read, and matmuls whose results
    `keep` and `keep_in_host` name; and attention once more."""
    flops = train_flops_per_token(model, sequence_length, head, tuning=tuning)
    if model.remat in ("none", "dots"):
        return flops
    kept = model.d_ff + sum(widths_of(model)[name] for name in (*model.keep, *model.keep_in_host))
    layers = matmul_parameters(model, 0) - model.n_layers * model.d_model * kept
    attended = model.n_layers
    if tuning is not None:
        layers += adapter_parameters(model, tuning)
        if tuning.lora is not None:
            layers -= model.n_layers * model.d_model * tuning.lora.rank * ("w_down" in tuning.lora.targets)
        if tuning.bottleneck is not None:  # the last of each layer is not read by what comes after it
            layers -= model.n_layers * model.d_model * tuning.bottleneck.width
        if tuning.frozen_embeddings:  # no backward pass through what is below
            layers -= layers * tuning.frozen_layers // model.n_layers
            attended -= tuning.frozen_layers
    attention = 2 * attended * model.n_heads * model.k_dim * sequence_length
    return flops + 2 * layers + attention


def widths_of(model: ModelConfig) -> dict[Activation, int]:
    """Numbers per token of what a layer may keep; the matmul of each has d_model times as many weights."""
    q, kv = model.n_heads * model.k_dim, model.n_kv_heads * model.k_dim
    return {"q": q, "k": kv, "v": kv, "gate": model.d_ff, "up": model.d_ff}
