"""Pipeline parallelism: the layers are dealt to the devices of the mesh axis `stage`, microbatches pass
through them (GPipe, Huang et al. 2019), several times around the ring if asked (Megatron's interleaved
schedule, Narayanan et al. 2021).

With S stages, M microbatches and R rounds, block r * S + s of the R * S blocks of layers is the one that
stage s computes in round r. At time t, stage s works on unit t - s: units count through the microbatches of a
group of S, then through the rounds, then through the groups. What the last stage hands on therefore reaches
the first just when its next round begins, and nothing waits in between. Of M * R + S - 1 steps, S - 1 are
idle on each stage: the bubble.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxllm.parallel.sharding import MICROBATCH, STAGE

Block = Callable[[Any, jax.Array, Any, jax.Array | None], jax.Array]
"""(weights [K, …] of K layers, x [b, T, D], the microbatch's other arrays, key) -> x."""


def stages_here() -> int:
    """Stages of the mesh in force; 1 without a mesh, or inside a stage."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or STAGE in mesh.manual_axes else mesh.shape[STAGE]


def bubble(stages: int, microbatches: int, rounds: int) -> float:
    """Share of a step in which a stage has nothing to do."""
    return (stages - 1) / (microbatches * rounds + stages - 1)


def pipeline(
    block: Block,
    weights: Any,
    x_BTD: jax.Array,
    rows: Any,
    key: jax.Array | None,
    *,
    microbatches: int,
    rounds: int,
) -> jax.Array:
    """Carries x through all layers, [B, T, D] -> [B, T, D].

    Args:
      block: what one stage does in one round.
      weights: tree of [L, …], split over STAGE in the order of the layers.
      x_BTD: its rows are split over BATCH.
      rows: tree of [B, …] that every layer reads.
      key: of dropout; each block and microbatch gets one of its own.
      microbatches: M, a multiple of the stages.
      rounds: R; with more than one, the layers are sent to where they are needed first.
    """
    rules = tuple(
        (name, MICROBATCH if name == "batch" else axes) for name, axes in nn.get_logical_axis_rules()
    )

    def on_stage(weights: Any, x_BTD: jax.Array, rows: Any, key: jax.Array | None) -> jax.Array:
        with nn.logical_axis_rules(rules):
            return run_stage(block, weights, x_BTD, rows, key, microbatches, rounds)

    split = PartitionSpec(STAGE)
    return jax.shard_map(
        on_stage,
        in_specs=(split, split, split, PartitionSpec()),
        out_specs=split,
        axis_names={STAGE},
        check_vma=False,
    )(weights, x_BTD, rows, key)


def run_stage(
    block: Block, weights: Any, x_BTD: jax.Array, rows: Any, key: jax.Array | None, M: int, R: int
) -> jax.Array:
    """One stage, inside `shard_map`: its weights [L / S, …] and its share of the rows, [B / S, …]."""
    S, stage = jax.lax.axis_size(STAGE), jax.lax.axis_index(STAGE)
    if R > 1:
        weights = interleaved(jax.tree.map(lambda w: w.reshape(R, -1, *w.shape[1:]), weights), R)
    own = jax.tree.map(partial(deal, parts=M // S), (x_BTD, rows))
    x_MbTD, rows_Mb = jax.tree.map(partial(jax.lax.all_gather, axis_name=STAGE, tiled=True), own)

    def one_round(round_: jax.Array, *arguments: Any) -> jax.Array:
        return block(weights if R == 1 else jax.tree.map(lambda w: w[round_], weights), *arguments)

    # A round's weights would be kept for the backward pass at every step, were they not looked up again.
    work = one_round if R == 1 else jax.checkpoint(one_round, prevent_cse=False)

    def step(x_bTD: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Before its first unit and after its last, a stage computes on rows whose result nobody reads.
        unit = jnp.clip(time - stage, 0, M * R - 1)
        round_, microbatch = unit % (S * R) // S, unit // (S * R) * S + unit % S
        x_bTD = jnp.where((stage == 0) & (round_ == 0), x_MbTD[microbatch], x_bTD)
        y_bTD = work(
            round_,
            x_bTD,
            jax.tree.map(lambda a: a[microbatch], rows_Mb),
            None if key is None else jax.random.fold_in(key, (round_ * S + stage) * M + microbatch),
        )
        return jax.lax.ppermute(y_bTD, STAGE, [(s, (s + 1) % S) for s in range(S)]), y_bTD

    _, y_tbTD = jax.lax.scan(step, jnp.zeros_like(x_MbTD[0]), jnp.arange(M * R + S - 1))
    done = y_tbTD[S - 1 :].reshape(M // S, R, S, *y_tbTD.shape[1:])[:, -1].reshape(x_MbTD.shape)
    # Only the last stage's are results; each stage takes its rows of them.
    done = jnp.where(stage == S - 1, done, 0)
    return undeal(jax.lax.psum_scatter(done, STAGE, tiled=True))


def deal(rows: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]; rows are dealt out in turn, so that each stays on its device."""
    return rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)


def undeal(parts: jax.Array) -> jax.Array:
    """[parts, B / parts, …] -> [B, …] in the order of the rows before they were dealt."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def interleaved(weights: Any, R: int) -> Any:
    """From R consecutive blocks on each stage, [R, …], to every S-th block: number r * S + s at place r.

    Block b starts on stage b // R and belongs to stage b % S. The exchange is R permutations: in number c,
    each stage sends the one of its blocks for which (b + b // lcm(R, S)) % R = c, and these go to S different
    stages. That costs a stage's own shard of its weights once a step, and of their gradients once.
    """
    if R == 1:
        return weights
    S, stage = jax.lax.axis_size(STAGE), jax.lax.axis_index(STAGE)
    blocks = np.arange(R * S)
    turn = (blocks + blocks // math.lcm(R, S)) % R
    arrived = []
    for c in range(R):
        moving = blocks[turn == c]  # one from each stage, in the order of the stages
        pairs = [(int(b) // R, int(b) % S) for b in moving]
        slot = jnp.asarray(moving % R)[stage]
        send = partial(jax.lax.ppermute, axis_name=STAGE, perm=pairs)
        arrived.append(jax.tree.map(lambda w, i=slot, send=send: send(w[i]), weights))
    # Stage s got block r * S + s in turn[r * S + s].
    order = jnp.asarray(turn.reshape(R, S).T)[stage]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[order], *arrived)
