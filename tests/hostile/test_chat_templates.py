"""A chat template comes from anywhere: it cannot reach Python, and what it raises is one row's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxllm.data import template
from maxllm.data.chat import Message
from maxllm.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
EXPRESSIONS = """
messages message.content message['role'] bos_token loop.index namespace range(3) strftime_now('%Y') 1/0
raise_exception('no') messages[99] ''.join 'a'*3 none|length {}|tojson self.x caller() messages.append(1)
messages.__class__ ''.__class__.__mro__ lipsum.__globals__ cycler.__init__ (1).__class__.__bases__
messages|attr('__class__') '%s'|format(messages) '{0.__class__}'.format(messages) {0:1}[1] [][0]
"""
STATEMENTS = """
{% endif %}/{% endfor %}/{% else %}/{% generation %}/{% endgeneration %}/{% break %}/{{ message.content }}
/{#/#}/{{/}}/{%- for message in messages -%}/{%/%}
"""
WORDS = st.sampled_from(EXPRESSIONS.split()) | st.text(max_size=8)
HEADS = st.sampled_from(["if", "set x =", "for m in", "macro", "include"])
PIECES = st.one_of(
    WORDS.map("{{{{ {} }}}}".format),
    st.builds("{{% {} {} %}}".format, HEADS, WORDS),
    st.sampled_from(STATEMENTS.replace("\n", "").split("/")),
    st.text(max_size=10),
)
TEMPLATES = st.lists(PIECES, max_size=7).map("".join)
MESSAGES = st.lists(st.fixed_dictionaries({"role": WORDS, "content": st.text(max_size=10)}), max_size=3)


@given(text=TEMPLATES, messages=MESSAGES, prompt=st.booleans())
def test_any_template(text, messages, prompt):
    before = [dict(message) for message in messages]
    try:
        filled, spans = template.fill(text, SPECIAL, messages, prompt)
    except UserError as error:
        assert str(error).strip()
    else:
        assert template.NONCE not in filled
        assert all(0 <= start <= end <= len(filled) for start, end in spans)
    assert [dict(message) for message in messages] == before, "a template changes nobody's messages"
    template.looked_for(text), template.marks_generation(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_no_way_out(text):
    """Ways out of Jinja that are known by heart: each is refused, none shows anything of Python."""
    messages = [Message(role="user", content="hello")]
    try:
        filled, _ = template.fill(text, SPECIAL, messages, False)
    except UserError as error:
        assert "chat template" in str(error)
    else:
        assert filled == "", "what the sandbox hides is nothing"
