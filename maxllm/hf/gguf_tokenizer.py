"""The two kinds of tokenizer that GGUF files carry, for the `tokenizers` library.

`gpt2` is byte-level BPE: pieces, merges, and the name of the rule that cuts text before it is merged (PRE).
`llama` is SentencePiece BPE: pieces with scores, spaces as U+2581, bytes for what has no piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from maxllm.data.spm import WORD_BOUNDARY
from maxllm.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's token types."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PRE: dict[str, tuple[bool, str]] = {
    "default": (False, GPT2),
    "gpt-2": (False, GPT2),
    "smollm": (True, GPT2),
    "llama-bpe": (False, LLAMA3),
    "llama3": (False, LLAMA3),
    "qwen2": (False, QWEN2),
}
"""tokenizer.ggml.pre -> (whether every digit stands alone, the pattern of words). From the tokenizer.json of
GPT-2, SmolLM2, Llama 3 and Qwen2."""

Metadata = Callable[..., Any]


def byte_level(value: Metadata, origin: str) -> tokenizers.Tokenizer:
    """Byte-level BPE.

    Raises:
      UserError: text is cut by a rule that we do not know.
    """
    tokens, merges = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")
    if not merges:
        raise UserError(f"{origin} has a byte-level BPE tokenizer without merges")
    pre = value("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise UserError(f"{origin} cuts text by the rule {pre!r}; known are {', '.join(PRE)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=PRE[pre][1] is LLAMA3))
    digits, pattern = PRE[pre]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    add_control_tokens(backend, tokens, value("tokenizer.ggml.token_type"))
    return backend


def adds_bos(value: Metadata) -> bool:
    """Whether texts begin with BOS where tokenizer.ggml.add_bos_token is not there to say it.

    llama.cpp's rule (src/llama-vocab.cpp): with SentencePiece and with Llama 3's cut.
    """
    if value("tokenizer.ggml.model") == "llama":
        return True
    return PRE.get(value("tokenizer.ggml.pre", "default"), (False, ""))[1] is LLAMA3


def sentence_piece(value: Metadata) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the neighbours whose union has the best score are merged first."""
    tokens, scores = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.scores")
    types = value("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    text = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    ranked = sorted(text, key=lambda token: (-scores[vocab[token]], vocab[token]))
    merges = [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in text and token[cut:] in text
    ]
    unknown = value("tokenizer.ggml.unknown_token_id", 0)
    model = BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", WORD_BOUNDARY)]
    strip: list[Any] = []
    if value("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(WORD_BOUNDARY))
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_control_tokens(backend, tokens, types)
    return backend


def add_control_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are not text are recognised whole."""
    kinds = list(zip(tokens, types, strict=True))
    special = [token for token, kind in kinds if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in kinds if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
