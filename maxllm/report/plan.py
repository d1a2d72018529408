"""A plan as people read it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(figures: dict[str, Any]) -> None:
    """Memory, collectives and the bound on speed, as tables."""
    terminal = Console()
    mesh = " x ".join(f"{axis}={size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    terminal.print(
        f"{figures['parameters'] / 1e9:.2f} B parameters on {figures['hardware']} "
        f"({figures['devices']} devices, {mesh}, attention {figures['attention']}): {verdict}",
        markup=False,
        highlight=False,
    )
    terminal.print(memory(figures))
    if figures["collectives"] is not None:
        terminal.print(collectives(figures["collectives"]))
    terminal.print(speed(figures))


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
