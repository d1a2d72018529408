"""PPO's step on a real tiny model: sampler and trainer agree, and every number has a NumPy twin.

Tolerances: log-probabilities and values come out of two float32 layers with other shapes and padding, exact
to some tens of 6e-8 at magnitudes up to 5: 1e-5, and 1e-4 after the sums over a response.
"""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import rounding
from flax.traverse_util import flatten_dict

from maxllm.config.generation import GenerationConfig
from maxllm.config.ppo import PpoConfig
from maxllm.data.tokenizer import EOS, IM_END, PAD
from maxllm.generate.decode import generate
from maxllm.losses import linear
from maxllm.losses.token import Shaping
from maxllm.model.forward import forward
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.records import Experience, PromptBatch, Rollout
from maxllm.stages.ppo_program import iterate, parts_of
from maxllm.steps import ppo as algorithm
from maxllm.steps.ppo import Frozen, Learner, Ppo, PpoState
from maxllm.steps.state import TrainState
from maxllm.weights import Weights

B, P, R, V = 8, 6, 8, 16
TEMPERATURE = 0.7
CONFIG = PpoConfig(gae_lambda=0.9, gamma=0.97, score_clip=0.8, missing_eos_penalty=0.5, kl_coef=0.1)


def trainable(params, optimizer):
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def left_padded(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), P), PAD, np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[P - n :] = rng.integers(6, V, n)
    return PromptBatch(tokens, np.array(lengths, np.int32))


@pytest.fixture(scope="module")
def world(tiny_model, params_of):
    """Four models, a rollout at temperature 0.7, and its experience."""
    config = tiny_model(vocab_size=V, init_std=0.3)
    model, scalar = Llama(config), ScalarModel(config)
    sgd = plain.sgd(0.05)
    ppo = Ppo(CONFIG, Learner(model, sgd), Learner(scalar, sgd), Shaping(TEMPERATURE), (EOS, IM_END), PAD)
    actor, other = params_of(model), params_of(model, 1)
    reference = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, actor, other)
    frozen = Frozen(Weights(reference), Weights(params_of(scalar, 2)))
    state = PpoState(jnp.int32(0), trainable(actor, sgd), trainable(params_of(scalar, 3), sgd))
    decoding = GenerationConfig(max_new_tokens=R, temperature=TEMPERATURE)
    respond = jax.jit(partial(generate, model, config=decoding, stop_tokens=(EOS, IM_END), pad=PAD))
    prompts = left_padded([6, 1, 3, 6, 2, 5, 4, 1])
    rollout = respond(weights=Weights(actor), prompts=prompts, key=jax.random.key(4))
    lengths = np.asarray(rollout.mask_BR).sum(1)
    assert 0 < np.asarray(rollout.finished_B).sum() < B and len(set(lengths)) > 3, "a rollout worth testing"
    judge = jax.jit(partial(experience, ppo))
    batch, metrics = judge(state, frozen, rollout)
    return SimpleNamespace(**locals())


def experience(ppo, state, frozen, rollout):
    """The reward model's scores, and all that is made of them."""
    scores_B = algorithm.scores(ppo, frozen.reward, rollout)
    return algorithm.experience(ppo, state, frozen, rollout, scores_B)


def masked(array, rollout):
    return np.asarray(array)[np.asarray(rollout.mask_BR) > 0]


# What the sampler said and what the trainer says


@pytest.fixture(scope="module")
def off(world):
    """How far rounding alone can move a log-probability of these responses, in nats."""
    recompute = jax.jit(lambda params: recomputed_logps(world, params))
    return rounding.of_network(
        lambda params: masked(recompute(params), world.rollout), world.actor, world.config.d_ff
    )


def recomputed_logps(world, params):
    return algorithm.response_logps(world.model, world.ppo.shaping, Weights(params), world.rollout)


def test_recomputed_logps_are_the_samplers(world, off):
    """As near as float32 allows: a step of decoding and the whole row sum in different orders."""
    ours, theirs = (
        masked(world.batch.old_logps_BR, world.rollout),
        masked(world.rollout.logps_BR, world.rollout),
    )
    assert off < 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=off)
    assert theirs.std() > 0.5  # the samples do differ in likelihood


@pytest.fixture(scope="module")
def first_update(world):
    """The jitted update of a minibatch, and what it makes of the whole batch at first."""
    step = jax.jit(partial(algorithm.update_minibatch, world.ppo))
    return step, step(world.state, world.frozen, world.batch, jax.random.key(0))


def test_first_minibatch_is_on_policy(world, first_update, off):
    """ratio 1, KL 0, nothing clipped; the loss is minus the mean whitened advantage: 0, of a sum of ones."""
    _, (_, metrics) = first_update
    tokens = np.asarray(world.rollout.mask_BR).sum()
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert float(metrics["ratio"][1]) == tokens
    np.testing.assert_allclose(means["ratio"], 1, rtol=0, atol=off)
    assert 0 <= means["approx_kl"] < off**2 and means["clip_fraction"] == 0
    np.testing.assert_allclose(means["loss"], 0, rtol=0, atol=off)
    assert means["skipped"] == 0 and means["gradient_norm"] > 1e-3 and means["value_loss"] > 1e-3


def test_kl_to_an_equal_reference_is_zero(world, off):
    """The sums over all tokens of two forward passes, which a compiler may round apart."""
    same = Frozen(Weights(world.state.actor.params), world.frozen.reward)
    batch, metrics = world.judge(world.state, same, world.rollout)
    tokens = np.asarray(world.rollout.mask_BR).sum()
    for name in ("kl", "kl_k3"):
        np.testing.assert_allclose(metrics[name][0], 0, atol=tokens * off)
    assert not np.allclose(batch.returns_BR, world.batch.returns_BR, atol=1e-3)  # the KL was in the reward


# The NumPy twin


def twin(world):
    """Everything `experience` computes, row by row in float64 from right-padded rows."""
    rollout, config = jax.device_get(world.rollout), world.ppo.config
    rows, lengths, prompts = [], rollout.mask_BR.sum(1).astype(int), world.prompts.lengths_B
    for b in range(B):
        rows.append(rollout.tokens_BT[b, P - prompts[b] : P + lengths[b]])
    tokens = np.full((B, P + R), PAD, np.int32)
    segments = np.zeros_like(tokens)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], segments[b, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(P + R, dtype=np.int32), tokens.shape)

    def run(model, weights):
        return np.asarray(jax.jit(partial(forward, model))(weights, tokens, segments, positions), np.float64)

    def logps(weights, b):
        z = logits[id(weights)][b, prompts[b] - 1 : prompts[b] - 1 + lengths[b]] / TEMPERATURE
        every = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return every[np.arange(lengths[b]), rows[b][prompts[b] :]], every

    actor, reference = Weights(world.state.actor.params), world.frozen.reference
    logits = {id(weights): run(world.model, weights) for weights in (actor, reference)}
    values = run(world.scalar, Weights(world.state.critic.params))
    scores = run(world.scalar, world.frozen.reward)
    out = {"advantages": [], "returns": [], "values": [], "logps": [], "kl": 0.0, "k3": 0.0, "entropy": 0.0}
    out["score"] = [scores[b, len(rows[b]) - 1] for b in range(B)]
    for b in range(B):
        new, every = logps(actor, b)
        old, _ = logps(reference, b)
        v = values[b, prompts[b] - 1 : prompts[b] - 1 + lengths[b]]
        reward = -config.kl_coef * (new - old)
        score = min(max(out["score"][b], -config.score_clip), config.score_clip)
        reward[-1] += score - (0 if rollout.finished_B[b] else config.missing_eos_penalty)
        advantage, after, running = np.zeros(lengths[b]), 0.0, 0.0
        for t in reversed(range(lengths[b])):
            running = reward[t] + config.gamma * after - v[t] + config.gamma * config.gae_lambda * running
            advantage[t], after = running, v[t]
        out["advantages"].append(advantage)
        out["returns"].append(advantage + v)
        out["values"].append(v)
        out["logps"].append(new)
        out["kl"] += (new - old).sum()
        out["k3"] += (np.exp(old - new) - 1 - (old - new)).sum()
        out["entropy"] -= (np.exp(every) * every).sum()
    for name in ("advantages", "returns", "values", "logps"):
        out[name] = np.concatenate(out[name])
    return out


@pytest.fixture(scope="module")
def expected(world):
    return twin(world)


def off_by(world, function):
    """How far rounding may move `function(experience, metrics)` of a rollout's judgement."""

    def judged(models):
        actor, critic, reference, reward = models
        state = world.state.replace(
            actor=world.state.actor.replace(params=actor), critic=world.state.critic.replace(params=critic)
        )
        return function(*world.judge(state, Frozen(Weights(reference), Weights(reward)), world.rollout))

    frozen, state = world.frozen, world.state
    models = (state.actor.params, state.critic.params, frozen.reference.base, frozen.reward.base)
    return rounding.of_network(judged, models, world.config.d_ff)


def test_experience_equals_its_numpy_twin(world, expected):
    batch = world.batch
    raw = expected["advantages"]
    white = (raw - raw.mean()) / np.sqrt(((raw - raw.mean()) ** 2).mean() + 1e-8)
    for name, wanted in (
        ("old_logps_BR", expected["logps"]),
        ("old_values_BR", expected["values"]),
        ("returns_BR", expected["returns"]),
        ("advantages_BR", white),
    ):
        atol = off_by(world, lambda batch, _, name=name: masked(getattr(batch, name), world.rollout))
        got = masked(getattr(batch, name), batch.rollout)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=name)
    outside = np.asarray(batch.rollout.mask_BR) == 0
    assert outside.any()
    assert not np.any(np.asarray(batch.advantages_BR)[outside])
    assert not np.any(np.asarray(batch.returns_BR)[outside])
    bitten = np.abs(expected["score"]) > CONFIG.score_clip
    assert bitten.any() and not bitten.all()  # the clip was part of the test


def test_experience_metrics_equal_their_numpy_twins(world, expected):
    tokens = np.asarray(world.rollout.mask_BR).sum()
    wanted = {
        "score": (sum(expected["score"]), B),
        "kl": (expected["kl"], B),
        "kl_k3": (expected["k3"], B),
        "entropy": (expected["entropy"], tokens),
        "response_tokens": (tokens, B),
        "advantage_std": (expected["advantages"].std(), 1),
        "finished": (np.asarray(world.rollout.finished_B).sum(), B),
    }
    assert set(world.metrics) == set(wanted)
    for name, (total, count) in wanted.items():
        got = [float(x) for x in world.metrics[name]]
        atol = off_by(world, lambda _, metrics, name=name: metrics[name][0])
        np.testing.assert_allclose(got[0], total, rtol=rounding.of_sum(B * R), atol=atol, err_msg=name)
        assert got[1] == count


def test_actor_loss_off_policy_equals_numpy(world, expected):
    """The reference's parameters stand in for an actor that has moved."""
    loss_of = jax.jit(partial(algorithm.actor_loss, world.ppo))
    losses = partial(loss_of, batch=world.batch, key=jax.random.key(0))
    loss = losses(world.frozen.reference)
    moved = world.state.replace(actor=trainable(world.frozen.reference.base, world.sgd))
    logps = world.judge(moved, world.frozen, world.rollout)[0].old_logps_BR
    delta = masked(logps, world.rollout).astype(np.float64) - expected["logps"]
    advantage, ratio = masked(world.batch.advantages_BR, world.rollout), np.exp(delta)
    plain, clipped = -advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2)
    wanted = {
        "clip_fraction": (clipped > plain).sum(),
        "approx_kl": 0.5 * (delta**2).sum(),
        "ratio": ratio.sum(),
    }
    assert 0 < wanted["clip_fraction"] < len(delta)
    off = partial(rounding.of_network, weights=world.frozen.reference, terms=world.config.d_ff)
    rtol, atol = rounding.of_sum(B * R), off(lambda weights: losses(weights).total)
    np.testing.assert_allclose(loss.total, np.maximum(plain, clipped).sum(), rtol=rtol, atol=atol)
    assert float(loss.weight) == len(delta)
    for name, total in wanted.items():
        atol = off(lambda weights, name=name: losses(weights).metrics[name][0])
        np.testing.assert_allclose(loss.metrics[name][0], total, rtol=rtol, atol=atol, err_msg=name)


# Updates


def test_microbatches_do_not_change_the_update(world):
    """Two epochs of two minibatches of 4 rows with uneven responses, whole and in 4 parts."""
    config = CONFIG.model_copy(update={"epochs": 2, "minibatches": 2})

    def step_of(microbatches):
        actor = replace(world.ppo.actor, microbatches=microbatches)
        other = world.ppo.critic.optimizer._replace(learning_rate=lambda _: jnp.float32(7))
        critic = replace(world.ppo.critic, microbatches=microbatches, optimizer=other)
        ppo = replace(world.ppo, config=config, actor=actor, critic=critic)
        step = jax.jit(partial(algorithm.update_epochs, ppo))
        return partial(step, frozen=world.frozen, batch=world.batch, key=jax.random.key(1))

    in_one = step_of(1)
    whole, whole_metrics = in_one(world.state)
    parts, part_metrics = step_of(4)(world.state)

    def updated(params):
        """(how far each parameter is moved, the metrics' sums) from other parameters."""
        models = {name: getattr(world.state, name).replace(params=params[name]) for name in params}
        state, metrics = in_one(world.state.replace(**models))
        after = {name: getattr(state, name).params for name in params}
        return jax.tree.map(jnp.subtract, after, params), {
            name: total for name, (total, _) in metrics.items()
        }

    before = {"actor": world.state.actor.params, "critic": world.state.critic.params}
    off = partial(rounding.of_network, weights=before, terms=B * R)
    close = partial(np.testing.assert_allclose, rtol=0)
    jax.tree.map(partial(close, atol=off(lambda params: updated(params)[0])), parts, whole)
    for name in ("ratio", "approx_kl", "value_loss", "loss"):
        atol = off(lambda params, name=name: updated(params)[1][name])
        close(part_metrics[name][0], whole_metrics[name][0], atol=atol, err_msg=name)
    np.testing.assert_array_equal(part_metrics["clip_fraction"], whole_metrics["clip_fraction"])
    tokens = np.asarray(world.rollout.mask_BR).sum()
    assert float(whole_metrics["ratio"][1]) == 2 * tokens  # every token once an epoch
    assert [float(x) for x in whole_metrics["learning_rate"]] == [np.float32(4 * 0.05), 4]  # the actor's
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), whole.actor.params, world.state.actor.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_every_row_once_an_epoch_in_another_order(monkeypatch):
    """The update is replaced by one that writes down which rows it was given."""
    rows, epochs, minibatches = 12, 3, 4
    size = rows // minibatches

    def note(ppo, state, frozen, part, key):
        count, log = state
        assert part.returns_BR.shape == (size, 1) and part.rollout.tokens_BT.shape == (size, 2)
        log = jax.lax.dynamic_update_slice(log, part.returns_BR[:, 0], (count,))
        return (count + size, log), {"one": (jnp.float32(1), jnp.float32(2))}

    monkeypatch.setattr(algorithm, "update_minibatch", note)
    ids = jnp.arange(rows, dtype=jnp.float32)[:, None]
    wide = jnp.concatenate([ids, ids], 1)
    batch = Experience(Rollout(wide, wide, wide, ids, ids, ids[:, 0]), ids, ids, ids, ids)
    ppo = SimpleNamespace(config=PpoConfig(epochs=epochs, minibatches=minibatches))
    state = (jnp.int32(0), jnp.zeros(rows * epochs))
    (count, log), metrics = algorithm.update_epochs(ppo, state, None, batch, jax.random.key(0))
    assert int(count) == rows * epochs
    orders = np.asarray(log).reshape(epochs, rows)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    assert len({tuple(order) for order in orders}) == epochs
    assert [float(x) for x in metrics["one"]] == [12, 24]  # summed over all minibatches


def test_a_non_finite_return_changes_neither_model(world, first_update):
    step, _ = first_update
    bad = world.batch.replace(
        returns_BR=world.batch.returns_BR.at[0, 0].set(jnp.nan),
        advantages_BR=world.batch.advantages_BR.at[0, 0].set(jnp.nan),
    )
    after, metrics = step(world.state, world.frozen, bad, jax.random.key(0))
    assert [float(x) for x in metrics["skipped"]] == [1, 1]
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.actor.params, after.critic.params),
        (world.state.actor.params, world.state.critic.params),
    )


def test_detached_state_attaches_again(world):
    params, rest = world.state.detach()
    assert params is world.state.actor.params and rest.actor.params is None
    back = rest.attach(params)
    jax.tree.map(np.testing.assert_array_equal, back, world.state)


# What a recipe says of an update is honoured


def test_updates_have_dropout(world):
    """The losses with a key drop what the model's dropout says; without one, and in judging, nothing."""
    config = world.config.model_copy(update={"residual_dropout": 0.5})
    ppo = replace(
        world.ppo,
        actor=replace(world.ppo.actor, model=Llama(config)),
        critic=replace(world.ppo.critic, model=ScalarModel(config)),
    )
    for loss, state in (
        (algorithm.actor_loss, world.state.actor),
        (algorithm.critic_loss, world.state.critic),
    ):
        run = jax.jit(partial(loss, ppo, Weights(state.params), world.batch))
        plain, one, other = (float(run(key).total) for key in (None, jax.random.key(0), jax.random.key(1)))
        assert plain == float(
            jax.jit(partial(loss, world.ppo, Weights(state.params), world.batch))(None).total
        )
        assert len({plain, one, other}) == 3


def test_updates_have_gradients_of_the_type_that_is_asked_for(world):
    """In bfloat16 each entry of a matrix's gradient is rounded once, by at most 2^-8 of itself; SGD's step of
    0.05 is as much off. Other parameters have float32 gradients as before."""
    update = jax.jit(partial(algorithm.update_minibatch, world.ppo))
    coarse = replace(world.ppo, actor=replace(world.ppo.actor, gradient_dtype=jnp.dtype("bfloat16")))
    rough = jax.jit(partial(algorithm.update_minibatch, coarse))
    fine, after = (
        f(world.state, world.frozen, world.batch, jax.random.key(0))[0].actor.params for f in (update, rough)
    )
    before = world.state.actor.params
    name = "decoder/layers/mlp/w_up"
    moved = {
        which: flatten_dict(jax.tree.map(lambda a, b: np.asarray(a - b), tree, before), sep="/")
        for which, tree in (("fine", fine), ("rough", after))
    }
    exact, rounded = moved["fine"][name], moved["rough"][name]
    assert not np.array_equal(exact, rounded)
    size = np.abs(flatten_dict(before, sep="/")[name]).max()
    atol = rounding.of_operations(2, float(size))  # the subtraction here, and the addition that it undoes
    np.testing.assert_allclose(rounded, exact, rtol=2**-7, atol=atol + 2**-8 * float(np.abs(exact).max()))
    np.testing.assert_array_equal(moved["fine"]["lm_head"], moved["rough"]["lm_head"])


def test_the_logits_of_all_responses_are_never_there(world, monkeypatch):
    """No array of the compiled part has B x R x V entries, where the head takes eight rows at a time."""
    monkeypatch.setattr(linear, "PART_BYTES", 4 * V * 8)  # eight rows
    learn = parts_of(world.ppo, world.model, world.decoding, seed=0)["learn"]
    scores_B = jnp.zeros(B, jnp.float32)
    text = jax.jit(learn).lower(world.state, world.rollout, scores_B, world.frozen).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([0-9,]+)\]", text)}
    assert (8, V) in shapes
    assert not shapes & {(B * R, V), (B, R, V), (B, P + R, V), (B, R + 1, V)}


# The whole iteration learns


def test_ppo_raises_the_probability_of_the_rewarded_token(world, monkeypatch):
    """Score: the share of a response that is token 9. From about 1 in 16 it must come to dominate."""
    wanted = 9

    def share(ppo, reward_params, rollout):
        hits = (algorithm.response_tokens(rollout) == wanted) * rollout.mask_BR
        return hits.sum(1) / jnp.maximum(rollout.mask_BR.sum(1), 1)

    monkeypatch.setattr(algorithm, "scores", share)
    adam = plain.adam(1e-2)
    config = PpoConfig(kl_coef=0.0, missing_eos_penalty=0.0, epochs=2)
    ppo = replace(
        world.ppo, config=config, actor=Learner(world.model, adam), critic=Learner(world.scalar, adam)
    )
    decoding = GenerationConfig(max_new_tokens=4, temperature=TEMPERATURE)
    step = jax.jit(partial(iterate, parts_of(ppo, world.model, decoding, seed=0)))
    prompts = left_padded([6, 1, 3, 6, 2, 5, 4, 1] * 4, seed=5)
    state = PpoState(
        jnp.int32(0),
        trainable(world.state.actor.params, adam),
        trainable(world.state.critic.params, adam),
    )

    scores = []
    for _ in range(25):
        state, metrics = step(state, prompts, world.frozen)
        scores.append(float(metrics["score"][0] / metrics["score"][1]))
    assert int(state.step) == 25 and int(state.actor.step) == 50
    assert np.mean(scores[:3]) < 0.25 and np.mean(scores[-3:]) > 0.6, scores


def test_a_judge_on_the_host_finds_the_row_of_each_prompt(world):
    """Rows come out of the compiled rollout as they went in, whatever the responses."""
    decoding = GenerationConfig(max_new_tokens=2, temperature=TEMPERATURE)
    answers = np.arange(100) ** 2
    rows = np.array([7, 99, 0, 7, 12, 31], np.int32)
    prompts = left_padded([6, 1, 3, 6, 2, 5])

    def judge(reward, rollout):
        return answers[np.asarray(rollout.row_B)]

    def learn(state, rollout, scores_B, reference):
        return state, scores_B

    parts = {"rollout": jax.jit(parts_of(world.ppo, world.model, decoding, seed=0)["rollout"])}
    parts |= {"judge": judge, "learn": learn}
    _, scores_B = iterate(parts, world.state, prompts.replace(row_B=rows), world.frozen)
    assert scores_B.tolist() == (rows**2).tolist()
    without = parts["rollout"](world.state.actor.params, world.state.step, prompts, world.frozen.reference)
    assert without.row_B is None


def test_the_policy_is_over_the_ids_that_have_a_token(world, off):
    """The sampler and the update leave the same ids out, so that their ratio is 1 before the first update."""
    never = tuple(range(V - 5, V))
    shaping = Shaping(TEMPERATURE, never)
    decoding = GenerationConfig(max_new_tokens=R, temperature=TEMPERATURE)
    settings = {"config": decoding, "stop_tokens": (EOS, IM_END), "pad": PAD, "never": never}
    respond = jax.jit(partial(generate, world.model, **settings))
    rollout = respond(weights=Weights(world.actor), prompts=world.prompts, key=jax.random.key(4))
    tokens = masked(algorithm.response_tokens(rollout), rollout)
    assert tokens.max() < V - 5
    recompute = jax.jit(lambda weights: algorithm.response_logps(world.model, shaping, weights, rollout))
    logps = recompute(Weights(world.actor))
    np.testing.assert_allclose(masked(logps, rollout), masked(rollout.logps_BR, rollout), rtol=0, atol=off)
    assert np.abs(masked(logps, rollout)).max() < 1e3
