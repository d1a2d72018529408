"""Conversations to token ids and loss masks, built together from the structure.

The models we train speak ChatML, put together here token by token, so that no content can forge a turn:

    <s><|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

An imported model speaks its own Jinja chat template, exactly as Hugging Face renders and encodes it; only
that what a message spells is never a control token (control.py). The mask is 1 on an assistant's content and
the token that ends its turn: what the model must learn to produce.
"""

from __future__ import annotations

from collections.abc import Sequence

from maxllm.data import control, template
from maxllm.data.bpe import FastTokenizer
from maxllm.data.chat import Message, RowError
from maxllm.data.template import Span
from maxllm.data.tokenizer import BOS, CHAT_TEMPLATE, IM_END, IM_START, Tokenizer
from maxllm.errors import UserError


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and, for each id, 1 if the model is trained to produce it.

    Raises:
      RowError: the tokenizer's template cannot render it.
    """
    if speaks_chatml(tokenizer):
        return render_chatml(tokenizer, messages)
    return render_template(with_template(tokenizer), messages)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak; raises as `render` does."""
    if speaks_chatml(tokenizer):
        ids, _ = render_chatml(tokenizer, messages)
        return [*ids, IM_START, *tokenizer.encode("assistant\n")]
    tokenizer = with_template(tokenizer)
    return encode_filled(tokenizer, filled(tokenizer, messages, True)[0])[0]


def render_to_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with the token that ends the assistant's last turn."""
    return render_reply(tokenizer, messages)[0]


def render_reply(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], int]:
    """(token ids, how many of them stand before what the model is trained to say in the last turn) of a
    conversation that ends with the token that ends that turn."""
    ids, mask = render(tokenizer, messages)
    end = len(mask) - mask[::-1].index(1)
    start = end - mask[:end][::-1].index(0)
    # A template's own span of what is generated may go on behind the token that ends the turn.
    while ids[end - 1] not in tokenizer.stop_tokens:
        end -= 1
    return ids[:end], start


# --- ChatML ------------------------------------------------------------------------------------------------


def speaks_chatml(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer lays out conversations as those we train do."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.speaks_chatml
    return tokenizer.chat_template == CHAT_TEMPLATE


def render_chatml(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """`render` for the tokenizers we train."""
    ids, mask = [BOS], [0]
    for message in messages:
        header = [IM_START, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), IM_END]
        newline = tokenizer.encode("\n")
        ids += header + body + newline
        trained = int(message["role"] == "assistant")
        mask += [0] * len(header) + [trained] * len(body) + [0] * len(newline)
    return ids, mask


# --- Jinja chat templates ----------------------------------------------------------------------------------


def with_template(tokenizer: Tokenizer) -> FastTokenizer:
    """The tokenizer, known to have a chat template.

    Raises:
      UserError: it has none.
    """
    if tokenizer.chat_template is None or not isinstance(tokenizer, FastTokenizer):
        raise UserError("this model has no chat template: it completes text, and does not read conversations")
    return tokenizer


def render_template(tokenizer: FastTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """`render` for imported tokenizers.

    Where the template marks what it generates, that is what is trained. Elsewhere an assistant's span begins
    where the prompt before it ends, and ends with the first stop token after its content; the template is
    asked for every prefix of the conversation, so the spans are its own.
    """
    text, generated = filled(tokenizer, messages, False)
    ids, offsets = encode_filled(tokenizer, text)
    mask = [0] * len(ids)
    if template.marks_generation(tokenizer.chat_template or ""):
        for first, last in generated:
            inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
            if not any(ids[i] in tokenizer.stop_tokens for i in inside):
                raise RowError("what the chat template marks as generated has no stop token in it")
            for i in inside:
                mask[i] = 1
        return ids, mask
    for first, content, last in assistant_spans(tokenizer, messages, text):
        inside = [i for i, (start, end) in enumerate(offsets) if first <= start and end <= last]
        stops = (n for n, i in enumerate(inside) if ids[i] in tokenizer.stop_tokens)
        stop = next((n for n in stops if offsets[inside[n]][0] >= content), None)
        if stop is None:
            raise RowError("the chat template ends the assistant's turn without a stop token")
        for i in inside[: stop + 1]:
            mask[i] = 1
    return ids, mask


def assistant_spans(
    tokenizer: FastTokenizer, messages: Sequence[Message], text: str
) -> list[tuple[int, int, int]]:
    """Where in a conversation's text each reply begins, where its content ends, and where its turn ends.

    Raises:
      RowError: a turn is not rendered alike with and without those after it.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            head, _ = filled(tokenizer, messages[:number], True)
            turn, _ = filled(tokenizer, messages[: number + 1], False)
            if not (turn.startswith(head) and text.startswith(turn)):
                raise RowError("the chat template renders a turn differently once the conversation goes on")
            content = quoted(tokenizer, message)["content"].strip()
            at = turn.find(content, len(head))
            # A template that rewrites the content is trusted to write no stop token into it.
            spans.append((len(head), at + len(content) if at >= 0 else len(head), len(turn)))
    return spans


def quoted(tokenizer: FastTokenizer, message: Message) -> Message:
    """A message whose content spells no control token; a reply may spell what the template looks for."""
    tokens = tokenizer.control_tokens
    if message["role"] == "assistant":
        tokens = tuple(token for token in tokens if token not in tokenizer.sayable)
    return {**message, "content": control.quote(message["content"], tokens)}


def filled(
    tokenizer: FastTokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[Span]]:
    """The template's text for some messages, in which marks tell text from control tokens, and what of it is
    generated."""
    assert tokenizer.chat_template is not None, "with_template looked"
    plain = [quoted(tokenizer, message) for message in messages]
    return template.fill(
        tokenizer.chat_template, tokenizer.named, plain, add_generation_prompt, tokenizer.day
    )


def encode_filled(tokenizer: FastTokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Ids and character spans of a filled template, its control tokens included."""
    if control.QUOTE not in text:
        encoding = tokenizer.reader.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    spelled, stood = control.private(text, tokenizer.control_tokens)
    encoding = tokenizer.renamed.encode(spelled, add_special_tokens=False)
    return encoding.ids, [(stood[start], stood[end]) for start, end in encoding.offsets]
