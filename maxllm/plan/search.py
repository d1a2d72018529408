"""The best way to put a recipe onto a machine: meshes, `remat`, rows and microbatches, all of them estimated.

What trains fastest by the bound of plan/roofline.py comes first; of what is equally fast, what fits
with room for the estimate's error, then what has the lower sum of floors. It takes no compiler:
stages/plan.py has the best few compiled to confirm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from maxllm.config.data import BatchConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.plan.estimate import Estimate, Layout, estimate, layout_of, machine_of, model_of, obstacle
from maxllm.plan.hardware import CHIPS, DIMENSIONS, SLICES, Hardware, hardware_of

REMATS: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")
ROWS = (0.25, 0.5, 1, 2, 4)
"""Rows of a batch that are tried, as multiples of the recipe's."""
MICROBATCHES = (1, 2, 4)

ERROR = 0.15
"""Of an estimated peak (tests/plan/test_estimate.py)."""


@dataclass(frozen=True)
class Candidate:
    """One way, and what comes of it."""

    config: Config
    """The recipe with its mesh, model.remat, batch.rows and batch.microbatches."""
    generation: str
    """The chips' generation, such as v5p."""
    layout: Layout
    found: Estimate | None
    """None where something does not divide."""
    obstacle: str | None
    over_bytes: int
    """What is missing of the device's memory; 0 where it fits."""

    @property
    def fits(self) -> bool:
        """Whether it is one to choose from."""
        return self.found is not None and self.over_bytes == 0

    @property
    def tokens_per_second(self) -> float:
        """At best, of all devices; 0 where something does not divide."""
        batch = self.config.batch
        return batch.rows * batch.sequence_length / self.found.bound.seconds if self.found else 0.0

    @property
    def floors_per_token(self) -> float:
        """The three floors together, which is what a step takes if nothing overlaps."""
        assert self.found is not None, "only what divides is ranked"
        bound, batch = self.found.bound, self.config.batch
        return (bound.compute + bound.memory + bound.links) / (batch.rows * batch.sequence_length)

    @property
    def tight(self) -> bool:
        """Whether the estimate's error may be more than the room that is left."""
        limit = CHIPS[self.generation].hbm_bytes
        return self.found is not None and (1 + ERROR) * self.found.peak_bytes > limit

    @property
    def words(self) -> list[str]:
        """The overrides that make the recipe this candidate."""
        assert self.config.model is not None, "candidates have a model"
        return [
            *(f"mesh.{axis}={size}" for axis, size in self.layout.sizes.items()),
            f"model.remat={self.config.model.remat}",
            f"batch.rows={self.config.batch.rows}",
            f"batch.microbatches={self.config.batch.microbatches}",
        ]


def candidates(config: Config, hardware: Hardware, fixed: Collection[str] = ()) -> list[Candidate]:
    """All ways, the best first; then what does not fit, by what is missing; then what does not divide.

    Args:
      config: the recipe.
      hardware: the machine.
      fixed: settings that stay as the recipe has them, such as "batch.rows" and "mesh.tensor". A recipe with
        `model.keep` stays with its `model.remat`, of which that is a part; model.keep=[] lets both go.
    """
    model = model_of(config)
    found = [
        candidate(config, model, hardware, mesh, remat, batch)
        for mesh in meshes(hardware.devices, config.mesh, fixed)
        for remat in ((model.remat,) if "model.remat" in fixed or model.keep else REMATS)
        for batch in batches(config.batch, fixed)
    ]
    return sorted(found, key=order)


def order(one: Candidate) -> tuple[int, float, bool, float]:
    """Sorts candidates."""
    if one.found is None:
        return 2, 0.0, False, 0.0
    if one.over_bytes:
        return 1, one.over_bytes, False, 0.0
    # Speeds with the same first three digits are the same: room decides, then the floors of a step.
    return 0, -float(f"{one.tokens_per_second:.3g}"), one.tight, one.floors_per_token


def meshes(devices: int, mesh: MeshConfig, fixed: Collection[str]) -> Iterator[MeshConfig]:
    """Every product of four axes that makes the machine; `mesh.stage` and `mesh.zero` stay as they are."""
    held = {
        name: getattr(mesh, name) for name in ("data", "fsdp", "context", "tensor") if f"mesh.{name}" in fixed
    }
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in divisors:
        for context in (size for size in divisors if devices // tensor % size == 0):
            for fsdp in (size for size in divisors if devices // tensor // context % size == 0):
                data = devices // tensor // context // fsdp
                sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
                if all(size in (-1, sizes[name]) for name, size in held.items()):
                    yield mesh.model_copy(update=sizes)


def batches(batch: BatchConfig, fixed: Collection[str]) -> Iterator[BatchConfig]:
    """Other numbers of rows and microbatches."""
    shares = (1,) if "batch.rows" in fixed else ROWS
    for rows in sorted({int(batch.rows * share) for share in shares} - {0}):
        for parts in (batch.microbatches,) if "batch.microbatches" in fixed else MICROBATCHES:
            if rows % parts == 0:
                yield batch.model_copy(update={"rows": rows, "microbatches": parts})


def candidate(
    config: Config,
    model: ModelConfig,
    hardware: Hardware,
    mesh: MeshConfig,
    remat: str,
    batch: BatchConfig,
) -> Candidate:
    """One of them, estimated if it divides."""
    model = model.model_copy(update={"remat": remat})
    config = config.model_copy(update={"mesh": mesh, "model": model, "batch": batch})
    layout = layout_of(mesh, hardware)
    if problem := obstacle(config, model, layout):
        return Candidate(config, hardware.generation, layout, None, problem, 0)
    found = estimate(config, model, layout, hardware)
    over = max(0, found.peak_bytes - hardware.chip.hbm_bytes)
    return Candidate(config, hardware.generation, layout, found, None, over)


def run(
    config: Config, hardware_name: str | None, fixed: Collection[str] = ()
) -> tuple[dict[str, Any], list[Candidate]]:
    """The figures of `maxllm plan --search` before anything is compiled, and the candidates that fit.

    Args:
      config: the recipe.
      hardware_name: see plan/hardware.py; the recipe's own when absent.
      fixed: settings that stay as they are.

    Raises:
      UserError: the recipe cannot be estimated, or names no machine.
    """
    hardware = machine_of(config, hardware_name)
    found = candidates(config, hardware, fixed)
    fitting = [one for one in found if one.fits]
    return {
        "hardware": hardware.name,
        "devices": hardware.devices,
        "links": hardware.links,
        "hbm_bytes": hardware.chip.hbm_bytes,
        "fits": bool(fitting),
        "tried": len(found),
        "fitting": len(fitting),
        "too_large": sum(one.over_bytes > 0 for one in found),
        "not_dividing": sum(one.found is None for one in found),
        "best": [figures(one) for one in fitting[:10]],
        "others": [figures(one) | {"lost": why(one, fitting)} for one in best_of_meshes(found, fitting)],
        "would_fit": None if fitting else least_change(config, hardware, fixed),
    }, fitting


def figures(one: Candidate) -> dict[str, Any]:
    """A candidate as plain data."""
    assert one.config.model is not None, "candidates have a model"
    plain: dict[str, Any] = {
        "mesh": one.layout.sizes,
        "remat": one.config.model.remat,
        "rows": one.config.batch.rows,
        "microbatches": one.config.batch.microbatches,
        "words": one.words,
    }
    if one.found is None:
        return plain
    return plain | {
        "peak_bytes": one.found.peak_bytes,
        "sent_bytes": one.found.sent_bytes,
        "step_seconds_bound": one.found.bound.seconds,
        "bound_by": one.found.bound.by,
        "tokens_per_second": one.tokens_per_second,
    }


def best_of_meshes(found: list[Candidate], fitting: list[Candidate]) -> list[Candidate]:
    """The best candidate of every mesh that is not among the best ten: `found` is sorted."""
    seen = {tuple(one.layout.sizes.items()) for one in fitting[:10]}
    others = []
    for one in found:
        mesh = tuple(one.layout.sizes.items())
        if mesh not in seen:
            seen.add(mesh)
            others.append(one)
    return others


def why(one: Candidate, fitting: list[Candidate]) -> str:
    """Why a candidate is not the best."""
    if one.found is None:
        return one.obstacle or ""
    if one.over_bytes:
        return f"does not fit by {one.over_bytes / 1e9:.1f} GB"
    share = one.tokens_per_second / fitting[0].tokens_per_second
    if share > 0.995:
        return f"as fast at best, sends {one.found.sent_bytes / 1e9:.0f} GB"
    return f"{1 - share:.0%} slower, bound by {one.found.bound.by}"


def least_change(config: Config, hardware: Hardware, fixed: Collection[str]) -> dict[str, Any] | None:
    """What would fit where nothing does: fewer rows here, or else the next larger slice where something does.

    What was held fixed is let go first. None where no slice of this generation is enough.
    """
    if fixed and (best := candidates(config, hardware)[0]).fits:
        return {"change": " ".join(best.words), **figures(best)}
    rows = config.batch.rows
    while (rows := rows // 2) >= 1:
        fewer = config.model_copy(update={"batch": config.batch.model_copy(update={"rows": rows})})
        if (best := candidates(fewer, hardware)[0]).fits:
            return {"change": f"batch.rows={best.config.batch.rows}", **figures(best)}
    torus = DIMENSIONS.get(hardware.generation)
    for chips in SLICES[torus] if torus else ():
        if chips <= hardware.chips:
            continue
        larger = hardware_of(f"{hardware.generation}-{chips * CHIPS[hardware.generation].cores}")
        if (best := candidates(config, larger)[0]).fits:
            return {"change": f"--hardware {larger.name}", **figures(best)}
    return None
