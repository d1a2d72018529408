"""A plan as people read it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(figures: dict[str, Any]) -> None:
    """Memory, collectives and the bound on speed, as tables."""
    terminal = Console()
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    trained = figures["trained_parameters"]
    part = "" if trained == figures["parameters"] else f" ({trained / 1e6:,.2f} M of them trained)"
    terminal.print(
        f"{figures['parameters'] / 1e9:.2f} B parameters{part} on {figures['hardware']} "
        f"({machine(figures)}, {mesh_name(figures['mesh'])}, attention {figures['attention']}): {verdict}",
        markup=False,
        highlight=False,
    )
    terminal.print(memory(figures))
    if figures["collectives"] is not None:
        terminal.print(collectives(figures["collectives"]))
    terminal.print(speed(figures))


def print_layout(figures: dict[str, Any]) -> None:
    """How every parameter is split: each axis by name and size, with the mesh axes that divide it."""
    title = f"parameters on {figures['hardware']}, {mesh_name(figures['mesh'])}"
    table = Table("parameter\n  its axes / what splits them", "of a device", "MB", title=title)
    table.title_justify, table.columns[0].overflow = "left", "fold"
    for row in figures["layout"]:
        axes = (
            " / ".join((f"{name or 'rank'} {size}", *split))
            for name, size, split in zip(row["axes"], row["shape"], row["mesh"], strict=True)
        )
        table.add_row(
            f"{row['path']}\n  {', '.join(axes)}",
            " x ".join(map(str, row["device_shape"])),
            f"{row['device_bytes'] / 1e6:,.1f}",
        )
    Console().print(table)


def shortage(figures: dict[str, Any]) -> str:
    """In a sentence, what is missing; of a search that found nothing, what would do."""
    if "peak_bytes" in figures:
        return (
            f"{figures['peak_bytes'] / 1e9:.2f} GB per device are needed on {figures['hardware']}, which has "
            f"{figures['hbm_bytes'] / 1e9:.2f}"
        )
    if figures["fitting"]:
        return (
            f"the compiler refuses the best that were found for {figures['hardware']}: give fewer batch.rows"
        )
    change = figures["would_fit"]
    if change is None:
        return f"nothing fits onto {figures['hardware']}, nor onto a larger slice: give a smaller model"
    return (
        f"nothing fits onto {figures['hardware']}; {change['change']} would, with "
        f"{mesh_name(change['mesh'])}, model.remat={change['remat']} and "
        f"{change['peak_bytes'] / 1e9:.1f} GB per device"
    )


def print_estimate(figures: dict[str, Any]) -> None:
    """An estimate, term by term."""
    verdict = "should fit" if figures["fits"] else "SHOULD NOT FIT"
    terminal = Console()
    terminal.print(
        f"{figures['parameters'] / 1e9:.2f} B parameters on {figures['hardware']} "
        f"({machine(figures)}, {mesh_name(figures['mesh'])}): {verdict}",
        markup=False,
        highlight=False,
    )
    for title, terms, end in (
        ("memory at the peak, per device", figures["memory"], figures["peak_bytes"]),
        ("sent, per device and step", figures["sent"], sum(figures["sent"].values())),
    ):
        table = Table("estimate", "GB", title=title, title_justify="left")
        for name, size in terms.items():
            table.add_row(name, f"{size / 1e9:.2f}")
        table.add_row("all", f"{end / 1e9:.2f}")
        terminal.print(table)
    terminal.print(
        f"the device has {figures['hbm_bytes'] / 1e9:.2f} GB; a step takes at least "
        f"{figures['step_seconds_bound']:.3f} s, bound by {figures['bound_by']}: at best "
        f"{figures['tokens_per_second']:,.0f} tokens per second",
        highlight=False,
        soft_wrap=True,
    )


def print_search(figures: dict[str, Any]) -> None:
    """What a search found: the best, what the compiler says of the first few, and why others lost."""
    terminal = Console()
    terminal.print(
        f"{figures['tried']:,} ways onto {figures['hardware']} ({machine(figures)}, "
        f"{figures['hbm_bytes'] / 1e9:.1f} GB each): {figures['fitting']:,} fit by estimate, "
        f"{figures['too_large']:,} are too large, {figures['not_dividing']:,} do not divide",
        highlight=False,
        soft_wrap=True,
    )
    if figures["best"]:
        terminal.print(best(figures["best"]))
    if figures["others"]:
        table = Table("mesh", "remat", "rows", "", title="other meshes at their best", title_justify="left")
        for other in figures["others"]:
            table.add_row(mesh_name(other["mesh"]), other["remat"], str(other["rows"]), other["lost"])
        terminal.print(table)
    if figures["chosen"]:
        terminal.print(
            "confirmed by the compiler: " + " ".join(figures["chosen"]), highlight=False, soft_wrap=True
        )


def best(rows: list[dict[str, Any]]) -> Table:
    """The best candidates: the estimate, and the compiler's figure where it was asked; 80 columns wide."""
    title = "the best, by the bound on speed (mesh: data x fsdp x context x tensor)"
    columns = ("mesh", "remat", "rows", "peak GB", "compiled", "tokens/s", "bound by")
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        compiled, parts = row.get("compiled"), row["microbatches"]
        table.add_row(
            "x".join(map(str, row["mesh"].values())),
            row["remat"],
            f"{row['rows']} / {parts}" if parts > 1 else str(row["rows"]),
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{compiled['peak_bytes'] / 1e9:.1f}" if compiled else "",
            f"{row['tokens_per_second']:,.0f}",
            row["bound_by"],
        )
    return table


def machine(figures: dict[str, Any]) -> str:
    """64 devices, links torus"""
    links = figures["links"]
    return f"{figures['devices']} devices" + (f", links {links}" if links else "")


def mesh_name(mesh: dict[str, int]) -> str:
    """fsdp=4 x tensor=2"""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def memory(figures: dict[str, Any]) -> Table:
    """Gigabytes per device."""
    table = Table("per device", "GB", title="memory", title_justify="left")
    for label, name in (
        ("arguments: parameters, optimizer, batch", "argument_bytes"),
        ("temporaries", "temp_bytes"),
        ("peak", "peak_bytes"),
        ("the device has", "hbm_bytes"),
        ("host", "host_bytes"),
    ):
        if figures[name] is not None:
            table.add_row(label, f"{figures[name] / 1e9:.2f}")
    for name, part in figures.get("parts", {}).items():
        table.add_row(f"  peak of the part {name}", f"{part['peak_bytes'] / 1e9:.2f}")
    table.add_row("classic recipe's state, nothing split", f"{figures['classic_state_bytes'] / 1e9:.2f}")
    for line in figures["largest"]:
        table.add_row(f"  {line}", "")
    return table


def collectives(exchanges: dict[str, Any]) -> Table:
    """Gigabytes that a device sends in a step."""
    table = Table("per device and step", "GB sent", "count", title="collectives", title_justify="left")
    for kind, exchange in exchanges.items():
        table.add_row(kind, f"{exchange['bytes'] / 1e9:.2f}", f"{exchange['count']:,}")
    table.add_row("all", f"{sum(exchange['bytes'] for exchange in exchanges.values()) / 1e9:.2f}", "")
    return table


def speed(figures: dict[str, Any]) -> Table:
    """The bound, and what follows from it."""
    table = Table("at best", "", title="speed", title_justify="left")
    table.add_row("FLOPs per token (causal)", f"{figures['flops_per_token']:.3g}")
    optimal = figures["compute_optimal_tokens"]
    table.add_row("compute-optimal for this model (20 per parameter)", f"{optimal:.3g} tokens")
    best = figures["compute_optimal_parameters"]
    table.add_row(f"compute-optimal for its {figures['tokens']:.3g} tokens", f"{best:.3g} parameters")
    if figures["matmul_flops"] is not None:
        table.add_row(
            "matmuls in the program", f"{figures['matmul_flops'] / 1e12:,.1f} TFLOP per device and step"
        )
    if figures["step_seconds_bound"] is not None:
        table.add_row("step", f"{figures['step_seconds_bound']:.3f} s, bound by {figures['bound_by']}")
        if figures["bubble"]:
            table.add_row("bubble of the pipeline", f"{figures['bubble']:.1%}")
        table.add_row("model FLOPs utilization", f"{figures['mfu_bound']:.1%}")
        table.add_row("tokens per second", f"{figures['tokens_per_second']:,.0f}")
        table.add_row(f"{figures['tokens']:.3g} tokens", f"{figures['days']:.2f} days")
    if figures["cost"] is not None:
        table.add_row("cost", f"{figures['cost']:,.0f}")
    if figures["energy_kwh"] is not None:
        table.add_row("energy of the boards", f"{figures['energy_kwh']:,.0f} kWh")
    table.add_row("compiling took", f"{figures['compile_seconds']:.1f} s")
    return table
