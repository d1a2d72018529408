"""Each process builds the rows that its own devices hold, and no others."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from maxllm.config.mesh import MeshConfig
from maxllm.data.loader import ALL, ArrayBatches
from maxllm.parallel import discovery, processes, sharding
from maxllm.parallel.mesh import AXES, make_mesh

SHAPES = [
    (8, 1, 1, 1, 1),
    (2, 4, 1, 1, 1),
    (1, 2, 4, 1, 1),
    (1, 2, 1, 4, 1),
    (2, 1, 1, 1, 4),
    (1, 1, 2, 2, 2),
]
"""Sizes of the mesh (data, fsdp, stage, context, tensor)."""


class Asked(ArrayBatches):
    """Batches of 16 rows, with a note of what they were asked for."""

    def __init__(self):
        rows = {"ids": np.arange(40 * 3, dtype=np.int32).reshape(40, 3), "n": np.arange(40, dtype=np.float32)}
        super().__init__(rows, 16, 0)
        object.__setattr__(self, "asked", [])

    def at(self, step, rows=ALL):
        self.asked.append((rows.start, rows.stop))
        return super().at(step, rows)


def placed(shape, step=3):
    """(global arrays, what was asked for, the whole batch as every process built it before)."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))))
    batches, whole = Asked(), Asked().at(step)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), whole)
    rows = sharding.batch_sharding(mesh)
    return processes.own_rows(lambda part: batches.at(step, part), abstract, rows), batches.asked, whole


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_global_arrays_are_those_of_the_whole_batch(shape):
    """Same values, types and shardings; each part of the rows is built once, however many devices hold it."""
    arrays, asked, whole = placed(shape)
    former = processes.to_global(whole, arrays["ids"].sharding)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, former[name])
        assert array.dtype == whole[name].dtype and array.sharding == former[name].sharding
    split = shape[0] * shape[1] * shape[2]
    assert sorted(asked) == [(first, first + 16 // split) for first in range(0, 16, 16 // split)]


def report():
    """One of two processes: what it asked for, and which rows its devices hold, for every mesh."""
    processes.initialize()
    for shape in SHAPES:
        arrays, asked, whole = placed(shape)
        held = set()
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[name][shard.index])
                held.add(shard.index[0].indices(16)[:2])
        print(json.dumps({"asked": sorted(asked), "held": sorted(held)}), flush=True)


def test_two_processes_build_their_own_rows_alone():
    """Four devices each: of a batch that is split over all eight each process builds one half."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    few = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    few |= {discovery.COORDINATOR: address, discovery.COUNT: "2"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | few | {discovery.INDEX: str(number)},
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    reports = [[json.loads(line) for line in text.splitlines()] for text in said]
    for one in (*reports[0], *reports[1]):
        assert one["asked"] == one["held"]
    first, second = ([sum(b - a for a, b in one["asked"]) for one in each] for each in reports)
    assert first == second == [8, 8, 8, 8, 8, 8]


if __name__ == "__main__":
    report()
