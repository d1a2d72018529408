"""What a compiled program sends: its collectives, read from XLA's text, each as often as its loops run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

SIZES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
"""Bytes of an element."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

CONTEXT_BYTES = 8
"""No array that is exchanged is as small as the marks that an exchange under way carries."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(rf"({'|'.join(SIZES)})\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One kind of exchange, over a whole step."""

    bytes: int
    """Bytes that each device sends, at least: (n - 1) / n of a gathered array among n devices, and so on."""
    count: int
    """How often."""


def collectives(text: str) -> dict[str, Collective]:
    """Kind -> what each device sends in a run of the program.

    Args:
      text: of a compiled module (`compiled.as_text()`).
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
            kind, size = found
            total = totals.setdefault(kind, [0, 0])
            total[0] += size * times
            total[1] += times
    return {kind: Collective(*totals[kind]) for kind in KINDS if kind in totals}


def identity(line: str) -> tuple[str, ...] | None:
    """What the pieces of one exchange have in common: TPU's compiler spreads it over the fusions that it
    overlaps with. A channel alone does not tell; all of `shard_map`'s have number 1."""
    match, channel = _INSTRUCTION.match(line), re.search(r"channel_id=\d+", line)
    if match is None or channel is None:
        return None
    source = re.search(r'op_name="[^"]*"', line)
    arrays = (f"{kind}[{dims}]" for kind, dims in _ARRAY.findall(match[2]))  # layouts differ
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
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if match[3] == "while":
            body = re.search(r"body=%?([\w.\-]+)", line)
            assert body is not None, "a loop has a body"
            yield from walk(computations, body[1], times * trip_count(computations, line), fused)
        elif match[3] in ("fusion", "call", "conditional", "async-start"):
            if reduce_scatter_of(line, computations):
                yield line, times, True
                continue
            for called in _CALLED.findall(line):
                yield from walk(computations, called, times, fused or match[3] == "fusion")
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


def exchange(line: str, computations: dict[str, list[str]]) -> tuple[str, int] | None:
    """(kind, bytes that a device sends) of one instruction; None where it sends nothing."""
    if inner := reduce_scatter_of(line, computations):
        return "reduce-scatter", sent("reduce-scatter", line_bytes(inner), group_size(inner))
    match = _INSTRUCTION.match(line)
    assert match is not None, "walk gives instructions"
    kind, started = match[3].removesuffix("-start"), match[3].endswith("-start")
    if kind not in KINDS:
        return None
    size = line_bytes(line, started)
    if kind == "reduce-scatter":
        size *= group_size(line)  # its result is a part
    return kind, sent(kind, size, group_size(line))


def line_bytes(line: str, started: bool = False) -> int:
    """Bytes of an instruction's result; what is only started holds its operands before it, and contexts."""
    match = _INSTRUCTION.match(line)
    assert match is not None, "walk gives instructions"
    arrays = [array_bytes(kind, dims) for kind, dims in _ARRAY.findall(match[2])]
    if started and match[2].startswith("("):
        arrays = [size for size in arrays if size > CONTEXT_BYTES]
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def array_bytes(kind: str, dims: str) -> int:
    """Bytes of `bf16[4,2048]`."""
    return SIZES[kind] * math.prod(int(size) for size in dims.split(",") if size)


def group_size(line: str) -> int:
    """How many devices take part together."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        # An axis may be split: 'name':(1)2 is two of it.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return 2


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
