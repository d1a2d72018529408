"""The named device mesh. A parallel strategy is the sizes of its axes; an unused axis has size 1."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from maxllm.config.data import BatchConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.errors import UserError
from maxllm.parallel.sharding import TABLES

AXES = ("data", "fsdp", "stage", "context", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices arranged along AXES.

    Args:
      config: sizes of the axes.
      devices: all devices of all processes when absent; else those of a machine that is only planned.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = sizes_of(config, jax.device_count() if devices is None else len(devices))
    arranged = across_slices(config, sizes, jax.devices() if devices is None else devices)
    # Auto, because under Explicit axes the lookup in an FSDP-sharded table is an error.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes_of(config: MeshConfig, count: int) -> list[int]:
    """Sizes of AXES on a number of devices.

    Raises:
      UserError: they do not multiply to it.
    """
    sizes = config.sizes
    given = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if count % rest:
            raise UserError(f"mesh {given}: {rest} does not divide the {count} devices that are here")
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count:
        raise UserError(f"mesh {given} is {math.prod(sizes)} devices; {count} are here")
    return sizes


def across_slices(config: MeshConfig, sizes: list[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices [*sizes]: those of a slice as its links join them, slices one after another on `across`.

    TPUs say which slice they are of. Others are taken in the order of their processes, an equal number to
    each slice.

    Raises:
      UserError: the devices are of another number of slices, or `across` is not a multiple of it.
    """
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found > 1 and found != config.slices:
        raise UserError(f"these devices are {found} slices: give mesh.slices={found}")
    axis = AXES.index(config.across)
    if sizes[axis] % config.slices or len(devices) % config.slices:
        raise UserError(
            f"mesh.{config.across}={sizes[axis]} goes across slices and is not divisible by "
            f"mesh.slices={config.slices}"
        )
    inside = [size // config.slices if number == axis else size for number, size in enumerate(sizes)]
    in_order = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    slices = np.array_split(np.array(in_order, dtype=object), config.slices)
    # Splitting: an axis that no product of the slice's dimensions makes is laid along part of one.
    laid_out = [create_device_mesh(inside, list(one), allow_split_physical_axes=True) for one in slices]
    return np.concatenate(laid_out, axis)


def check_batch_divides(mesh: Mesh, batch: BatchConfig, model: ModelConfig, minibatches: int = 1) -> None:
    """The rows of a batch, or of each of PPO's minibatches, must split evenly.

    Raises:
      UserError: naming the numbers.
    """
    rows, split = batch.rows // (minibatches * batch.microbatches), mesh.shape["data"] * mesh.shape["fsdp"]
    given = f"{batch.microbatches} microbatches"
    if minibatches > 1:
        given = f"ppo.minibatches={minibatches} x batch.microbatches={batch.microbatches}"
    if rows % split:
        raise UserError(
            f"batch.rows={batch.rows} in {given} is {rows} rows at a time, "
            f"which mesh data x fsdp = {split} does not divide"
        )
    stages = mesh.shape["stage"]
    parts = model.pipeline_microbatches or stages
    if stages > 1 and (parts % stages or rows % (split * parts)):
        raise UserError(
            f"mesh.stage={stages} works on model.pipeline_microbatches={parts}, which must be a multiple of "
            f"the stages and split {rows} rows at a time into parts that mesh data x fsdp = {split} divides"
        )
    shards = mesh.shape["context"]
    if shards > 1 and batch.sequence_length % (2 * shards):
        raise UserError(
            f"batch.sequence_length={batch.sequence_length} is not divisible by 2 x mesh.context={shards}: "
            "every device takes two chunks of a row"
        )


def check_model_divides(mesh: Mesh, model: ModelConfig) -> None:
    """Every sharded dimension of a model must split evenly.

    Raises:
      UserError: naming the dimension and the mesh axis that does not divide it.
    """
    blocks = mesh.shape["stage"] * model.pipeline_rounds
    if mesh.shape["stage"] > 1 and model.n_layers % blocks:
        raise UserError(
            f"model.n_layers={model.n_layers} is not divisible by mesh.stage={mesh.shape['stage']} x "
            f"model.pipeline_rounds={model.pipeline_rounds}"
        )
    for name, size, axes in (
        ("model.n_heads", model.n_heads, ("tensor",)),
        ("model.n_kv_heads", model.n_kv_heads, ("tensor",)),
        ("model.d_ff", model.d_ff, ("tensor",)),
        ("model.vocab_size", model.vocab_size, ("tensor",)),
        ("model.d_model", model.d_model, TABLES),
    ):
        split = math.prod(mesh.shape[axis] for axis in axes)
        if size % split:
            given = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
            raise UserError(f"{name}={size} is not divisible by {given}")


def check_layers_unrolled(mesh: Mesh, model: ModelConfig) -> None:
    """On CPU, XLA runs a loop beside exchanges that do not wait for it.

    Between processes, gloo then takes the arrays of one for the other's and aborts (with jaxlib 0.10: the
    head's weights and a layer's).

    Raises:
      UserError: layers are a loop, and exchange arrays with other processes.
    """
    if platform_of(mesh) != "cpu" or model.scan_unroll == model.n_layers:
        return
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    spanning = [
        name
        for axis, name in enumerate(mesh.axis_names)
        if name in ("fsdp", "context", "tensor") and np.diff(owners, axis=axis).any()
    ]
    if spanning:
        raise UserError(
            f"mesh.{spanning[0]} goes over several processes of CPUs, where layers must be no loop: give "
            f"model.scan_unroll={model.n_layers}"
        )


def compute_type(mesh: Mesh) -> Literal["float32", "bfloat16"]:
    """The type in which a mesh's devices multiply fastest at the precision that training needs: bfloat16 on
    TPUs and on NVIDIA's GPUs from Ampere on (compute capability 8.0), float32 on others and on CPUs."""
    device = mesh.devices.flat[0]
    if device.platform == "gpu":
        return "bfloat16" if float(device.compute_capability) >= 8 else "float32"
    return "bfloat16" if device.platform == "tpu" else "float32"


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The kind of a mesh's devices: cpu, gpu or tpu; where it has none, of those that are here."""
    if isinstance(mesh, AbstractMesh):
        return jax.default_backend()
    platform: str = mesh.devices.flat[0].platform
    return platform
