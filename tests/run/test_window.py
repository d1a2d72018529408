"""Speed and MFU between two log lines."""

from types import SimpleNamespace

import pytest

from maxllm.run import window as module
from maxllm.run.observers import Terminal

STEPS, TOKENS, FLOPS = 5, 1000, 10e12


@pytest.fixture
def window(monkeypatch):
    """Builds a window of STEPS steps that took two seconds and one of pause, on 4 devices of a kind."""

    def build(kind):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
        monkeypatch.setattr(module.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)] * 4)
        monkeypatch.setattr(module.jax, "device_count", lambda: 4)
        window = module.Window(SimpleNamespace(tokens_per_step=TOKENS, flops_per_step=FLOPS))
        for _ in range(STEPS):
            window.add({"loss": (6.0, 2.0), "skipped": (0.0, 1.0)})
        window.paused(1.0)
        clock.now = 3.0
        return window

    return build


def line_of(record):
    """What the terminal shows of a record of a run of 30 steps."""
    terminal = Terminal("pretrain", 30, 0)
    terminal.close()
    return terminal.line(record)


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices(window):
    speed = window("TPU v5").speed()
    assert speed["steps_per_second"] == pytest.approx(2.5)
    assert speed["tokens_per_second"] == pytest.approx(2500)
    assert speed["mfu"] == pytest.approx(2.5 * 10e12 / (4 * 459e12))


def test_the_line_says_mfu_where_the_peak_is_known(window):
    busy = window("TPU v5")
    record = {"step": 5} | busy.means() | busy.speed()
    assert line_of(record) == "step 5/30: loss 3, 2,500 tokens/s, MFU 1.4%, 0:10 to go"


def test_no_mfu_where_the_peak_is_unknown(window):
    other = window("cpu")
    assert "mfu" not in other.speed()
    assert "MFU" not in line_of({"step": 5} | other.means() | other.speed())
