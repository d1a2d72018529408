"""Where the residual stream and its gradients lie."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from maxllm.config.mesh import MeshConfig
from maxllm.parallel import residual
from maxllm.parallel.mesh import make_mesh
from maxllm.parallel.sharding import BATCH, CONTEXT, RULES, TENSOR

WHOLE, SPLIT = PartitionSpec(BATCH, CONTEXT), PartitionSpec(BATCH, (CONTEXT, TENSOR))


@pytest.mark.parametrize(
    ("function", "layout", "of_gradient"),
    [
        (residual.split, SPLIT, SPLIT),
        (residual.collected, WHOLE, SPLIT),
        (residual.summed, SPLIT, WHOLE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("length", [8, 6], ids=["divides", "does not"])
def test_layouts(function, layout, of_gradient, length):
    """Eight positions lie over context=2 x tensor=2; six only over context, both ways."""
    if length == 6:
        layout = of_gradient = WHOLE
    mesh, x_BTD = make_mesh(MeshConfig(data=2, context=2, tensor=2)), jnp.ones((2, length, 4))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        y_BTD, pulled_back = jax.jit(
            lambda x: (function(x), jax.grad(lambda x: (function(x) ** 2).sum())(x))
        )(x_BTD)
    for array, wanted in ((y_BTD, layout), (pulled_back, of_gradient)):
        assert array.sharding.is_equivalent_to(jax.NamedSharding(mesh, wanted), 3)


def test_without_a_mesh_nothing_is_said():
    x_BTD = jnp.ones((2, 8, 4))
    assert all(f(x_BTD) is x_BTD for f in (residual.split, residual.collected, residual.summed))
