"""Puts the committed benchmark results into the README, between two marker lines.

    python -m fastnets.bench.readme_table README.md docs/cpu-stock-resnet50.json docs/cpu-keep-pages.json

So that no figure in the README is typed by hand: each comes from a result file that ``fastnets bench -o``
wrote.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastnets.bench.report import read_results

START = "<!-- figures: made by `make readme-table`, do not edit -->"
END = "<!-- figures: end -->"


def table(runs: list[dict[str, Any]]) -> str:
    """One Markdown table: a line per network and variant, two columns (ms, ratio to eager) per allocator."""
    runs = _by_allocator(runs)
    names = [run["environment"]["allocator"] for run in runs]
    lines = [
        "| network | variant | " + " | ".join(f"ms, {n} allocator | vs eager [95 %]" for n in names) + " |",
        "| --- | --- |" + " ---: | ---: |" * len(runs),
    ]
    for network, first in _networks(runs).items():
        for variant in [row["variant"] for row in first["variants"]]:
            cells = [cell for run in runs for cell in _cells(run, network, variant)]
            if any(cells):
                shown = f"**{variant}**" if variant.startswith("fastnets") else variant
                lines.append(f"| {network[0]}, batch {network[1]} | {shown} | " + " | ".join(cells) + " |")
    facts = runs[0]["environment"]
    settings = runs[0]["settings"]
    lines += [
        "",
        f"Measured on {facts.get('device_name') or facts['cpu']}, {facts['threads']} threads, "
        f"{settings['dtype'].removeprefix('torch.')}, torch {facts['torch']}, oneDNN {facts['onednn']}, "
        f"at commit {facts['commit']}; variants interleaved in one process, medians.",
    ]
    return "\n".join(lines)


def _by_allocator(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs under the same allocator made one: networks may have been measured in processes of their own."""
    merged: dict[str, dict[str, Any]] = {}
    for run in runs:
        first = merged.setdefault(run["environment"]["allocator"], {**run, "results": []})
        first["results"] = first["results"] + run["results"]
    return list(merged.values())


def _networks(runs: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (result["network"], result["input_shape"][0]): result
        for run in reversed(runs)
        for result in run["results"]
    }


def _cells(run: dict[str, Any], network: tuple[str, int], variant: str) -> tuple[str, str]:
    for result in run["results"]:
        if (result["network"], result["input_shape"][0]) == network:
            for row in result["variants"]:
                if row["variant"] == variant and "median_seconds" in row:
                    ratio = row["ratio_to_eager"]
                    times = "" if ratio is None else f"{ratio[0]:.2f}× [{ratio[1]:.2f}, {ratio[2]:.2f}]"
                    return f"{row['median_seconds'] * 1e3:.1f}", times
    return "", ""


def insert(readme: str, figures: str) -> str:
    """The README with everything between the markers replaced."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the README has no marker lines {START!r} and {END!r}")
    return f"{before}{START}\n{figures}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readme", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    arguments = parser.parse_args()
    try:
        current = arguments.readme.read_text()
        wanted = insert(current, table([read_results(path) for path in arguments.results]))
    except (OSError, ValueError) as error:
        sys.exit(f"readme_table: {error}")
    if arguments.check:
        return 0 if current == wanted else 1
    arguments.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
