"""Estimates against what TPU's compiler said of the same steps (tools/estimates.py, tools/plans.py)."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from maxllm import recipe
from maxllm.cli import main
from maxllm.losses import linear
from maxllm.model import rope
from maxllm.model.attend import Keys
from maxllm.model.llama import Layer
from maxllm.optim import make_optimizer
from maxllm.plan import estimate
from maxllm.plan.estimate import layout_of, sizes_of
from maxllm.plan.hardware import hardware_of

CONFIGS = Path(__file__).parents[2] / "configs"
RECORDED = json.loads((CONFIGS / "plans.json").read_text())
COMPILED = json.loads((Path(__file__).parent / "compiled.json").read_text()) | {
    name: figures | {"words": [name]}
    for name, figures in RECORDED.items()
    if "_h100" not in name and "_pipeline" not in name  # of which there is no estimate
}
SEVEN = "pretrain/llama2-7b_synthetic_v5p-16"


def estimated(name: str, *words: str) -> dict:
    """What `maxllm plan NAME WORDS --estimate` says."""
    hardware = None
    if "--hardware" in words:
        at = words.index("--hardware")
        hardware, words = words[at + 1], (*words[:at], *words[at + 2 :])
    return estimate.run(recipe.load_recipe(name, words), hardware)


@pytest.mark.parametrize("name", COMPILED)
def test_the_peak_is_that_of_the_compiler(name):
    """Within 15 %, over machines, meshes, ZeRO's stages, every remat, types, optimizers and microbatches."""
    found = estimated(*COMPILED[name]["words"])
    assert found["peak_bytes"] == pytest.approx(COMPILED[name]["peak_bytes"], rel=0.15)


OWN_WAYS = {
    "muon": "the partitioner gathers matrices in each of Muon's iterations",
    "float32": "weights are gathered once, as no cast stands between",
    "pretrain/llama2-7b_synthetic_v5e-256": "gradients of the feed-forward are reduced whole",
}
"""Where compilers send other bytes than a step needs, and why."""


@pytest.mark.parametrize("name", sorted(COMPILED.keys() - OWN_WAYS.keys()))
def test_what_is_sent_is_what_the_compiler_says(name):
    found = estimated(*COMPILED[name]["words"])
    assert sum(found["sent"].values()) == pytest.approx(COMPILED[name]["sent_bytes"], rel=0.1)


def test_there_are_points_enough_to_say_so():
    assert len(COMPILED) >= 12


@pytest.mark.parametrize("name", [name for name, said in COMPILED.items() if said.get("argument_bytes")])
def test_the_state_is_that_of_the_compiler(name):
    """Parameters, optimizer and batch are counted, not estimated: to 0.5 % (padding to tiles)."""
    found = estimated(*COMPILED[name]["words"])
    state = sum(found["memory"][term] for term in ("parameters", "optimizer", "batch"))
    assert state == pytest.approx(COMPILED[name]["argument_bytes"], rel=0.005)


def test_what_a_layer_keeps_is_what_vjp_keeps():
    """`kept_bytes` without remat against the residuals of a Layer, to the byte but for small arrays."""
    config = recipe.load_recipe(SEVEN, ["model.remat=none"])
    model, (B, T, D) = estimate.model_of(config), (4, 2048, 4096)
    x, ids = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16), jax.ShapeDtypeStruct((B, T), jnp.int32)
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    cos, sin = jax.eval_shape(lambda p: rope.angles(model, p), ids)

    def layer(kind, params, x, ids, slot, cos, sin):
        module = Layer(model.model_copy(update={"attention": kind}))
        arguments = (x, Keys(ids, ids, slot), cos, sin, True, None)
        if params is None:
            return nn.unbox(module.init(jax.random.key(0), *arguments))
        return module.apply(params, *arguments)[0]

    params = jax.eval_shape(lambda *a: layer("xla", None, *a), x, ids, slot, cos, sin)
    kept = jax.eval_shape(
        lambda p, x, *a: jax.vjp(lambda p, x: layer("splash", p, x, *a), p, x)[1],
        *(params, x, ids, slot, cos, sin),
    )
    large = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.size > 1e6]
    layout = layout_of(config.mesh, hardware_of("v5p-16"))
    ours = estimate.kept_bytes(model, sizes_of(model, 1), layout, B * T, B * T)
    assert ours == sum(large)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_optimizers_bytes_are_those_of_its_state(name, tiny_model, params_of):
    from maxllm.model.llama import Llama
    from maxllm.steps.state import partition_of

    config = recipe.load_recipe(SEVEN, [f"optimizer.name={name}", "mesh.fsdp=1", "mesh.data=8"])
    model = tiny_model()
    optimizer = make_optimizer(config.optimizer, 10, partition_of(Llama(model)).declared)
    state = jax.eval_shape(optimizer.init, params_of(Llama(model)))
    # Placeholders of one number, counts and coefficients are not in the estimate.
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[-1] > 3]
    layout = layout_of(config.mesh, hardware_of("v5p-16"))
    ours = estimate.optimizer_bytes(config, model, sizes_of(model, 1), layout)
    assert ours == sum(leaf.size * leaf.dtype.itemsize for leaf in large)


def test_constants_are_those_of_the_program():
    assert estimate.PART_BYTES == linear.PART_BYTES


def test_an_estimate_needs_neither_jax_nor_its_libraries():
    code = (
        "import sys; from maxllm.cli import main; "
        f"main(['plan', {SEVEN!r}, '--estimate']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "orbax", "transformers", "numpy"} & set(done.stderr.split())
    for word in ("should fit", "optimizer", "gradients of layers", "weights gathered", "bound by compute"):
        assert word in done.stdout


def test_what_should_not_fit_is_exit_3(capsys):
    assert main(["plan", SEVEN, "--estimate", "--hardware", "v5e:2x2", "--json"]) == 3
    said = capsys.readouterr()
    assert not json.loads(said.out)["fits"] and "GB per device are needed on v5e:2x2" in said.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ppo/tiny_tasks_cpu", "--hardware", "v5e:2x2"], "no estimate for the stage ppo"),
        (["sft/tiny_tasks_cpu", "--hardware", "v5e:2x2", "lora.rank=8"], "no estimate for lora"),
        (["pretrain/tiny_slice_cpu"], "names no machine"),
        ([SEVEN, "--hardware", "h100x8"], "only TPUs can be estimated for as yet"),
        ([SEVEN, "model.keep_in_host=[gate]"], "there is no estimate for model.keep_in_host"),
        ([SEVEN, "model.attention=xla"], "no estimate for XLA's attention: give model.attention=auto"),
        ([SEVEN, "mesh.stage=2", "optimizer.gradient_dtype=float32"], "no estimate for a pipeline"),
        ([SEVEN, "mesh.fsdp=3"], "does not make 8 devices"),
        ([SEVEN, "batch.rows=12"], "rows at a time 12 is not divisible by 8"),
        ([SEVEN, "batch.sequence_length=200"], "200 positions per device, not a multiple of 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_cannot_be_estimated_is_told(words, sentence, capsys):
    assert main(["plan", *words, "--estimate"]) == 2
    assert sentence in capsys.readouterr().err
