"""Decoding speed beside `transformers.generate`: one model, the same prompts, float32, greedy, in one run.

    python tools/bench_decode.py RUN [--rows 1 16] [--tokens 64]      RUN: a run folder, as `convert` makes it

Prints decoding steps per second of both at each batch size (the prompt's pass is taken out by timing two
lengths), their ratio, and the bound: bytes of weights over the memory bandwidth that this machine measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxllm.config.generation import GenerationConfig
from maxllm.data.instruct import pad_prompts
from maxllm.folder import RunFolder
from maxllm.generate.decode import decoder_of, generate
from maxllm.hf.export import export
from maxllm.model.llama import Llama
from maxllm.run.session import reopen
from maxllm.stages.start import policy_weights

PROMPT = 32
NEVER = -1
"""A stop token that no model says: every row decodes to the end."""


def seconds_per_step(decode: Callable[[int], Any], tokens: int, repeats: int) -> float:
    """Seconds of one decoding step: the difference between a long and a short generation."""
    short = tokens // 4
    for length in (short, tokens):
        decode(length)  # compile, warm up
    times = []
    for _ in range(repeats):
        spent = []
        for length in (short, tokens):
            started = time.perf_counter()
            decode(length)
            spent.append(time.perf_counter() - started)
        times.append((spent[1] - spent[0]) / (tokens - short))
    return statistics.median(times)


def ours(run: Path, rows: int) -> Callable[[int], Any]:
    """Our decoding as a function of the number of new tokens."""
    session = reopen(RunFolder(run), ["model.dtype=float32"], ("model.dtype",))
    model = decoder_of(Llama(session.model), jax.default_backend())
    weights = policy_weights(session, session.folder.find())
    prompts = pad_prompts(prompt_ids(session.model.vocab_size, rows), PROMPT, 0)
    compiled: dict[int, Any] = {}

    def decode(length: int) -> Any:
        if length not in compiled:
            config = GenerationConfig(max_new_tokens=length)
            compiled[length] = jax.jit(
                lambda weights: generate(model, weights, prompts, jax.random.key(0), config, (NEVER,), 0)
            )
        return jax.block_until_ready(compiled[length](weights))

    return decode


def theirs(folder: Path, vocab_size: int, rows: int) -> Callable[[int], Any]:
    """`transformers.generate` as a function of the number of new tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompt_ids(vocab_size, rows))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generation_config.eos_token_id = None

    def decode(length: int) -> Any:
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=length, min_new_tokens=length, **settings)
        assert out.shape[1] == PROMPT + length
        return out

    return decode


def prompt_ids(vocab_size: int, rows: int) -> list[list[int]]:
    """Random prompts of one length."""
    return np.random.default_rng(0).integers(10, vocab_size, (rows, PROMPT)).tolist()


def bandwidth() -> float:
    """Bytes per second that a large sum reads on all cores."""
    x = jax.numpy.ones(1 << 28, jax.numpy.float32)
    total = jax.jit(lambda x: x.sum())
    total(x).block_until_ready()
    best = min(timed(lambda: total(x).block_until_ready()) for _ in range(5))
    return x.nbytes / best


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Prints one JSON object per batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    session = reopen(options.run)
    params = policy_weights(session, options.run).base
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    bound = bandwidth() / size
    with tempfile.TemporaryDirectory() as folder:
        if not options.ours_only:
            export(params, session.model, session.tokenizer, Path(folder) / "hf")
        del params
        for rows in options.rows:
            one = seconds_per_step(ours(options.run, rows), options.tokens, options.repeats)
            figures = {"rows": rows, "ours": 1 / one, "bound": bound}
            if not options.ours_only:
                other = theirs(Path(folder) / "hf", session.model.vocab_size, rows)
                figures["transformers"] = 1 / seconds_per_step(other, options.tokens, options.repeats)
                figures["ratio"] = figures["ours"] / figures["transformers"]
            print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
