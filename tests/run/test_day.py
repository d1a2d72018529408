"""The day that a chat template tells is the run's: recorded when it began, the same when it goes on."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maxllm import recipe
from maxllm.config.data import TokenizerConfig
from maxllm.config.root import Config
from maxllm.data import bpe
from maxllm.data.chat import Message
from maxllm.data.render import render_prompt
from maxllm.data.tokenizer import CHAT_TEMPLATE
from maxllm.errors import UserError
from maxllm.folder import CONFIG, RunFolder
from maxllm.run import session
from maxllm.run.session import Session, open_folder, open_session, reopen

TEXT = ["abc abd"] * 9
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHAT_TEMPLATE


@pytest.fixture
def sft(tmp_path: Path, tiny_model: Any) -> Config:
    """A recipe that starts from a converted model's folder, which is here as far as a session looks at it."""
    parent, run = tmp_path / "parent", tmp_path / "run"
    parent.mkdir()
    pieces = TokenizerConfig(path="unused", algorithm="byte_bpe").model_copy(update={"vocab_size": 264})
    tokenizer = bpe.train(TEXT, pieces)
    dated = bpe.FastTokenizer(tokenizer.json_bytes, dict(tokenizer.config) | {"chat_template": DATED})
    for name, content in dated.files.items():
        (parent / name).write_bytes(content)
    model = tiny_model(vocab_size=dated.vocab_size).model_dump(mode="json")
    common = {"batch": {"rows": 8, "sequence_length": 32}, "generation": {"max_new_tokens": 8}}
    converted = common | {"stage": "convert", "model": model, "run": {"dir": str(parent), "steps": 1}}
    (parent / CONFIG).write_text(recipe.dump(Config.model_validate(converted)))
    tree = common | {"stage": "sft", "start": {"policy": str(parent)}, "run": {"dir": str(run), "steps": 3}}
    return Config.model_validate(tree)


def on(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    """It is that day of July 2024."""

    class Today(datetime.date):
        @classmethod
        def today(cls) -> Today:
            return cls(2024, 7, day)

    monkeypatch.setattr(session, "datetime", SimpleNamespace(date=Today))


def told(opened: Session) -> str:
    """The prompt that the session's tokenizer makes, as text."""
    ids = render_prompt(opened.tokenizer, [Message(role="user", content="x")])
    return opened.tokenizer.decode(ids)


def test_a_run_keeps_its_day(sft: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened on the 26th, opened again the next day, and read: the same prompt, hence the same data."""
    on(monkeypatch, 26)
    first = open_session(sft)
    with open_folder(first):
        pass
    assert told(first).startswith("Today is 26 Jul 2024.")
    on(monkeypatch, 27)
    again = open_session(sft)
    assert told(again) == told(first) and again.config == first.config
    assert told(reopen(RunFolder(sft.run.dir))) == told(first)
    asked = reopen(RunFolder(sft.run.dir), ["run.day=2024-07-28"], ["run.day"])
    assert told(asked).startswith("Today is 28 Jul 2024.")


def test_a_day_may_be_set_and_then_stays(sft: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 26)
    day = datetime.date(2023, 1, 2)
    set_to = sft.model_copy(update={"run": sft.run.model_copy(update={"day": day})})
    first = open_session(set_to)
    with open_folder(first):
        pass
    assert told(first).startswith("Today is 02 Jan 2023.") and told(open_session(sft)) == told(first)
    other = sft.model_copy(update={"run": sft.run.model_copy(update={"day": datetime.date(2023, 1, 3)})})
    with pytest.raises(UserError, match=r"holds a run with run.day=2023-01-02, not 2023-01-03"):
        open_session(other)
