"""`maxllm data show`: every token of the rows that a stage trains on, its document and its weight."""

import json

import pytest

from maxllm.cli import main
from maxllm.data.bpe import FastTokenizer
from maxllm.data.shown import texts_of
from maxllm.data.tokenizer import IM_END, SPECIAL_TOKENS

TALKS = [
    {
        "messages": [
            {"role": "user", "content": "春夜 1+2?"},
            {"role": "assistant", "content": "3 🙂"},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {"prompt": "5+5?", "completion": "ten"},
    {"text": "Once upon a time."},
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory, policy_at):
    """The folder of a model to start from."""
    return policy_at(tmp_path_factory.mktemp("show") / "policy", max_seq_len=256)


@pytest.fixture
def show(policy, tmp_path, capsys):
    """show(recipe, rows, *words): what is printed of a file of rows."""

    def run(recipe, rows, *words):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [
            f"start.policy={policy}",
            f"data.sources=['{source}']",
            "data.heldout_sources=[tasks:heldout:9]",
        ]
        given += [f"run.dir={tmp_path / 'run'}", "batch.rows=8", "batch.sequence_length=256"]
        code = main(["data", "show", recipe, *given, *words])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert not (tmp_path / "run").exists()
        return said.out

    return run


def test_a_packed_row_of_sft(show, tiny_tokenizer):
    """Texts are those of the tokens, and what is in the loss is the replies and their ends."""
    (row,) = json.loads(show("sft/tiny_tasks_cpu_fast", TALKS, "--json", "--rows=1"))
    assert row.keys() == {"tokens", "text", "segments", "weights"}
    assert len({len(values) for values in row.values()}) == 1 and sorted(set(row["segments"])) == [1, 2, 3]

    def of(segment, name):
        return [value for value, number in zip(row[name], row["segments"], strict=True) if number == segment]

    for segment in (1, 2, 3):
        both = zip(of(segment, "text"), of(segment, "tokens"), strict=True)
        said = [text for text, token in both if token >= len(SPECIAL_TOKENS)]
        assert "".join(said) == tiny_tokenizer.decode(of(segment, "tokens"))
    trained = [token for token, weight in zip(of(1, "tokens"), of(1, "weights"), strict=True) if weight]
    assert trained == [*tiny_tokenizer.encode("3 🙂"), IM_END, *tiny_tokenizer.encode("4"), IM_END]
    begins = "<s><|im_start|>user\n春夜 1+2?<|im_end|>\n<|im_start|>assistant\n3 🙂"
    assert "".join(of(1, "text")).startswith(begins)
    assert of(3, "weights") == [0.0] + [1.0] * (len(of(3, "weights")) - 1)


def test_on_the_console_the_loss_is_between_marks(show):
    shown = show("sft/tiny_tasks_cpu_fast", TALKS)
    assert "⟦3 🙂<|im_end|>⟧" in shown and "⟦ten<|im_end|>⟧" in shown and "row 1: " in shown


PAIR = {"prompt": "1+2?", "chosen": "3", "rejected": "five"}


def test_pairs_and_prompts(show, tiny_tokenizer):
    good, bad = json.loads(show("dpo/tiny_tasks_cpu_fast", [PAIR], "--json"))
    for row, reply in ((good, "3"), (bad, "five")):
        trained = [t for t, w in zip(row["tokens"], row["weights"], strict=True) if w]
        assert trained == [*tiny_tokenizer.encode(reply), IM_END]
    good, bad = json.loads(show("reward/tiny_tasks_cpu_fast", [PAIR], "--json"))
    assert good["weights"][-1] == bad["weights"][-1] == 1 and sum(good["weights"] + bad["weights"]) == 2


def test_texts_of_tokens_that_are_parts_of_letters(make_bytes):
    ids = make_bytes.encode("é 春!")
    assert texts_of(make_bytes, [*ids, 257]) == ["", "é", " ", "", "", "春", "!", "<|im_end|>"]


@pytest.fixture
def make_bytes():
    """A tokenizer of bytes with one control token, the id 257."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return FastTokenizer(backend.to_str().encode(), {"eos_token": "<|im_end|>"})
