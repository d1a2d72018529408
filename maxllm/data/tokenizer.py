"""What every tokenizer can do; load_tokenizer.py reads one back from a folder.

Two kinds exist: SentencePiece models (data/spm.py; the ones `prepare` trains by default) and anything that
Hugging Face's `tokenizers` library runs (data/bpe.py; byte-level BPE, and every imported model's tokenizer).
Text goes in as it is; control tokens are never produced from text, so a document cannot forge a chat turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

UNK, BOS, EOS, IM_START, IM_END, PAD = range(6)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")
"""Ids 0..5 of the tokenizers we train; the first five are those of the happy-llm tutorial."""

TOOLS_HEAD = "Functions that you may call, a JSON schema on each line:\n"
TOOLS_FOOT = 'A call of one is <tool_call>{"name": …, "arguments": {…}}</tool_call>.'
"""Around the functions in a conversation's system turn."""

PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""That of runs of before functions could be called."""

CHATML_LEAD = (
    "{% set leads = messages[0]['role'] in ['system', 'developer'] %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if leads and messages[0]['content'] %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    f"{{{{ '{TOOLS_HEAD}' }}}}"
    "{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    f"{{{{ '{TOOLS_FOOT}' + '<|im_end|>\n' }}}}"
    "{% endif %}{% for message in messages %}{% if not (tools and leads and loop.first) %}"
    "{{ '<|im_start|>' + ('system' if message['role'] == 'developer' else message['role']) + '\n' }}"
)
CHATML_SAID = (
    "{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}</tool_call>' }}"
    "{% endfor %}"
)
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
"""Up to what a turn says, what it says, and behind all turns."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    + CHATML_LEAD
    + CHATML_SAID
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + CHATML_PROMPT
)
"""The layout of conversations in the models we train (ChatML), in Hugging Face's form.

Functions stand in the system's turn, calls in the assistant's (as Hermes and Qwen lay them out), what they
come to in turns of `tool`.
"""

SPM_FILE, FAST_FILE, FAST_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


class Tokenizer(Protocol):
    """Text to ids and back, and the ids that mean something."""

    def __hash__(self) -> int:
        """A tokenizer never changes."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1; a model's table may have more rows (padding), never fewer."""

    @property
    def holes(self) -> tuple[int, ...]:
        """Ids below vocab_size that no piece has."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """File name -> content: everything `load_tokenizer` needs to make it again."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the files: two runs that exchange tokens must agree on it."""

    @property
    def bos(self) -> int | None:
        """Begins a text, if the model knows such an id."""

    @property
    def adds_bos(self) -> bool:
        """Whether every document begins with `bos`: the tokenizer's own rule."""

    @property
    def eos(self) -> int:
        """Ends a document."""

    @property
    def pad(self) -> int:
        """Fills rows. Masks never look at it."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Generation ends at any of them."""

    @property
    def chat_template(self) -> str | None:
        """Jinja layout of a conversation; None where the model has not learned to chat."""

    def control_name(self, token: int) -> str | None:
        """How a control token is spelled; None for every other id."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens and ids without a piece vanish."""


def document_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """BOS, where the tokenizer puts one, and the text: how a document begins."""
    head = [tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []
    return [*head, *tokenizer.encode(text)]


def without_piece(tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
    """The ids of a table with `rows` rows that mean nothing: holes, and rows that pad the table."""
    return (*tokenizer.holes, *range(tokenizer.vocab_size, rows))


def fingerprint_of(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
