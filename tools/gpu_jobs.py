"""The measurements of bench_gpu.py, `python tools/gpu_jobs.py JOB`, which prints what it measured.

Each is a process of its own: the one framework is not loaded where the other is measured, and a peak of
memory is that of one measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from maxllm.config.model import ModelConfig


@dataclass(frozen=True)
class Job:
    """One measurement, made in a process of its own."""

    framework: str
    """ours or torch."""
    work: str
    """train or decode."""
    remat: str
    """Of training; none in decoding."""
    platform: str
    """Of JAX's devices, and the name of torch's: cuda, or cpu for a toy."""
    shapes: dict[str, Any]
    """Of the model: fields of its configuration."""
    rows: int
    length: int
    """Tokens of a row of the batch; of a prompt in decoding."""
    tokens: int
    """Decoded after each prompt."""
    steps: int
    """That are timed."""

    @property
    def model(self) -> ModelConfig:
        """The whole configuration."""
        return ModelConfig.model_validate(self.shapes | {"remat": self.remat}).computed_in("bfloat16")


Measured = dict[str, float]
"""seconds (of a step, or of a token of all rows), peak_bytes (0 where it is not told), first_seconds (of what
compiles)."""


def median_seconds(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """The median time of a step, of three and more, after two that are not counted; and the first's."""
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:]), times[0]


def seconds_per_token(decode: Callable[[int], object], job: Job) -> tuple[float, float]:
    """Seconds between two tokens, from a long and a short generation, so that the prompt's pass is taken out;
    and those of the first generation, which compiles."""
    short, took = job.tokens // 4, {}
    for length in (short, job.tokens):
        took[length], first = median_seconds(partial(decode, length), job.steps)
    return (took[job.tokens] - took[short]) / (job.tokens - short), first


# --- ours --------------------------------------------------------------------------------------------------


def ours(job: Job) -> Measured:
    """Ours, in this process."""
    import jax

    seconds, first = (our_training if job.work == "train" else our_decoding)(job)
    memory = jax.devices()[0].memory_stats() or {}
    return {"seconds": seconds, "first_seconds": first, "peak_bytes": memory.get("peak_bytes_in_use", 0)}


def training_program(job: Job, devices: Any, offload: Any = "none") -> tuple[Any, Any]:
    """The mesh of one device, and the program that `pretrain` would compile for it."""
    from maxllm.config.data import BatchConfig
    from maxllm.config.mesh import MeshConfig
    from maxllm.config.optimizer import OptimizerConfig
    from maxllm.config.root import Config
    from maxllm.config.run import RunConfig
    from maxllm.parallel.mesh import make_mesh
    from maxllm.stages.program import language_program

    config = Config.model_construct(
        stage="pretrain",
        run=RunConfig(dir="unused", steps=1000),
        batch=BatchConfig(rows=job.rows, sequence_length=job.length),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        mesh=MeshConfig(offload=offload),
        lora=None,
    )
    mesh = make_mesh(config.mesh, devices)
    return mesh, language_program(config, job.model, mesh)


def our_training(job: Job) -> tuple[float, float]:
    """Seconds of a step, compiled as `pretrain` does it, and of compiling it."""
    import jax
    import numpy as np

    from maxllm.parallel import processes, sharding
    from maxllm.records import LmBatch
    from maxllm.run.program import compile_program
    from maxllm.steps.state import create

    mesh, program = training_program(job, jax.devices()[:1])
    step, compiling = compile_program(mesh, program)
    tokens, ones = ids(job, 1), np.ones((job.rows, job.length), np.int32)
    positions = np.arange(job.length, dtype=np.int32) * ones
    batch = LmBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
    placed = processes.to_global(batch, sharding.batch_sharding(mesh))
    state = create(program.init, program.abstract_state, jax.random.key(0))

    def advance() -> None:
        nonlocal state
        state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))

    return median_seconds(advance, job.steps)[0], compiling


def decoding_program(job: Job, tokens: int, platform: str) -> Any:
    """Decoding so many tokens after the job's prompts, jitted; of the model's weights."""
    import jax
    import numpy as np

    from maxllm.config.generation import GenerationConfig
    from maxllm.generate.decode import decoder_of, generate
    from maxllm.model.llama import Llama
    from maxllm.records import PromptBatch

    model = decoder_of(Llama(job.model), platform)
    prompts = PromptBatch(ids(job), np.full(job.rows, job.length, np.int32))
    config, never = GenerationConfig(max_new_tokens=tokens), (-1,)  # a stop token that no model says
    return jax.jit(lambda weights: generate(model, weights, prompts, jax.random.key(0), config, never, 0))


def our_decoding(job: Job) -> tuple[float, float]:
    """Seconds of a token, and of the first generation, compiling included."""
    import jax

    from maxllm.model.llama import Llama
    from maxllm.weights import Weights

    compiled = cache(lambda tokens: decoding_program(job, tokens, jax.default_backend()))
    weights = Weights(random_bfloat16(Llama(job.model)))
    return seconds_per_token(lambda tokens: jax.block_until_ready(compiled(tokens)(weights)), job)


def random_bfloat16(model: Any) -> Any:
    """Parameters as they lie when a model only decodes. The largest are made first, so that what making them
    takes is in no peak."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from maxllm.steps.state import init_params

    shapes, structure = jax.tree.flatten(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    made: dict[int, Any] = {}
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].size):
        made[i] = jax.block_until_ready(make(jax.random.key(i), shapes[i].shape))
    return nn.unbox(jax.tree.unflatten(structure, [made[i] for i in range(len(shapes))]))


def ids(job: Job, more: int = 0) -> Any:
    """Random tokens [rows, length + more], int32 of numpy."""
    import numpy as np

    shape = (job.rows, job.length + more)
    return np.random.default_rng(0).integers(10, job.model.vocab_size, shape).astype(np.int32)


# --- transformers and torch --------------------------------------------------------------------------------


def torchs(job: Job) -> Measured:
    """Hugging Face's, in this process."""
    import torch

    seconds, first = (torch_training if job.work == "train" else torch_decoding)(job)
    peak = 0 if job.platform == "cpu" else torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "first_seconds": first, "peak_bytes": peak}


def torch_model(job: Job) -> Any:
    """`LlamaForCausalLM` of the same shapes, random float32 weights, SDPA."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    c = job.model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(job.platform):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def waited(job: Job) -> None:
    """Returns when the card has done all that it was told."""
    import torch

    if job.platform != "cpu":
        torch.cuda.synchronize()


def torch_training(job: Job) -> tuple[float, float]:
    """Seconds of a step, and of the first, which compiles."""
    import torch

    model = torch_model(job).train()
    model.config.use_cache = False
    if job.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    # Compiling on the CPU needs a compiler of C++, and says nothing of a card.
    forward = model if job.platform == "cpu" else torch.compile(model)
    tokens = torch.from_numpy(ids(job)).long().to(job.platform)

    def advance() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(job.platform, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        waited(job)

    return median_seconds(advance, job.steps)


def torch_decoding(job: Job) -> tuple[float, float]:
    """Seconds of a token, and of the first generation, compiling included."""
    import torch

    model = torch_model(job).to(torch.bfloat16).eval()
    if job.platform != "cpu":
        torch.cuda.reset_peak_memory_stats()  # its float32 weights are no part of decoding
    tokens = torch.from_numpy(ids(job)).long().to(job.platform)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if job.platform != "cpu":
        settings["cache_implementation"] = "static"  # on a GPU `generate` compiles the step then

    def decode(length: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, **settings
            )
        assert out.shape[1] == job.length + length
        waited(job)

    return seconds_per_token(decode, job)


# --- the command -------------------------------------------------------------------------------------------


def device(platform: str) -> dict[str, str]:
    """What the device is called.

    Raises:
      RuntimeError: there is none.
    """
    import jax

    return {"kind": jax.devices(platform)[0].device_kind}


def main(words: str) -> int:
    """Makes one measurement, a Job in JSON, or asks for the device of a platform; exit code 2 without one."""
    asked = json.loads(words)
    if isinstance(asked, str):
        try:
            print(json.dumps(device(asked)))
        except RuntimeError:
            return 2
        return 0
    job = Job(**asked)
    print(json.dumps((ours if job.framework == "ours" else torchs)(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
