"""Replies to held-out questions: which are right, what a user's scorer says, and some to look at."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from maxllm.data.chat import Message
from maxllm.data.conversation import Conversation
from maxllm.data.instruct import Question
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError
from maxllm.parallel.processes import from_all
from maxllm.records import PromptBatch
from maxllm.run.session import Session
from maxllm.user_function import UserFunction, load_function

SAMPLES = 8
"""Replies that every evaluation keeps."""

TAKEN = {"loss", "accuracy", "perplexity", "margin", "score", "kl", "finished", "exact_match"}
"""Figures that a scorer's must not be mistaken for."""

Best = tuple[str, Literal["min", "max"]]
"""A held-out figure, and which end of it is good."""


def exact_match(texts: Sequence[str], answers: Sequence[str | None]) -> float:
    """Share of replies equal to the known answer, white space around both ignored."""
    right = 0
    for text, answer in zip(texts, answers, strict=True):
        assert answer is not None, "whoever asks knows the answers"
        right += text.strip() == answer.strip()
    return right / len(answers)


def row_text(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], answer: str | None) -> str:
    """What a scorer is told of a question, as JSON: the row's own fields, and the prompt's turns in
    `messages`, the right answer in `answer`."""
    return json.dumps({**row, "messages": list(messages), "answer": answer}, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Scorer:
    """A user's `(reply: str, row: dict) -> float`, larger is better."""

    function: UserFunction

    def mean(self, texts: Sequence[str], told: Sequence[str] | None) -> dict[str, float]:
        """The mean score of replies, under the function's name.

        Of several processes the first one's counts: checkpoints are ranked by it, and a scorer may draw lots.

        Raises:
          UserError: the function fails, or gives no finite number.
        """
        assert told is not None, "where there is a scorer, rows are kept for it"
        scores = []
        for text, row in zip(texts, told, strict=True):
            about = f"the reply {text[:60]!r}"
            scores.append(self.number(self.function(text, json.loads(row), about=about), about))
        mean = from_all([float(np.mean(scores))])[0, 0]
        return {self.function.name.rpartition(":")[2]: float(mean)}

    def number(self, score: Any, about: str) -> float:
        """A score as a number: Python's own, or a scalar of any library.

        Raises:
          UserError: it is none, or not finite.
        """
        try:
            number = math.nan if isinstance(score, str | bytes) else float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{self.function.name} gave {reprlib.repr(score)} for {about}, which is no finite number"
            )
        return number


def scorer_of(session: Session) -> Scorer | None:
    """The recipe's scorer, if it has one.

    Raises:
      UserError: it cannot be loaded, or its name is that of a figure.
    """
    name = session.config.evaluation.scorer
    if name is None:
        return None
    if name.rpartition(":")[2] in TAKEN:
        raise UserError(
            f"evaluation.scorer={name}: the name of the function is that of a figure; give another"
        )
    return Scorer(load_function(name, f"evaluation.scorer={name}"))


def told(session: Session, questions: Sequence[Question]) -> list[str] | None:
    """What the recipe's scorer is told of each question; None without a scorer."""
    if session.config.evaluation.scorer is None:
        return None
    return [row_text(each.row, each.messages, each.answer) for each in questions]


def samples(
    tokenizer: Tokenizer, prompts: PromptBatch, texts: Sequence[str], answers: Sequence[str | None]
) -> list[dict[str, str]]:
    """The replies to the first SAMPLES prompts, which are the same at every evaluation of a run."""
    shown = []
    for n in range(min(SAMPLES, len(texts))):
        ids = np.asarray(prompts.tokens_BP[n])[-int(prompts.lengths_B[n]) :].tolist()
        sample = {"prompt": tokenizer.decode(ids), "reply": texts[n]}
        answer = answers[n]
        shown.append(sample if answer is None else sample | {"answer": answer})
    return shown


def shots_of(session: Session, examples: Sequence[Conversation]) -> list[Message]:
    """The turns of evaluation.shots training conversations of one question and its reply, drawn by run.seed.

    Raises:
      UserError: there are not so many.
    """
    wanted = session.config.evaluation.shots
    if not wanted:
        return []
    turns = [without_system(each.messages) for each in examples]
    short = [each for each in turns if [turn["role"] for turn in each] == ["user", "assistant"]]
    if len(short) < wanted:
        raise UserError(
            f"evaluation.shots={wanted}, but only {len(short)} training conversations are a question and its "
            "reply"
        )
    chosen = np.random.default_rng(session.config.run.seed).permutation(len(short))[:wanted]
    return [message for n in chosen for message in short[n]]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """A conversation's turns but for the system's, and without the functions that a first turn may carry."""
    return [message for message in messages if message["role"] not in ("system", "developer")]


def after_system(messages: Sequence[Message], shots: Sequence[Message]) -> list[Message]:
    """A conversation with more turns behind its system's turn, or at its beginning; the functions that may be
    called stay in the first turn."""
    own = without_system(messages)
    made = [*messages[: len(messages) - len(own)], *shots, *own]
    if shots and made[0] is not messages[0] and "tools" in messages[0]:
        made[0] = {**made[0], "tools": messages[0]["tools"]}
    return made


def perplexity(loss: float) -> float:
    """exp(loss), which overflows for none that a model comes to."""
    return math.exp(min(loss, 700.0))


def best_of(session: Session, without: Best) -> Best:
    """Which held-out figure ranks checkpoints: the scorer's where there is one."""
    scorer = session.config.evaluation.scorer
    return (scorer.rpartition(":")[2], "max") if scorer else without
