"""Steps of SFT on this machine beside TRL's SFTTrainer, in one run, float32.

    pip install 'trl>=1.16'
    python tools/bench_sft.py [--turns 2] [--json]

The model has 76 M parameters (d 512, 8 layers, vocabulary 49,152). Three comparisons: all of it on 8 full
rows of 256 tokens a step, ours and TRL's; LoRA (rank 8, all linear layers) beside the whole model, both
ours; and conversations of 50 to 1,500 tokens, ours packed into rows of 1,536 and TRL's padded to the
longest of each batch of 8. Tokens are those of the conversations: padding does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import jax
import numpy as np
from bench_step import torch_llama
from rich.console import Console
from rich.table import Table

from maxllm.config.data import BatchConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.root import Config
from maxllm.config.run import RunConfig
from maxllm.config.tuning import LoraConfig
from maxllm.data.pack import Piece, pack
from maxllm.model.forward import init_weights
from maxllm.parallel import processes, sharding
from maxllm.parallel.compiler import without_tpu
from maxllm.parallel.hugepages import restart_with_huge_pages
from maxllm.parallel.mesh import make_mesh
from maxllm.run.program import compile_program
from maxllm.stages.program import language_program
from maxllm.steps.state import create, partition_of

ROWS, LENGTH, LONGEST = 8, 256, 1536
STEPS = 5
"""Of a turn, of which the first is not counted."""
MODEL = ModelConfig(
    vocab_size=49152,
    d_model=512,
    n_layers=8,
    n_heads=8,
    n_kv_heads=8,
    d_ff=1408,
    max_seq_len=LONGEST,
    dtype="float32",
    scan_unroll=8,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)

Texts = Sequence[np.ndarray]


def full_rows(count: int) -> Texts:
    """Token ids that fill rows of LENGTH targets."""
    return list(np.random.default_rng(0).integers(0, MODEL.vocab_size, (count, LENGTH + 1)))


def mixed(count: int) -> Texts:
    """Conversations of 50 to 1,500 tokens, most of them short, as in instruction data."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(50), np.log(1500), count)).astype(int)
    return [rng.integers(0, MODEL.vocab_size, length) for length in lengths]


# --- ours --------------------------------------------------------------------------------------------------


def ours(texts: Texts, rows: int, length: int, lora: LoraConfig | None = None) -> Callable[[], list[float]]:
    """A turn: seconds for each token of some steps on packed texts."""
    config = Config.model_construct(
        stage="sft",
        run=RunConfig(dir="unused", steps=1000),
        batch=BatchConfig(rows=rows, sequence_length=length),
        optimizer=OPTIMIZER,
        lora=lora,
    )
    mesh = make_mesh(MeshConfig())
    program = language_program(config, MODEL, mesh)
    batch = pack([Piece(ids, np.ones(len(ids), np.int32)) for ids in texts], length, 0)
    step, _ = compile_program(mesh, program)
    key = jax.random.key(0)
    state = create(program.init, program.abstract_state, key)
    frozen: tuple[Any, ...] = ()
    if program.frozen:
        partition = partition_of(program.model)
        kept = create(
            lambda key: partition.split(init_weights(program.model, key))[1], program.frozen[0], key
        )
        frozen = (kept,)

    def turn() -> list[float]:
        nonlocal state
        seconds = []
        for number in range(STEPS):
            first = number * rows % (len(batch.tokens_BT) - rows + 1)
            part = jax.tree.map(lambda array, at=first: array[at : at + rows], batch)
            placed = processes.to_global(part, sharding.batch_sharding(mesh))
            tokens = int((part.segment_ids_BT > 0).sum())
            started = time.perf_counter()
            state, metrics = step(state, placed, *frozen)
            jax.block_until_ready(metrics)
            seconds.append((time.perf_counter() - started) / tokens)
        return seconds[1:]

    return turn


# --- TRL's -------------------------------------------------------------------------------------------------


def theirs(texts: Texts, folder: Path) -> Callable[[], list[float]]:
    """A turn: seconds for each token of some steps of SFTTrainer."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = torch_llama(MODEL)
    rows = [{"input_ids": ids.tolist()} for ids in texts]
    tokens = [sum(len(ids) for ids in texts[at : at + ROWS]) for at in range(0, STEPS * ROWS, ROWS)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes how long each step takes."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = 0.0

        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    class InOrder(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that takes rows as they stand."""

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=OPTIMIZER.learning_rate,
        weight_decay=OPTIMIZER.weight_decay,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def turn() -> list[float]:
        clock = Clock()
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=any_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [seconds / count for seconds, count in zip(clock.seconds[1:], tokens[1:], strict=True)]

    return turn


def any_tokenizer() -> Any:
    """SFTTrainer wants one, though the rows are cut already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")


# --- both --------------------------------------------------------------------------------------------------


def tokens_per_second(works: dict[str, Callable[[], list[float]]], turns: int) -> dict[str, float]:
    """The median of each; they take turns, because machines are noisy."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            found[name] += work()
    return {name: 1 / statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    """Prints tokens per second and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    restart_with_huge_pages()  # as `maxllm sft` does; torch has them too
    without_tpu()
    rows, conversations = full_rows(STEPS * ROWS), mixed(STEPS * ROWS)
    with tempfile.TemporaryDirectory() as folder:
        full = tokens_per_second(
            {
                "ours": ours(rows, ROWS, LENGTH),
                "ours, LoRA": ours(rows, ROWS, LENGTH, LoraConfig(rank=8)),
                "TRL": theirs(rows, Path(folder) / "full"),
            },
            options.turns,
        )
        packed = tokens_per_second(
            {"ours": ours(conversations, 2, LONGEST), "TRL": theirs(conversations, Path(folder) / "mixed")},
            options.turns,
        )
    figures = {
        "tokens_per_second": {"full": full, "mixed": packed},
        "full_to_trl": full["ours"] / full["TRL"],
        "lora_to_full": full["ours, LoRA"] / full["ours"],
        "mixed_to_trl": packed["ours"] / packed["TRL"],
    }
    if options.json:
        print(json.dumps(figures))
        return
    table = Table("", "tokens/s", "times")
    for name, speed, times in (
        ("TRL, full rows", full["TRL"], ""),
        ("ours, full rows", full["ours"], f"{figures['full_to_trl']:.2f} of TRL"),
        ("ours, full rows, LoRA", full["ours, LoRA"], f"{figures['lora_to_full']:.2f} of the whole model"),
        ("TRL, 50 to 1,500 tokens, padded", packed["TRL"], ""),
        ("ours, 50 to 1,500 tokens, packed", packed["ours"], f"{figures['mixed_to_trl']:.2f} of TRL"),
    ):
        table.add_row(name, f"{speed:,.0f}", times)
    Console().print(table)


if __name__ == "__main__":
    main()
