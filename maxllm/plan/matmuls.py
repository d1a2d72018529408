"""What a compiled program multiplies: its matmuls, read from XLA's text, each as often as its loops run.

Kernels that attend (splash, cuDNN) are calls whose inside XLA does not see; they are not counted.
"""

from __future__ import annotations

import math
import re

import numpy as np

from maxllm.plan.hlo import instruction, numbers, parse, walk

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]+)')
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def matmul_flops(text: str) -> float:
    """Floating-point operations of one device's matmuls in a run of the program: two for each product.

    Args:
      text: of a compiled module (`compiled.as_text()`).
    """
    computations, entry = parse(text)
    shapes = {
        found.name: shape_of(found.result)
        for lines in computations.values()
        for found in map(instruction, lines)
        if found is not None
    }
    return 2.0 * sum(times * products(line, shapes) for line, times, _ in walk(computations, entry, 1))


def products(line: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiplications of one instruction; 0 if it is no matmul."""
    found = instruction(line)
    assert found is not None, "walk gives instructions"
    output = shape_of(found.result)
    if found.kind == "convolution":
        lhs, rhs = (shapes[name] for name in found.operands[:2])
        return convolution_products(line, lhs, rhs, output)
    if found.kind == "dot" or (found.kind == "custom-call" and "__cublas$" in line):
        contracted = _CONTRACTED.search(line)
        lhs = shapes[found.operands[0]]
        sizes = [lhs[axis] for axis in numbers(contracted[1].replace('"', ""))] if contracted else []
        return math.prod(output) * math.prod(sizes)
    return 0


def convolution_products(
    line: str, lhs: tuple[int, ...], rhs: tuple[int, ...], output: tuple[int, ...]
) -> int:
    """A matmul as TPU's compiler writes it. Its axes are b (rows), i (contracted), o and f (columns), and
    numbered ones: places of a window, which sums over rows or heads, or meets one place and padding."""
    labels = _LABELS.search(line)
    assert labels is not None, f"a convolution names its axes: {line}"
    of_lhs, of_rhs, of_output = (
        dict(zip(*pair, strict=True)) for pair in zip(labels.groups(), (lhs, rhs, output), strict=True)
    )
    count = of_output["b"] * of_output["f"] * of_rhs["i"]
    for place in (axis for axis in of_lhs if axis.isdigit()):
        count *= taps(line, int(place), of_lhs[place], of_rhs[place], of_output[place])
    return count


def taps(line: str, place: int, lhs: int, window: int, output: int) -> int:
    """Pairs of an output and a place of the window that meet something else than padding, along one axis."""

    def setting(name: str, default: str) -> str:
        found = re.search(rf"window=\{{[^}}]*\b{name}=([\dx_\-]+)", line)
        return found[1].split("x")[place] if found else default

    stride, low = int(setting("stride", "1")), int(setting("pad", "0_0").split("_")[0])
    lhs_dilation, window_dilation = int(setting("lhs_dilate", "1")), int(setting("rhs_dilate", "1"))
    at = np.arange(output)[:, None] * stride + np.arange(window) * window_dilation - low
    return int(np.sum((at % lhs_dilation == 0) & (at >= 0) & (at < lhs * lhs_dilation)))


def shape_of(result: str) -> tuple[int, ...]:
    """Of `bf16[4,2048]{1,0}`; of a tuple its first array's."""
    found = _SHAPE.search(result)
    return tuple(numbers(found[1])) if found and found[1] else ()
