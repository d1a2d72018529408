"""Memory and exchanges of a training step by arithmetic, for `plan --estimate` and `plan --search`.

Every term is something that the program holds, named and sized by what it is. Which of them are there at once
was read in TPU's schedule of Llama-2-7B's step, eight layers deep, on v5p. The sum is held against compiled
peaks in tests/plan/test_estimate.py. Nothing here imports JAX: an estimate takes as long as reading a recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.plan.hardware import Hardware, hardware_of
from maxllm.plan.roofline import Bound, step_bound, update_bytes, widths_of

PART_BYTES = 1 << 28
"""Logits that the head's loss holds at once (losses/linear.py, which needs JAX)."""

LANES = 128
"""Numbers in a TPU's vector lane: splash keeps a row's log-sum-exp that many times."""

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layout:
    """A mesh and what it splits."""

    data: int
    fsdp: int
    context: int
    tensor: int
    zero: int

    @property
    def shards(self) -> int:
        """Shards of what ZeRO splits, beside tensor parallelism."""
        return self.fsdp * self.context

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "stage": 1,
            "context": self.context,
            "tensor": self.tensor,
        }


@dataclass(frozen=True)
class Estimate:
    """What a step needs; bytes are per device."""

    memory: dict[str, float]
    """Term -> bytes, of what is there at the peak."""
    sent: dict[str, float]
    """Exchange -> bytes that a device sends in a step."""
    parameters: int
    bound: Bound

    @property
    def peak_bytes(self) -> int:
        """All terms."""
        return int(sum(self.memory.values()))

    @property
    def sent_bytes(self) -> int:
        """All exchanges."""
        return int(sum(self.sent.values()))


def run(config: Config, hardware_name: str | None) -> dict[str, Any]:
    """The figures of `maxllm plan --estimate`; bytes are per device.

    Raises:
      UserError: the recipe is not of a kind that can be estimated, or does not divide the machine.
    """
    model, hardware = model_of(config), machine_of(config, hardware_name)
    layout = layout_of(config.mesh, hardware)
    if problem := obstacle(config, model, layout):
        raise UserError(f"this recipe does not go onto {hardware.name}: {problem}")
    found = estimate(config, model, layout, hardware)
    tokens = config.batch.rows * config.batch.sequence_length
    return {
        "hardware": hardware.name,
        "devices": hardware.devices,
        "links": hardware.links,
        "mesh": layout.sizes,
        "parameters": found.parameters,
        "fits": found.peak_bytes <= hardware.chip.hbm_bytes,
        "hbm_bytes": hardware.chip.hbm_bytes,
        "peak_bytes": found.peak_bytes,
        "memory": {name: int(size) for name, size in found.memory.items()},
        "sent": {name: int(size) for name, size in found.sent.items()},
        "step_seconds_bound": found.bound.seconds,
        "bound_by": found.bound.by,
        "tokens_per_second": tokens / found.bound.seconds,
    }


def machine_of(config: Config, name: str | None) -> Hardware:
    """The machine by its name, or the recipe's own.

    Raises:
      UserError: there is neither, or it is no TPU.
    """
    if name is None and config.run.hardware is None:
        raise UserError("this recipe names no machine: give --hardware, such as v5p-16, v6e:4x4 or v5e-256")
    hardware = hardware_of(name or config.run.hardware or "")
    if hardware.chip.platform != "tpu":
        raise UserError(f"--hardware {hardware.name}: only TPUs can be estimated for as yet")
    return hardware


def model_of(config: Config) -> ModelConfig:
    """The model that a recipe trains.

    Raises:
      UserError: it trains more than one, or part of one, or says none; or XLA's kernel attends.
    """
    if not config.rules.next_token or config.tuning is not None:
        what = config.tuning.named() if config.tuning is not None else f"the stage {config.stage}"
        raise UserError(f"there is no estimate for {what}; `maxllm plan` alone compiles every recipe")
    if config.mesh.offload != "none":
        raise UserError("there is no estimate for mesh.offload; `maxllm plan` alone compiles every recipe")
    if config.model is None:
        raise UserError("an estimate needs the section model in the recipe; `maxllm plan` alone does not")
    if config.model.keep_in_host:
        raise UserError("there is no estimate for model.keep_in_host; `maxllm plan` alone compiles it")
    if config.model.kernel == "xla":
        raise UserError(
            "there is no estimate for XLA's attention: give model.attention=auto, without attention_dropout "
            "and ALiBi"
        )
    return config.model.computed_in("bfloat16")  # as all machines that are planned for have it


def layout_of(mesh: MeshConfig, hardware: Hardware) -> Layout:
    """The mesh on a machine, -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the machine's devices, or there is a pipeline.
    """
    sizes, count = mesh.sizes, hardware.devices
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        given = " x ".join(map(str, mesh.sizes))
        raise UserError(f"mesh {given} (data, fsdp, stage, context, tensor) does not make {count} devices")
    data, fsdp, stage, context, tensor = sizes
    if stage > 1:
        raise UserError("there is no estimate for a pipeline: give mesh.stage=1, or compile it")
    return Layout(data, fsdp, context, tensor, mesh.zero)


def obstacle(config: Config, model: ModelConfig, layout: Layout) -> str | None:
    """What does not divide, if anything: the checks of parallel/mesh.py and of TPU's attention kernel."""
    rows, shards = config.batch.rows // config.batch.microbatches, layout.data * layout.fsdp
    positions = config.batch.sequence_length / layout.context
    for name, size, split in (
        ("rows at a time", rows, shards),
        ("sequence_length", config.batch.sequence_length, 2 * layout.context if layout.context > 1 else 1),
        ("n_kv_heads", model.n_kv_heads, layout.tensor),
        ("n_heads", model.n_heads, layout.tensor),
        ("d_ff", model.d_ff, layout.tensor),
        ("vocab_size", model.vocab_size, layout.tensor),
        ("d_model", model.d_model, layout.shards),
    ):
        if size % split:
            return f"{name} {size} is not divisible by {split}"
    return f"{positions:g} positions per device, not a multiple of 128" if positions % 128 else None


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model on one device, with tensor parallelism taken off."""

    layer: int
    """Parameters of a layer's matrices."""
    widest: int
    """Parameters of the largest of a layer's matrices."""
    table: int
    """Parameters of the embedding table, or of the head."""
    tables: int
    norms: int
    """Of all norms."""


def sizes_of(model: ModelConfig, tensor: int) -> Sizes:
    """Parameters by kind; biases are left out."""
    D, H, G, K, F = model.d_model, model.n_heads, model.n_kv_heads, model.k_dim, model.d_ff
    layer = (2 * D * H * K + 2 * D * G * K + 3 * D * F) // tensor
    return Sizes(
        layer=layer,
        widest=max(D * F, D * H * K) // tensor,
        table=model.vocab_size * D // tensor,
        tables=1 if model.tie_embeddings else 2,
        norms=(2 * model.n_layers + 1) * D,
    )


def estimate(config: Config, model: ModelConfig, layout: Layout, hardware: Hardware) -> Estimate:
    """A step of next-token prediction (pretrain, SFT of the whole model).

    Args:
      config: batch and optimizer.
      model: what is trained.
      layout: of the devices.
      hardware: they are its chips.
    """
    sizes, batch = sizes_of(model, layout.tensor), config.batch
    kind, L, D = BYTES[model.dtype], model.n_layers, model.d_model
    matrices = L * sizes.layer + sizes.tables * sizes.table
    rows = batch.rows / batch.microbatches / (layout.data * layout.fsdp)
    tokens = rows * batch.sequence_length / layout.context
    keys = rows * batch.sequence_length  # every device of a row has all its keys
    gradient_shards = layout.shards if layout.zero >= 2 else 1

    state = {
        "parameters": 4 * (matrices / (layout.shards if layout.zero >= 3 else 1) + sizes.norms),
        "optimizer": optimizer_bytes(config, model, sizes, layout),
        "batch": 5 * 4 * rows * batch.microbatches * batch.sequence_length,
    }
    if batch.microbatches > 1:
        # What is added up over the microbatches is float32, whatever the type of the parts; the head's sum is
        # whole (seen in Llama-2-7B's schedule: nothing in the program says that it should be split).
        split = L * sizes.layer + (sizes.tables - 1) * sizes.table
        state["sums of gradients"] = 4 * (split / gradient_shards + sizes.table)
    kept = {"activations kept for the backward pass": L * kept_bytes(model, sizes, layout, tokens, keys)}
    gradients = {
        "gradients of layers": L * sizes.layer * BYTES[config.optimizer.gradient_dtype] / gradient_shards,
        "gradients of embedding and head": 4 * sizes.tables * sizes.table / gradient_shards,
    }
    backward = state | kept | gradients | layer_bytes(model, sizes, layout, tokens, keys)
    # The head's gradient is scattered (steps/head.py) before any layer's gradient is there.
    head_part = min(PART_BYTES, 4 * tokens * model.vocab_size / layout.tensor)
    head = (
        state
        | kept
        | {
            "head, whole": kind * sizes.table,
            "its gradient, summed over parts": 4 * sizes.table,
            "logits of a part, and their gradient": head_part * (1 + kind / 4),
            "hidden states and their gradient": 2 * kind * tokens * D,
        }
    )
    peak = max(backward, head, key=lambda terms: sum(terms.values()))
    count = L * sizes.layer * layout.tensor + sizes.tables * sizes.table * layout.tensor + sizes.norms
    sent = sent_bytes(config, model, sizes, layout, tokens, keys)
    bound = step_bound(
        hardware.chip,
        model=model,
        sequence_length=batch.sequence_length,
        tokens_per_device=tokens * batch.microbatches / layout.tensor,
        parameter_shard=count / (layout.shards * layout.tensor),
        gathered_parameters=count / layout.tensor,
        sent_bytes=sum(sent.values()),
        passes=3 if model.remat == "none" else 4,
        update_bytes=update_bytes(config.optimizer, L * sizes.layer * layout.tensor / count),
    )
    return Estimate(peak, sent, count, bound)


def optimizer_bytes(config: Config, model: ModelConfig, sizes: Sizes, layout: Layout) -> float:
    """Moments: two of each parameter (AdamW), one of the layers' (Muon), a row and a column (Adafactor)."""
    split = layout.shards if layout.zero >= 1 else 1
    each = BYTES[config.optimizer.moment_dtype]
    layers, tables = model.n_layers * sizes.layer, sizes.tables * sizes.table
    match config.optimizer.name:
        case "adamw":
            return 2 * each * ((layers + tables) / split + sizes.norms)
        case "muon":
            return each * ((layers + 2 * tables) / split + 2 * sizes.norms)
        case "adafactor":
            D, F, V = model.d_model, model.d_ff, model.vocab_size
            H, G = model.n_heads * model.k_dim, model.n_kv_heads * model.k_dim
            rows_and_columns = 2 * (D + H) + 2 * (D + G) + 3 * (D + F)
            return 4 * (model.n_layers * rows_and_columns + sizes.tables * (V + D) + sizes.norms)


def kept_bytes(model: ModelConfig, sizes: Sizes, layout: Layout, tokens: float, keys: float) -> float:
    """Of one layer, by `model.remat` and `model.keep`; a tensor group splits the positions of the residual
    stream."""
    kind, t = BYTES[model.dtype], layout.tensor
    D, F = model.d_model, model.d_ff / t
    q, kv = model.n_heads * model.k_dim / t, model.n_kv_heads * model.k_dim / t
    named = sum(widths_of(model)[name] for name in model.keep) / t
    match model.remat:
        case "offload":
            return kind * tokens * named  # the layer's input is in the memory of the host
        case "full":
            return kind * tokens * (D / t + named)
        case "dots":
            # The layer's input, and the results of its seven matmuls.
            return kind * tokens * (3 * D / t + q + 2 * kv + 2 * F)
        case "none":
            # What jax.vjp keeps of a Layer, counted from its residuals: float32 of both norms (three of
            # [tokens, D] each), their results, q k v twice and attention's own four, three of [tokens, F],
            # and the gathered weights.
            wide = 6 * 4 * D / t + kind * (2 * D + 3 * q + 2 * kv + 3 * F)
            return tokens * wide + kind * (keys * 2 * kv + tokens * q + sizes.layer)


def layer_bytes(
    model: ModelConfig, sizes: Sizes, layout: Layout, tokens: float, keys: float
) -> dict[str, float]:
    """What a layer's backward pass holds besides what is kept, at its fullest: in the feed-forward's part."""
    kind, t = BYTES[model.dtype], layout.tensor
    D, F = model.d_model, model.d_ff / t
    q, kv = model.n_heads * model.k_dim / t, model.n_kv_heads * model.k_dim / t
    # splash: its output, and a log-sum-exp of every query and head, float32, once for each lane.
    attention = tokens * (kind * q + 4 * LANES * model.n_heads / t)
    if model.remat == "none":
        return {
            "gradient of the widest weight, before it is scattered": kind * sizes.widest,
            "feed-forward: gradients of its three results": 3 * kind * tokens * F,
            "attention's log-sum-exp over lanes": 4 * LANES * tokens * model.n_heads / t,
        }
    return {
        "a layer's weights, whole": kind * sizes.layer,
        "gradient of the widest weight, before it is scattered": kind * sizes.widest,
        # silu(gate), up, their product and its gradient
        "feed-forward of the layer": 4 * kind * tokens * F,
        # two norms' results, q, k, v
        "attention of the layer": kind * (tokens * (2 * D + q) + keys * 2 * kv) + attention,
    }


def sent_bytes(
    config: Config, model: ModelConfig, sizes: Sizes, layout: Layout, tokens: float, keys: float
) -> dict[str, float]:
    """Exchanges of a step: (n - 1) / n of an array among n devices, twice that for an all-reduce."""
    kind, parts, L = BYTES[model.dtype], config.batch.microbatches, model.n_layers

    def share(devices: int) -> float:
        return (devices - 1) / devices

    weights, sent = kind * L * sizes.layer, {}
    passes = 1 if model.remat == "none" else 2
    if layout.shards > 1 and layout.zero >= 3:
        gathered = passes * weights + kind * sizes.table
        sent["weights gathered"] = parts * share(layout.shards) * gathered
    if layout.shards > 1:
        # An embedding that is split is looked up where it lies: its gradient has nowhere to go.
        tables = 1 if layout.zero >= 3 else sizes.tables
        # Where only shares of them are used, gradients are scattered; else reduced whole.
        scattered = 1 if layout.zero >= 1 else 2
        sent["gradients over shards"] = (
            scattered * parts * share(layout.shards) * (weights + 4 * tables * sizes.table)
        )
        if layout.zero in (1, 2):
            updated = L * sizes.layer + sizes.tables * sizes.table
            sent["updated parameters"] = 4 * share(layout.shards) * updated
        if layout.zero >= 3:
            looked_up = kind * tokens * model.d_model
            sent["embeddings of tokens, and their gradients"] = parts * 2 * share(layout.shards) * looked_up
    if layout.data > 1:
        whole = weights + 4 * sizes.tables * sizes.table
        held = layout.shards if layout.zero >= 2 else 1
        sent["gradients over replicas"] = parts * 2 * share(layout.data) * whole / held
    if layout.context > 1:
        each = keys * 2 * model.n_kv_heads * model.k_dim / layout.tensor * kind
        sent["keys and values"] = parts * share(layout.context) * L * each * (passes + 1)
    if layout.tensor > 1:
        # Into attention and feed-forward a gather, out of them a reduce-scatter, and backward the same; with
        # remat both gathers again, and the sum after attention where matmuls are not kept. Where a device has
        # one row, TPU's compiler makes the reduce-scatters all-reduces (seen on v5p).
        gathers = 4 if model.remat == "none" else 6
        sums = 4 if model.remat in ("none", "dots") else 5
        times = gathers + sums * (2 if keys == config.batch.sequence_length else 1)
        sent["activations"] = parts * share(layout.tensor) * L * times * kind * tokens * model.d_model
    return sent
