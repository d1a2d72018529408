"""Generate and chat: one prompt, or a conversation, answered by the model in a run folder.

maxllm generate runs/tiny/pretrain --prompt "To be, or not to be"
maxllm chat runs/tiny/ppo generation.temperature=0.7
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, reduce
from typing import Any

import jax
import numpy as np

from maxllm.data.chat import Message
from maxllm.data.instruct import pad_prompts
from maxllm.data.render import render_prompt
from maxllm.data.tokenizer import document_start
from maxllm.errors import UserError
from maxllm.folder import RunFolder, Which
from maxllm.parallel.sharding import row_shards
from maxllm.records import Array
from maxllm.run import session as sessions
from maxllm.run.session import Session, reopen
from maxllm.stages.registry import stage_of
from maxllm.stages.shared import reply_text, responder, response_ids
from maxllm.stages.start import model_beside, policy_weights
from maxllm.weights import Weights

MAY_SET = ("generation", "run.seed", "run.day", "model.dtype")
"""What may be set otherwise than when the run was trained."""

SHORTEST_PROMPT = 16
"""Prompts are padded to a power of two of at least this, so that few programs are compiled."""


class Policy:
    """A policy ready to answer."""

    def __init__(
        self,
        folder: RunFolder,
        overrides: Sequence[str] = (),
        which: Which = "latest",
        may_set: Sequence[str] = MAY_SET,
        beside: Policy | None = None,
    ) -> None:
        """Opens one of a run's checkpoints.

        Args:
          folder: the run.
          overrides: may change what `may_set` names.
          which: of its checkpoints.
          may_set: settings.
          beside: the model that the run's adapters were trained beside, whose weights are not read again.

        Raises:
          UserError: it is a reward model, or replies as long as the context leave no room for a prompt; or
            what it was trained beside is another model than the one that is given.
        """
        self.session: Session = reopen(folder, overrides, may_set)
        reply = stage_of(self.session.config.stage).replies(self.session)
        if reply == "score":
            raise UserError(f"{folder} holds a reward model, which gives scores and no text")
        self.check_context()
        self.checkpoint = folder.find(which)
        self._beside = beside
        if beside is not None:
            tuning = self.session.config.tuning
            if tuning is None or not tuning.adapters:
                raise UserError(f"{folder} trained no adapters that could be put beside another model")
            self.session = replace(self.session, mesh=beside.session.mesh)
            if (model := model_beside(self.checkpoint)).resolve() != beside.checkpoint.resolve():
                raise UserError(f"{folder} was trained beside {model}, not beside {beside.checkpoint}")
        self.chats = reply == "turns"
        self._respond = cache(lambda: responder(self.session, self.session.config.generation))
        self._turn = 0

    @cached_property
    def weights(self) -> Weights:
        """What it answers with, read when it first does."""
        beside = None if self._beside is None else self._beside.weights
        return policy_weights(self.session, self.checkpoint, beside=beside)

    def rest(self) -> None:
        """Lets the weights go, until it answers again."""
        self.__dict__.pop("weights", None)

    @property
    def prompt_limit(self) -> int:
        """Tokens that a prompt may have."""
        return self.context - self.session.config.generation.max_new_tokens

    @property
    def context(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        return self.session.config.generation.context or self.session.model.context

    def context_source(self) -> str:
        """The context, and the setting that it comes from."""
        config = self.session.model
        if self.session.config.generation.context:
            return f"context of generation.context={self.context}"
        stretched = "" if config.context == config.max_seq_len else f", stretched to {config.context},"
        return f"context of model.max_seq_len={config.max_seq_len}{stretched}"

    def check_context(self) -> None:
        """Warns of a context that is longer than the model's.

        Raises:
          UserError: replies are as long as the context, or longer.
        """
        reply, own = self.session.config.generation.max_new_tokens, self.session.model.context
        if self.context > own:
            sessions.say(
                self.session,
                f"generation.context={self.context} is more than the {own} tokens that the model was made "
                "for: what it says beyond them may make no sense",
            )
        if self.prompt_limit < 1:
            raise UserError(
                f"generation.max_new_tokens={reply} leaves no room for a prompt in the "
                f"{self.context_source()}; give less than that"
            )

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as this model reads it: a user's turn, or, for a pretrained model, the start of a text."""
        if self.chats:
            return render_prompt(self.session.tokenizer, [Message(role="user", content=prompt)])
        return document_start(self.session.tokenizer, prompt)

    def reply(self, ids: list[int]) -> dict[str, Any]:
        """Completes token ids, as `replies` does; the next ones are drawn otherwise.

        Raises:
          UserError: the prompt does not fit the model's context, or is empty.
        """
        self.check_prompt(ids)
        self._turn += 1
        return self.replies([ids], [(self._turn - 1,)])[0]

    def replies(
        self, prompts: Sequence[list[int]], draws: Sequence[tuple[int, ...]], rows: int = 1
    ) -> list[dict[str, Any]]:
        """Completes several prompts at a time.

        A reply is a function of its prompt and its draw, whatever stands beside it: what differs with the
        number of rows and the length that they are padded to is the order of sums, and so the last bits.

        Args:
          prompts: token ids, each as `check_prompt` wants it.
          draws: numbers that tell each reply's sampling from that of others, folded into run.seed.
          rows: of the batch, which is filled up to so many, or as many as the mesh needs.

        Returns:
          For each prompt {"text", "tokens": the response's ids, "finished": whether a stop token came}.
        """
        shards = row_shards(self.session.mesh)
        rows = -(-max(rows, len(prompts)) // shards) * shards
        more = rows - len(prompts)  # which end when the first one does
        length = max(map(self.padded_length, prompts))
        batch = pad_prompts([*prompts, *[prompts[0]] * more], length, self.session.tokenizer.pad)
        key, draws_BN = jax.random.key(self.session.config.run.seed), [*draws, *[draws[0]] * more]
        keys_B = keys_of(key, np.array(draws_BN, np.uint32))
        rollout = jax.device_get(self._respond()(self.weights, batch, keys_B))
        return [
            {
                "text": reply_text(self.session.tokenizer, rollout, row),
                "tokens": response_ids(rollout, row),
                "finished": bool(rollout.finished_B[row]),
            }
            for row in range(len(prompts))
        ]

    def padded_length(self, ids: Sequence[int]) -> int:
        """What a prompt is padded to: one of few lengths, so that few programs are compiled."""
        return min(max(SHORTEST_PROMPT, 1 << (len(ids) - 1).bit_length()), self.prompt_limit)

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Looks whether a prompt can be completed.

        Raises:
          UserError: it does not fit the model's context, or is empty.
        """
        if not ids:
            raise UserError("the prompt is empty, and this model's texts begin with no token of their own")
        if len(ids) > self.prompt_limit:
            reply = self.session.config.generation.max_new_tokens
            raise UserError(
                f"the prompt has {len(ids)} tokens; the {self.context_source()} leaves {self.prompt_limit} "
                f"beside generation.max_new_tokens={reply}; generation.context=… sets a longer one"
            )


@jax.jit
def keys_of(key: jax.Array, draws_BN: Array) -> jax.Array:
    """One key a row, [B], from one for all and the numbers of each draw."""
    return jax.vmap(lambda draws_N: reduce(jax.random.fold_in, draws_N, key))(draws_BN)


BASE = "base"
"""The name of the model that adapters lie beside."""

SWITCH = "/adapter"
"""A line of a chat that begins so says who answers from here on."""


class Policies:
    """A model, and adapters that were trained beside it, by name: one of them answers at a time.

    The model's own weights are held once. Those that low-rank adapters are merged into are made when it is
    their turn.
    """

    def __init__(
        self,
        folder: RunFolder,
        adapters: Sequence[tuple[str, RunFolder]] = (),
        overrides: Sequence[str] = (),
        which: Which = "latest",
    ) -> None:
        """The first adapters answer, or, where there are none, the model.

        Raises:
          UserError: a name is given twice; or see `Policy`.
        """
        base = Policy(folder, overrides, which)
        self._named = {BASE: base}
        for name, run in adapters:
            if name in self._named:
                raise UserError(f"--adapter {name}={run}: there is a {name} already; give another name")
            self._named[name] = Policy(run, overrides, beside=base)
        self.name = next(iter(dict(adapters)), BASE)

    @property
    def names(self) -> list[str]:
        """Who can answer, the model first."""
        return list(self._named)

    @property
    def current(self) -> Policy:
        """Who answers."""
        return self._named[self.name]

    def use(self, name: str) -> None:
        """Another one answers from here on.

        Raises:
          UserError: there is none of this name.
        """
        if name not in self._named:
            raise UserError(f"there is no adapter {name!r}; there are {', '.join(self._named)}")
        if self.name not in (BASE, name):
            self.current.rest()
        self.name = name


def generate(
    folder: RunFolder,
    prompts: Sequence[str],
    overrides: Sequence[str] = (),
    which: Which = "latest",
    adapters: Sequence[tuple[str, RunFolder]] = (),
) -> list[dict[str, Any]]:
    """A reply to each prompt; with adapters, one of each of them, under "adapter"."""
    policies = Policies(folder, adapters, overrides, which)
    made = []
    for name in [name for name, _ in adapters] or [BASE]:
        policies.use(name)
        policy = policies.current
        said = {"adapter": name} if adapters else {}
        made += [said | {"prompt": prompt, **policy.reply(policy.prompt_ids(prompt))} for prompt in prompts]
    return made


def converse(
    folder: RunFolder,
    lines: Iterable[str],
    say: Callable[[str], None],
    overrides: Sequence[str] = (),
    which: Which = "latest",
    adapters: Sequence[tuple[str, RunFolder]] = (),
) -> None:
    """Answers each line in turn, with all that was said before in view.

    When the conversation outgrows the context, its oldest turns are forgotten, and `say` tells so. When a
    line cannot be answered (the chat template refuses it, or it is too long by itself), `say` tells why, and
    the conversation goes on without it. With adapters, a line `/adapter NAME` has others answer.
    """
    policies = Policies(folder, adapters, overrides, which)
    if not policies.current.chats:
        raise UserError(f"{folder} holds a pretrained model, which has not learned to chat; use generate")
    messages: list[Message] = []
    for line in lines:
        if not line.strip():
            continue
        if adapters and line.split()[0] == SWITCH:
            say(switched(policies, line.split()[1:]))
            continue
        policy = policies.current
        conversation = [*messages, Message(role="user", content=line.strip())]
        try:
            ids = render_prompt(policy.session.tokenizer, conversation)
            while len(ids) > policy.prompt_limit and len(conversation) > 1:
                del conversation[:2]
                ids = render_prompt(policy.session.tokenizer, conversation)
            text = policy.reply(ids)["text"]
        except UserError as error:
            say(f"({error})")
            continue
        if len(conversation) <= len(messages):
            say("(the conversation is longer than the model's context; its oldest turns are forgotten)")
        say(text)
        messages = [*conversation, Message(role="assistant", content=text)]


def switched(policies: Policies, words: Sequence[str]) -> str:
    """What is said of a line that asks for others to answer, after it was followed if it could be."""
    if len(words) != 1:
        return f"({SWITCH} NAME has others answer: {', '.join(policies.names)}; now {policies.name})"
    try:
        policies.use(words[0])
    except UserError as error:
        return f"({error})"
    return f"({policies.name} answers)"


def typed_lines() -> Iterator[str]:
    """Lines from the terminal with a prompt sign, or from a pipe without.

    Raises:
      UserError: a line is not UTF-8.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("what was typed is not UTF-8 text") from None


def utf8(word: str) -> str:
    """A word of the command line as the text it is, whatever the locale.

    Raises:
      UserError: it is not UTF-8.
    """
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{word!r} is not UTF-8 text") from None
