"""Eight simulated devices do what one does: DP, FSDP, context and tensor parallelism and their products are
layouts and nothing more.

Steps of each kind are compiled as the project does it (abstract state, `create` into its shardings,
`compile_step`) on a mesh of one device and on meshes (data, fsdp, stage, context, tensor) of eight. SGD makes
the change of the parameters RATE times the gradient; a language model takes three steps, so that each but the
first has a gradient at other parameters. At rate 1 the steps themselves multiply what is rounded, by ten for
rows of one document, on any mesh. Tolerance of gradients: sums of at most 256 float32 terms in another order,
whose absolute values add up to about four times a gradient of order 1.
"""

from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import numpy as np
import plain
import pytest
import rounding
from jax.sharding import AxisType, Mesh, PartitionSpec

from maxllm.config.data import BatchConfig
from maxllm.config.dpo import DpoConfig
from maxllm.config.generation import GenerationConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.ppo import PpoConfig
from maxllm.errors import UserError
from maxllm.losses.token import Shaping
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.parallel import processes, sharding
from maxllm.parallel.compiler import made_whole
from maxllm.parallel.mesh import AXES, check_batch_divides, check_model_divides, make_mesh
from maxllm.records import LmBatch, PairBatch, PromptBatch, ReplyPairBatch
from maxllm.run.program import Part, compile_part, compile_reader
from maxllm.stages.ppo_program import init_state, iterate, parts_of
from maxllm.steps.dpo import dpo_loss
from maxllm.steps.language import language_loss
from maxllm.steps.ppo import Frozen, Learner, Ppo
from maxllm.steps.state import abstract, create, init_params, initializer, partition_of
from maxllm.steps.update import eval_step, train_step
from maxllm.weights import Weights

B, T, V = 8, 16, 64
RATE = 0.1
SGD = plain.sgd(RATE)
TOLERANCE = rounding.of_sum(256, magnitude=4.0)  # 3e-5
ONE = (1, 1, 1, 1, 1)
MESHES = [
    (8, 1, 1, 1, 1),
    (1, 8, 1, 1, 1),
    (1, 1, 1, 8, 1),
    (1, 1, 1, 1, 8),
    (2, 2, 1, 1, 2),
    (4, 2, 1, 1, 1),
    (1, 2, 1, 1, 4),
    (1, 2, 1, 2, 2),
    (2, 1, 1, 4, 1),
    (1, 1, 8, 1, 1),
    (2, 1, 4, 1, 1),
    (1, 2, 2, 1, 2),
    (1, 2, 2, 2, 1),
]


@cache
def mesh_of(shape):
    if shape == ONE:
        kinds = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.devices()[:1])
    return make_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))))


@pytest.fixture(scope="module")
def config(tiny_model):
    """Every sharded dimension is a multiple of 8; heads are grouped two to a key/value head."""
    return tiny_model(n_heads=16, n_kv_heads=8, head_dim=4, d_ff=64, n_layers=8)


def lm_batch(packed=True):
    """Rows of two documents, of 7 and 9 tokens, or of one; other tokens of each row count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, V, (B, T + 1)).astype(np.int32)
    weights = (np.arange(T) < (2 * np.arange(B) + 1)[:, None]).astype(np.float32)
    first = 7 if packed else T
    segments = np.where(np.arange(T) < first, 1, 2) * np.ones((B, 1), np.int32)
    positions = np.where(np.arange(T) < first, np.arange(T), np.arange(T) - first) * np.ones((B, 1), np.int32)
    return LmBatch(
        tokens[:, :-1], tokens[:, 1:], weights, segments.astype(np.int32), positions.astype(np.int32)
    )


def prompt_batch(P=6):
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, P + 1, B).astype(np.int32)
    tokens = rng.integers(6, V, (B, P)).astype(np.int32)
    return PromptBatch(np.where(np.arange(P) < P - lengths[:, None], np.int32(5), tokens), lengths)


def pair_batch():
    """Pairs of 3 to 16 tokens, of which those behind the second or a later one are the completion's."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, T + 1, (B, 2)).astype(np.int32)
    tokens = rng.integers(6, V, (B, 2, T)).astype(np.int32)
    starts = rng.integers(2, lengths).astype(np.int32)
    return ReplyPairBatch(PairBatch(tokens, lengths, np.ones(B, np.float32)), starts)


@cache
def created(init):
    """What `init` makes on one device, as numpy arrays: the start on every mesh (test_state_… compares)."""
    return jax.device_get(create(init, abstract(init, mesh_of(ONE)), jax.random.key(0)))


def shapes_of(batch):
    """Shapes and types of numpy arrays."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)


def described(array):
    """Shape, type and sharding of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def take_steps(mesh, init, step, batch, frozen_init=None, zero=3, count=1, offload="none"):
    """(state before, state after, metrics of each step), compiled the project's way, on this mesh."""
    description, before = abstract(init, mesh, zero, offload), created(init)
    state, frozen = jax.device_put(before, sharding.shardings_of(description)), ()
    if frozen_init is not None:
        frozen_shardings = sharding.shardings_of(abstract(frozen_init, mesh))
        frozen = (jax.device_put(created(frozen_init), frozen_shardings),)
    with made_whole() as whole:
        arguments = (description, shapes_of(batch), *jax.tree.map(described, frozen))
        compiled = compile_part(mesh, Part(function=step, arguments=arguments, updates=True), zero)
    assert whole == []
    global_batch, metrics = processes.to_global(batch, sharding.batch_sharding(mesh)), []
    for _ in range(count):
        state, latest = compiled(state, global_batch, *frozen)
        metrics.append(jax.device_get(latest))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(description), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    return before, jax.device_get(state), metrics


@pytest.fixture(scope="module")
def run_lm(config):
    """run_lm(mesh or its shape, …): three steps of a language model."""
    init = initializer(Llama(config), SGD)

    @cache
    def run(shape, zero=3, packed=True, **changes):
        model = Llama(config.model_copy(update=changes))
        loss_fn = partial(language_loss, model)
        step = partial(train_step, loss_fn=loss_fn, optimizer=SGD, seed=0, microbatches=1)
        mesh = shape if isinstance(shape, Mesh) else mesh_of(shape)
        return take_steps(mesh, init, step, lm_batch(packed), zero=zero, count=3)

    return run


@pytest.fixture(scope="module")
def run_dpo(config):
    """run_dpo(mesh shape, zero): three steps of the policy, away from another reference."""
    model = Llama(config)
    loss_fn = partial(dpo_loss, model, DpoConfig(nll=0.1))
    step = partial(train_step, loss_fn=loss_fn, optimizer=SGD, seed=0, microbatches=1, compares=True)

    def reference(key):
        return Weights(init_params(model, jax.random.fold_in(key, 7)))

    @cache
    def run(shape, zero=3):
        return take_steps(
            mesh_of(shape), initializer(model, SGD), step, pair_batch(), reference, zero=zero, count=3
        )

    return run


@pytest.fixture(scope="module")
def run_ppo(config):
    """run_ppo(mesh shape, microbatches): a whole iteration: rollout, four models, one epoch."""

    slow = plain.sgd(0.1)
    learners = (Learner(Llama(config), slow), Learner(ScalarModel(config), slow))
    ppo = Ppo(PpoConfig(epochs=1), *learners, shaping=Shaping(), stop_tokens=(2, 4), pad=5)
    decoding = GenerationConfig(max_new_tokens=6, temperature=1.0)
    init = partial(init_state, ppo)

    def frozen(key):
        key = jax.random.fold_in(key, 7)  # neither the actor's nor the critic's parameters
        return Frozen(*(Weights(init_params(learner.model, key)) for learner in learners))

    def run(shape, microbatches):
        actor, critic = (replace(learner, microbatches=microbatches) for learner in learners)
        parts = replace(ppo, actor=actor, critic=critic)
        step = partial(iterate, parts_of(parts, actor.model, decoding, seed=0))
        return take_steps(mesh_of(shape), init, step, prompt_batch(), frozen)

    return run


def movement(step, state):
    """How far rounding moves the parameters that one step makes of a state.

    Muon needs more than sums do: its iterations multiply what is rounded in the directions of small singular
    values by up to 3.4445^5, which is 485.
    """

    def parameters(params):
        return step(state.replace(params=params), lm_batch())[0].params

    return rounding.of_network(jax.jit(parameters), state.params, terms=B * T)


def assert_same(many, one, within=RATE * TOLERANCE):
    """Metrics to TOLERANCE, and the states: those that SGD moved by RATE times their gradients to as much."""
    before, after, metrics = many
    _, after_one, metrics_one = one
    close = np.testing.assert_allclose
    jax.tree.map(partial(close, rtol=min(within, TOLERANCE), atol=within), after, after_one)
    for number, (ours, wanted) in enumerate(zip(metrics, metrics_one, strict=True)):
        for name in wanted:
            close(ours[name], wanted[name], TOLERANCE, TOLERANCE, err_msg=f"step {number} {name}")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, before)
    assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_three_steps_of_a_language_model(run_lm, shape):
    assert_same(run_lm(shape), run_lm(ONE))


@pytest.mark.parametrize("shape", [(2, 2, 1, 1, 2), (1, 2, 2, 2, 1)], ids=str)
def test_rows_of_one_document(run_lm, shape):
    assert_same(run_lm(shape, packed=False), run_lm(ONE, packed=False))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8, 1), (1, 2, 1, 2, 2), (1, 1, 2, 4, 1)], ids=str)
def test_keys_that_travel(run_lm, shape, packed):
    assert_same(run_lm(shape, packed=packed, context_attention="ring"), run_lm(ONE, packed=packed))


@pytest.mark.parametrize("shape", [(2, 1, 1, 2, 2), (2, 1, 2, 1, 2)], ids=str)
def test_linear_biases(run_lm, shape):
    """Each device has the slopes of its heads and the distances of its places."""
    assert_same(run_lm(shape, position="alibi"), run_lm(ONE, position="alibi"))


@pytest.mark.parametrize(
    ("shape", "across"), [((2, 2, 1, 1, 2), "data"), ((1, 2, 2, 1, 2), "stage")], ids=str
)
def test_two_slices(run_lm, shape, across):
    """Four devices each; what is on one place of `across` is of one slice."""
    sizes = dict(zip(AXES, shape, strict=True))
    mesh = make_mesh(MeshConfig(**sizes, slices=2, across=across))
    first = np.take(mesh.devices, 0, AXES.index(across))
    assert {device.id for device in first.flat} == {0, 1, 2, 3}
    assert_same(run_lm(mesh), run_lm(ONE))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 1, 4, 1, 1), {"pipeline_rounds": 2}),
        ((2, 2, 2, 1, 1), {"pipeline_rounds": 4}),
        ((1, 1, 2, 2, 2), {"pipeline_rounds": 2, "pipeline_microbatches": 8}),
        ((2, 1, 2, 1, 2), {"pipeline_microbatches": 4, "remat": "full"}),
    ],
    ids=str,
)
def test_schedules_of_a_pipeline(run_lm, shape, changes):
    """Rounds that are more than the stages, as many and fewer; microbatches in one group and in several."""
    assert_same(run_lm(shape, **changes), run_lm(ONE))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_stages_of_zero(run_lm, shape, zero):
    """ZeRO-3 is every other test here."""
    assert_same(run_lm(shape, zero), run_lm(ONE))


@pytest.mark.parametrize(
    ("zero", "split"), [(0, set()), (1, {"moments"}), (2, {"moments"}), (3, {"moments", "parameters"})]
)
def test_what_a_stage_of_zero_splits(config, adam_init, zero, split):
    """On eight devices a device holds an eighth of what is split, and all of the rest."""
    description = abstract(adam_init, mesh_of((1, 8, 1, 1, 1)), zero)
    parts = {"parameters": description.params, "moments": description.opt_state[0].mu}
    for name, tree in parts.items():
        leaf = tree["decoder"]["layers"]["mlp"]["w_gate"]
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert leaf.size // np.prod(shard) == (8 if name in split else 1), name


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers(config, name):
    """Adafactor's rows and columns are means over split axes, Muon's iterations contract them; its moments
    lie as parameters do."""
    model, recipe = Llama(config), OptimizerConfig(name=name, learning_rate=0.05, schedule="constant")
    optimizer = make_optimizer(recipe, 10, partition_of(model).declared)
    init = initializer(model, optimizer)
    loss_fn = partial(language_loss, model)
    step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, seed=0, microbatches=1)
    one = take_steps(mesh_of(ONE), init, step, lm_batch())
    within = movement(step, one[0])
    for shape in ((1, 8, 1, 1, 1), (2, 2, 1, 1, 2)):
        assert_same(take_steps(mesh_of(shape), init, step, lm_batch()), one, within)
    w_gate = abstract(init, mesh_of((1, 8, 1, 1, 1))).opt_state
    sizes = [
        leaf.size // int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(w_gate)
        if "w_gate" in jax.tree_util.keystr(path)
    ]
    assert set(sizes) == ({8} if name == "muon" else {1})


@pytest.mark.parametrize(
    ("shape", "offload"),
    [((2, 2, 1, 1, 2), "parameters"), ((1, 2, 1, 2, 2), "optimizer"), ((2, 1, 4, 1, 1), "optimizer")],
    ids=str,
)
def test_what_lies_in_the_hosts_memory(config, shape, offload):
    """SGD with momentum, 1 and 1/2: three steps' gradients are added with weights of at most 1 3/4."""
    optimizer, model = plain.sgd(1.0, momentum=0.5), Llama(config)
    init = initializer(model, optimizer)
    step = partial(
        train_step,
        loss_fn=partial(language_loss, model),
        optimizer=optimizer,
        seed=0,
        microbatches=1,
        partition=partition_of(model),
    )
    one, many = (
        take_steps(mesh_of(where), init, step, lm_batch(), count=3, **changes)
        for where, changes in ((ONE, {}), (shape, {"offload": offload}))
    )
    assert_same(many, one, 1.75 * TOLERANCE)
    description = abstract(init, mesh_of(shape), 3, offload)
    in_host = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(description)
        if leaf.sharding.memory_kind == "pinned_host"
    }
    parameters = ["decoder/layers/mlp/w_gate", "decoder/layers/attention/wo", "decoder/embedding", "lm_head"]
    assert all(any(f"trace/{name}" in path for path in in_host) for name in parameters)
    found = [f"params/{name}" in in_host for name in parameters]
    assert found == ([True, True, False, False] if offload == "parameters" else [False] * 4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimizers_do_the_same_one_parameter_at_a_time(config, name):
    """The same operations on the same numbers, fused otherwise."""
    model, mesh = Llama(config), mesh_of((1, 8, 1, 1, 1))
    recipe = OptimizerConfig(name=name, learning_rate=0.05, schedule="constant")
    optimizer = make_optimizer(recipe, 10, partition_of(model).declared)
    init = initializer(model, optimizer)
    step = partial(
        train_step, loss_fn=partial(language_loss, model), optimizer=optimizer, seed=0, microbatches=1
    )
    run = partial(take_steps, mesh, init, step, lm_batch())
    one = run()
    assert_same(run(offload="optimizer"), one, movement(step, one[0]))


@pytest.mark.parametrize(
    ("shape", "zero"),
    [((1, 2, 1, 1, 4), 3), ((1, 2, 1, 2, 2), 3), ((1, 2, 2, 1, 2), 3), ((2, 2, 1, 1, 2), 0)],
    ids=str,
)
def test_three_steps_of_dpo(run_dpo, shape, zero):
    """Policy and reference are split alike but by ZeRO, which leaves the reference as it is."""
    assert_same(run_dpo(shape, zero), run_dpo(ONE))


@pytest.mark.parametrize("shape", [(2, 2, 1, 1, 2), (1, 2, 2, 1, 2)], ids=str)
def test_ppo_iteration(run_ppo, shape):
    """All three axes at once, in two microbatches on eight devices and in one on one: rows are split twice,
    the same samples are drawn and the same updates of actor and critic follow."""
    assert_same(run_ppo(shape, 2 if shape[2] == 1 else 1), run_ppo(ONE, 1), TOLERANCE)


# What is where


def shard_sizes(config, fsdp, stage, context, tensor):
    """Shapes of one device's shard of each parameter, from the sizes and nothing else."""
    D, F, K = config.d_model // (fsdp * context), config.d_ff // tensor, config.k_dim
    H, G, L = config.n_heads // tensor, config.n_kv_heads // tensor, config.n_layers // stage
    return {
        "wq": (L, D, H, K),
        "wk": (L, D, G, K),
        "wv": (L, D, G, K),
        "wo": (L, H, K, D),
        "w_gate": (L, D, F),
        "w_up": (L, D, F),
        "w_down": (L, F, D),
        "embedding": (config.vocab_size // tensor, D // stage),
        "lm_head": (D // stage, config.vocab_size // tensor),
    }


@pytest.fixture(scope="module")
def adam_init(config):
    return initializer(Llama(config), plain.adam(1e-3))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_state_lies_as_abstract_says_and_in_shards(config, adam_init, shape):
    """Every matrix, and its moments, is cut along every axis but data; norm scales by their layers alone."""
    description = abstract(adam_init, mesh_of(shape))
    state = create(adam_init, description, jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(description)
    for wanted, leaf in zip(jax.tree.leaves(description), jax.tree.leaves(state), strict=True):
        assert (wanted.shape, wanted.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding == wanted.sharding
    sizes, seen = shard_sizes(config, *shape[1:]), set()
    moments = state.opt_state[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, moments.mu, moments.nu)):
        name = path[-1].key
        assert len(leaf.addressable_shards) == 8
        norm = (leaf.shape[0] // shape[2], *leaf.shape[1:]) if leaf.ndim > 1 else leaf.shape
        assert {shard.data.shape for shard in leaf.addressable_shards} == {sizes.get(name, norm)}, name
        seen.add(name)
    assert seen == set(sizes) | {"scale"}
    # Initialized as on one device: the same random bits, then an inverse error function of 40 operations.
    atol = rounding.of_operations(40, magnitude=float(np.abs(created(adam_init).params["lm_head"]).max()))
    close = partial(np.testing.assert_allclose, rtol=0, atol=atol)
    jax.tree.map(close, jax.device_get(state), created(adam_init))


def test_what_zero_3_leaves_whole_is_an_error(config):
    """Norms may be on every device; an embedding of 4 MB, a sixth of all, may not."""
    mesh = mesh_of((1, 8, 1, 1, 1))
    large = config.model_copy(update={"vocab_size": 32768})
    description = abstract(initializer(Llama(large), plain.adam(1e-3)), mesh)
    sharding.check_split(description, mesh)

    def whole(path, leaf):
        if path[-1].key != "embedding":
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    params = jax.tree_util.tree_map_with_path(whole, description.params)
    with pytest.raises(UserError, match=r"15\.9% of .* fsdp: params/decoder/embedding \(4,194,304 bytes\)"):
        sharding.check_split(description.replace(params=params), mesh)


def test_batches_are_split_by_rows():
    rows = np.arange(16).reshape(8, 2)
    placed = processes.to_global({"x": rows}, sharding.batch_sharding(mesh_of((2, 2, 1, 1, 2))))["x"]
    assert placed.sharding.spec == PartitionSpec(("stage", "data", "fsdp"))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed, rows)


def test_compile_reader_answers_on_a_mesh(config, run_lm):
    """A numpy batch in; out come the loss and accuracy that the training step saw on one device."""
    before, _, (wanted, *_) = run_lm(ONE)
    model, mesh = Llama(config), mesh_of((2, 2, 1, 1, 2))
    shardings = sharding.shardings_of(abstract(partial(init_params, model), mesh))
    weights = Weights(jax.device_put(before.params, shardings))
    got = compile_reader(mesh, partial(eval_step, loss_fn=partial(language_loss, model)))(weights, lm_batch())
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=TOLERANCE, err_msg=name)


def test_tied_embeddings_and_unboxing(tiny_model):
    """Nothing of Linen's boxes stays in a created state."""
    model = Llama(tiny_model(tie_embeddings=True))
    init = partial(init_params, model)
    params = create(init, abstract(init, mesh_of((2, 2, 1, 1, 2))), jax.random.key(0))
    assert "lm_head" not in params
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(params) == jax.tree.structure(nn.unbox(params))


# Meshes


def test_minus_one_takes_the_rest():
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "stage": 1,
        "context": 1,
        "tensor": 2,
    }
    assert dict(make_mesh(MeshConfig(data=1, fsdp=-1)).shape) == {
        "data": 1,
        "fsdp": 8,
        "stage": 1,
        "context": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ((3, 1, 1, 1, 1), "data=3 x fsdp=1 x stage=1 x context=1 x tensor=1"),
        ((-1, 3, 1, 1, 1), "fsdp=3"),
        ((-1, 16, 1, 1, 1), "fsdp=16"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so(sizes, given):
    with pytest.raises(UserError, match=r"8( devices that)? are here") as error:
        make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    assert given in str(error.value)


def test_slices_that_do_not_divide_are_named():
    with pytest.raises(
        UserError, match=r"mesh.data=1 goes across slices and is not divisible by mesh.slices=2"
    ):
        make_mesh(MeshConfig(data=1, fsdp=8, slices=2))


@pytest.mark.parametrize(
    ("shape", "changes", "rows", "microbatches", "sentence"),
    [
        ((1, 1, 1, 1, 8), {}, 8, 1, "model.n_heads=4 is not divisible by mesh.tensor=8"),
        ((2, 1, 1, 1, 4), {}, 8, 1, "model.n_kv_heads=2 is not divisible by mesh.tensor=4"),
        (
            (1, 8, 1, 1, 1),
            {"d_model": 36, "head_dim": 8},
            8,
            1,
            "model.d_model=36 is not divisible by mesh.fsdp=8",
        ),
        ((4, 1, 1, 1, 2), {"d_ff": 49}, 8, 1, "model.d_ff=49 is not divisible by mesh.tensor=2"),
        ((4, 1, 1, 1, 2), {"vocab_size": 65}, 8, 1, "model.vocab_size=65 is not divisible by mesh.tensor=2"),
        ((2, 1, 4, 1, 1), {}, 8, 1, "model.n_layers=2 is not divisible by mesh.stage=4"),
        ((4, 1, 2, 1, 1), {}, 4, 1, "model.pipeline_microbatches=2, which must be a multiple"),
        ((8, 1, 1, 1, 1), {}, 16, 4, "4 rows at a time, which mesh data x fsdp = 8 does not divide"),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(tiny_model, shape, changes, rows, microbatches, sentence):
    batch = BatchConfig(rows=rows, sequence_length=20, microbatches=microbatches)
    with pytest.raises(UserError) as error:
        check_model_divides(mesh_of(shape), tiny_model(**changes))
        check_batch_divides(mesh_of(shape), batch, tiny_model(**changes))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            (2, 1, 1, 1, 4),
            "batch.rows=8 in ppo.minibatches=4 x batch.microbatches=2 is 1 rows at a time, which mesh data x "
            "fsdp = 2 does not divide",
        ),
        ((1, 1, 2, 1, 4), "split 1 rows at a time into parts that mesh data x fsdp = 1 divides"),
    ],
)
def test_minibatches_that_the_mesh_does_not_divide_are_named(tiny_model, shape, sentence):
    """A stage of a pipeline takes rows too."""
    batch = BatchConfig(rows=8, sequence_length=20, microbatches=2)
    with pytest.raises(UserError) as error:
        check_batch_divides(mesh_of(shape), batch, tiny_model(), minibatches=4)
    assert sentence in str(error.value)


def test_rows_are_split_over_all_axes_of_a_batch(config):
    for shape in MESHES:
        mesh = mesh_of(shape)
        data, fsdp, stage = (mesh.shape[axis] for axis in ("data", "fsdp", "stage"))
        assert sharding.row_shards(mesh) == data * fsdp * stage


def test_a_mesh_that_divides_passes(config):
    for shape in MESHES:
        check_model_divides(mesh_of(shape), config)
