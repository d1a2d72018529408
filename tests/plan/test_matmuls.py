"""Matmuls counted in compiled programs, and in lines as TPU's and CUDA's compilers write them."""

import jax
import jax.numpy as jnp
import pytest

from maxllm.plan.matmuls import matmul_flops


def program(*lines: str) -> str:
    """A module of one computation."""
    return "ENTRY %main (x: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_a_loop_counts_as_often_as_it_runs():
    """[32, 64] x [64, 64] ten times, then three products with [64, 5] at once."""
    x, w, y = jnp.ones((32, 64)), jnp.ones((10, 64, 64)), jnp.ones((3, 64, 5))

    def function(x, w, y):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.einsum("bd,gdk->gbk", x, y)

    text = jax.jit(function).lower(x, w, y).compile().as_text()
    assert matmul_flops(text) == 10 * 2 * 32 * 64 * 64 + 3 * 2 * 32 * 64 * 5


# Llama-2-7B's matmuls on v5p, four rows of 2,048 tokens on a device.
ROWS = 4 * 2048
LINES = {
    "gate": (
        "%x = bf16[4,2048,4096]{2,1,0} parameter(0)",
        "%w = bf16[4096,11008,1]{1,0,2} parameter(1)",
        "%y = bf16[4,2048,11008]{2,1,0} convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf",
        2 * ROWS * 4096 * 11008,
    ),
    "query, by a window of one place and padding": (
        "%x = bf16[4,2048,4096,1]{2,1,0,3} parameter(0)",
        "%w = bf16[32,128,4096,1]{2,1,0,3} parameter(1)",
        "%y = bf16[4,2048,32,128]{3,1,2,0} convolution(%x, %w), "
        "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
        2 * ROWS * 4096 * 4096,
    ),
    "output, summed over a window of heads": (
        "%x = bf16[4,32,2048,128]{3,2,1,0} parameter(0)",
        "%w = bf16[32,128,4096,1]{2,1,0,3} parameter(1)",
        "%y = bf16[4,2048,4096,1]{2,1,3,0} convolution(%x, %w), window={size=1x32}, "
        "dim_labels=01bf_1io0->0bf1",
        2 * ROWS * 4096 * 4096,
    ),
    "gradient of gate, summed over a window of rows": (
        "%x = bf16[4,2048,4096]{2,1,0} parameter(0)",
        "%g = bf16[4,2048,11008]{2,1,0} parameter(1)",
        "%y = bf16[4096,11008,1]{1,0,2} convolution(%x, %g), window={size=4}, dim_labels=0fb_0io->bf0",
        2 * ROWS * 4096 * 11008,
    ),
    "head, one part": (
        "%x = bf16[2048,4096]{1,0} parameter(0)",
        "%w = bf16[4096,32000]{1,0} parameter(1)",
        "%y = f32[2048,32000]{1,0} convolution(%x, %w), dim_labels=bf_io->bf",
        2 * 2048 * 4096 * 32000,
    ),
    "cuBLAS": (
        "%x = bf16[2048,4096]{1,0} parameter(0)",
        "%w = bf16[4096,32000]{1,0} parameter(1)",
        "%y = (f32[2048,32000]{1,0}, s8[33554432]{0}) custom-call(%x, %w), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
        2 * 2048 * 4096 * 32000,
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_as_compilers_write_them(name):
    *lines, flops = LINES[name]
    assert matmul_flops(program(*lines)) == flops


def test_an_elementwise_product_is_no_matmul():
    assert matmul_flops(jax.jit(jnp.multiply).lower(jnp.ones(8), jnp.ones(8)).compile().as_text()) == 0
