"""FLOPs against hand counts of LLaMA-2 7B."""

from functools import partial

import jax

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import LoraConfig, Tuning
from maxllm.model.llama import Llama
from maxllm.plan.flops import adapter_parameters, matmul_parameters, train_flops_per_token
from maxllm.steps.state import init_params

LLAMA2_7B = ModelConfig(
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11008, max_seq_len=4096
)


def test_matmul_parameters_of_llama2_7b() -> None:
    # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008, and the output projection 4096 * 32000
    assert matmul_parameters(LLAMA2_7B, 32_000) == 6_607_077_376


def test_training_costs_six_per_parameter_and_causal_attention() -> None:
    # attention: 12 L D T per token for full attention (PaLM, appendix B), half of it under the causal mask
    assert train_flops_per_token(LLAMA2_7B, 4096) == 6 * 6_607_077_376 + 6 * 32 * 4096 * 4096


def test_grouped_queries_save_projections() -> None:
    grouped = LLAMA2_7B.model_copy(update={"n_kv_heads": 8})
    saved = 32 * 2 * 4096 * (4096 - 1024)
    assert matmul_parameters(LLAMA2_7B, 32_000) - matmul_parameters(grouped, 32_000) == saved


def test_a_frozen_reference_costs_its_forward_pass() -> None:
    # 2 of the 6 FLOPs per parameter, and 2 of the 6 L D T of causal attention
    trained = train_flops_per_token(LLAMA2_7B, 4096)
    both = train_flops_per_token(LLAMA2_7B, 4096, references=1)
    assert both - trained == 2 * 6_607_077_376 + 2 * 32 * 4096 * 4096


def test_adapters_cost_a_forward_pass_and_the_gradients_of_activations() -> None:
    # The model: 2 forward, 2 for the gradients of activations, none for its own. Adapters of rank 8 beside wq
    # and w_down: 6 for each of their 8 * (4096 + 4096) and 8 * (11008 + 4096) parameters in 32 layers.
    lora = LoraConfig(rank=8, targets=("wq", "w_down"))
    low_rank = 32 * 8 * (4096 + 4096 + 11008 + 4096)
    attention = 6 * 32 * 4096 * 4096
    assert (
        train_flops_per_token(LLAMA2_7B, 4096, tuning=Tuning(lora))
        == 4 * 6_607_077_376 + 6 * low_rank + attention
    )


def test_all_adapters_are_counted_with_their_own_widths(tiny_model) -> None:
    """As many parameters as a model declares."""
    model, lora = tiny_model(n_heads=4, n_kv_heads=2, head_dim=16), LoraConfig(rank=2)
    shapes = jax.eval_shape(partial(init_params, Llama(model, Tuning(lora))), jax.random.key(0))
    assert adapter_parameters(model, Tuning(lora)) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
