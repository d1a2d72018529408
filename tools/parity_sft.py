"""SFT step by step beside TRL's SFTTrainer: the same model, rows, order, optimizer and precision.

    pip install 'trl>=1.16'
    python tools/parity_sft.py [--steps 20] [--json]

Three ways of training a small random Llama in float32: on completions alone, on every reply of
conversations, and on conversations packed into rows. TRL cuts the rows into ids and finds the replies by
itself, from the text of the same rows and the exported tokenizer. Prints the losses of both, and ends with
1 where they differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from maxllm.config.data import TokenizerConfig
from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.data import tasks
from maxllm.data.conversation import read_conversation
from maxllm.data.fields import Fields
from maxllm.data.pack import Piece, fill, packed
from maxllm.data.sources import read_documents
from maxllm.data.spm import train as train_tokenizer
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import Tokenizer
from maxllm.hf.export import export
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.records import LmBatch, Params
from maxllm.steps.language import language_loss
from maxllm.steps.state import TrainState, init_params, partition_of
from maxllm.steps.update import train_step

ROWS, LENGTH, TOLERANCE = 8, 128, 1e-4
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.1, beta2=0.95)

MARKED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as our tokenizers lay it out, with the marks by which TRL finds what an assistant says, and without
the line end behind the last turn: of a prompt and its completion TRL trains all that the template writes
after the prompt, and so that line end too, which we do not."""


# --- rows --------------------------------------------------------------------------------------------------


def completions(count: int) -> list[dict[str, Any]]:
    """One question and its answer each."""
    turns = [question_and_answer(row) for row in tasks.instruction_rows("train", count, 0)]
    return [{"prompt": [question], "completion": [answer]} for question, answer in turns]


def conversations(count: int) -> list[dict[str, Any]]:
    """Of one to four questions, some after a system turn."""
    turns = [question_and_answer(row) for row in tasks.instruction_rows("train", 4 * count, 1)]
    rows = []
    for number in range(count):
        first = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
        pairs = turns[4 * number : 4 * number + 1 + number % 4]
        rows.append({"messages": [*first, *(message for pair in pairs for message in pair)]})
    return rows


def question_and_answer(row: dict[str, str]) -> list[dict[str, str]]:
    """A row of the built-in tasks as two turns."""
    question = "\n".join(row[name] for name in ("instruction", "input") if row.get(name))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


# --- ours --------------------------------------------------------------------------------------------------


def our_losses(
    params: Params, model: Llama, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], pack: bool
) -> list[float]:
    """Of every step, on `ROWS` rows after `ROWS` rows."""
    steps = len(rows) // ROWS
    optimizer = make_optimizer(OPTIMIZER, steps, partition_of(model).declared)
    advance = jax.jit(
        partial(
            train_step, loss_fn=partial(language_loss, model), optimizer=optimizer, seed=0, microbatches=1
        )
    )
    state, losses = TrainState(jnp.int32(0), params, optimizer.init(params)), []
    for step in range(steps):
        batch = batch_of(tokenizer, rows[step * ROWS : (step + 1) * ROWS], pack)
        state, metrics = advance(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses


def batch_of(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], pack: bool) -> LmBatch:
    """The conversations of a step: each in a row of its own, or as few rows as they fit into."""
    read = [read_conversation(tokenizer, Fields(row), 2 * LENGTH) for row in rows]
    pieces: list[Piece] = [piece for each in read for piece in each.pieces]
    together = [row for _, row in packed(pieces, 2 * LENGTH)] if pack else [[piece] for piece in pieces]
    # As many rows in every step, so that the step is compiled once.
    together += [[]] * (ROWS - len(together))
    return fill(together, 2 * LENGTH, tokenizer.pad)


# --- TRL's -------------------------------------------------------------------------------------------------


def their_losses(
    folder: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path
) -> list[float]:
    """Of every step of SFTTrainer, before they are rounded for its log."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []

    class InOrder(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that takes rows as they stand, and notes every loss."""

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED_TEMPLATE
    config = SFTConfig(
        output_dir=str(out),
        max_steps=len(rows) // ROWS,
        per_device_train_batch_size=ROWS,
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta2=OPTIMIZER.beta2,
        max_grad_norm=OPTIMIZER.clip_norm,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **({"max_length": 2 * LENGTH} | settings),
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses


# --- both --------------------------------------------------------------------------------------------------


WAYS: dict[str, tuple[Callable[[int], list[dict[str, Any]]], bool, dict[str, Any]]] = {
    "completions": (completions, False, {"completion_only_loss": True}),
    "conversations": (conversations, False, {"assistant_only_loss": True}),
    "packed": (conversations, True, {"assistant_only_loss": True, "padding_free": True, "max_length": None}),
}
"""Name -> rows, whether ours are packed, and what TRL is told."""


def compared(steps: int) -> dict[str, dict[str, Any]]:
    """{way: {"ours", "trl", "largest_difference"}}"""
    texts = ["\n".join(row.values()) for row in tasks.instruction_rows("train", 400, 0)]
    texts += islice(read_documents("slice:shakespeare", "text", Tally("slice:shakespeare")), 2)
    tokenizer = train_tokenizer(texts, TokenizerConfig(path="unused", vocab_size=512, character_coverage=1.0))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_ff=160,
        max_seq_len=2 * LENGTH,
        dtype="float32",
    )
    model = Llama(config)
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "model"
        export(params, config, tokenizer, base)
        for name, (make, pack, settings) in WAYS.items():
            rows = make(steps * ROWS)
            ours = our_losses(params, model, tokenizer, rows, pack)
            theirs = their_losses(base, rows, settings, Path(folder) / name)
            largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            found[name] = {"ours": ours, "trl": theirs, "largest_difference": largest}
    return found


def main() -> int:
    """Prints both columns; 1 where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compared(options.steps)
    if options.json:
        print(json.dumps(found))
    else:
        table = Table("step", *(f"{who},\n{name}" for name in found for who in ("ours", "TRL")))
        for step in range(options.steps):
            losses = (f"{each[who][step]:.6f}" for each in found.values() for who in ("ours", "trl"))
            table.add_row(str(step + 1), *losses)
        differences = (f"{each['largest_difference']:.1e}" for each in found.values())
        table.add_section()
        table.add_row("largest\ndifference", *(cell for each in differences for cell in (each, "")))
        Console(width=110).print(table)
    return int(any(each["largest_difference"] > TOLERANCE for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
