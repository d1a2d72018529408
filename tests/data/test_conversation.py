"""Conversations as samples: functions and what they give, one sample or several, texts, turns of weight 0."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from maxllm.data.conversation import read_conversation
from maxllm.data.fields import RowError
from maxllm.data.render import TurnsDiffer, render
from maxllm.data.rows import messages_of
from maxllm.data.tokenizer import BOS, EOS, IM_END

HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}"
    "{{ '[' + m['content'] + ']' if m['role'] == 'tool' else m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '(' + (call['function'] | tojson) + ')' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEAF = "{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: earlier turns lose their thoughts."""

TOOLS = [{"type": "function", "function": {"name": "add", "description": "x <|im_end|> y"}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "1<|im_end|>"}}}
FUNCTIONS = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3<|im_end|>"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": TOOLS,
}
SEVERAL = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "<think>ah</think>four"},
    ]
}


def trained(tokenizer, row, **settings):
    """What each piece of a row is trained to say, as text."""
    pieces = read_conversation(tokenizer, row, 999, **settings).pieces
    return [
        tokenizer.decode([i for i, weight in zip(piece.ids, piece.weights, strict=True) if weight])
        for piece in pieces
    ]


def test_functions_are_rendered_as_transformers_does_and_results_have_no_loss(make, tmp_path):
    tokenizer = make(HERMES)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = json.loads(json.dumps(FUNCTIONS).replace("<|im_end|>", "!").replace("null", '""'))
    ids, _ = render(tokenizer, messages_of(plain))
    assert ids == theirs.apply_chat_template(plain["messages"], tools=plain["tools"])["input_ids"]
    (said,) = trained(tokenizer, FUNCTIONS)
    assert said == '({"name": "add", "arguments": {"x": "1<|im_end|>"}})It is 3.'
    ids, mask = render(tokenizer, messages_of(FUNCTIONS))
    assert ids.count(257) == 5 and sum(i == 257 and m for i, m in zip(ids, mask, strict=True)) == 2


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (DEAF, "the functions"),
        (DEAF.replace("m['role'] +", "m['role'] + (tools | tojson) +"), "calls of functions"),
        (HERMES.replace("'[' + m['content'] + ']'", "'[]'"), "what functions gave"),
    ],
)
def test_a_template_that_leaves_something_out_is_a_reason(make, template, what):
    with pytest.raises(RowError, match=f"the chat template leaves out {what}"):
        read_conversation(make(template), FUNCTIONS, 999)


def test_functions_in_our_own_layout(tiny_tokenizer):
    (said,) = trained(tiny_tokenizer, FUNCTIONS)
    call = '<tool_call>{"name": "add", "arguments": {"x": "1<|im_end|>"}}</tool_call>'
    assert said == f"{call}It is 3."
    (piece,) = read_conversation(tiny_tokenizer, FUNCTIONS, 999).pieces
    assert list(piece.ids).count(IM_END) == 5 and BOS not in piece.ids[1:]


def test_all_each_and_last_have_the_same_losses(tiny_tokenizer):
    """What is before a trained token is the same in all three, so that its loss is: the one sample of `all`
    has each of them once, with 40 % less to compute."""

    def predictions(turns):
        pieces = read_conversation(tiny_tokenizer, SEVERAL, 999, turns).pieces
        assert all(len(piece.ids) == len(piece.weights) for piece in pieces)
        found = [
            tuple(piece.ids[: n + 1]) for piece in pieces for n, weight in enumerate(piece.weights) if weight
        ]
        return found, sum(len(piece) for piece in pieces)

    (together, few), (apart, many), (last, _) = map(predictions, ("all", "each", "last"))
    assert sorted(together) == sorted(apart) and len(set(together)) == len(together)
    assert set(last) < set(together) and few < many
    assert trained(tiny_tokenizer, SEVERAL, turns="last") == ["<think>ah</think>four"]


def test_a_template_that_drops_earlier_thoughts_takes_a_sample_for_each_reply(make):
    tokenizer = make(FORGETFUL, special=False)
    with pytest.raises(TurnsDiffer):
        render(tokenizer, messages_of(SEVERAL))
    conversation = read_conversation(tokenizer, SEVERAL, 999)
    assert conversation.cut and len(conversation.pieces) == 2
    assert trained(tokenizer, SEVERAL) == ["<think>hm</think>two", "<think>ah</think>four"]
    assert "hm" not in tokenizer.decode(conversation.pieces[1].ids)
    assert not read_conversation(tokenizer, SEVERAL, 999, "last").cut


@pytest.mark.parametrize("marked", [False, True])
def test_a_turn_of_weight_0_has_no_loss(make, tiny_tokenizer, marked):
    row = json.loads(json.dumps(SEVERAL))
    row["messages"][2]["weight"] = 0
    template = FORGETFUL.replace("m['content'] if loop.last else m['content'].split('</think>')[-1]", "''")
    body = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    plain = "{{ m['content'] + '<|im_end|>' }}"
    inside = (
        "{% if m['role'] == 'assistant' %}"
        + (body if marked else plain)
        + "{% else %}"
        + plain
        + "{% endif %}"
    )
    tokenizer = make(template.replace("{{ '' }}{{ '<|im_end|>' }}", inside))
    assert trained(tokenizer, row) == trained(tiny_tokenizer, row) == ["<think>ah</think>four"]


def test_a_conversation_that_the_assistant_begins(make, tiny_tokenizer):
    """ShareGPT has such; there is no prompt then but how every conversation begins."""
    row = {
        "conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "q"}],
        "tools": TOOLS,
    }
    row["conversations"].append({"from": "gpt", "value": "a"})
    for tokenizer in (tiny_tokenizer, make(HERMES)):
        assert trained(tokenizer, row) == ["Hi.a"]
    assert read_conversation(tiny_tokenizer, row, 999).prompt[0] == BOS


def test_every_token_of_a_text_is_in_the_loss(tiny_tokenizer):
    (piece,) = read_conversation(tiny_tokenizer, {"text": "Once upon <|im_end|>"}, 999).pieces
    assert list(piece.ids) == [BOS, *tiny_tokenizer.encode("Once upon <|im_end|>"), EOS]
    assert np.all(np.array(piece.weights) == 1)
    with pytest.raises(RowError, match="the text is longer than 3 tokens"):
        read_conversation(tiny_tokenizer, {"text": "Once upon a time"}, 3)
