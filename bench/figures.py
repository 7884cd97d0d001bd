"""Puts committed benchmark results into the pages that state them.

    python -m fastnets.bench.figures README.md docs/cpu.md

A page says where its figures come from and where they belong:

    <!-- figures: docs/cpu-zoo.json -->
    <!-- figures: end -->

Paths are relative to the page; several files make one table. So no figure of those tables is typed by hand:
each comes from a file that ``fastnets bench -o FILE.json`` wrote, and carries what it was measured on.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

from fastnets.bench.baselines import BASELINE
from fastnets.bench.report import read_results

__all__ = ["fill", "table"]

_BLOCK = re.compile(
    r"(?P<start><!-- figures: (?P<files>[^>]*?\.json) -->\n)(?P<old>.*?)(?P<end><!-- figures: end -->)",
    re.DOTALL,
)


def table(runs: list[dict[str, Any]]) -> str:
    """A line per network and batch size: eager's milliseconds, then every other variant's speed over eager's.

    Ours have their 95 % interval. The last line is the geometric mean, of variants that ran everywhere.
    """
    results = [result for run in runs for result in run["results"]]
    shown = {
        row["variant"]: row["ours"]
        for result in results
        for row in result["variants"]
        if row["variant"] != BASELINE and row["status"] != "unavailable"
    }
    headings = [f"**{name}**" if ours else name for name, ours in shown.items()]
    lines = [
        "| network | batch | eager, ms | " + " | ".join(headings) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(shown),
    ]
    ratios: dict[str, list[float]] = {name: [] for name in shown}
    for result in results:
        rows = {row["variant"]: row for row in result["variants"]}
        cells = [_cell(rows.get(name), ratios[name]) for name in shown]
        what = f"{result['network']}, training" if result.get("training") else result["network"]
        milliseconds = f"{rows[BASELINE]['median_seconds'] * 1e3:.1f}"
        lines.append(f"| {what} | {result['input_shape'][0]} | {milliseconds} | " + " | ".join(cells) + " |")
    if len(results) > 1:
        means = [_geometric_mean(values, len(results)) for values in ratios.values()]
        lines.append("| geometric mean | | | " + " | ".join(means) + " |")
    lines.append("")
    lines += list(dict.fromkeys(_conditions(run) for run in runs))
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, ratios: list[float]) -> str:
    if row is None or row["status"] == "unavailable":
        return "–"
    if row.get("ratio_to_eager") is None:
        return row["status"]
    value, low, high = row["ratio_to_eager"]
    ratios.append(value)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if row["ours"] else f"{value:.2f}"


def _geometric_mean(values: list[float], of: int) -> str:
    if len(values) < of:
        return "–"
    return f"{math.exp(sum(map(math.log, values)) / of):.2f}"


def _conditions(run: dict[str, Any]) -> str:
    facts, settings = run["environment"], run["settings"]
    where = facts.get("device_name") or f"{facts['cpu']}, {facts['threads']} threads"
    vendor = "" if facts.get("device_name") else f", oneDNN {facts['onednn']}"
    return (
        f"{where}, {settings['dtype'].removeprefix('torch.')}, torch {facts['torch']}{vendor}, "
        f"allocator: {facts['allocator']}, commit {facts['commit']}; "
        "variants interleaved in one process, ratios of medians."
    )


def fill(page: Path) -> str:
    """The page's text with every block of figures made anew; ValueError where it has none."""

    def made(block: re.Match) -> str:
        runs = [read_results(page.parent / name) for name in block["files"].split()]
        return f"{block['start']}\n{table(runs)}\n\n{block['end']}"

    text, blocks = _BLOCK.subn(made, page.read_text())
    if not blocks:
        raise ValueError(
            f"{page}: has no block of figures (<!-- figures: FILE.json --> … <!-- figures: end -->)"
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    arguments = parser.parse_args()
    try:
        filled = {page: fill(page) for page in arguments.pages}
    except (OSError, ValueError) as error:
        sys.exit(f"figures: {error}")
    old = [page for page, text in filled.items() if page.read_text() != text]
    for page in old:
        if arguments.check:
            print(f"figures: {page} is not up to date")
        else:
            page.write_text(filled[page])
    return 1 if arguments.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
