"""The named device mesh. A parallel strategy is the sizes of its axes; an unused axis has size 1."""

import math

import jax
from jax.sharding import AxisType, Mesh

from maxllm.config import BatchConfig, MeshConfig, ModelConfig
from maxllm.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig) -> Mesh:
    """All devices of all processes, arranged as (data, fsdp, tensor).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    given = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if devices % rest:
            raise UserError(f"mesh {given}: {rest} does not divide the {devices} devices that are here")
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices:
        raise UserError(f"mesh {given} is {math.prod(sizes)} devices; {devices} are here")
    # Auto, because under Explicit axes (make_mesh's default) the lookup in an FSDP-sharded table is an error.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch_divides(mesh: Mesh, batch: BatchConfig) -> None:
    """The rows of a batch must split evenly.

    Raises:
      UserError: naming the numbers.
    """
    rows, split = batch.rows // batch.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"batch.rows={batch.rows} in {batch.microbatches} microbatches is {rows} rows at a time, "
            f"which mesh data x fsdp = {split} does not divide"
        )


def check_model_divides(mesh: Mesh, model: ModelConfig) -> None:
    """Every sharded dimension of a model must split evenly.

    Raises:
      UserError: naming the dimension and the mesh axis that does not divide it.
    """
    for name, size, axis in (
        ("model.n_heads", model.n_heads, "tensor"),
        ("model.n_kv_heads", model.n_kv_heads, "tensor"),
        ("model.d_ff", model.d_ff, "tensor"),
        ("model.vocab_size", model.vocab_size, "tensor"),
        ("model.d_model", model.d_model, "fsdp"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"{name}={size} is not divisible by mesh.{axis}={mesh.shape[axis]}")
