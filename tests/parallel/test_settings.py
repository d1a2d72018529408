"""What XLA, libtpu and NCCL are told: one table, a recipe on top of it, the environment on top of both."""

import jax
import jax.numpy as jnp
import pytest

from maxllm import recipe
from maxllm.config.launch import NO_SETTINGS, LaunchConfig
from maxllm.errors import UserError
from maxllm.parallel import settings
from maxllm.parallel.settings import (
    SETTINGS,
    Settings,
    compile_lowered,
    compiler_options,
    described,
    platform_here,
    set_variables,
)

PIPELINED = "xla_gpu_enable_pipelined_all_reduce"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", *SETTINGS["gpu"].variables):
        monkeypatch.delenv(name, raising=False)


def test_a_recipe_goes_on_top_of_the_table():
    assert compiler_options("gpu", NO_SETTINGS) == SETTINGS["gpu"].compiler_options
    words = [
        f"launch.compiler_options.{PIPELINED}=null",
        "launch.compiler_options.xla_gpu_triton_gemm_any=true",
    ]
    launch = recipe.load_recipe("pretrain/tiny_slice_cpu", words).launch
    named = {"xla_gpu_triton_gemm_any": True}
    table = dict(SETTINGS["gpu"].compiler_options)
    del table[PIPELINED]
    assert compiler_options("gpu", launch) == table | named
    assert compiler_options("another", NO_SETTINGS) == {}


def test_a_list_is_no_value_of_an_option():
    with pytest.raises(UserError, match=r"^launch.compiler_options.a: an option of XLA is text, a number"):
        recipe.load_recipe("pretrain/tiny_slice_cpu", ["launch.compiler_options={a: [1]}"])


def test_the_environment_goes_on_top_of_both(monkeypatch):
    variables = {"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring"}
    launch = LaunchConfig(compiler_options={PIPELINED: True}, variables=variables)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{PIPELINED}=false")
    assert PIPELINED not in compiler_options("gpu", launch), "left to XLA_FLAGS"
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setattr(settings.os, "environ", dict(settings.os.environ))
    set_variables("gpu", launch)
    assert settings.os.environ["NCCL_DEBUG"] == "INFO", "the recipe's, before the table's WARN"
    line = described("gpu", launch)
    assert "NCCL_ALGO=Tree" in line and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("xla_no_such", True, "No such compile option: 'xla_no_such'"),
        ("xla_cpu_copy_insertion_use_region_analysis", "maybe", "'maybe' is not a valid bool value"),
    ],
)
def test_an_option_that_is_none_is_a_sentence(name, value, said):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    with pytest.raises(UserError, match=said):
        compile_lowered(lowered, "cpu", LaunchConfig(compiler_options={name: value}))


@pytest.mark.parametrize(
    "word",
    [
        "launch.variables.HF_TOKEN=hunter2",
        "launch.variables.AWS_SECRET_ACCESS_KEY=hunter2",
        "run.dir=s3://AKIA:hunter2@bucket/run",
        "data.prepared_dir=s3://hunter2@bucket/corpus",
        "data.sources=[s3://AKIA:hunter2@bucket/texts]",
    ],
)
def test_keys_do_not_belong_in_a_recipe(word):
    with pytest.raises(UserError, match="keys do not belong in a recipe") as error:
        recipe.load_recipe("pretrain/tiny_slice_cpu", [word])
    assert "hunter2" not in str(error.value)


def test_the_platform_here(monkeypatch, tmp_path):
    monkeypatch.setitem(SETTINGS, "tpu", Settings(devices=(str(tmp_path / "accel0"),)))
    assert platform_here() in ("cpu", "gpu")
    (tmp_path / "accel0").touch()
    assert platform_here() == "tpu"
    for wanted, platform in (("cpu", "cpu"), ("cuda,cpu", "gpu"), ("tpu", "tpu")):
        monkeypatch.setenv("JAX_PLATFORMS", wanted)
        assert platform_here() == platform
