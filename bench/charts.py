"""The charts of a benchmark run, each drawn on a matplotlib axes: ``CHARTS`` names them.

What a chart shows was measured (times, memory) or counted (traffic, FLOPs), and its title says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastnets.bench.baselines import BASELINE
from fastnets.bench.breakdown import Layer
from fastnets.bench.suite import Result, Row, Run
from fastnets.fused.measure import Ratio

OURS, OTHERS, BETTER, WORSE = "#2a9d5c", "#8a94a6", "#2a9d5c", "#c0504d"
_SHADES = ("#8a94a6", "#b7bec9", "#5d6778", "#c9a66b", "#a0785a", "#7d93b8", "#b79bc0", "#6b8e8e")
_LAYERS_SHOWN = 12


def speedup(result: Result, row: Row) -> Ratio | None:
    """The row's ratio to eager; None unless both were measured after passing the accuracy gate."""
    if row.status != "measured" or result.comparison is None:
        return None
    base = next((other for other in result.rows if other.variant == BASELINE), None)
    if base is None or base.status != "measured":
        return None
    return result.comparison.ratio(row.variant, BASELINE)


def label(result: Result) -> str:
    """A network with its batch and what sets it apart."""
    kind = ", training" if result.training else ""
    return f"{result.network}, batch {result.input_shape[0]}, {result.dtype}{kind}"


def colours(variants: list[str]) -> dict[str, str]:
    """A colour for each variant, ours in greens."""
    greens = iter(("#2a9d5c", "#8fce9f", "#17653a", "#5fb98a"))
    greys = iter(_SHADES * 4)
    return {name: next(greens, OURS) if name.startswith("fastnets") else next(greys) for name in variants}


def _tidy(panel: Any, title: str, x_label: str) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x_label, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def _groups(panel: Any, run: Run, value: Callable[[Result, Row], Any], skip: str = "") -> list[str]:
    """Horizontal bars, a group for each network; ``value`` gives (length, below, above) or None."""
    results = [r for r in run.results if any(row.status == "measured" for row in r.rows)]
    present = {row.variant for r in results for row in r.rows if value(r, row) and row.variant != skip}
    variants = [row.variant for r in results for row in r.rows if row.variant in present]
    variants = list(dict.fromkeys(variants))
    colour = colours(variants)
    thickness = 0.8 / max(1, len(variants))
    for index, variant in enumerate(variants):
        places, lengths, below, above = [], [], [], []
        for place, result in enumerate(results):
            row = next((row for row in result.rows if row.variant == variant), None)
            found = None if row is None else value(result, row)
            if found:
                places.append(place - 0.4 + (index + 0.5) * thickness)
                lengths.append(found[0])
                below.append(found[1])
                above.append(found[2])
        error = [below, above] if any(below) or any(above) else None
        panel.barh(places, lengths, thickness, xerr=error, color=colour[variant], label=variant,
                   ecolor="#333333", error_kw={"linewidth": 0.8})  # fmt: skip
    panel.set_yticks(range(len(results)), [label(result) for result in results], fontsize=8)
    panel.set_ylim(len(results) - 0.5, -0.5)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return variants


def draw_speedups(panel: Any, run: Run) -> None:
    """Times faster than eager, with the 95 % interval."""

    def value(result: Result, row: Row):
        ratio = speedup(result, row)
        return ratio and (ratio.value, ratio.value - ratio.low, ratio.high - ratio.value)

    _groups(panel, run, value, skip=BASELINE)
    panel.axvline(1, color="#333333", linewidth=1)
    _tidy(panel, "Speed beside eager, measured", "times as fast as eager (whiskers: 95 % interval)")


def draw_memory(panel: Any, run: Run) -> None:
    """Memory that one call takes at its peak."""
    _groups(panel, run, lambda _, row: row.peak_bytes and (row.peak_bytes / 2**20, 0, 0))
    _tidy(panel, "Memory of one call, measured", "MiB at the peak, beyond what was held before the call")


def draw_traffic(panel: Any, run: Run) -> None:
    """Bytes that a forward moves, stock and fused, as counted."""
    counted = [r for r in run.results if r.breakdown is not None and r.breakdown.stock_traffic]
    for offset, colour, name, field in (
        (-0.2, OTHERS, "stock", "stock_traffic"), (0.2, OURS, "fused", "fused_traffic")
    ):  # fmt: skip
        sizes = [getattr(r.breakdown, field) / 2**20 for r in counted]
        places = [place + offset for place in range(len(counted))]
        bars = panel.barh(places, sizes, 0.4, color=colour, label=name)
        panel.bar_label(bars, [f"{size:.0f}" for size in sizes], padding=3, fontsize=8)
    panel.set_yticks(range(len(counted)), [label(result) for result in counted], fontsize=8)
    panel.set_ylim(len(counted) - 0.5, -0.5)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _tidy(panel, "Traffic before and after, counted", "MiB read and written in one forward")


def saved(layer: Layer) -> float:
    """Seconds of a forward that fusing this layer saves, over all its calls."""
    return layer.calls * (layer.stock_seconds - layer.fused_seconds)


def draw_waterfall(panel: Any, result: Result) -> None:
    """From the stock layers' time down to the fused ones', layer by layer, the largest savings first."""
    layers = sorted(result.breakdown.layers, key=saved, reverse=True)
    shown, rest = layers[:_LAYERS_SHOWN], layers[_LAYERS_SHOWN:]
    level = sum(layer.calls * layer.stock_seconds for layer in layers) * 1e3
    rows = [("all layers, stock", 0.0, level, OTHERS)]
    steps = [(f"{layer.kind} {layer.shape} ×{layer.calls}", saved(layer) * 1e3) for layer in shown]
    if rest:
        steps.append((f"{len(rest)} other layers", sum(map(saved, rest)) * 1e3))
    for name, milliseconds in steps:
        start = level - milliseconds
        rows.append((name, min(start, level), abs(milliseconds), BETTER if milliseconds >= 0 else WORSE))
        level = start
    rows.append(("all layers, fused", 0.0, level, OURS))
    names, starts, lengths, shades = zip(*rows)
    bars = panel.barh(range(len(rows)), lengths, left=starts, color=shades)
    panel.bar_label(bars, [f"{length:.2f}" for length in lengths], padding=3, fontsize=8)
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.invert_yaxis()
    _tidy(panel, f"Where the time went: {label(result)}, measured layer by layer", "ms of a forward")


def draw_roofline(panel: Any, result: Result) -> None:
    """FLOP/s of each layer over its FLOPs per compulsory byte, under what the device can do at best."""
    layers = [layer for layer in result.breakdown.layers if layer.flops]
    ceilings = result.breakdown.ceilings
    for name, field, face, edge in (
        ("stock", "stock_seconds", "none", "#5d6778"), ("fused", "fused_seconds", OURS, OURS)
    ):  # fmt: skip
        panel.scatter(
            [layer.flops / layer.moved for layer in layers],
            [layer.flops / getattr(layer, field) / 1e9 for layer in layers],
            s=24, facecolors=face, edgecolors=edge, label=name,
        )  # fmt: skip
    if layers:
        lowest = min(layer.flops / layer.moved for layer in layers) / 2
        ridge = ceilings.flops / ceilings.bytes_per_second
        highest = 2 * max(ridge, *(layer.flops / layer.moved for layer in layers))
        xs = [lowest, ridge, highest]
        roof = [min(ceilings.bytes_per_second * x, ceilings.flops) / 1e9 for x in xs]
        panel.plot(xs, roof, color="#333333", linewidth=1, label="measured ceilings")
        panel.set_xscale("log")
        panel.set_yscale("log")
    panel.set_ylabel("GFLOP/s", fontsize=9)
    panel.legend(fontsize=8, frameon=False)
    _tidy(panel, f"Roofline: {label(result)}", "FLOPs per compulsory byte (counted)")


Drawing = tuple[str, float, Callable[[Any], None]]
"""A chart's name, its height in inches, and what draws it on an axes."""


def drawings(run: Run) -> list[Drawing]:
    """The charts that this run has figures for."""
    measured = [r for r in run.results if any(row.status == "measured" for row in r.rows)]
    if not measured:
        return []
    bars = sum(1.2 + 0.11 * len(result.rows) for result in measured) * 0.55
    charts: list[Drawing] = [("speed-up", 1.2 + bars, lambda panel: draw_speedups(panel, run))]
    if any(row.peak_bytes for result in measured for row in result.rows):
        charts.append(("memory", 1.2 + bars, lambda panel: draw_memory(panel, run)))
    counted = [r for r in measured if r.breakdown is not None]
    if any(r.breakdown.stock_traffic for r in counted):
        charts.append(("traffic", 1.2 + 0.4 * len(counted), lambda panel: draw_traffic(panel, run)))
    for result in counted:
        if result.breakdown.layers:
            height = 1.4 + 0.25 * min(_LAYERS_SHOWN + 3, len(result.breakdown.layers) + 2)
            charts.append((f"where the time went, {label(result)}", height,
                           lambda panel, result=result: draw_waterfall(panel, result)))  # fmt: skip
            charts.append((f"roofline, {label(result)}", 3.6,
                           lambda panel, result=result: draw_roofline(panel, result)))  # fmt: skip
    return charts
