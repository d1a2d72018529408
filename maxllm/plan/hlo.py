"""What a compiled program sends: its collectives, read from XLA's text, each as often as its loops run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SIZES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
"""Bytes of an element."""

BETWEEN_SLICES = "between slices"
"""What TPU's compiler makes of the part of an exchange that leaves the slice: messages of its Megascale
runtime, from host to host."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", BETWEEN_SLICES)

CONTEXT_BYTES = 8
"""No array that is exchanged is as small as the marks that an exchange under way carries."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)")
_ARRAY = re.compile(rf"({'|'.join(SIZES)})\[([\d,]*)\]")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    result: str
    """Type, dimensions and layout, such as `bf16[4,2048]{1,0}`; of a tuple several."""
    kind: str
    operands: list[str]
    """Names of the instructions whose results it reads."""


@dataclass(frozen=True)
class Collective:
    """One kind of exchange, over a whole step."""

    bytes: int
    """Bytes that each device sends, at least: (n - 1) / n of a gathered array among n devices, and so on."""
    count: int
    """How often a step runs it."""
    between_nodes: int = 0
    """Bytes that leave the node, at least: its devices share out what goes to other nodes."""


def collectives(text: str, node: int | None = None) -> dict[str, Collective]:
    """Kind -> what each device sends in a run of the program.

    Args:
      text: of a compiled module (`compiled.as_text()`).
      node: devices of a node, numbered in a row; None where all are of one.
    """
    computations, entry = parse(text)
    totals: dict[str, list[int]] = {}
    seen: set[tuple[str, ...]] = set()
    for line, times, fused in walk(computations, entry, 1):
        if found := exchange(line, computations):
            if fused and (name := identity(line)):
                if name in seen:
                    continue
                seen.add(name)
            kind, size, devices = found
            total = totals.setdefault(kind, [0, 0, 0])
            total[0] += size * times
            total[1] += times
            total[2] += int(size * share_outside(kind, devices, node)) * times
    return {kind: Collective(*totals[kind]) for kind in KINDS if kind in totals}


def instruction(line: str) -> Instruction | None:
    """What a line says; None if it is no instruction."""
    if match := _INSTRUCTION.match(line):
        return Instruction(match[1], match[2], match[3], re.findall(r"%([\w.\-]+)", match[4]))
    return None


def identity(line: str) -> tuple[str, ...] | None:
    """What the pieces of one exchange have in common: TPU's compiler spreads it over the fusions that it
    overlaps with. A channel alone does not tell; all of `shard_map`'s have number 1."""
    found, channel = instruction(line), re.search(r"channel_id=\d+", line)
    if found is None or channel is None:
        return None
    source = re.search(r'op_name="[^"]*"', line)
    arrays = (f"{kind}[{dims}]" for kind, dims in _ARRAY.findall(found.result))  # layouts differ
    return channel[0], *arrays, source[0] if source else ""


def parse(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def walk(
    computations: dict[str, list[str]], name: str, times: int, fused: bool = False
) -> Iterator[tuple[str, int, bool]]:
    """Every instruction that a computation leads to, how often it runs, and whether inside a fusion."""
    for line in computations[name]:
        found = instruction(line)
        if found is None:
            continue
        if found.kind == "while":
            body = re.search(r"body=%?([\w.\-]+)", line)
            assert body is not None, "a loop has a body"
            yield from walk(computations, body[1], times * trip_count(computations, line), fused)
        elif found.kind in ("fusion", "call", "call-start", "conditional", "async-start"):
            if reduce_scatter_of(line, computations):
                yield line, times, fused
                continue
            for called in _CALLED.findall(line):
                yield from walk(computations, called, times, fused or found.kind == "fusion")
        else:
            yield line, times, fused


def trip_count(computations: dict[str, list[str]], line: str) -> int:
    """How often a loop's body runs: as the compiler says, or the constant that its counter is compared to."""
    if known := re.search(r"known_trip_count[^0-9]*(\d+)", line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition is not None, "a loop has a condition"
    constants = [
        int(value)
        for inner in computations[condition[1]]
        for value in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", inner)
    ]
    return max(constants, default=1)


def reduce_scatter_of(line: str, computations: dict[str, list[str]]) -> str | None:
    """The all-reduce inside a fusion that keeps only a part of it: a TPU's reduce-scatter."""
    called = _CALLED.search(line)
    if called is None or "all-reduce-scatter" not in called[1]:
        return None
    inner = computations.get(called[1], [])
    return next((text for text in inner if " all-reduce(" in text), None)


def exchange(line: str, computations: dict[str, list[str]]) -> tuple[str, int, list[int]] | None:
    """(kind, bytes that a device sends, devices of a group) of an instruction; None if it sends nothing."""
    if inner := reduce_scatter_of(line, computations):
        devices = group(inner)
        return "reduce-scatter", sent("reduce-scatter", line_bytes(inner), len(devices)), devices
    found = instruction(line)
    assert found is not None, "walk gives instructions"
    if found.kind == "send" and "xla_megascale_runtime" in line:
        return BETWEEN_SLICES, array_bytes(*_ARRAY.findall(found.result)[0]), []
    kind, started = found.kind.removesuffix("-start"), found.kind.endswith("-start")
    if kind not in KINDS:
        return None
    devices = group(line)
    size = line_bytes(line, started and kind != "all-reduce")
    if kind == "reduce-scatter":
        size *= len(devices)  # its result is a part
    return kind, sent(kind, size, len(devices)), devices


def line_bytes(line: str, started: bool = False) -> int:
    """Bytes of an instruction's result; what is only started holds its operands before it, and contexts."""
    found = instruction(line)
    assert found is not None, "walk gives instructions"
    arrays = [array_bytes(kind, dims) for kind, dims in _ARRAY.findall(found.result)]
    if started and found.result.startswith("("):
        arrays = [size for size in arrays if size > CONTEXT_BYTES]
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def array_bytes(kind: str, dims: str) -> int:
    """Bytes of `bf16[4,2048]`."""
    return SIZES[kind] * math.prod(int(size) for size in dims.split(",") if size)


def group(line: str) -> list[int]:
    """Devices of the first group that exchanges; of a permutation the two that are furthest apart."""
    if match := re.search(rf"replica_groups=\[\d+,(\d+)\]<={_ORDER}", line):
        return spread(match[2], match[3])[: int(match[1])]
    if match := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}", line
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        names, found = list(sizes), [0]
        # An axis may be split: 'name':(2)4 is four of it, in each of its halves.
        for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[4]):
            count = int(part or sizes[name])
            inner = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
            step = inner * sizes[name] // (int(before or 1) * count)
            found = [place + index * step for place in found for index in range(count)]
        return [spread(match[2], match[3])[place] for place in found] if match[2] else found
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return numbers(match[1])
    match = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    assert match is not None, f"an exchange names its devices: {line}"
    pairs = [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", match[1])]
    return max(pairs, key=lambda pair: abs(pair[0] - pair[1]))


def spread(sizes: str, axes: str | None) -> list[int]:
    """Devices in the order `[2,4]T(1,0)`: numbered row by row in a table of 2 x 4, read column by column."""
    table = np.arange(math.prod(numbers(sizes))).reshape(numbers(sizes))
    return (table.transpose(numbers(axes)) if axes else table).ravel().tolist()


def numbers(text: str) -> list[int]:
    """Of `2,4`."""
    return [int(number) for number in text.split(",")]


def share_outside(kind: str, devices: list[int], node: int | None) -> float:
    """The share of what a device of a group sends that must leave its node.

    n devices, m of them in each node: a node needs n - m of an array's n parts from elsewhere, where its m
    devices together send m (n - 1); what is not shared (all-to-all) goes straight to the n - m others.
    """
    if kind == BETWEEN_SLICES:
        return 1.0
    if node is None:
        return 0.0
    n, m = len(devices), sum(device // node == devices[0] // node for device in devices)
    if n == m:
        return 0.0
    return (n - m) / (n - 1) / (m if kind in ("all-gather", "reduce-scatter", "all-reduce") else 1)


def sent(kind: str, size: int, devices: int) -> int:
    """Bytes that a device sends for an array of `size` bytes (all-gather and reduce-scatter: the whole)."""
    share = (devices - 1) / devices
    match kind:
        case "all-reduce":
            return int(2 * share * size)
        case "collective-permute":
            return size
        case _:
            return int(share * size)
