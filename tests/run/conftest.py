"""A training job so small that a run takes a second: a state of one array, which counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllm import recipe
from maxllm.config.mesh import MeshConfig
from maxllm.data.loader import ArrayBatches
from maxllm.folder import RunFolder
from maxllm.parallel.mesh import make_mesh
from maxllm.run import loop
from maxllm.run.heldout import Measured
from maxllm.run.program import Program, step_alone
from maxllm.run.session import Session
from maxllm.steps.state import TrainState

STEPS = 12


def step(state, batch):
    """Counts."""
    loss = jnp.sum(batch.astype(jnp.float32))
    metrics = {"loss": (loss, jnp.float32(1)), "skipped": (jnp.float32(0), jnp.float32(1))}
    return state.replace(step=state.step + 1, params=jax.tree.map(lambda w: w + 1, state.params)), metrics


@pytest.fixture
def build(tmp_path, tiny_tokenizer):
    """build(figures, *words): a session, and a job whose evaluation of step n gives or raises figures[n]."""

    def make(figures, *words, rows=None, answers=("yes",)):
        few = (
            f"run.dir={tmp_path / 'run'}",
            f"run.steps={STEPS}",
            "optimizer.warmup_steps=0",
            "batch.rows=8",
        )
        config = recipe.load_recipe("pretrain/tiny_slice_cpu", [*few, *words])
        mesh = make_mesh(MeshConfig())
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def fresh():
            state = TrainState(jnp.int32(0), {"w": jnp.zeros(8)}, {"m": jnp.zeros(())})
            return jax.device_put(state, everywhere)

        def evaluate(params):
            figure = figures.get(int(params["w"][0]), 9.0)
            if isinstance(figure, BaseException):
                raise figure
            return Measured({"loss": figure})

        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(fresh)
        )
        rows = np.arange(64, dtype=np.int32) if rows is None else rows
        batch = jax.ShapeDtypeStruct((8, *rows.shape[1:]), rows.dtype)
        session = Session(config, config.model, mesh, tiny_tokenizer, RunFolder(tmp_path / "run"))
        job = loop.Job(
            session=session,
            program=Program(
                init=fresh,
                abstract_state=abstract,
                abstract_batch=batch,
                **step_alone(step, abstract, batch),
                tokens_per_step=8,
                flops_per_step=1.0,
            ),
            fresh=fresh,
            batches=ArrayBatches(rows, 8, 0),
            heldout=list(answers),
            evaluate=evaluate,
            best=("loss", "min"),
        )
        return session, job

    return make
