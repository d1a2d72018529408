"""Published figures that the laws must give."""

import pytest

from maxllm.plan.scaling import (
    KAPLAN_TOKENS_PER_PARAMETER,
    classic_bytes,
    optimal_parameters,
    optimal_tokens,
    training_flops,
)


def test_gpt3_took_what_its_paper_says():
    """Brown et al. 2020, table D.1: 174,600 M parameters, 300 B tokens, 3.14e23 FLOPs."""
    assert training_flops(174.6e9, 300e9) == pytest.approx(3.14e23, rel=2e-3)


def test_chinchilla():
    """Hoffmann et al. 2022: 70 B parameters and 1.4 T tokens for 5.76e23 FLOPs; Gopher's budget."""
    assert optimal_tokens(70e9) == 1.4e12
    assert training_flops(70e9, 1.4e12) == pytest.approx(5.76e23, rel=0.03)
    assert optimal_parameters(5.76e23) == pytest.approx(70e9, rel=0.02)


@pytest.mark.parametrize("parameters", [1e6, 7e9, 405e9])
def test_the_optimum_spends_its_budget(parameters):
    assert optimal_parameters(training_flops(parameters, optimal_tokens(parameters))) == pytest.approx(
        parameters
    )


def test_the_older_law_asked_for_fewer_tokens():
    """GPT-3's 300 B tokens for 175 B parameters."""
    assert optimal_tokens(175e9, KAPLAN_TOKENS_PER_PARAMETER) == pytest.approx(300e9, rel=0.02)


def test_mixed_precision_adam_takes_16_bytes_a_parameter():
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 120 GB on one device, 1.9 GB on each of 64."""
    assert classic_bytes(7.5e9) == 120e9
    assert classic_bytes(7.5e9, shards=64) == pytest.approx(1.9e9, rel=0.02)


def test_ppo_with_four_models_of_seven_billion():
    """About 240 GB before activations: 2 x 112 trained, 2 x 14 run."""
    assert classic_bytes(7e9, 2, 2) == 252e9
    assert classic_bytes(6.74e9, 2, 2) == pytest.approx(240e9, rel=0.02)


def test_dpo_with_two_models_of_seven_billion():
    """112 GB trained, 14 run: half of PPO's."""
    assert classic_bytes(7e9, 1, 1) == 126e9 == classic_bytes(7e9, 2, 2) / 2
