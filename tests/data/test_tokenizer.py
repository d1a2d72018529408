"""decode(encode(s)) == s for every string, and no text becomes a control token."""

import random

import pytest

from maxllm.config.data import TokenizerConfig
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.spm import TRAINING_LINE_CHARS, train, training_lines
from maxllm.data.tokenizer import (
    BOS,
    EOS,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    UNK,
)
from maxllm.errors import UserError

RNG = random.Random(0)
CONSONANTS, VOWELS = "bcdfghklmnprstvw", "aeiou"
WORDS = [
    "".join(RNG.choice(CONSONANTS) + RNG.choice(VOWELS) for _ in range(RNG.randint(1, 4))) for _ in range(600)
]
TEXT = "\n".join(" ".join(RNG.choices(WORDS, k=12)) for _ in range(400))


def settings(**changes):
    return TokenizerConfig.model_validate({"path": "unused", "vocab_size": 600} | changes)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return train([TEXT], settings(algorithm=request.param))


NASTY = {
    "empty": "",
    "spaces": "   a  b   ",
    "only spaces": "     ",
    "word boundary": "▁",
    "word boundaries": "a▁b▁▁ ▁c ▁",
    "newlines": "\n\na\n \n",
    "carriage return": "a\r\nb\rc\r",
    "tab and NUL": "a\tb\x00c\x00",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "emoji": "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "not NFKC": "ﬁ ① Ａ e\u0301 \u00a0\u3000",
    "Chinese": "床前明月光，疑是地上霜。",
    "zero width": "\u200b\ufeff\u200d\u2028\u2029",
    "astral": "\U0001f9ff\U00020000\U0010ffff",
    "private use": "\ue000\uf8ff\ufffd\ufffe",
    "special tokens": "".join(SPECIAL_TOKENS) + " <s> </s>",
    "byte pieces": "<0x41><0x0A>",
    "a turn": "<|im_start|>assistant\nno<|im_end|>\n",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nasty_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= i < tokenizer.vocab_size for i in ids)


def test_random_text_over_all_of_unicode_comes_back(tokenizer):
    """400 strings: any code point but surrogates, mixed with what the rules above single out."""
    rng = random.Random(1)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    favourites = [*NASTY.values(), *WORDS[:20], *SPECIAL_TOKENS, "▁", " ", "\n", "\x00", "\r"]
    for _ in range(400):
        parts = [
            rng.choice(favourites) if rng.random() < 0.4 else chr(rng.choice(points))
            for _ in range(rng.randint(1, 30))
        ]
        text = "".join(parts)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, ascii(text)
        assert min(ids) >= len(SPECIAL_TOKENS), ascii(text)


def test_text_is_compressed(tokenizer):
    """Words of the training text take fewer tokens than they have letters."""
    line = TEXT.splitlines()[0]
    assert len(tokenizer.encode(line)) < 0.7 * len(line)


def test_special_tokens_have_their_ids(tokenizer):
    assert (UNK, BOS, EOS, IM_START, IM_END, PAD) == (0, 1, 2, 3, 4, 5)
    for i, piece in enumerate(SPECIAL_TOKENS):
        assert tokenizer.processor.id_to_piece(i) == piece
    assert PAD != EOS and PAD != IM_END
    assert tokenizer.processor.pad_id() == PAD and tokenizer.processor.eos_id() == EOS
    assert tokenizer.vocab_size == 600


def test_control_tokens_vanish_in_decoding(tokenizer):
    ids = [BOS, IM_START, *tokenizer.encode("a b"), IM_END, EOS, PAD, PAD]
    assert tokenizer.decode(ids) == "a b"


def test_digits_and_newlines_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("2026")) == 4
    newline = tokenizer.encode("\n")
    assert len(newline) == 1 and tokenizer.encode("ba\nda").count(newline[0]) == 1


def test_encoding_is_a_concatenation_around_newlines(tokenizer):
    """Text is encoded the same way wherever it is cut at a line's end: chat.py relies on it."""
    a, b = WORDS[0] + " " + WORDS[1], WORDS[2]
    assert tokenizer.encode(f"{a}\n{b}") == tokenizer.encode(a) + tokenizer.encode("\n") + tokenizer.encode(b)


def test_training_is_deterministic():
    """Same text, same settings: the same model, to the byte."""
    first, second = (train([TEXT], settings()) for _ in range(2))
    assert first.model_bytes == second.model_bytes and first.fingerprint == second.fingerprint
    assert first == second
    other = train([TEXT], settings(vocab_size=599))
    assert other != first and other.fingerprint != first.fingerprint


def test_written_and_read_again(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model_bytes)
    again = load_tokenizer(path)
    assert again == tokenizer and again.encode(TEXT[:500]) == tokenizer.encode(TEXT[:500])


def test_long_lines_are_not_skipped():
    """A word that stands only in a line of 60,000 characters is learned all the same."""
    line = "qxzqxzq " * 7500
    tokenizer = train([TEXT, line], settings())
    assert len(tokenizer.encode("qxzqxzq")) <= 2
    assert len(train([TEXT], settings()).encode("qxzqxzq")) == 7


def test_training_lines_lose_nothing():
    long = "x" * (2 * TRAINING_LINE_CHARS + 5)
    lines = list(training_lines(["a\n\nb", long, ""]))
    assert lines[:2] == ["a", "b"] and "".join(lines[2:]) == long
    assert max(map(len, lines)) == TRAINING_LINE_CHARS
    assert max(len(line.encode()) for line in training_lines(["漢" * 9000])) <= 4 * TRAINING_LINE_CHARS


# Errors


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_vocabulary_that_the_text_cannot_fill(algorithm):
    with pytest.raises(UserError) as error:
        train(["ba da ga"], settings(vocab_size=4000, algorithm=algorithm))
    sentence = str(error.value)
    assert sentence.startswith("tokenizer.vocab_size=4000 cannot be trained on this text")
    assert "\n" not in sentence


def test_no_text_at_all():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=600"):
        train([], settings())


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer .*missing.model does not exist; `maxllm prepare RECIPE`"):
        load_tokenizer(tmp_path / "missing.model")


def test_not_a_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model at all")
    with pytest.raises(UserError, match=r"tokenizer.model is not a SentencePiece model"):
        load_tokenizer(path)


def test_a_model_with_other_special_tokens(tmp_path):
    import sentencepiece

    prefix = tmp_path / "other"
    (tmp_path / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(prefix),
        vocab_size=200,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"other.model starts with the pieces \('<unk>', '<s>', '</s>'"):
        load_tokenizer(f"{prefix}.model")
