"""The benchmark's programs, whole, for a GPU that is not here: lowered for CUDA on any machine, and compiled
where JAX's CUDA plugin is, which needs no GPU."""

import importlib.util
from functools import partial

import bench_gpu
import flax.linen as nn
import gpu_jobs
import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import SingleDeviceSharding

from maxllm.cli import main
from maxllm.model.llama import Llama
from maxllm.parallel import sharding
from maxllm.plan.compile import Compiled, compiled_for, topology_devices
from maxllm.plan.hardware import hardware_of
from maxllm.run.program import STEP, lower_part
from maxllm.steps.state import init_params
from maxllm.weights import Weights

HAS_PLUGIN = importlib.util.find_spec("jax_cuda12_plugin")
HAS_CUDNN = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")

with_the_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's CUDA plugin is in the extra cuda")


def training_of(remat, attention, devices, offload="none"):
    """The mesh and the program of the benchmark's step."""
    words = f"--frameworks ours --work train --remat {remat}".split()
    (job,) = bench_gpu.jobs_of(bench_gpu.options_of(words))
    job.shapes["attention"] = attention
    return gpu_jobs.training_program(job, devices, offload)


def decoding_of(tokens):
    """The benchmark's decoding, jitted, and its weights' shapes."""
    (job,) = bench_gpu.jobs_of(bench_gpu.options_of(["--frameworks", "ours", "--work", "decode"]))
    params = nn.unbox(jax.eval_shape(lambda: init_params(Llama(job.model), jax.random.key(0))))
    return gpu_jobs.decoding_program(job, tokens, "gpu"), Weights(params)


@pytest.fixture
def own_shapes(monkeypatch):
    """Shapes that a test may change."""
    monkeypatch.setattr(bench_gpu, "LLAMA_1B", dict(bench_gpu.LLAMA_1B))


@pytest.mark.usefixtures("own_shapes")
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("offload", ["none", "parameters"])
def test_training_lowers_for_cuda(monkeypatch, remat, offload):
    """Attention is cuDNN's in both passes, twice where it is computed again; what is offloaded moves."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    mesh, program = training_of(remat, "cudnn", jax.devices()[:1], offload)
    part, rows = program.parts[STEP], sharding.batch_sharding(mesh)
    arguments = jax.tree.map(
        lambda leaf: leaf if leaf.sharding else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows),
        part.arguments,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(sharding.RULES):
        jitted = jax.jit(part.function, out_shardings=(sharding.shardings_of(arguments[0]), None))
        text = jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == (1 if remat == "none" else 2)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert ('_xla_buffer_placement = "pinned_host"' in text) == (offload != "none")


def test_decoding_lowers_for_cuda():
    decode, weights = decoding_of(8)
    assert "stablehlo.while" in decode.trace(weights).lower(lowering_platforms=("cuda",)).as_text()


def compiled_training(hardware, *settings):
    """The step by the compiler of a machine that is not here."""
    mesh, program = training_of(settings[0], settings[1], topology_devices(hardware), *settings[2:])
    return compiled_for(hardware, partial(lower_part, mesh, program.parts[STEP]))


def compiled_decoding(hardware):
    """Decoding by the compiler of a machine that is not here, with weights in bfloat16."""
    decode, weights = decoding_of(8)
    lies = SingleDeviceSharding(topology_devices(hardware)[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=lies), weights)
    return compiled_for(hardware, partial(decode.lower, placed))


@with_the_plugin
@pytest.mark.usefixtures("own_shapes")
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_training_compiles_for_an_h100(remat):
    """The state is 12 bytes a parameter. Of a GPU that is not here JAX knows no host memory: what offloading
    lowers to is shown above."""
    compiled = compiled_training(hardware_of("h100x1"), remat, "cudnn" if HAS_CUDNN else "xla")
    assert isinstance(compiled, Compiled), compiled
    assert compiled.argument_bytes >= 12 * 1_235_814_400 and compiled.host_bytes == 0


@with_the_plugin
def test_offloading_cannot_be_planned_for_a_gpu(capsys):
    words = ["plan", "pretrain/llama2-7b_synthetic_h100x8", "mesh.offload=optimizer"]
    assert main(words) == 2 and "h100x8: what mesh.offload and" in capsys.readouterr().err


@with_the_plugin
def test_decoding_compiles_for_an_h100():
    compiled = compiled_decoding(hardware_of("h100x1"))
    assert isinstance(compiled, Compiled) and compiled.argument_bytes >= 2 * 1_235_814_400
