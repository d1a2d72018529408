"""A pretraining step on this machine beside Hugging Face transformers and torch's AdamW, in one run.

    python tools/bench_step.py [--turns 3] [--ours-only]

The model has 34 M parameters (d 512, 8 layers, vocabulary 8,192), the batch 8 rows of 256 tokens, float32;
both clip gradients and take AdamW. Prints seconds per step, tokens per second, and the share of the speed
that this machine reaches on one of the model's own matmuls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from maxllm.config.data import BatchConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.root import Config
from maxllm.config.run import RunConfig
from maxllm.parallel import processes, sharding
from maxllm.parallel.compiler import without_tpu
from maxllm.parallel.hugepages import restart_with_huge_pages
from maxllm.parallel.mesh import make_mesh
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import LmBatch
from maxllm.run.program import compile_program
from maxllm.stages.program import language_program
from maxllm.steps.state import TrainState, create

ROWS, LENGTH = 8, 256
MODEL = ModelConfig(
    vocab_size=8192,
    d_model=512,
    n_layers=8,
    n_heads=8,
    n_kv_heads=8,
    d_ff=1408,
    max_seq_len=LENGTH,
    dtype="float32",
    scan_unroll=8,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)


def seconds_of(works: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """The median time of each. They take turns, because machines are noisy: five times one, of which the
    first is not counted, then five times the other."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(turns):
        for work, own in zip(works, seconds, strict=True):
            for number in range(5):
                started = time.perf_counter()
                work()
                if number > 0:
                    own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in seconds]


def random_tokens(rows: int = ROWS) -> np.ndarray:
    """Rows and one token more of each, [rows, LENGTH + 1]."""
    return np.random.default_rng(0).integers(0, MODEL.vocab_size, (rows, LENGTH + 1)).astype(np.int32)


def training(tokens: np.ndarray) -> tuple[Callable[..., Any], LmBatch, TrainState]:
    """A step as `pretrain` compiles it, its batch and its first state."""
    rows = len(tokens)
    config = Config.model_construct(
        stage="pretrain",
        run=RunConfig(dir="unused", steps=1000),
        batch=BatchConfig(rows=rows, sequence_length=LENGTH),
        optimizer=OPTIMIZER,
    )
    mesh = make_mesh(MeshConfig())
    program = language_program(config, MODEL, mesh)
    ones = np.ones((rows, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    batch = LmBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
    step, _ = compile_program(mesh, program)
    placed = processes.to_global(batch, sharding.batch_sharding(mesh))
    return step, placed, create(program.init, program.abstract_state, jax.random.key(0))


def ours(tokens: np.ndarray) -> Callable[[], object]:
    """A step of ours."""
    step, placed, state = training(tokens)

    def advance() -> object:
        nonlocal state
        state, metrics = step(state, placed)
        return jax.block_until_ready(metrics)

    return advance


def torch_llama(c: ModelConfig) -> Any:
    """Hugging Face's model of the same shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            intermediate_size=c.d_ff,
            max_position_embeddings=c.max_seq_len,
            tie_word_embeddings=c.tie_embeddings,
        )
    )


def theirs(tokens: np.ndarray) -> Callable[[], object]:
    """A step of the same model in torch."""
    import torch

    model = torch_llama(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=0.1)
    ids = torch.from_numpy(tokens[:, :-1]).long()

    def advance() -> object:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss

    return advance


def matmul_flops() -> float:
    """FLOP/s of the feed-forward's matmul alone."""
    x, w = jnp.ones((ROWS * LENGTH, MODEL.d_model)), jnp.ones((MODEL.d_model, MODEL.d_ff))
    multiply = jax.jit(jnp.matmul)
    seconds = seconds_of([partial(repeat, lambda: multiply(x, w), 20)], 1)[0] / 20
    return 2 * x.size * MODEL.d_ff / seconds


def repeat(work: Callable[[], jax.Array], times: int) -> None:
    """Calls that are waited for."""
    for _ in range(times):
        work().block_until_ready()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    restart_with_huge_pages()  # as `maxllm pretrain` does; torch has them too
    without_tpu()
    tokens = random_tokens()
    flops = ROWS * LENGTH * train_flops_per_token(MODEL, LENGTH)
    peak = matmul_flops()
    table = Table(
        "", "s per step", "tokens/s", "of the matmul speed", title=f"matmul {peak / 1e9:.0f} GFLOP/s"
    )
    steps = {"ours": ours} if options.ours_only else {"ours": ours, "transformers + torch": theirs}
    timed = seconds_of([make(tokens) for make in steps.values()], options.turns)
    for name, seconds in zip(steps, timed, strict=True):
        speed, share = ROWS * LENGTH / seconds, flops / seconds / peak
        table.add_row(name, f"{seconds:.2f}", f"{speed:,.0f}", f"{share:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
