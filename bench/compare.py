"""Two result files of ``fastnets bench`` beside each other: ``fastnets compare A.json B.json``.

What is compared is how many times faster than eager each variant was in its own run: a machine that was
slower on the second day slows eager down, too. The interval of the change comes from resampling the rounds of
both runs. A change counts where its whole interval lies beyond a margin, since two runs of the same code
differ by more than the rounds of one run tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastnets.bench.baselines import BASELINE
from fastnets.fused.measure import Ratio, ratio_of, resampled_ratios

__all__ = ["MARGIN", "Change", "compare_runs", "print_changes"]

MARGIN = 0.05
_RESAMPLES = 2000


@dataclass(frozen=True)
class Change:
    """One variant of one network in both runs.

    before, after: times faster than eager, None where it was not measured. change: after over before.
    verdict: "faster", "slower", "same", or what is missing.
    """

    network: str
    variant: str
    before: float | None
    after: float | None
    change: Ratio | None
    verdict: str


def compare_runs(first: dict[str, Any], second: dict[str, Any], margin: float = MARGIN) -> list[Change]:
    """Every variant of every network that both runs (``report.read_results``) name, eager aside.

    Raises ``ValueError`` where they have no network, batch, dtype and kind of step in common.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin:g}: a share between 0 and 1")
    before, after = ({_title(result): result for result in run["results"]} for run in (first, second))
    shared = [title for title in before if title in after]
    if not shared:
        here, there = (", ".join(titles) or "nothing" for titles in (before, after))
        raise ValueError(f"the runs have nothing in common: {here} against {there}")
    changes = []
    for title in shared:
        old, new = (_measured(results[title]) for results in (before, after))
        for variant in dict.fromkeys([*old, *new]):
            if variant != BASELINE:
                changes.append(_change(title, variant, old, new, margin))
    return changes


def _title(result: dict[str, Any]) -> str:
    shape = "×".join(map(str, result["input_shape"]))
    return f"{result['network']} {shape} {result['dtype']}{' training' if result.get('training') else ''}"


def _measured(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row["samples"] for row in result["variants"] if "samples" in row}


def _change(title: str, variant: str, old: dict, new: dict, margin: float) -> Change:
    speeds, replicates = [], []
    for seed, run in enumerate((old, new)):
        pair = _paired(run, variant)
        speeds.append(None if pair is None else float(np.median(pair[1]) / np.median(pair[0])))
        replicates.append(None if pair is None else resampled_ratios(*pair, _RESAMPLES, seed))
    if None in speeds:
        missing = " and ".join(name for name, speed in zip("AB", speeds) if speed is None)
        return Change(title, variant, *speeds, None, f"not measured in {missing}")
    change = ratio_of(speeds[1] / speeds[0], replicates[1] / replicates[0])
    verdict = "slower" if change.high < 1 - margin else "faster" if change.low > 1 + margin else "same"
    return Change(title, variant, *speeds, change, verdict)


def _paired(run: dict, variant: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(times of the variant, times of eager) in the rounds that both were timed in."""
    if variant not in run or BASELINE not in run:
        return None
    ours, eager = (dict(_by_round(run[name])) for name in (variant, BASELINE))
    rounds = sorted(ours.keys() & eager.keys())
    if len(rounds) < 3:
        return None
    return np.array([ours[i] for i in rounds]), np.array([eager[i] for i in rounds])


def _by_round(samples: dict[str, Any]) -> Iterator[tuple[int, float]]:
    return zip(samples["rounds"], samples.get("device") or samples["wall"])


def print_changes(changes: list[Change], console: Any) -> None:
    """One line for each change on a rich console."""
    from rich import box
    from rich.table import Table

    table = Table("network", "variant", "A vs eager", "B vs eager", "B / A [95 %]", "", box=box.SIMPLE_HEAD)
    for change in changes:
        speeds = ["" if speed is None else f"{speed:.2f}×" for speed in (change.before, change.after)]
        style = {"slower": "red", "faster": "green"}.get(change.verdict, "")
        ratio = "" if change.change is None else str(change.change)
        table.add_row(change.network, change.variant, *speeds, ratio, change.verdict, style=style)
    console.print(table)
