"""Generate and chat: one prompt, or a conversation, answered by the model in a run folder.

maxllm generate runs/tiny/pretrain --prompt "To be, or not to be"
maxllm chat runs/tiny/ppo generation.temperature=0.7
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
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
from maxllm.stages.start import policy_weights

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
    ) -> None:
        """Loads the parameters of one of a run's checkpoints; `overrides` may change what `may_set` names.

        Raises:
          UserError: it is a reward model, or replies as long as the context leave no room for a prompt.
        """
        self.session: Session = reopen(folder, overrides, may_set)
        reply = stage_of(self.session.config.stage).replies(self.session)
        if reply == "score":
            raise UserError(f"{folder} holds a reward model, which gives scores and no text")
        self.check_context()
        self.weights = policy_weights(self.session, folder.find(which))
        self.chats = reply == "turns"
        self._respond = cache(lambda: responder(self.session, self.session.config.generation))
        self._turn = 0

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


def generate(
    folder: RunFolder, prompts: Sequence[str], overrides: Sequence[str] = (), which: Which = "latest"
) -> list[dict[str, Any]]:
    """A reply to each prompt."""
    policy = Policy(folder, overrides, which)
    return [{"prompt": prompt, **policy.reply(policy.prompt_ids(prompt))} for prompt in prompts]


def converse(
    folder: RunFolder,
    lines: Iterable[str],
    say: Callable[[str], None],
    overrides: Sequence[str] = (),
    which: Which = "latest",
) -> None:
    """Answers each line in turn, with all that was said before in view.

    When the conversation outgrows the context, its oldest turns are forgotten, and `say` tells so. When a
    line cannot be answered (the chat template refuses it, or it is too long by itself), `say` tells why, and
    the conversation goes on without it.
    """
    policy = Policy(folder, overrides, which)
    if not policy.chats:
        raise UserError(f"{folder} holds a pretrained model, which has not learned to chat; use generate")
    messages: list[Message] = []
    for line in lines:
        if not line.strip():
            continue
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
