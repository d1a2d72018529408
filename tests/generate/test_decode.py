"""Cached decoding against plain forward passes, and sampling against NumPy.

The cached and the uncached path have the same float32 sums, over other shapes.
"""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from maxllm.config.generation import GenerationConfig
from maxllm.generate.decode import generate
from maxllm.generate.sampling import restrict, sample
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.records import PromptBatch
from maxllm.weights import Weights

V, P, R, PAD = 64, 9, 8, 5
LENGTHS = (9, 1, 4, 7, 2)
NEVER = (V,)
"""A stop token outside the vocabulary."""
TOLERANCE = 2 * rounding.of_sum(64, magnitude=8.0)
"""Two layers of sums of up to 64 terms, whose absolute values add up to about 8: 6e-5."""


@pytest.fixture(scope="module", params=["grouped", "tied", "alibi"])
def lm(request, tiny_model, params_of):
    changes = {
        "grouped": {},
        "tied": {"tie_embeddings": True, "n_kv_heads": 4, "init_std": 0.5},
        "alibi": {"position": "alibi"},
    }[request.param]
    model = Llama(tiny_model(**changes))
    return model, Weights(params_of(model))


@pytest.fixture(scope="module")
def grouped(tiny_model, params_of):
    model = Llama(tiny_model())
    return model, Weights(params_of(model))


def prompts_of(lengths=LENGTHS, width=P, seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), width), PAD, np.int32)
    for row, n in zip(tokens, lengths, strict=True):
        row[width - n :] = rng.integers(6, V - 1, n)
    return PromptBatch(tokens, np.array(lengths, np.int32))


@cache
def decoder(model, stop, **settings):
    config = GenerationConfig(max_new_tokens=R, **settings)
    return jax.jit(partial(generate, model, config=config, stop_tokens=stop, pad=PAD))


def respond(lm, prompts, stop=NEVER, key=0, **settings):
    model, weights = lm
    rollout = decoder(model, stop, **settings)(weights=weights, prompts=prompts, key=jax.random.key(key))
    return jax.device_get(rollout)


@cache
def whole(model):
    return jax.jit(partial(forward, model))


def bare_logits(lm, ids):
    """Logits of one sequence without left padding, [len, V]; right-padded to one width to compile once."""
    model, weights = lm
    tokens = np.zeros((1, P + R), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (np.arange(P + R) < len(ids)).astype(np.int32)[None]
    return np.asarray(whole(model)(weights, tokens, segments, np.arange(P + R, dtype=np.int32)[None]))[
        0, : len(ids)
    ]


def greedy_by_hand(lm, prompt, stop=NEVER):
    """The textbook loop: a full forward pass a token."""
    ids = list(prompt)
    for _ in range(R):
        ids.append(int(np.argmax(bare_logits(lm, ids)[-1])))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def bare(prompts, row):
    return prompts.tokens_BP[row, P - prompts.lengths_B[row] :]


def log_softmax(z):
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# Greedy


def test_cached_decoding_equals_the_textbook_loop(lm):
    """Left-padded prompts of mixed lengths in one batch, token for token."""
    prompts = prompts_of()
    rollout = respond(lm, prompts)
    by_hand = [greedy_by_hand(lm, bare(prompts, row)) for row in range(len(LENGTHS))]
    np.testing.assert_array_equal(rollout.tokens_BT[:, P:], by_hand)
    assert len({tuple(row) for row in by_hand}) == len(LENGTHS)
    assert rollout.mask_BR.all() and not rollout.finished_B.any()
    np.testing.assert_array_equal(rollout.tokens_BT[:, :P], prompts.tokens_BP)


def test_a_row_does_not_depend_on_its_batch(grouped):
    """Each row alone, with its own amount of padding (none), gives the same response and logps."""
    prompts = prompts_of()
    together = respond(grouped, prompts)
    for row, length in enumerate(LENGTHS[:3]):
        one = PromptBatch(bare(prompts, row)[None], np.array([length], np.int32))
        alone = respond(grouped, one)
        np.testing.assert_array_equal(alone.tokens_BT[0, length:], together.tokens_BT[row, P:])
        np.testing.assert_allclose(alone.logps_BR[0], together.logps_BR[row], rtol=0, atol=TOLERANCE)


def test_what_stands_in_the_padding_does_not_matter(grouped):
    prompts = prompts_of()
    padding = np.arange(P) < P - prompts.lengths_B[:, None]
    noisy = prompts.replace(tokens_BP=np.where(padding, 17, prompts.tokens_BP))
    expected, got = respond(grouped, prompts), respond(grouped, noisy)
    np.testing.assert_array_equal(got.tokens_BT[:, P:], expected.tokens_BT[:, P:])
    np.testing.assert_array_equal(got.logps_BR, expected.logps_BR)


# Stopping


@pytest.fixture(scope="module")
def stopped(grouped):
    """A stop token taken from the middle of one row's free response."""
    prompts = prompts_of()
    free = respond(grouped, prompts).tokens_BT[:, P:]
    stop = (int(free[0, 3]), int(free[2, 5]))
    return SimpleNamespace(
        prompts=prompts, free=free, stop=stop, rollout=respond(grouped, prompts, stop=stop)
    )


def test_a_stop_token_ends_its_row(stopped):
    """The mask takes in the stop token; after it comes padding with logp 0; other rows go on."""
    rollout, ended = stopped.rollout, []
    for row in range(len(LENGTHS)):
        places = np.flatnonzero(np.isin(stopped.free[row], stopped.stop))
        length = places[0] + 1 if len(places) else R
        ended.append(bool(len(places)))
        np.testing.assert_array_equal(rollout.tokens_BT[row, P : P + length], stopped.free[row, :length])
        assert (rollout.tokens_BT[row, P + length :] == PAD).all()
        np.testing.assert_array_equal(rollout.mask_BR[row], np.arange(R) < length)
        assert not rollout.logps_BR[row, length:].any() and (rollout.logps_BR[row, :length] < 0).all()
    np.testing.assert_array_equal(rollout.finished_B, ended)
    assert any(ended) and not all(ended)


def test_a_first_token_that_stops_is_a_response_of_one(grouped, stopped):
    """And when every row stops at once the loop ends there."""
    stop = tuple(int(token) for token in stopped.free[:, 0])
    rollout = respond(grouped, stopped.prompts, stop=stop)
    np.testing.assert_array_equal(rollout.mask_BR, [[1] + [0] * (R - 1)] * len(LENGTHS))
    assert rollout.finished_B.all() and (rollout.tokens_BT[:, P + 1 :] == PAD).all()


def test_a_sampled_pad_is_a_token_like_any_other(grouped, stopped):
    """PAD may be drawn: what ends a row is a stop token, and the mask says so, not the id."""
    prompts = stopped.prompts
    model, weights = grouped
    drawn = int(stopped.free[0, 2])  # let the pad id be one that the model likes to say
    config = GenerationConfig(max_new_tokens=R)
    rollout = jax.jit(partial(generate, model, config=config, stop_tokens=NEVER, pad=drawn))(
        weights=weights, prompts=prompts, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(rollout.tokens_BT[:, P:], stopped.free)
    assert np.asarray(rollout.mask_BR).all()


def test_rollout_arrays_feed_a_full_forward(grouped, stopped):
    """Segments and positions: a forward pass over the whole rollout gives every row its own bare logits."""
    model, weights = grouped
    rollout = stopped.rollout
    lengths = np.array(LENGTHS) + rollout.mask_BR.sum(1).astype(int)
    np.testing.assert_array_equal(rollout.segment_ids_BT.sum(1), lengths)
    logits = whole(model)(weights, rollout.tokens_BT, rollout.segment_ids_BT, rollout.positions_BT)
    for row, n in enumerate(LENGTHS):
        here = slice(P - n, P - n + lengths[row])
        assert rollout.segment_ids_BT[row, here].all()
        np.testing.assert_array_equal(rollout.positions_BT[row, here], np.arange(lengths[row]))
        expected = bare_logits(grouped, rollout.tokens_BT[row, here])
        np.testing.assert_allclose(logits[row, here], expected, rtol=0, atol=TOLERANCE)


# Log-probabilities


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 3}], ids=["greedy", "T=.7", "top-k"]
)
def test_logps_are_log_softmax_of_the_full_forward(grouped, settings):
    """Divided by the temperature, before top-k; greedy: undivided. Of every token of every row."""
    rollout = respond(grouped, prompts_of(), key=3, **settings)
    temperature = settings.get("temperature", 1.0)
    for row, n in enumerate(LENGTHS):
        ids = rollout.tokens_BT[row][rollout.segment_ids_BT[row] > 0]
        response = ids[n:]
        every = log_softmax(bare_logits(grouped, ids)[n - 1 : -1] / temperature)
        expected = every[np.arange(len(response)), response]
        np.testing.assert_allclose(rollout.logps_BR[row, : len(response)], expected, rtol=0, atol=TOLERANCE)


def test_sampling_is_a_function_of_the_key(grouped):
    prompts = prompts_of()
    first, again, other = (respond(grouped, prompts, key=key, temperature=1.0) for key in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens_BT, again.tokens_BT)
    assert (first.tokens_BT != other.tokens_BT).any()
    same_prompt = prompts_of((4, 4, 4), seed=8)
    same_prompt = same_prompt.replace(tokens_BP=np.repeat(same_prompt.tokens_BP[:1], 3, 0))
    rows = respond(grouped, same_prompt, key=1, temperature=1.0).tokens_BT
    assert len({tuple(row) for row in rows}) == 3  # rows draw independently


# Restricting


def restricted_by_numpy(z, top_k, top_p):
    """Which tokens stay, by sorting one row at a time."""
    kept = np.ones(z.shape, bool)
    for row, keep in zip(z, kept, strict=True):
        order = np.argsort(-row, kind="stable")
        if top_k:
            keep[order[top_k:]] = False
        probs = np.where(keep, np.exp(row - row.max()), 0)
        probs /= probs.sum()
        if top_p < 1:
            mass = 0.0
            for token in order:
                keep[token] &= mass < top_p
                mass += probs[token]
    return kept


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 5, 33, 100])
def test_restrict_equals_numpy(top_k, top_p):
    z = np.random.default_rng(top_k).normal(0, 3, (16, 33)).astype(np.float32)
    got = np.asarray(restrict(jnp.array(z), top_k, top_p))
    kept = restricted_by_numpy(z.astype(np.float64), top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), kept)
    np.testing.assert_array_equal(got[kept], z[kept])
    assert kept.any(1).all()
    if top_k == 1 or top_p < 1e-3:
        np.testing.assert_array_equal(kept.sum(1), 1)


def test_nucleus_of_known_probabilities():
    """.5 .3 .15 .05: mass before each token is 0, .5, .8, .95; a token stays while that is below top_p."""
    z = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])):
        assert list(np.flatnonzero(np.isfinite(np.asarray(restrict(z, 0, top_p))[0]))) == kept


def test_the_nucleus_is_of_what_top_k_left():
    """Top 2 of .5 .3 .2 renormalise to .625 .375, so that top_p .6 keeps one; of all three it keeps two."""
    z = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    assert np.isfinite(np.asarray(restrict(z, 2, 0.6))).sum() == 1
    assert np.isfinite(np.asarray(restrict(z, 0, 0.6))).sum() == 2


# Sampling

DRAWS = 20_000
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.7},
    ],
    ids=str,
)
def test_frequencies_follow_the_restricted_softmax(settings):
    """20,000 draws on a fixed key: each frequency within five standard errors sqrt(p (1 - p) / n); what is
    outside the support never comes."""
    config = GenerationConfig(**settings)
    z = np.tile(LOGITS, (DRAWS, 1))
    tokens, logps = jax.jit(partial(sample, config=config))(jnp.array(z), jax.random.key(0))
    scaled = (LOGITS / config.temperature)[None].astype(np.float64)
    kept = restricted_by_numpy(scaled, config.top_k, config.top_p)[0]
    p = np.where(kept, np.exp(scaled[0]), 0)
    p /= p.sum()
    frequency = np.bincount(np.asarray(tokens), minlength=6) / DRAWS
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS)), (frequency, p)
    # The reported log-probability is of the softmax before the restriction.
    np.testing.assert_allclose(logps, log_softmax(scaled)[0][np.asarray(tokens)], rtol=0, atol=TOLERANCE)


def test_temperature_zero_is_argmax():
    z = jnp.array(np.random.default_rng(0).normal(0, 1, (50, 20)), jnp.float32)
    tokens, logps = sample(z, jax.random.key(0), GenerationConfig(temperature=0.0))
    np.testing.assert_array_equal(tokens, np.argmax(z, 1))
    assert tokens.dtype == jnp.int32
    np.testing.assert_allclose(logps, log_softmax(np.asarray(z)).max(1), rtol=0, atol=TOLERANCE)


def test_top_k_1_is_argmax_at_any_temperature():
    z = jnp.array(np.random.default_rng(1).normal(0, 1, (50, 20)), jnp.float32)
    tokens, _ = sample(z, jax.random.key(0), GenerationConfig(temperature=3.0, top_k=1))
    np.testing.assert_array_equal(tokens, np.argmax(z, 1))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 3, "temperature": 1.0}]
)
def test_ids_without_a_token_have_no_probability(settings):
    """The others are sampled, and their log-probabilities told, as if the table were so much smaller."""
    z = jnp.array(np.random.default_rng(2).normal(0, 1, (200, 20)), jnp.float32)
    never = (3, *range(15, 20))
    few, config = [i for i in range(20) if i not in never], GenerationConfig(**settings)
    tokens, logps = sample(z.at[:, never].add(9), jax.random.key(1), config, never)
    assert set(np.asarray(tokens).tolist()) <= set(few)
    scaled = np.asarray(z)[:, few] / (config.temperature or 1)
    wanted = log_softmax(scaled)[np.arange(200), np.searchsorted(few, tokens)]
    np.testing.assert_allclose(logps, wanted, rtol=0, atol=TOLERANCE)


def test_a_temperature_that_overflows_is_refused():
    """1e-38 made every probability NaN; 1e-6 leaves room for the logits of ids without a token."""
    for value in (1e-38, 9e-7):
        with pytest.raises(ValueError, match="is too small to divide logits by; 0 is greedy, 1e-6 the least"):
            GenerationConfig(temperature=value)
    z = jnp.array([[1e3, -1e3, 0.0, 7.0]])
    tokens, logps = sample(z, jax.random.key(0), GenerationConfig(temperature=1e-6), (3,))
    assert tokens[0] == 0 and logps[0] == 0
