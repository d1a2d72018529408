"""The chat templates that `data.template` knows by name, and those that stand in a file.

Each marks by `{% generation %}` what the assistant is trained to say, the token that ends its turn included.
What stands between control tokens follows the sources; where one calls for BOS or EOS, these are the
tokenizer's own, and a tokenizer without BOS writes none.
"""

from __future__ import annotations

from collections.abc import Mapping

from maxllm.config.data import TEMPLATES
from maxllm.data.tokenizer import CHATML_LEAD, CHATML_PROMPT, CHATML_SAID
from maxllm.errors import UserError
from maxllm.storage import path_of


def marked(said: str) -> str:
    """What a turn of any role says, marked where the assistant says it."""
    return (
        "{% if message['role'] == 'assistant' %}{% generation %}" + said + "{% endgeneration %}"
        "{% else %}" + said + "{% endif %}"
    )


def instructions(lead: str, asked: str) -> str:
    """A template of sections under headings; a system's turn stands in place of `lead`."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' and loop.first %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{% if loop.first %}" + lead + "{% endif %}"
        "{{ '### Instruction:\n' }}" + asked + "{{ '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' }}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
        "{% else %}{{ raise_exception('a turn of ' + message['role'] + ' has no place here') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    )


BOS = "{{ bos_token }}"
"""Before templates in which a conversation begins as the tokenizer begins a document."""

CHATML = (
    CHATML_LEAD
    + marked(CHATML_SAID + "{{ '<|im_end|>' }}")
    + "{{ '\n' }}{% endif %}{% endfor %}"
    + CHATML_PROMPT
)
"""OpenAI's ChatML (github.com/openai/openai-python, chatml.md of v0.28), with functions as Hermes and Qwen
have them:

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n
"""

HAPPY_LLM = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + marked("{{ message['content'] }}{{ '<|im_end|>' }}")
    + "{{ '\n' }}{% endfor %}"
    + CHATML_PROMPT
)
"""The template that chapter 5 of the tutorial happy-llm writes (train_tokenizer.py): ChatML as Qwen has it,
without BOS before it, and without functions."""

LLAMA2 = (
    "{% set leads = messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if leads else messages) %}"
    "{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('user and assistant do not take turns') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if leads else '' %}"
    "{{ '[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] | trim + ' ' }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
"""Llama 2 Chat (Touvron et al. 2023, arXiv:2307.09288; github.com/meta-llama/llama, `chat_completion`), where
BOS begins each question and EOS ends each answer:

    <s>[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{question} [/INST] {answer} </s>
"""

LLAMA3 = (
    BOS + "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + marked("{{ message['content'] | trim }}{{ '<|eot_id|>' }}")
    + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3 Instruct (Grattafiori et al. 2024, arXiv:2407.21783; github.com/meta-llama/llama3, `ChatFormat`):

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n{content}<|eot_id|>
"""

ALPACA = instructions(
    "{{ 'Below is an instruction that describes a task' }}"
    "{% if message['input'] %}{{ ', paired with an input that provides further context' }}{% endif %}"
    "{{ '. Write a response that appropriately completes the request.\n\n' }}",
    "{% if message['input'] %}{{ message['instruction'] + '\n\n### Input:\n' + message['input'] }}"
    "{% else %}{{ message['content'] }}{% endif %}",
)
"""Stanford Alpaca's two prompts, with and without input (Taori et al. 2023, `PROMPT_DICT` of
github.com/tatsu-lab/stanford_alpaca), and the line break before the reply that the field `text` of its data
has. Later turns go on after an empty line, as in LLaMA-Factory."""

INSTRUCTION = instructions("", "{{ message['content'] }}")
"""The sections of Alpaca's prompt alone, which chapter 4 of happy-llm shows as LLaMA's format:

    ### Instruction:\\n{instruction and input}\\n\\n### Response:\\n{reply}
"""

TEXTS: Mapping[str, str] = dict(
    zip(TEMPLATES, (CHATML, LLAMA2, LLAMA3, ALPACA, INSTRUCTION, HAPPY_LLM), strict=True)
)

AS_DOCUMENTS = ("chatml", "alpaca", "instruction")
"""Templates that begin with BOS where the tokenizer's documents do; the others say it themselves."""


def text_of(template: str, adds_bos: bool) -> str:
    """The Jinja text of `data.template`: a name, or a file.

    Args:
      template: one of TEMPLATES, or where the file is.
      adds_bos: whether the tokenizer's documents begin with BOS.

    Raises:
      UserError: there is no such file, or it is no text.
    """
    if template in TEXTS:
        return (BOS if adds_bos and template in AS_DOCUMENTS else "") + TEXTS[template]
    try:
        return path_of(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"data.template={template} cannot be read: {error}") from None
