"""Files of rows to arrays: bad rows are named and counted, held-out rows are stable and apart."""

import json

import jax
import numpy as np
import pytest

from maxllm.config.data import DataConfig
from maxllm.data import render, tasks
from maxllm.data.conversation import before_first_reply, read_conversation
from maxllm.data.fields import RowError
from maxllm.data.instruct import (
    RowReader,
    pad_pairs,
    pad_prompts,
    pad_reply_pairs,
    question_of,
    reply_pair,
)
from maxllm.data.pack import pack
from maxllm.data.rows import messages_of, preference_of, prompt_of
from maxllm.data.tokenizer import BOS, IM_END, PAD
from maxllm.errors import UserError

GOOD = [
    {"instruction": "Reverse the digits.", "input": str(i), "output": str(i)[::-1]} for i in range(100, 160)
]
PAIRS = [{"prompt": f"Sort {i}", "chosen": "good", "rejected": "bad"} for i in range(40)]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def asked_of(row):
    """The messages before the reply in a row of any kind."""
    if "chosen" in row:
        return preference_of(row)[0]
    return prompt_of(row) if "prompt" in row else before_first_reply(messages_of(row))


@pytest.fixture
def split(tiny_tokenizer):
    """split(source, parse): (training rows, held-out rows, tallies), each row through `parse`."""

    def make(source, parse, kind="instruction", seed=0, **settings):
        sources = () if source is None else (source,)
        train, heldout, tallies = RowReader(
            DataConfig(sources=sources, **settings),
            kind,
            seed,
            lambda row: (row, parse(row)),
            lambda parsed: render.render_prompt(tiny_tokenizer, asked_of(parsed[0])),
        ).split()
        return [row for _, row in train], [row for _, row in heldout], tallies

    return make


@pytest.fixture
def conversation(tiny_tokenizer):
    return lambda row: read_conversation(tiny_tokenizer, row, 64).pieces[0]


@pytest.fixture
def pair(tiny_tokenizer):
    return lambda row: reply_pair(tiny_tokenizer, row, 64)


# What the user is told


LONG = "9" * 200
BAD = {
    "not JSON": ('{"instruction": ', "is not JSON"),
    "not an object": ("[1, 2]", "is not"),
    "missing field": ({"instruction": "Reverse."}, "field 'output' is missing"),
    "empty field": ({"instruction": "Reverse.", "output": " "}, "field 'output' is not text or is empty"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "has the unknown role 'narrator'"),
    "too long": ({"instruction": "Repeat.", "output": LONG}, "the conversation is longer than 64 tokens"),
    "no form": ({"title": "x"}, "none of the fields 'messages', 'conversations', 'instruction', 'prompt'"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_line_and_reason(split, tmp_path, conversation, row, reason):
    """Line 31 of 61; the limit in the sentence is the setting's own name."""
    source = write(tmp_path / "rows.jsonl", [*GOOD[:30], row, *GOOD[30:]])
    with pytest.raises(UserError) as error:
        split(source, conversation)
    sentence = str(error.value)
    assert sentence.startswith(f"{source} line 31") and reason in sentence
    assert sentence.endswith("; 1 of 61 rows are bad, more than data.max_bad_share=0.01 allows")
    assert "\n" not in sentence


@pytest.mark.parametrize("content", ["\ud800", "a \udfff b"])
def test_a_lone_surrogate_is_a_bad_row(split, tmp_path, conversation, content):
    """JSON can carry half of a UTF-16 pair (lmarena's does); UTF-8 cannot, so it is no text."""
    row = '{"instruction": "Say it.", "output": ' + json.dumps(content) + "}"
    source = write(tmp_path / "rows.jsonl", [*GOOD, row])
    with pytest.raises(UserError, match="line 61"):
        split(source, conversation)


def test_a_role_of_another_type_is_a_bad_row(split, tmp_path, conversation):
    row = {"messages": [{"role": {"name": "user"}, "content": "x"}]}
    source = write(tmp_path / "rows.jsonl", [*GOOD, row])
    with pytest.raises(UserError, match="line 61"):
        split(source, conversation)


PAIR_ERRORS = {
    "equal": ({"prompt": "Sort 1", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
    "missing": ({"prompt": "Sort 1", "chosen": "a"}, "field 'rejected' is missing"),
    "too long": (
        {"prompt": "Sort 1", "chosen": "a", "rejected": LONG},
        "prompt and reply is longer than 64 tokens",
    ),
}


@pytest.mark.parametrize(("row", "reason"), PAIR_ERRORS.values(), ids=PAIR_ERRORS)
def test_a_bad_pair_is_named(split, tmp_path, pair, row, reason):
    source = write(tmp_path / "pairs.jsonl", [*PAIRS, row])
    with pytest.raises(UserError) as error:
        split(source, pair, "preference")
    assert str(error.value).startswith(f"{source} line 41: {reason}; 1 of 41 rows are bad")


def test_rows_are_counted_by_reason(split, tmp_path, conversation):
    bad = [row for row, _ in BAD.values()] + [BAD["too long"][0]]
    source = write(tmp_path / "rows.jsonl", [*GOOD, *bad])
    train, heldout, (tally,) = split(source, conversation, max_bad_share=0.5)
    assert len(train) + len(heldout) == len(GOOD) == tally.kept
    assert (tally.rows, tally.bad) == (len(GOOD) + len(bad), len(bad))
    assert tally.dropped["the conversation is longer than 64 tokens"] == 2
    assert tally.dropped["field 'output' is missing"] == 1
    assert sum(tally.dropped.values()) == len(bad)
    assert tally.report()["source"] == source


def test_a_share_of_bad_rows_may_be_allowed(split, tmp_path, pair):
    source = write(tmp_path / "pairs.jsonl", [*PAIRS, PAIR_ERRORS["equal"][0]])
    train, heldout, _ = split(source, pair, "preference", max_bad_share=0.05, heldout_share=0.2)
    assert len(train) + len(heldout) == 40


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("tasks:train:many", "source 'tasks:train:many' is not tasks:train:COUNT or tasks:heldout:COUNT"),
        ("tasks:test:5", "source 'tasks:test:5' is not tasks:train:COUNT or tasks:heldout:COUNT"),
        ("tasks:train:0", "tasks:train:0 is empty"),
    ],
)
def test_a_bad_source_is_named(split, conversation, source, sentence):
    with pytest.raises(UserError) as error:
        split(source, conversation)
    assert str(error.value) == sentence


def test_no_source_at_all(split, conversation):
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        split(None, conversation)


def test_an_empty_file(split, tmp_path, conversation):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        split(str(tmp_path / "empty.jsonl"), conversation)


# Held-out rows


def identity(row):
    return row["instruction"], row["input"]


def test_heldout_rows_are_stable_and_disjoint(split, tmp_path):
    """A row's content decides: not its place, not its neighbours, not the seed."""
    rows = [{"instruction": "Double.", "input": str(i), "output": str(2 * i)} for i in range(600)]
    train, heldout, _ = split(write(tmp_path / "a.jsonl", rows), identity, heldout_share=0.1)
    assert not set(train) & set(heldout) and len(train) + len(heldout) == 600
    assert 60 - 5 * 7.4 < len(heldout) < 60 + 5 * 7.4  # five standard deviations of a binomial
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(600)[:300]]
    source = write(tmp_path / "b.jsonl", shuffled)
    again_train, again_heldout, _ = split(source, identity, seed=99, heldout_share=0.1)
    assert set(again_heldout) <= set(heldout) and set(again_train) <= set(train)


def test_a_larger_share_keeps_what_was_held_out(split, tmp_path):
    source = write(tmp_path / "a.jsonl", GOOD)
    _, small, _ = split(source, identity, heldout_share=0.1)
    _, large, _ = split(source, identity, heldout_share=0.3)
    assert set(small) < set(large)


def test_folds_hold_out_every_row_once(split, tmp_path):
    """The first of ten is what a tenth holds out."""
    rows = [{"instruction": "Double.", "input": str(i), "output": "x"} for i in range(400)]
    source = write(tmp_path / "a.jsonl", rows)
    parts = [split(source, identity, fold=f"{k}/10") for k in range(1, 11)]
    assert sorted(row for _, held, _ in parts for row in held) == sorted(map(identity, rows))
    assert all(len(train) + len(held) == 400 and not set(train) & set(held) for train, held, _ in parts)
    assert parts[0][1] == split(source, identity, heldout_share=0.1)[1]
    with pytest.raises(ValueError, match="is not one of at least two parts"):
        split(source, identity, fold="3/2")
    with pytest.raises(ValueError, match="leave heldout_sources empty"):
        split(source, identity, fold="1/2", heldout_sources=(source,))


def test_twins_stay_on_one_side(split, tmp_path):
    """A duplicated row, its keys in another order, cannot stand on both sides."""
    twins = [dict(reversed(row.items())) for row in GOOD]
    train, heldout, _ = split(write(tmp_path / "a.jsonl", [*GOOD, *twins]), identity, heldout_share=0.2)
    assert not set(train) & set(heldout) and len(heldout) % 2 == 0 and heldout


def test_demonstrations_that_are_partly_wrong_are_not_held_out(split):
    """Exact match would be measured against mistakes."""
    with pytest.raises(UserError, match=r"partly wrong on purpose.*give data.heldout_sources"):
        split("tasks:train:100", identity)
    split("tasks:train:100", lambda row: row["prompt"], "preference")
    _, heldout, _ = split("tasks:train:100", identity, heldout_sources=("tasks:heldout:20",))
    assert len(heldout) == 20


def test_heldout_sources_are_used_whole(split, tmp_path):
    source = write(tmp_path / "a.jsonl", GOOD[:40])
    other = write(tmp_path / "b.jsonl", GOOD[40:])
    train, heldout, tallies = split(source, identity, heldout_sources=(other,))
    assert train == [identity(row) for row in GOOD[:40]]
    assert heldout == [identity(row) for row in GOOD[40:]]
    assert [tally.source for tally in tallies] == [source, other]


# The forms in which one prompt comes; `i` numbers it.
FORMS = {
    "instruction": lambda i: {"instruction": f"Say {i}", "output": "one"},
    "empty input": lambda i: {"instruction": f"Say {i}", "input": "", "output": "two"},
    "input": lambda i: {"instruction": "Say", "input": f"{i}", "output": "x"},
    "messages": lambda i: {
        "messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "three"}]
    },
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": "four"}]
    },
    "a key more": lambda i: {
        "messages": [
            {"role": "user", "content": f"Say {i}", "id": i},
            {"role": "assistant", "content": "five", "id": -i},
        ],
        "source": "somewhere",
    },
    "turns": lambda i: {
        "messages": [
            {"role": "user", "content": f"Say {i}"},
            {"role": "assistant", "content": "six"},
            {"role": "user", "content": f"And {i + 1}?"},
            {"role": "assistant", "content": "seven"},
        ]
    },
}


def prompts_read(tokenizer, rows):
    """Every prefix of the rows' conversations that ends where a reply begins, as the model reads it."""
    return {
        tuple(render.render_prompt(tokenizer, talk[:n]))
        for talk in map(messages_of, rows)
        for n, message in enumerate(talk)
        if message["role"] == "assistant"
    }


@pytest.mark.parametrize("explicit", [False, True])
def test_no_heldout_prompt_is_trained_on_in_whatever_form_it_comes(split, tiny_tokenizer, tmp_path, explicit):
    """Eighty prompts, each in seven forms, once as one file and once with held-out rows of one form alone."""
    rows = [form(i) for i in range(80) for name, form in FORMS.items() if not explicit or name != "messages"]
    words = {"heldout_share": 0.2}
    if explicit:
        held = [FORMS["messages"](i) for i in range(0, 80, 8)]
        words = {"heldout_sources": (write(tmp_path / "held.jsonl", held),)}
    train, heldout, tallies = split(write(tmp_path / "a.jsonl", rows), lambda row: row, **words)
    assert heldout and train
    assert not prompts_read(tiny_tokenizer, train) & prompts_read(tiny_tokenizer, heldout)
    if explicit:
        same = len(FORMS) - 2  # the form with an input reads otherwise, and "messages" is what is held out
        assert tallies[0].dropped == {"its prompt is held out": 10 * same}
        assert "50 dropped: its prompt is held out" in tallies[0].line()


def test_heldout_rows_that_repeat_all_of_training_leave_nothing(split, tmp_path):
    source = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(UserError, match=r"none of 60 rows was kept \(its prompt is held out: 60\)"):
        split(source, identity, heldout_sources=(source,))


def test_pairs_that_repeat_a_heldout_prompt_are_dropped(split, tmp_path, pair):
    talk = [{"role": "user", "content": "Sort 3"}]
    chosen, rejected = ([*talk, {"role": "assistant", "content": word}] for word in ("good", "bad"))
    held = [{"chosen": chosen, "rejected": rejected}]
    train, heldout, (tally, _) = split(
        write(tmp_path / "a.jsonl", PAIRS),
        pair,
        "preference",
        heldout_sources=(write(tmp_path / "b.jsonl", held),),
    )
    assert (len(train), len(heldout)) == (39, 1) and tally.dropped == {"its prompt is held out": 1}


def test_too_few_rows_to_hold_any_out(split, tmp_path, conversation):
    with pytest.raises(UserError, match=r"1 rows are too few .* give data.heldout_sources"):
        split(write(tmp_path / "a.jsonl", GOOD[:1]), conversation)


@pytest.mark.parametrize("kind", ["instruction", "preference", "prompt"])
def test_tasks_are_a_source(split, kind):
    train, heldout, (first, second) = split(
        "tasks:train:50", lambda row: tuple(row.values()), kind, heldout_sources=("tasks:heldout:20",)
    )
    assert (len(train), len(heldout), first.rows, second.rows) == (50, 20, 50, 20)


def test_fields_that_nobody_reads_are_named_once_and_counted(split, tmp_path, conversation):
    rows = [row | {"id": n, "note": "" if n else "x"} for n, row in enumerate(GOOD)]
    source = write(tmp_path / "rows.jsonl", rows)
    _, _, (tally,) = split(source, conversation)
    assert tally.unread == {"id": len(GOOD), "note": 1} == tally.report()["unread"]
    assert tally.line().endswith("; fields that are not read, with the number of rows: id (60), note (1)")
    with pytest.raises(UserError, match=r"rows.jsonl line 1: nothing here reads the field 'id'"):
        split(source, conversation, strict=True)


# Arrays


def test_a_conversation_just_fits_or_does_not(tiny_tokenizer):
    """T inputs hold T + 1 ids. Nothing is cut."""
    ids, _ = render.render(tiny_tokenizer, messages_of(GOOD[0]))
    (piece,) = read_conversation(tiny_tokenizer, GOOD[0], len(ids) - 1).pieces
    assert list(piece.ids) == ids
    with pytest.raises(RowError, match=f"longer than {len(ids) - 2} tokens"):
        read_conversation(tiny_tokenizer, GOOD[0], len(ids) - 2)


def test_packed_conversations_train_replies_alone(tiny_tokenizer, conversation):
    """The targets of weight 1 are the rows' outputs and their <|im_end|>."""
    batch = pack([conversation(row) for row in GOOD[:10]], 64, PAD)
    trained = sorted(int(token) for token in batch.targets_BT[batch.loss_weights_BT > 0])
    replies = [[*tiny_tokenizer.encode(row["output"]), IM_END] for row in GOOD[:10]]
    assert trained == sorted(token for reply in replies for token in reply)
    assert len(batch.tokens_BT) < 10
    starts = (batch.positions_BT == 0) & (batch.segment_ids_BT > 0)
    assert (batch.tokens_BT[starts] == BOS).all() and starts.sum() == 10


def test_pairs_are_right_padded(tiny_tokenizer, pair):
    pairs = [pair(row).ids for row in PAIRS[:3]]
    batch = pad_pairs(pairs, 64, PAD)
    assert batch.tokens_BCT.shape == (3, 2, 64) and batch.weights_B.tolist() == [1, 1, 1]
    for n, (row, ids) in enumerate(zip(PAIRS, pairs, strict=False)):
        head = render.render_prompt(tiny_tokenizer, [{"role": "user", "content": row["prompt"]}])
        for c, reply in enumerate((row["chosen"], row["rejected"])):
            assert ids[c] == head + tiny_tokenizer.encode(reply) + [IM_END]
            assert batch.lengths_BC[n, c] == len(ids[c])
            assert batch.tokens_BCT[n, c].tolist() == ids[c] + [PAD] * (64 - len(ids[c]))


def test_replies_of_a_pair_begin_where_generation_does(tiny_tokenizer):
    """Also after an earlier turn of the assistant's; the two are what the reward model reads."""
    talk = [
        {"role": "user", "content": "Sort 21"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Again"},
    ]
    rows = [PAIRS[0], {"prompt": talk, "chosen": "12", "rejected": "21 21"}]
    pairs = [reply_pair(tiny_tokenizer, row, 64) for row in rows]
    batch = pad_reply_pairs(pairs, 64, PAD)
    wanted = pad_pairs([pair.ids for pair in pairs], 64, PAD)
    jax.tree.map(np.testing.assert_array_equal, batch.pairs, wanted)
    heads = [[{"role": "user", "content": rows[0]["prompt"]}], talk]
    for n, head in enumerate(heads):
        length = len(render.render_prompt(tiny_tokenizer, head))
        assert batch.starts_BC[n].tolist() == [length, length]
    assert batch.starts_BC.dtype == np.int32


def test_prompts_are_left_padded():
    batch = pad_prompts([[7, 8, 9], [10]], 4, PAD)
    np.testing.assert_array_equal(batch.tokens_BP, [[PAD, 7, 8, 9], [PAD, PAD, PAD, 10]])
    np.testing.assert_array_equal(batch.lengths_B, [3, 1])
    assert batch.tokens_BP.dtype == batch.lengths_B.dtype == np.int32
    with pytest.raises(UserError, match="a prompt of 5 tokens does not fit the 4"):
        pad_prompts([[1] * 5], 4, PAD)


def test_questions_of_prompt_and_instruction_rows(tiny_tokenizer):
    row = next(iter(tasks.prompt_rows("train", 1, 0)))
    question = question_of(tiny_tokenizer, row, 64)
    assert question.answer == tasks.solve(row["prompt"])
    assert question.ids == render.render_prompt(tiny_tokenizer, [{"role": "user", "content": row["prompt"]}])
    same = question_of(tiny_tokenizer, {"instruction": "Sort.", "input": "21", "output": "12"}, 64)
    apart = {"instruction": "Sort.", "input": "21"}
    assert (same.messages, same.answer) == ([{"role": "user", "content": "Sort.\n21"} | apart], "12")
    assert question_of(tiny_tokenizer, {"question": "Why?"}, 64).answer is None
    with pytest.raises(RowError, match="field 'answer' is not text"):
        question_of(tiny_tokenizer, {"prompt": "1 + 1", "answer": 2}, 64)
    with pytest.raises(RowError, match="the prompt is longer than 8 tokens"):
        question_of(tiny_tokenizer, row, 8)
