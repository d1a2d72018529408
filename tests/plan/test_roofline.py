"""The bound of a step, by hand."""

import pytest

from maxllm.config.model import ModelConfig
from maxllm.config.optimizer import OptimizerConfig
from maxllm.config.tuning import LoraConfig, Tuning
from maxllm.plan.hardware import CHIPS
from maxllm.plan.roofline import hardware_flops_per_token, step_bound, update_bytes

LLAMA2_7B = ModelConfig(
    vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008, max_seq_len=4096
)
MATRICES = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)


def test_full_remat_computes_again_all_but_the_last_matmul():
    """407 TF of matmuls for 4 x 2048 tokens of Llama-2-7B: 8 per weight, 6 of w_down and of the head."""
    remat = LLAMA2_7B.model_copy(update={"remat": "full"})
    tokens, T = 4 * 2048, 2048
    attention = 4 * 2 * 32 * 4096 * T  # forward twice, backward two forwards' worth; causal half
    down, head = 32 * 4096 * 11_008, 4096 * 32_000
    wanted = 8 * (MATRICES - down) + 6 * (down + head)
    assert hardware_flops_per_token(remat, T) == wanted + attention
    assert wanted * tokens == pytest.approx(407e12, rel=2e-3)


def test_what_is_kept_is_not_computed_again():
    """The matmuls of q, k and gate are done three times, like the model's; in which memory, is one."""
    full = LLAMA2_7B.model_copy(update={"remat": "full"})
    some = full.model_copy(update={"keep": ("q", "gate"), "keep_in_host": ("k",)})
    spared = 2 * 32 * (2 * 4096**2 + 4096 * 11_008)
    assert hardware_flops_per_token(full, 2048) - hardware_flops_per_token(some, 2048) == spared


def test_without_remat_the_model_is_all_there_is():
    T = 2048
    assert hardware_flops_per_token(LLAMA2_7B, T) == 6 * (MATRICES + 4096 * 32_000) + 6 * 32 * 4096 * T


def test_the_highest_floor_is_the_bound():
    chip = CHIPS["v5p"]
    figures = {
        "model": LLAMA2_7B,
        "sequence_length": 2048,
        "parameter_shard": 1e9,
        "gathered_parameters": 8e9,
    }
    bound = step_bound(chip, **figures, tokens_per_device=8192, sent_bytes=35e9, passes=3)
    flops = hardware_flops_per_token(LLAMA2_7B, 2048) * 8192
    assert bound.compute == flops / 459e12
    assert bound.memory == (1e9 * 28 + 8e9 * 2 * 3) / 2.765e12
    assert bound.links == 35e9 / 5.4e11
    assert (bound.seconds, bound.by) == (bound.compute, "compute")
    beside = step_bound(chip, **figures, tokens_per_device=8192, sent_bytes=35e9, passes=3, references=1)
    assert beside.compute == pytest.approx(bound.compute * 4 / 3)  # nothing is computed again here
    assert beside.memory == (1e9 * 28 + 8e9 * 2 * 4) / 2.765e12
    few = step_bound(chip, **figures, tokens_per_device=1, sent_bytes=35e9, passes=3)
    assert few.by == "links"


def test_between_nodes_the_network_is_the_link():
    """45 GB by NVLink take 0.1 s; a ninth of them by a GPU's 50 GB/s of network takes as long."""
    figures = {
        "model": LLAMA2_7B,
        "sequence_length": 2048,
        "tokens_per_device": 1,
        "parameter_shard": 1e9,
        "gathered_parameters": 8e9,
        "sent_bytes": 45e9,
        "passes": 3,
    }
    assert step_bound(CHIPS["h100"], **figures).links == pytest.approx(0.1)
    assert step_bound(CHIPS["h100"], **figures, between_nodes_bytes=5e9).links == pytest.approx(0.1)
    assert step_bound(CHIPS["h100"], **figures, between_nodes_bytes=45e9).links == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("optimizer", "share", "wanted"),
    [
        ({}, 1.0, 4 * 7),  # gradient, parameter and two moments read; all but the gradient written
        ({"moment_dtype": "bfloat16", "beta2": 0.95}, 0.9, 4 * 3 + 2 * 4),
        ({"name": "muon"}, 1.0, 4 * 5),  # one moment
        ({"name": "muon"}, 0.75, 0.75 * 4 * 5 + 0.25 * 4 * 7),  # embedding and head have AdamW's
        ({"name": "muon", "moment_dtype": "bfloat16"}, 1.0, 4 * 3 + 2 * 2),
        ({"name": "adafactor"}, 0.9, 4 * 3),  # a row and a column of each matrix are next to nothing
    ],
)
def test_an_update_moves_the_bytes_of_its_optimizer(optimizer, share, wanted):
    assert update_bytes(OptimizerConfig(**optimizer), share) == wanted
    figures = {"model": LLAMA2_7B, "sequence_length": 2048, "tokens_per_device": 1, "sent_bytes": 0}
    bound = step_bound(
        CHIPS["v5p"], **figures, parameter_shard=1e9, gathered_parameters=0, passes=3, update_bytes=wanted
    )
    assert bound.memory == 1e9 * wanted / 2.765e12


def test_adapters_are_computed_again_as_the_model_is():
    """All but what the last matmul's adapter makes of its R numbers; the head of a reward model is D wide."""
    remat = LLAMA2_7B.model_copy(update={"remat": "full"})
    tuning, T = Tuning(LoraConfig(rank=8, targets=("wq", "w_down"))), 2048
    down, head = 32 * 4096 * 11_008, 4096 * 32_000
    low_rank, last = 32 * 8 * (4096 + 4096 + 11_008 + 4096), 32 * 8 * 4096
    attention = 4 * 2 * 32 * 4096 * T
    wanted = 6 * (MATRICES - down) + 4 * (down + head) + 8 * (low_rank - last) + 6 * last + attention
    assert hardware_flops_per_token(remat, T, tuning=tuning) == wanted
    scalar = hardware_flops_per_token(LLAMA2_7B, T, head=1)
    assert scalar == 6 * (MATRICES + 4096) + 6 * 32 * 4096 * T
