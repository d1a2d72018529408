"""The exported tokenizer against ours, through `transformers.AutoTokenizer`."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers.models import Unigram
from transformers import AutoTokenizer

import maxllm.hf.tokenizer as hf_tokenizer
from maxllm.config.data import TokenizerConfig
from maxllm.data.chat import Message
from maxllm.data.render import render, render_prompt
from maxllm.data.spm import SpmTokenizer, train
from maxllm.data.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS
from maxllm.errors import UserError
from maxllm.hf.tokenizer import fast_tokenizer, save_tokenizer

SLICE = Path(hf_tokenizer.__file__).parents[1] / "data" / "slice"

ENGLISH = [
    "The whole life of a language model: a corpus is read, cleaned, cut into pieces and packed into rows.",
    "It was the best of times, it was the worst of times; it was 1859, and nobody had 3.14 pence to spare!",
    "She said, 'I don't know -- perhaps tomorrow?'  He didn't answer...",
    "User: what is 12 + 34?\nassistant: 46\nsystem prompt\nuser\n\n",
]
CODE = """\
import numpy as np


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    \"""exp(x) / sum(exp(x)); <unk>, <s> and <|im_end|> are spelled out here.\"""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    if not (e > 0).any() or e.ndim != 2:
\treturn {"k": [1, 2.5e-3, None], 'v': f"{e!r}"}  # ===== ~@$%^&*\\`|/?
    return e / e.sum(axis, keepdims=True)
"""
CHINESE = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
]
HAND_PICKED = (
    *(
        "",
        " ",
        "  ",
        "   leading",
        "trailing   ",
        " a",
        "a ",
        "a  b   c    d",
        "\n",
        "\n\n\n",
        " \n ",
        "\t",
        "\t\tx\t",
    ),
    *(
        "a\r\nb\r\n",
        "0",
        "1234567890",
        "3.14159 -2e-7",
        "x = {'a': [1, 2]}\n\tfor i in x:\n\t\tprint(i)  # ok\n",
    ),
    *(
        "🙂",
        "👩‍👩‍👧 family",
        "naïve café e\u0301",
        "𝕌𝕟𝕚",
        "\u3000全角　空格",
        "…—“”‘’",
        "\ufffd",
        "a\x00b",
        "\u200b",
    ),
    *("▁", "a▁b", " ▁ ▁▁", "▁▂▃▄▅▆▇█", "<0x0A>", "x<0x41><0xE2>", "<s", "|im_end|>", "中文 English 混合 123"),
    *("床前 明月光\n疑是\n", "hahahahaha haha", "=-" * 40, "The" * 50),
)
RUNS = tuple(character * length for character in "aelt-=.# 0\t\n" for length in (2, 3, 4, 5, 7, 16, 33))
"""Where equal segmentations abound: told apart by position under BPE, by rounding under unigram."""


def training_texts() -> list[str]:
    """English, Chinese and code; each a few thousand characters of the committed slice."""
    texts = [*ENGLISH, *CHINESE, *[CODE] * 20]
    for path in sorted(SLICE.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            texts += [json.loads(line)["text"][:3000] for line in itertools.islice(lines, 30)]
    return texts


def strings() -> Iterator[str]:
    """Training text, hand-picked cases, and random strings over the training text's characters."""
    texts = training_texts()
    yield from texts
    yield from HAND_PICKED
    rng, text = random.Random(0), "".join(texts)
    for length in (1, 4, 30, 300, 3000):
        for _ in range(100 if length < 3000 else 10):
            yield "".join(rng.choices(text, k=length))  # characters as often as in the text
            yield "".join(rng.choices(sorted(set(text)), k=length))  # rare ones as often as common ones
    for _ in range(200):
        start = rng.randrange(len(text))
        yield text[start : start + rng.randrange(200)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SpmTokenizer, Any]:
    """(ours, the exported one as AutoTokenizer loads it)."""
    config = TokenizerConfig(path="unused", vocab_size=3500, algorithm=request.param)
    ours = train(training_texts(), config)
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(ours, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')  # AutoTokenizer looks here too
    return ours, AutoTokenizer.from_pretrained(folder)


def is_tie(ours: SpmTokenizer, ids: list[int], other: list[int]) -> bool:
    """Whether a unigram model gives two segmentations the same probability."""
    scores = [math.fsum(map(ours.processor.get_score, row)) for row in (ids, other)]
    return math.isclose(*scores, rel_tol=1e-6)


def test_same_ids_and_the_text_comes_back(both: tuple[SpmTokenizer, Any]) -> None:
    ours, theirs = both
    unigram = isinstance(theirs.backend_tokenizer.model, Unigram)
    checked = ties = 0
    for text in strings():
        ids = ours.encode(text)
        found = theirs(text, split_special_tokens=True)["input_ids"]
        if found != ids:
            assert unigram and is_tie(ours, ids, found), text
            ties += 1
        if not any(token in text for token in SPECIAL_TOKENS):
            assert theirs(text)["input_ids"] == found, text
        assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
        checked += 1
    assert checked > 1000 and ties < checked / 100


def test_runs_of_one_character(both: tuple[SpmTokenizer, Any]) -> None:
    ours, theirs = both
    unigram = isinstance(theirs.backend_tokenizer.model, Unigram)
    for text in RUNS:
        ids, found = ours.encode(text), theirs(text)["input_ids"]
        assert found == ids or (unigram and is_tie(ours, ids, found)), text
        assert theirs.decode(found) == text


def test_special_tokens(both: tuple[SpmTokenizer, Any]) -> None:
    ours, theirs = both
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<|im_end|>")
    assert (theirs.pad_token, theirs.unk_token) == ("<pad>", "<unk>")
    assert len(theirs) == ours.vocab_size
    assert theirs("<|im_end|>")["input_ids"] == [4]
    for token in SPECIAL_TOKENS:  # as plain text, on request
        assert theirs(token, split_special_tokens=True)["input_ids"] == ours.encode(token)
    ids = [1, 3, *ours.encode(" hello"), 4, 2, 5]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == " hello"
    assert theirs.decode(ids) == "<s><|im_start|> hello<|im_end|></s><pad>"


CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "system", "content": "You are terse.\n"},
        {"role": "user", "content": "  静夜思 \n\n是谁写的？\t🙂"},
        {"role": "assistant", "content": "\n李白。  "},
        {"role": "user", "content": "{{ not a template }} {% nor this %}"},
        {"role": "assistant", "content": "def f(x):\n    return x\n"},
    ],
]


ADD: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": 'x + y, "说" <b>', "parameters": {"type": "object"}},
}


def calling(content: str, *arguments: dict[str, Any]) -> Message:
    calls = [{"type": "function", "function": {"name": "add", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls}


CONVERSATIONS += [
    [
        {"role": "developer", "content": "Be brief.", "tools": [ADD, ADD]},
        {"role": "user", "content": "1 + 2? 3 + 4?"},
        calling("Let me see.", {"x": 1, "y": [2, None, "é"]}, {}),
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "3 and 7."},
    ],
    [
        {"role": "user", "content": "1 + 2?", "tools": [ADD]},
        calling("", {"x": 1}),
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
    [{"role": "system", "content": "", "tools": [ADD]}, {"role": "user", "content": "1?"}, calling("", {})],
]


@pytest.mark.parametrize(
    "messages", CONVERSATIONS, ids=["short", "long", "functions", "call", "empty system"]
)
def test_chat_template_gives_our_ids(both: tuple[SpmTokenizer, Any], messages: list[Message]) -> None:
    ours, theirs = both
    theirs = functools.partial(theirs.apply_chat_template, tools=messages[0].get("tools"))
    whole = theirs(messages)["input_ids"]
    assert whole == render(ours, messages)[0]
    assert whole == both[1](theirs(messages, tokenize=False))["input_ids"]
    prompt = theirs(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt == render_prompt(ours, messages[:-1])
    assert whole[: len(prompt)] == prompt


def test_saving_again_by_transformers_changes_nothing(both: tuple[SpmTokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*HAND_PICKED, *ENGLISH, *CHINESE):
        assert again(text)["input_ids"] == ours.encode(text)
    messages: Any = CONVERSATIONS[1]
    assert again.apply_chat_template(messages)["input_ids"] == render(ours, messages)[0]


def test_files(tmp_path: Path) -> None:
    ours = train(training_texts(), TokenizerConfig(path="unused", vocab_size=3500))
    save_tokenizer(ours, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == ours.model_bytes
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert config["clean_up_tokenization_spaces"] is False
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    }


def foreign_tokenizer(tmp_path: Path, **settings: Any) -> SpmTokenizer:
    """A SentencePiece model that `spm.train` would not make."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join([*ENGLISH, *CHINESE]), encoding="utf-8")
    prefix = str(tmp_path / "foreign")
    settings = {"vocab_size": 500, "minloglevel": 2, "hard_vocab_limit": False, "pad_id": 5} | settings
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=prefix, **settings)
    processor = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    return SpmTokenizer(Path(prefix + ".model").read_bytes(), processor)


UNCHANGED_TEXT = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "control_symbols": ["<|im_start|>", "<|im_end|>"],
    "pad_piece": "<pad>",
}


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"normalization_rule_name=nmt_nfkc, add_dummy_prefix=True"):
        fast_tokenizer(foreign_tokenizer(tmp_path, model_type="bpe"))


def test_a_character_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="type CHAR cannot be exported"):
        fast_tokenizer(foreign_tokenizer(tmp_path, model_type="char", **UNCHANGED_TEXT))


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_spelled_byte_pieces_stay_text_where_letters_have_no_piece(algorithm: str, tmp_path: Path) -> None:
    ours = foreign_tokenizer(tmp_path, model_type=algorithm, **UNCHANGED_TEXT)
    assert ours.encode("<") == [ours.processor.piece_to_id("<0x3C>")]  # "<" is nowhere in the text
    fast = fast_tokenizer(ours)
    fast.encode_special_tokens = True
    for text in ("<0x0A>", "a <0xE4><|im_end|> </s>x<<unk>>", "明<0x41 >|月"):
        assert fast.encode(text).ids == ours.encode(text), text
