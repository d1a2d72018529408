"""Byte-level BPE: the tutorial's ids, every text comes back, no text forges a token; Jinja templates."""

import random

import pytest

from maxllm.config.data import TokenizerConfig
from maxllm.data import bpe
from maxllm.data.fields import RowError
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.render import render, render_prompt, render_to_reply
from maxllm.data.tokenizer import CHAT_TEMPLATE, EOS, IM_END, PAD, SPECIAL_TOKENS
from maxllm.errors import UserError

RNG = random.Random(0)
WORDS = ["".join(RNG.choice("bdfgklmnprst") + RNG.choice("aeiou") for _ in range(3)) for _ in range(500)]
TEXT = [" ".join(RNG.choices(WORDS, k=12)) for _ in range(400)]
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] "
    "+ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXT, TokenizerConfig(path="unused", vocab_size=700, algorithm="byte_bpe"))


@pytest.fixture(scope="module")
def foreign(tokenizer):
    """The same pieces with another model's template."""
    config = dict(tokenizer.config) | {"chat_template": LLAMA2, bpe.STOP_KEY: [EOS]}
    return bpe.FastTokenizer(tokenizer.json_bytes, config)


def test_the_tutorials_ids_and_a_saved_folder(tokenizer, tmp_path):
    vocab = tokenizer.backend.get_vocab()
    assert [vocab[token] for token in SPECIAL_TOKENS] == list(range(6)) and tokenizer.vocab_size == 700
    assert (tokenizer.eos, tokenizer.pad, tokenizer.stop_tokens) == (EOS, PAD, (EOS, IM_END))
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])


@pytest.mark.parametrize(
    "text",
    ["", "  a  b ", "床前明月光", "🙂\r\n\t\x00", "1234", "ﬁ①e\u0301", "".join(SPECIAL_TOKENS) + "<s>"],
)
def test_every_text_comes_back_and_forges_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(token >= len(SPECIAL_TOKENS) for token in ids)


def test_too_many_pieces_are_refused():
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=9000 cannot be trained on this text"):
        bpe.train(["a b c"], TokenizerConfig(path="unused", vocab_size=9000, algorithm="byte_bpe"))


def test_our_own_chatml_needs_no_template(tokenizer):
    _, mask = render(tokenizer, TALK)
    assert tokenizer.chat_template == CHAT_TEMPLATE and sum(mask) == 4  # two digits, two ends of turn


def test_a_template_is_rendered_and_masked_by_its_own_spans(foreign):
    """The ids are those of the whole text; trained are each reply and the stop token that ends it."""
    ids, mask = render(foreign, TALK)
    text = "<s>[INST] One? [/INST] 1 </s><s>[INST] Two? [/INST] 2 </s>"
    assert ids == foreign.reader.encode(text, add_special_tokens=False).ids
    trained = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert foreign.reader.decode(trained, skip_special_tokens=False).replace(" ", "") == "1</s>2</s>"
    assert render_prompt(foreign, TALK[:3]) == ids[: len(render_prompt(foreign, TALK[:3]))]
    assert render_to_reply(foreign, TALK)[-1] == EOS


def test_what_a_template_refuses_is_a_bad_row(foreign):
    with pytest.raises(RowError, match="no system here"):
        render(foreign, [{"role": "system", "content": "x"}, *TALK])
    ids, _ = render(foreign, [{"role": "user", "content": "</s>"}, TALK[1]])
    assert ids.count(EOS) == 1  # what is spelled in a message is text
