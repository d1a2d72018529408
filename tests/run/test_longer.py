"""More steps for a run: where the schedule allows it, the numbers of one that had them from the first."""

import numpy as np
import pytest

from maxllm import recipe
from maxllm.config.optimizer import OptimizerConfig
from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.optim import schedule
from maxllm.run.longer import check_may_go_on_longer


def test_wsd_warms_up_stays_and_falls():
    """By hand: 4 steps up to 1, 12 at 1, 4 down to a tenth."""
    rates = schedule(
        OptimizerConfig(schedule="wsd", learning_rate=1.0, warmup_steps=4, decay_steps=4, final_share=0.1),
        20,
    )
    expected = [0, 0.25, 0.5, 0.75, *[1.0] * 12, 1.0, 0.775, 0.55, 0.325, 0.1]
    # Each is a sum of three float32 numbers near 1.
    np.testing.assert_allclose([float(rates(step)) for step in range(21)], expected, atol=3 * 2**-24)


def test_the_decay_is_a_tenth_of_the_run_where_nothing_is_said():
    assert [OptimizerConfig(schedule="wsd").decay_of(updates) for updates in (5, 10, 1000)] == [1, 1, 100]


def config_of(*words: str):
    few = ("optimizer.warmup_steps=2", "run.dir=runs/unused")
    return recipe.load_recipe("pretrain/tiny_slice_cpu", [*few, *words])


@pytest.mark.parametrize(
    "words",
    [("optimizer.schedule=constant",), ("optimizer.schedule=wsd", "optimizer.decay_steps=10")],
    ids=["constant", "wsd"],
)
def test_rates_until_now_are_those_of_the_longer_run(words):
    short, long = (config_of(f"run.steps={steps}", *words) for steps in (40, 100))
    one, other = schedule(short.optimizer, 40), schedule(long.optimizer, 100)
    assert [float(one(step)) for step in range(30)] == [float(other(step)) for step in range(30)]


def run_at(folder, step):
    """A run folder whose newest checkpoint is of a step."""
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("words", "step", "sentence"),
    [
        (("optimizer.schedule=constant",), 40, None),
        (("optimizer.schedule=wsd", "optimizer.decay_steps=10"), 30, None),
        (("optimizer.schedule=wsd", "optimizer.decay_steps=10"), 31, "falls after step 30; its newest"),
        (("optimizer.schedule=cosine",), 10, "over which its cosine schedule is stretched: with 100"),
        (("optimizer.schedule=linear",), 10, "over which its linear schedule is stretched: with 100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_schedule_allows_it_or_says_why_not(tmp_path, words, step, sentence):
    folder, former, now = run_at(tmp_path, step), *(config_of(f"run.steps={n}", *words) for n in (40, 100))
    if sentence is None:
        check_may_go_on_longer(folder, former, now)
        return
    with pytest.raises(UserError, match=sentence):
        check_may_go_on_longer(folder, former, now)


def test_no_run_becomes_shorter(tmp_path):
    former, now = (config_of(f"run.steps={n}", "optimizer.schedule=constant") for n in (40, 20))
    with pytest.raises(UserError, match="it can be made longer, not shorter"):
        check_may_go_on_longer(run_at(tmp_path, 10), former, now)


def test_a_decay_that_does_not_fit_is_refused():
    words = ("optimizer.schedule=wsd", "optimizer.decay_steps=39", "run.steps=40")
    with pytest.raises(UserError, match="are more than the run's 40 updates"):
        config_of(*words)
    with pytest.raises(UserError, match="decay_steps is of the schedule wsd, not of cosine"):
        config_of("optimizer.decay_steps=5")
