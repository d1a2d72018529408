"""What is checked on a GPU, as functions that run on any kind of device.

Each compares bfloat16 on the device with float64 on the CPU beside it, within what rounding allows
(float64_llama.py says how that is found), and returns figures: the largest error as a share of what is
allowed, or how much was checked. `python tests/gpu/gpu_checks.py NAME` runs one on the GPU.

The process must see both kinds of device, JAX_PLATFORMS=cuda,cpu; exit code 2 where there is no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rounding
from float64_llama import Rounding, attention, deviations, logits, loss, norms_allowed, seen_by

from maxllm.config.data import BatchConfig
from maxllm.config.generation import GenerationConfig
from maxllm.config.mesh import MeshConfig, Offload
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.root import Config
from maxllm.config.run import RunConfig
from maxllm.data.instruct import pad_prompts
from maxllm.generate import decode
from maxllm.model.attend import attend, resolve
from maxllm.model.llama import Llama
from maxllm.model.visible import Keys
from maxllm.parallel import processes, sharding
from maxllm.parallel.mesh import make_mesh
from maxllm.records import LmBatch, PromptBatch
from maxllm.run.program import compile_program
from maxllm.stages.program import language_program
from maxllm.steps.state import create, init_params
from maxllm.weights import Weights

Figures = dict[str, float]

NO_GPU = "there is no NVIDIA GPU here that JAX can use (pip install 'maxllm[cuda]'), and these tests need one"

MODEL = ModelConfig(
    vocab_size=512,
    d_model=256,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=512,
    max_seq_len=128,
    init_std=0.06,  # about 1 / sqrt(D): scores and logits of about 1, so that no softmax is flat or a maximum
    dtype="bfloat16",
)
ROWS, LENGTH = 2, 128
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=1e9)


def share(errors: Any, allowed: Any) -> float:
    """The largest error as a share of what is allowed, of the norms of all arrays.

    Raises:
      AssertionError: it is more than 1, or an error is no number.
    """
    shares = [
        float(np.linalg.norm(error) / bound)
        for error, bound in zip(jax.tree.leaves(errors), jax.tree.leaves(allowed), strict=True)
    ]
    assert all(one <= 1 for one in shares), f"errors as shares of what rounding allows: {shares}"
    return max(shares)


def documents(rows: int, length: int) -> np.ndarray:
    """Segment ids [rows, length]: three packed documents, and padding at the end of the last row."""
    ends = np.array([2, 5, 9]) * length // 9
    segments = np.searchsorted(ends, np.arange(length), side="right")[None].repeat(rows, 0).astype(np.int32)
    segments += 1
    segments[-1, -length // 8 :] = 0
    return segments


# --- attention ---------------------------------------------------------------------------------------------


def check_attention(
    window: int | None = None, packed: bool = False, heads: int = 2, K: int = 64, T: int = 256
) -> Figures:
    """The hardware's kernel and XLA's, outputs and gradients of q, k and v, against float64; so that the two
    are at most twice as far apart.

    Args:
      window: of keys.
      packed: several documents and padding in a row.
      heads: key and value heads, of 8 query heads.
      K: width of a head.
      T: tokens of a row.
    """
    rng, shapes = np.random.default_rng(0), (8, heads, heads, 8)
    q, k, v, do = (jnp.asarray(rng.standard_normal((2, T, h, K)), jnp.bfloat16) for h in shapes)
    segments_BT = documents(2, T) if packed else np.ones((2, T), np.int32)
    do *= (segments_BT != 0)[:, :, None, None]  # what padding sees is nobody's concern
    keys = Keys(jnp.asarray(segments_BT), jnp.asarray(segments_BT), jnp.int32(0))
    config = MODEL.model_copy(update={"sliding_window": window})

    def of(attended: Callable[..., jax.Array], q: Any, k: Any, v: Any, do: Any) -> tuple[jax.Array, ...]:
        o, backward = jax.vjp(attended, q, k, v)
        return (o * (segments_BT != 0)[:, :, None, None], *backward(do))

    def reference(r: Rounding, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        o, *gradients = of(partial(attention, seen_BTS=seen_by(config, segments_BT), r=r), *arrays)
        return o, *(r.value(gradient) for gradient in gradients)

    exact, changes = deviations(reference, max(T, K))(q, k, v, do)
    allowed = norms_allowed(changes)
    figures = {}
    best = resolve("auto", jax.default_backend(), jnp.bfloat16)
    for backend in dict.fromkeys((best, "xla")):
        got = jax.jit(partial(of, lambda q, k, v, b=backend: attend(b, q, k, v, keys, window)))(q, k, v, do)
        errors = [np.asarray(a, np.float64) - b for a, b in zip(got, exact, strict=True)]
        figures[backend] = share(errors, list(allowed))
    return figures


# --- a training step ---------------------------------------------------------------------------------------


def batch_of() -> LmBatch:
    """Random tokens in packed documents; the last token of a document predicts nothing."""
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = documents(ROWS, LENGTH)
    starts = np.array([[np.argmax(row == number) for number in row] for row in segments])
    positions = (np.arange(LENGTH) - starts).astype(np.int32)
    following = np.concatenate([segments[:, 1:], np.zeros((ROWS, 1), np.int32)], 1)
    weights = ((segments == following) & (segments != 0)).astype(np.float32)
    return LmBatch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def check_step(offload: Offload = "none") -> Figures:
    """Two steps as `pretrain` compiles them, on one device, with AdamW: loss, gradients and update.

    The gradients are read off the first moment: m = beta1 m + (1 - beta1) g. What is offloaded must lie in
    the host's memory after the steps as before; and since its steps are as near to the exact ones, they are
    those of a run without, within twice as much.
    """
    config = Config.model_construct(
        stage="pretrain",
        run=RunConfig(dir="unused", steps=10),
        batch=BatchConfig(rows=ROWS, sequence_length=LENGTH),
        optimizer=OPTIMIZER,
        mesh=MeshConfig(offload=offload),
        lora=None,
    )
    mesh, batch = make_mesh(config.mesh, jax.devices()[:1]), batch_of()
    program = language_program(config, MODEL, mesh)
    step, _ = compile_program(mesh, program)
    state = create(program.init, program.abstract_state, jax.random.key(0))
    placed = processes.to_global(batch, sharding.batch_sharding(mesh))
    longest = max(MODEL.d_ff, MODEL.vocab_size, ROWS * LENGTH)
    reference = deviations(jax.value_and_grad(partial(loss, MODEL), argnums=1), longest)
    beta, figures = OPTIMIZER.beta1, {}
    for number in range(2):
        before = jax.device_get(state)
        exact, changes = reference(before.params, batch)
        state, metrics = step(state, placed)
        after = jax.device_get(state)
        total, weight = jax.device_get(metrics["loss"])
        gradients = jax.tree.map(
            lambda new, old: (new.astype(np.float64) - beta * old) / (1 - beta),
            adam_of(after).mu,
            adam_of(before).mu,
        )
        errors = jax.tree.map(np.subtract, (np.float64(total) / weight, gradients), exact)
        figures[f"step {number}"] = share(errors, norms_allowed(changes))
        assert_updated(before, after, gradients, program.declared)
    kinds = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, (state.params, adam_of(state).mu))
    wanted = jax.tree.map(
        lambda leaf: leaf.sharding.memory_kind,
        (program.abstract_state.params, adam_of(program.abstract_state).mu),
    )
    assert kinds == wanted and ("pinned_host" in jax.tree.leaves(kinds)) == (offload != "none"), kinds
    return figures


def adam_of(state: Any) -> Any:
    """AdamW's count and moments in the state of the chain that optim.py makes."""
    return state.opt_state[1][0]


def assert_updated(before: Any, after: Any, gradients: Any, declared: Any) -> None:
    """Parameters and second moments are what AdamW makes of the state before and these gradients, by some
    sixteen operations in float32.

    Of 1 - beta2^t as much is rounded as of 1. The gradients are known to a rounding of m over 1 - beta1.
    """
    c, t = OPTIMIZER, int(adam_of(after).count)

    def compare(declaration: Any, g: Any, w0: Any, w1: Any, m: Any, v0: Any, v1: Any) -> None:
        w0, m, v1 = (a.astype(np.float64) for a in (w0, m, v1))
        slack = rounding.of_operations(16, np.max(g**2)) / (1 - c.beta1)
        np.testing.assert_allclose(v1, c.beta2 * v0 + (1 - c.beta2) * g**2, rtol=0, atol=slack)
        direction = m / (1 - c.beta1**t) / (np.sqrt(v1 / (1 - c.beta2**t)) + c.eps)
        if declaration.kind.decayed:
            direction += c.weight_decay * w0
        atol = c.learning_rate * rounding.of_operations(16, np.max(np.abs(direction))) / (1 - c.beta2)
        atol += rounding.of_operations(2, np.max(np.abs(w1)))
        np.testing.assert_allclose(w1 - w0, -c.learning_rate * direction, rtol=0, atol=atol)

    old, new = adam_of(before), adam_of(after)
    jax.tree.map(compare, declared, gradients, before.params, after.params, new.mu, old.nu, new.nu)


# --- decoding ----------------------------------------------------------------------------------------------

PROMPT, TOKENS = 16, 32


def check_decoding() -> Figures:
    """Greedy tokens of bfloat16, of one program and token by token, against float64's logits after the same
    tokens: each must be likeliest there, or less likely than the likeliest by no more than rounding may move
    both. Between the tokens nothing is compiled.
    """
    llama = decode.decoder_of(Llama(MODEL), jax.default_backend())
    rng = np.random.default_rng(2)
    prompts = pad_prompts(
        [rng.integers(0, MODEL.vocab_size, n).tolist() for n in (PROMPT, 11, 7, 1)], PROMPT, 0
    )
    weights = Weights(jax.jit(lambda key: nn.unbox(init_params(Llama(MODEL), key)))(jax.random.key(3)))
    settings = GenerationConfig(max_new_tokens=TOKENS)
    whole = jax.jit(
        lambda weights: decode.generate(llama, weights, prompts, jax.random.key(0), settings, (-1,), 0)
    )
    rollout = jax.device_get(whole(weights))
    decided = assert_greedy(weights, prompts, rollout.tokens_BT[:, PROMPT:])
    tokens_BR, compiled = one_by_one(llama, weights, prompts)
    assert compiled == 0, f"{compiled} programs were compiled between tokens"
    return {"decided": decided, "decided one by one": assert_greedy(weights, prompts, tokens_BR)}


def one_by_one(llama: Llama, weights: Weights, prompts: PromptBatch) -> tuple[np.ndarray, int]:
    """Tokens [B, R] as a server takes them, each fed by a call, and how many programs JAX compiled after the
    second of them."""
    slots, compiled = PROMPT + TOKENS, []
    prepared = jax.jit(partial(decode.laid_out, llama))(weights)
    logits_BV, cache = jax.jit(lambda weights: decode.prefill(llama, weights, prompts, slots))(prepared)

    @jax.jit
    def feed(weights: Weights, cache: Any, logits_BV: jax.Array, number: jax.Array) -> Any:
        tokens_B1 = jnp.argmax(logits_BV, -1).astype(jnp.int32)[:, None]
        token = tokens_B1, jnp.ones_like(tokens_B1), prompts.lengths_B[:, None] + number
        return tokens_B1, *decode.step(llama, weights, cache, slots, *token)

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    taken = []
    jax.monitoring.register_event_duration_secs_listener(note)
    for number in range(TOKENS):
        tokens_B1, logits_BV, cache = feed(prepared, cache, logits_BV, np.int32(number))
        taken.append(np.asarray(tokens_B1))
        if number == 1:
            assert compiled, "JAX tells of what it compiles by another name"
            compiled.clear()
    jax.monitoring.unregister_event_duration_listener(note)
    return np.concatenate(taken, 1), len(compiled)


def assert_greedy(weights: Weights, prompts: PromptBatch, tokens_BR: np.ndarray) -> float:
    """Each token is likeliest by float64, within rounding; the share of tokens that rounding cannot change,
    which must be most.

    What one logit is more than another may be off by LAMBDA times the root mean square of its changes.
    """
    segments_BP, positions_BP = jax.device_get(decode.places(prompts))
    rows, ones = np.concatenate([prompts.tokens_BP, tokens_BR], 1), np.ones_like(tokens_BR)
    segments_BT = np.concatenate([segments_BP, ones], 1)
    positions_BT = np.concatenate([positions_BP, prompts.lengths_B[:, None] + np.arange(TOKENS)], 1)
    reference = deviations(partial(logits, MODEL), max(MODEL.d_ff, rows.shape[1]))
    exact_BTV, changes = reference(weights.base, rows, segments_BT, positions_BT)
    exact_BRV, changes_NBRV = exact_BTV[:, PROMPT - 1 : -1], np.stack(changes)[:, :, PROMPT - 1 : -1]
    second_BR, first_BR = np.moveaxis(np.argsort(exact_BRV, -1)[..., -2:], -1, 0)

    def behind(tokens_BR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much tokens are less likely than the likeliest, and how far that may be off, [B, R] each."""

        def of(a: np.ndarray) -> np.ndarray:
            first, token = (np.broadcast_to(t[..., None], (*a.shape[:-1], 1)) for t in (first_BR, tokens_BR))
            return (np.take_along_axis(a, first, -1) - np.take_along_axis(a, token, -1))[..., 0]

        rms_BR = np.sqrt(np.mean(np.square(of(changes_NBRV)), axis=0))
        return of(exact_BRV), rounding.LAMBDA * rms_BR

    less_BR, allowed_BR = behind(tokens_BR)
    assert np.all(less_BR <= allowed_BR), f"less than the likeliest by {less_BR}, not {allowed_BR}"
    less_BR, allowed_BR = behind(second_BR)
    decided = float(np.mean(less_BR > allowed_BR))
    assert decided > 0.5, f"rounding may decide all but {decided:.0%} of the tokens: the check says nothing"
    return decided


# --- the command -------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[], Figures]] = {
    "attention": check_attention,
    "attention, packed": partial(check_attention, packed=True),
    "attention, every head its own keys": partial(check_attention, heads=8, packed=True),
    "attention, window": partial(check_attention, window=70, packed=True),
    "attention, wide heads": partial(check_attention, K=128, T=512, packed=True),
    "step": check_step,
    "step, optimizer in the host's memory": partial(check_step, "optimizer"),
    "step, parameters in the host's memory": partial(check_step, "parameters"),
    "decoding": check_decoding,
}


def main(name: str) -> int:
    """Runs a check on the GPU and prints its figures, JSON; or says that there is none."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        print(NO_GPU)
        return 2
    if name != "gpu":
        print(json.dumps(CHECKS[name]()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
