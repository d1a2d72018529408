"""Rows of SFT from a model's own replies to many prompts: batched, filtered, and resumed after any kill.

maxllm generate runs/teacher --prompts questions.jsonl --out made.jsonl generation.temperature=0.7
maxllm generate runs/teacher --prompts seeds.jsonl --bootstrap 8 --count 500 --novelty 0.7 --out more.jsonl
maxllm sft RECIPE 'data.sources=["made.jsonl"]'

After Wang et al. 2022, Self-Instruct; the filters are in data/judge.py, the files in data/growing.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maxllm.data.fields import ASIDE
from maxllm.data.growing import Growing, open_growing
from maxllm.data.judge import Judge, load_checker
from maxllm.data.novelty import Novelty
from maxllm.errors import UserError
from maxllm.folder import RunFolder, Which
from maxllm.run.console import console
from maxllm.run.hashes import content_hash
from maxllm.stages.chat import MAY_SET, Policy
from maxllm.stages.questions import Bootstrapped, Given, Prompt, Questions, check_bootstrap, read_prompts

TOLD_AFTER = 2.0
"""Seconds after which it is worth telling how fast the model speaks."""

SELF_INSTRUCT = 0.7
"""The paper's limit of an instruction's likeness to another one."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be made."""

    prompts: str
    """A source of rows."""
    out: Path
    batch: int = 16
    """Replies that are made at a time."""
    samples: int = 1
    """Replies to each prompt."""
    bootstrap: int | None = None
    """Instructions to show when a new one is asked for; None to have the prompts answered."""
    count: int | None = None
    """How often a new instruction is asked for; None for 100 times."""
    min_tokens: int = 1
    """Of a reply or instruction, without the token that ends it."""
    max_tokens: int | None = None
    novelty: float | None = None
    """ROUGE-L with an earlier row from which a row is dropped; None to measure none, or, of new instructions,
    for the paper's."""
    checker: str | None = None
    keep_rejected: bool = False

    @property
    def files(self) -> list[Path]:
        """What is written: the rows, and those that were dropped where they are kept."""
        rejected = self.out.with_name(f"{self.out.name.removesuffix('.jsonl')}.rejected.jsonl")
        return [self.out, rejected] if self.keep_rejected else [self.out]

    def judge(self) -> Judge:
        """The filters.

        Raises:
          UserError: there is no such checker.
        """
        checker = load_checker(self.checker) if self.checker else None
        limit = SELF_INSTRUCT if self.bootstrap and self.novelty is None else self.novelty
        return Judge(self.min_tokens, self.max_tokens, checker, Novelty(limit) if limit else None)

    def check(self) -> None:
        """Looks whether the options go together.

        Raises:
          UserError: they do not.
        """
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out} does not end in .jsonl, by which rows are known")
        if self.bootstrap and self.samples > 1:
            raise UserError("--samples is of prompts that are answered; with --bootstrap give --count")
        if self.count is not None and not self.bootstrap:
            raise UserError("--count is of new instructions; give --bootstrap K, or leave it away")


def run(
    folder: RunFolder, wanted: Wanted, overrides: Sequence[str] = (), which: Which = "latest"
) -> dict[str, Any]:
    """Makes the rows, or what is missing of them; returns what became of all replies.

    Raises:
      UserError: the prompts cannot be read, the file was made otherwise, or the options do not go together.
    """
    wanted.check()
    judge = wanted.judge()
    policy = Policy(folder, overrides, which, (*MAY_SET, "data.max_bad_share"))
    if jax.process_count() > 1:
        raise UserError("rows are made by one process, with all of its devices; start only one")
    if wanted.samples > 1 and policy.session.config.generation.temperature == 0:
        raise UserError(
            f"--samples {wanted.samples} would give the same reply to a prompt each time: give "
            "generation.temperature=0.7, or another above 0"
        )
    prompts = read_prompts(policy, wanted.prompts)
    settings = settings_of(policy, folder.find(which), prompts, wanted) | judge.settings()
    questions = questions_of(policy, prompts, wanted, judge)
    with open_growing(wanted.files, settings) as growing:
        for row in growing.rows():
            judge.remember(row)
            questions.keep(row)
        speed = make(policy, questions, wanted.batch, judge, growing)
        return {"out": str(wanted.out), "prompts": len(prompts), **growing.facts, **speed}


def questions_of(policy: Policy, prompts: Sequence[Prompt], wanted: Wanted, judge: Judge) -> Questions:
    """What the model is asked.

    Raises:
      UserError: there are too few instructions to show.
    """
    if wanted.bootstrap is None:
        return Given(policy, prompts, wanted.samples, wanted.batch)
    seeds = list(dict.fromkeys(prompt.messages[-1]["content"] for prompt in prompts))
    check_bootstrap(len(seeds), wanted.bootstrap)
    for seed in seeds:
        judge.remember({"prompt": seed})
    return Bootstrapped(policy, seeds, wanted.bootstrap, wanted.count or 100, wanted.batch)


def settings_of(
    policy: Policy, checkpoint: Path, prompts: Sequence[Prompt], wanted: Wanted
) -> dict[str, Any]:
    """All that decides what is written, by names that a person knows."""
    config = policy.session.config
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps([prompt.messages, prompt.ids, prompt.about]).encode())
    generation = config.generation.model_dump(mode="json")
    return {
        "the model": f"step {checkpoint.name} of content {content_hash(checkpoint / 'params')}",
        "the prompts": f"{len(prompts)} of content {digest.hexdigest()}",
        "--samples": wanted.samples,
        "--batch": wanted.batch,
        "--bootstrap": wanted.bootstrap,
        "--count": wanted.count or 100,
        "--keep-rejected": wanted.keep_rejected,
        "model.dtype": policy.session.model.dtype,
        "run.seed": config.run.seed,
        **{f"generation.{name}": value for name, value in generation.items()},
    }


def make(policy: Policy, questions: Questions, rows: int, judge: Judge, growing: Growing) -> dict[str, Any]:
    """Makes the batches that are not there yet; returns how fast that went, if it took a while."""
    facts: dict[str, Any] = {"replies": 0, "kept": 0, "tokens": 0, "dropped": {}} | growing.facts
    dropped, before, began = Counter(facts["dropped"]), facts["tokens"], time.monotonic()
    for number in shown(questions.sizes, growing.batches, lambda: facts["tokens"] - before):
        batch = questions.batch(number)
        replies = policy.replies([prompt.ids for prompt in batch], [prompt.draw for prompt in batch], rows)
        kept, rejected = [], []
        for prompt, reply in zip(batch, replies, strict=True):
            row = questions.row(prompt, reply)
            reason = judge.reason(row)
            if reason is None:
                kept.append(row)
                questions.keep(row)
            else:
                dropped[reason] += 1
                rejected.append(row | {ASIDE: {**row[ASIDE], "dropped": reason}})
        facts["replies"] += len(batch)
        facts["kept"] += len(kept)
        facts["tokens"] += sum(len(reply["tokens"]) for reply in replies)
        facts["dropped"] = dict(sorted(dropped.items()))
        growing.append([kept, rejected][: len(growing.paths)], facts)
    seconds = time.monotonic() - began
    if facts["tokens"] == before or seconds < TOLD_AFTER:
        return {}
    return {"seconds": seconds, "tokens_per_second": (facts["tokens"] - before) / seconds}


def shown(sizes: Sequence[int], done: int, tokens: Callable[[], int]) -> Iterator[int]:
    """The numbers of the batches that are not done, with a progress bar on a terminal.

    Args:
      sizes: prompts of each batch.
      done: batches that are.
      tokens: how many were made since.
    """
    terminal, began = console(), time.monotonic()
    columns = (
        *(TextColumn("generate"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("replies{task.fields[speed]}"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("", total=sum(sizes), completed=sum(sizes[:done]), speed="")
        for number in range(done, len(sizes)):
            yield number
            seconds = time.monotonic() - began
            speed = f", {tokens() / seconds:,.0f} tokens/s" if seconds > TOLD_AFTER else ""
            progress.update(task, advance=sizes[number], speed=speed)
