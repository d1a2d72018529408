"""What tests of data share: small tokenizers of the kind that comes with an imported model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from maxllm.data.bpe import STOP_KEY, FastTokenizer

TOKENS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<|pad|>")
END = 257
Make = Callable[..., FastTokenizer]


@pytest.fixture(scope="module")
def make() -> Make:
    """make(template, special=…, kind=…): bytes, then TOKENS; kind "spaces" is cut as by SentencePiece."""

    def build(chat_template: str, special: bool = True, kind: str = "bytes", **config: Any) -> FastTokenizer:
        vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        if kind == "bytes":
            backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        else:
            pieces = {f"<0x{byte:02X}>": byte for byte in range(256)}
            backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
            backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in TOKENS])
        config = {"chat_template": chat_template, "eos_token": "<|im_end|>", STOP_KEY: [END]} | config
        return FastTokenizer(backend.to_str().encode(), config)

    return build
