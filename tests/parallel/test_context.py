"""The order in which devices share a row."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config.mesh import MeshConfig
from maxllm.parallel import context
from maxllm.parallel.mesh import make_mesh

BATCH = ("stage", "data", "fsdp")


def test_slots_by_hand():
    """Three devices, chunks of two: the first has chunks 0 and 5, the next 1 and 4, the last 2 and 3."""
    assert context.slots(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert context.slots(5, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_devices_have_equal_work(shards):
    """Causal attention of slot s is s + 1 keys."""
    work = (context.slots(64, shards) + 1).reshape(shards, -1).sum(1)
    assert (work == work[0]).all()


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_rows_come_back(shards):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8 // shards, context=shards))
    row_BT = np.arange(8 * 64).reshape(8, 64, 1)
    placed = context.balanced(row_BT, shards)
    np.testing.assert_array_equal(placed[0, :, 0], context.slots(64, shards))
    np.testing.assert_array_equal(context.unbalanced(placed, shards), row_BT)
    split = jax.device_put(placed, NamedSharding(mesh, PartitionSpec(BATCH, "context")))
    with jax.set_mesh(mesh):
        home = jax.jit(context.unbalanced_shards)(split)
    np.testing.assert_array_equal(home, row_BT)
    assert {shard.data.shape for shard in home.addressable_shards} == {(shards, 64 // shards, 1)}
