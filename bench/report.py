"""Benchmark results as a terminal table, JSON with the raw samples, CSV, Markdown, HTML and charts.

The format of a file follows its name: ``--output run.json``, ``.csv``, ``.md``,
``.html``, ``.png`` or ``.svg``.
:func:`refuse_unwritable` looks at the paths before a run, so that an hour of measuring does not end at a
folder that is not there.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from fastnets.bench import charts, environment
from fastnets.bench.baselines import BASELINE
from fastnets.bench.charts import speedup
from fastnets.bench.suite import Result, Row, Run

SCHEMA = "fastnets-bench"
SCHEMA_VERSION = 1


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file of ``fastnets bench -o FILE.json``; ValueError where it is something else."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); `fastnets bench -o FILE.json` writes it") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: is not a {SCHEMA} file; `fastnets bench -o FILE.json` writes one")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: has schema version {content.get('schema_version')!r}, and this fastnets reads "
            f"{SCHEMA_VERSION}; run the benchmark again with this version"
        )
    return content


class BadOutput(ValueError):
    """An output path that cannot be written, or whose format is not known."""


def refuse_unwritable(paths: Sequence[str | Path], formats: Collection[str] | None = None) -> None:
    """Raise :class:`BadOutput` unless every path names a known format in a folder that can be written to.

    ``formats``: the endings that are known, those of :data:`WRITERS` by default.
    """
    known = WRITERS if formats is None else formats
    for path in map(Path, paths):
        if path.suffix not in known:
            raise BadOutput(
                f"{path}: unknown format {path.suffix!r}; use a name that ends in {', '.join(known)}"
            )
        if path.suffix in (".png", ".svg", ".html"):
            try:
                import matplotlib  # noqa: F401
            except ImportError as error:
                raise BadOutput(f"{path}: charts need matplotlib; pip install 'fastnets[bench]'") from error
        if path.is_dir():
            raise BadOutput(f"{path}: is a folder")
        if not path.parent.is_dir():
            raise BadOutput(f"{path}: the folder {path.parent} does not exist")
        try:
            if path.exists():
                with path.open("ab"):
                    pass
            else:
                tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise BadOutput(f"{path}: cannot be written ({error.strerror})") from error


def write(run: Run, path: str | Path) -> None:
    """Write the run in the format of the path's suffix."""
    path = Path(path)
    write_whole(path, WRITERS[path.suffix](run))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


# --- the figures of one row -----------------------------------------------------------------------------


def clearly_under(run: Run, bound: float) -> list[str]:
    """A line for each variant of ours whose whole interval of the ratio to eager lies under ``bound``."""
    lines = []
    for result in run.results:
        for row in result.rows:
            ratio = speedup(result, row) if row.ours else None
            if ratio is not None and ratio.high < bound:
                lines.append(f"{result.network}, {row.variant}: {ratio} of eager's speed, under {bound:g}")
    return lines


def cells(result: Result, row: Row) -> list[str]:
    """One line of a table, in the order of ``HEADINGS``."""
    error = "" if row.error_ratio is None else f"{row.error_ratio:.2f}"
    if row.status != "measured":
        return [row.variant, error, row.status, *[""] * (len(HEADINGS) - 3)]
    samples = result.comparison.samples[row.variant]
    low, high = samples.spread
    ratio = speedup(result, row)
    return [
        row.variant,
        error,
        f"{samples.median * 1e3:.2f}",
        f"{low * 1e3:.2f}–{high * 1e3:.2f}",
        f"{result.input_shape[0] / samples.median:.1f}",
        "" if ratio is None else str(ratio),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        f"{samples.cpu_share:.2f}",
        f"{row.ready_seconds:.1f}",
    ]


WIDTH = 132  # of a terminal, in characters, that shows every column
HEADINGS = (
    "variant",
    "error ratio",  # against float64, of stock's own
    "median ms",
    "p20–p80 ms",
    "images/s",
    "vs eager [95 %]",
    "peak MiB",  # of memory that one call takes, beyond what was held before it
    "CPU/wall",  # about the number of busy threads
    "ready s",  # from the stock network to the first answer
)


def title(result: Result) -> str:
    shape = "×".join(map(str, result.input_shape))
    what = "training step" if result.training else "inference"
    return f"{result.network}, {shape}, {result.dtype}, {what}, weights: {result.weights}"


def remarks(result: Result) -> list[str]:
    """What stands under a table: coverage, which implementations served, and what was cut short."""
    lines = []
    if result.coverage is not None:
        served = ", ".join(f"{name} {count}" for name, count in sorted(result.implementations.items()))
        lines.append(
            f"fastnets: {result.coverage:.1%} of the FLOPs in fused layers; by implementation: {served}"
        )
    lines += result.notes
    for row in result.rows:
        if row.note:
            lines.append(f"{row.variant}: {row.note}")
    if result.comparison is not None and result.comparison.interrupted:
        lines.append("interrupted: the figures are of the rounds that were complete")
    return lines


# --- terminal -------------------------------------------------------------------------------------------


def print_table(result: Result, console: Any) -> None:
    """Print one network's table to a rich console."""
    from rich import box
    from rich.table import Table

    columns = len(HEADINGS) if console.width >= WIDTH else len(HEADINGS) - 2
    table = Table(title=title(result), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(HEADINGS[:columns]):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in result.rows:
        style = {"measured": "bold" if row.ours else "", "wrong": "red", "failed": "red"}.get(
            row.status, "dim"
        )
        table.add_row(*cells(result, row)[:columns], style=style)
    console.print(table)
    for line in remarks(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()


# --- files ----------------------------------------------------------------------------------------------


def as_dict(run: Run) -> dict[str, Any]:
    """The run as JSON types, raw samples (seconds per call) included."""
    results = []
    for result in run.results:
        rows = []
        for row in result.rows:
            entry: dict[str, Any] = dict(vars(row))
            samples = result.comparison.samples.get(row.variant) if result.comparison else None
            if samples is not None and samples.times:
                ratio = speedup(result, row)
                entry["median_seconds"] = samples.median
                entry["p20_p80_seconds"] = list(samples.spread)
                entry["ratio_to_eager"] = None if ratio is None else [ratio.value, ratio.low, ratio.high]
                entry["samples"] = {key: value for key, value in vars(samples).items() if key != "name"}
            rows.append(entry)
        results.append(
            {
                "network": result.network,
                "weights": result.weights,
                "input_shape": list(result.input_shape),
                "dtype": result.dtype,
                "training": result.training,
                "coverage": result.coverage,
                "implementations": result.implementations,
                "notes": result.notes,
                "breakdown": None if result.breakdown is None else dataclasses.asdict(result.breakdown),
                "interrupted": bool(result.comparison and result.comparison.interrupted),
                "variants": rows,
            }
        )
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": run.environment,
        "settings": run.settings,
        "interrupted": run.interrupted,
        "results": results,
    }


def to_json(run: Run) -> bytes:
    return (json.dumps(as_dict(run), indent=1, allow_nan=False) + "\n").encode()


CSV_COLUMNS = (
    *("network", "batch", "dtype", "device", "variant", "status", "note", "error_ratio"),
    *("median_ms", "p20_ms", "p80_ms", "images_per_second"),
    *("ratio_to_eager", "ratio_low", "ratio_high", "ready_seconds", "peak_bytes"),
)


def to_csv(run: Run) -> bytes:
    """One line per network and variant, times in milliseconds."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for result in run.results:
        for row in result.rows:
            line: list[Any] = [result.network, result.input_shape[0], result.dtype, run.environment["device"]]
            line += [row.variant, row.status, row.note, row.error_ratio]
            if row.status == "measured":
                samples = result.comparison.samples[row.variant]
                ratio = speedup(result, row)
                line += [samples.median * 1e3, *(t * 1e3 for t in samples.spread)]
                line += [result.input_shape[0] / samples.median]
                line += [None] * 3 if ratio is None else [ratio.value, ratio.low, ratio.high]
                line += [row.ready_seconds, row.peak_bytes]
            else:
                line += [None] * 7 + [row.ready_seconds, row.peak_bytes]
            writer.writerow(line)
    return text.getvalue().encode()


def to_markdown(run: Run) -> bytes:
    lines = ["```", *environment.summary(run.environment), "```", ""]
    for result in run.results:
        lines += [f"**{title(result)}**", ""]
        lines.append("| " + " | ".join(HEADINGS) + " |")
        lines.append("| --- |" + " ---: |" * (len(HEADINGS) - 1))
        lines += ["| " + " | ".join(cells(result, row)) + " |" for row in result.rows]
        lines += ["", *(f"- {line}" for line in remarks(result)), ""]
    return "\n".join(lines).encode()


def draw_speed(panel: Any, result: Result) -> None:
    """Images per second of every measured variant on a matplotlib axes; whiskers are the p20-p80 spread."""
    rows = [row for row in result.rows if row.status == "measured"]
    batch = result.input_shape[0]
    rates, below, above, labels = [], [], [], []
    for row in rows:
        samples = result.comparison.samples[row.variant]
        rate = batch / samples.median
        low, high = samples.spread
        rates.append(rate)
        below.append(max(0.0, rate - batch / high))
        above.append(max(0.0, batch / low - rate))
        ratio = speedup(result, row)
        times = "" if ratio is None or row.variant == BASELINE else f"  ({ratio.value:.2f}× eager)"
        labels.append(f"{rate:.1f}{times}")
    colours = ["#2a9d5c" if row.ours else "#8a94a6" for row in rows]
    names = [row.variant for row in rows]
    bars = panel.barh(names, rates, color=colours, xerr=[below, above], ecolor="#333333")
    panel.bar_label(bars, labels, padding=10, fontsize=9)
    panel.invert_yaxis()
    panel.set_title(title(result), loc="left", fontsize=10)
    panel.set_xlim(0, max(rate + more for rate, more in zip(rates, above)) * 1.3)
    panel.set_xlabel("images per second, median (whiskers: 20th to 80th percentile)", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def caption(facts: dict[str, Any]) -> str:
    """One line that says what a chart was measured on."""
    return (
        f"{facts.get('device_name') or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"fastnets {facts['fastnets']} ({facts['commit'] or 'installed'}), allocator: {facts['allocator']}"
    )


def whole_figure(run: Run) -> Any:
    """A matplotlib figure: one panel of :func:`draw_speed` per network, and below them the other charts."""
    from matplotlib.figure import Figure

    shown = [result for result in run.results if any(row.status == "measured" for row in result.rows)]
    heights = [1.4 + 0.42 * len(result.rows) for result in shown] or [1]
    others = charts.drawings(run) if len(shown) > 1 or any(r.breakdown for r in shown) else []
    heights += [height for _, height, _ in others]
    figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained", dpi=120)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, result in zip(panels, shown):
        draw_speed(panel, result)
    for panel, (_, _, draw) in zip(panels[len(shown) :], others):
        draw(panel)
    if not shown:
        panels[0].text(0.5, 0.5, "nothing was measured", ha="center")
        panels[0].set_axis_off()
    figure.suptitle(caption(run.environment), fontsize=8)
    return figure


def to_png(run: Run) -> bytes:
    """All charts, one below the other."""
    return png_bytes(whole_figure(run))


def png_bytes(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file's content, drawn without any display."""
    return figure_bytes(figure, "png")


def figure_bytes(figure: Any, file_format: str) -> bytes:
    """A matplotlib figure as the content of a file, drawn without any display."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format)
    return buffer.getvalue()


def _page(run: Run) -> bytes:
    from fastnets.bench.page import to_html

    return to_html(run)


WRITERS: dict[str, Callable[[Run], bytes]] = {
    ".json": to_json,
    ".csv": to_csv,
    ".md": to_markdown,
    ".html": _page,
    ".png": to_png,
    ".svg": lambda run: figure_bytes(whole_figure(run), "svg"),
}
