"""`data.template` in a run: what it lays out, the run's folder keeps, and later stages inherit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from maxllm.config.root import Config
from maxllm.data.chat import Message
from maxllm.data.render import render_prompt
from maxllm.data.tokenizer import EOS, IM_END
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.run.session import Session, open_folder, open_session, reopen

ASKED = [Message(role="user", content="Sort 21")]


@pytest.fixture
def recipe_of(tmp_path: Path, policy_at: Callable[..., Path]) -> Callable[..., Config]:
    """recipe_of(name, parent=…, template=…): a recipe of SFT in folder `name`."""
    policy_at(tmp_path / "pretrained")

    def make(name: str, parent: str = "pretrained", template: str | None = None) -> Config:
        return Config.model_validate(
            {
                "stage": "sft",
                "start": {"policy": str(tmp_path / parent)},
                "run": {"dir": str(tmp_path / name), "steps": 3},
                "batch": {"rows": 8, "sequence_length": 32},
                "generation": {"max_new_tokens": 8},
                "data": {"template": template},
            }
        )

    return make


def begun(recipe: Config) -> Session:
    """A run as it begins."""
    session = open_session(recipe)
    with open_folder(session):
        return session


def asks(session: Session) -> str:
    """The prompt that a session makes, as text."""
    return session.tokenizer.decode(render_prompt(session.tokenizer, ASKED))


def test_a_run_and_those_after_it_have_the_template(
    recipe_of: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    first = begun(recipe_of("a", template="instruction"))
    assert asks(first) == "### Instruction:\nSort 21\n\n### Response:\n"
    assert first.tokenizer.stop_tokens == (EOS, IM_END)
    said = " ".join(capsys.readouterr().err.split())
    assert "sft: conversations are laid out as by data.template=instruction, not as by" in said
    for later in (reopen(RunFolder(first.config.run.dir)), begun(recipe_of("b", "a"))):
        assert later.tokenizer == first.tokenizer
        assert later.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert "laid out" not in capsys.readouterr().err
    other = begun(recipe_of("c", "a", "llama2"))
    assert asks(other) == "[INST] Sort 21 [/INST]"
    said = " ".join(capsys.readouterr().err.split())
    assert "data.template=llama2, not as by" in said and "/a" in said


def test_a_run_goes_on_with_its_own_template_alone(recipe_of: Callable[..., Config]) -> None:
    begun(recipe_of("a", template="alpaca"))
    assert asks(open_session(recipe_of("a", template="alpaca"))).startswith("Below is an instruction")
    with pytest.raises(UserError, match=r"holds a run with data.template=alpaca, not llama2"):
        open_session(recipe_of("a", template="llama2"))


def test_chatml_is_what_our_tokenizers_speak(
    recipe_of: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    named, plain = open_session(recipe_of("a", template="chatml")), open_session(recipe_of("b"))
    assert named.tokenizer == plain.tokenizer and "laid out" not in capsys.readouterr().err
