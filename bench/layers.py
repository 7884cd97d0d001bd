"""Single layers on the shapes of the zoo: ``fastnets bench-op``.

For every operation of ``bench.operations`` and every implementation: time, TFLOP/s, GB/s of compulsory bytes,
and the share of what the device could do at best (``bench.ceilings``), forward or backward. As in every
benchmark here nothing is timed whose answers failed the check, and all implementations take turns.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fastnets.bench.ceilings import Ceilings
from fastnets.bench.operations import OPERATIONS, Call, Inputs, Operation
from fastnets.bench.verify import FORWARD_RATIO, GRADIENT_RATIO, verify_op
from fastnets.fused.measure import Comparison, measure

__all__ = [
    "SCHEMA",
    "LayerResult",
    "bench_operation",
    "implementations",
    "print_table",
    "select_operations",
    "work_of",
    "write_json",
]

SCHEMA = "fastnets-layers/1"
STOCK = "reference"  # the op's definition: PyTorch's own functions


@dataclass
class LayerResult:
    """One operation: its work, and the samples of every implementation whose answers were right.

    ``moved``: compulsory bytes; ``flops``: of the products. Backward: of both gradients of a product, and of
    reading what the forward read and wrote, and writing the gradients. ``refused``: why others were not
    timed.
    """

    name: str
    family: str
    dtype: str
    batch_size: int
    training: bool
    moved: int
    flops: int
    comparison: Comparison | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def rows(self, ceilings: Ceilings) -> list[dict[str, Any]]:
        """A dict per implementation, for tables and files."""
        rows = [
            {"op": self.name, "implementation": name, "note": reason} for name, reason in self.refused.items()
        ]
        for name, samples in (self.comparison.samples if self.comparison else {}).items():
            if not samples.times:
                rows.append(
                    {"op": self.name, "implementation": name, "note": samples.failure or "no samples"}
                )
                continue
            seconds = samples.median
            ratio = self.comparison.ratio(name, STOCK) if STOCK in self.comparison.samples else None
            rows.append(
                {
                    "op": self.name,
                    "implementation": name,
                    "ms": seconds * 1e3,
                    "tflops": self.flops / seconds / 1e12,
                    "gbytes": self.moved / seconds / 1e9,
                    "share": ceilings.seconds(self.moved, self.flops) / seconds,
                    "ratio": None if ratio is None else (ratio.value, ratio.low, ratio.high),
                    "note": "",
                }
            )
        return rows


def select_operations(patterns: Iterable[str] = ()) -> list[Operation]:
    """The operations whose name or family matches any pattern (``"conv*"``); all without one.

    Raises:
        ValueError: a pattern that matches nothing; the message lists the families.
    """
    patterns = list(patterns)
    chosen: dict[str, Operation] = {} if patterns else dict(OPERATIONS)
    for pattern in patterns:
        found = {
            name: op
            for name, op in OPERATIONS.items()
            if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(op.family, pattern)
        }
        if not found:
            families = ", ".join(dict.fromkeys(op.family for op in OPERATIONS.values()))
            raise ValueError(f"no operation matches {pattern!r}; families: {families}")
        chosen.update(found)
    return list(chosen.values())


def implementations(device: torch.device | str) -> tuple[str, ...]:
    """Stock first, then what may run on the device."""
    return (STOCK, "library", "triton") if torch.device(device).type == "cuda" else (STOCK, "library")


def work_of(call: Call, training: bool) -> tuple[int, int]:
    """(compulsory bytes, FLOPs) of a call, or of its backward."""
    meta = Call(
        call.function,
        tuple(t.to("meta") if isinstance(t, torch.Tensor) else t for t in call.tensors),
        call.options,
        call.learns,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.run(STOCK)
    moved, flops = call.compulsory_bytes, counter.get_total_flops()
    if training:
        learning = [call.tensors[p] for p in call.learns if call.tensors[p] is not None]
        moved += sum(t.numel() * t.element_size() for t in learning)  # the gradients
        products = sum(t.dim() >= 2 for t in learning)  # dx and dw: each as much as the product itself
        flops *= min(products, 2)
    return moved, flops


def bench_operation(
    operation: Operation,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    batch_size: int = 32,
    training: bool = False,
    backends: Iterable[str] | None = None,
    rounds: int = 20,
    max_seconds: float | None = 5.0,
) -> LayerResult:
    """Check every implementation, then time those that are right, forward or (``training``) backward."""
    if training and not operation.trains:
        raise ValueError(f"{operation.name} has no gradient")
    call = operation.make(Inputs(device, dtype), batch_size)
    result = LayerResult(
        operation.name,
        operation.family,
        str(dtype).removeprefix("torch."),
        batch_size,
        training,
        *work_of(call, training),
    )
    timed: dict[str, Callable[[], Any]] = {}
    for backend in backends or implementations(device):
        judged = verify_op(operation, backend, dtype, device)
        if judged.error:
            result.refused[backend] = judged.error
        elif not judged.passed:
            ratios = f"{judged.forward:.2f} forward, {judged.gradients} gradients"
            result.refused[backend] = (
                f"wrong: error ratio {ratios} (allowed {FORWARD_RATIO:g}, {GRADIENT_RATIO:g}); not timed"
            )
        else:
            timed[backend] = _timed(call, backend, training)
    if timed:
        with torch.inference_mode(not training):
            result.comparison = measure(timed, device=device, rounds=rounds, max_seconds=max_seconds)
    return result


def _timed(call: Call, backend: str, training: bool) -> Callable[[], Any]:
    if not training:
        return lambda: call.run(backend)
    tensors = list(call.tensors)
    leaves = [p for p in call.learns if tensors[p] is not None]
    for p in leaves:
        tensors[p] = tensors[p].detach().requires_grad_()
    y = Call(call.function, tuple(tensors), call.options, call.learns).run(backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return lambda: torch.autograd.grad(y, [tensors[p] for p in leaves], dy, retain_graph=True)


def print_table(results: Iterable[LayerResult], ceilings: Ceilings, console: Console) -> None:
    """One line per operation and implementation, with the ceilings above."""
    console.print(str(ceilings))
    table = Table()
    table.add_column("operation")
    table.add_column("implementation")
    for heading in ("ms", "TFLOP/s", "GB/s", "of the ceiling", "vs stock [95 %]"):
        table.add_column(heading, justify="right")
    for result in results:
        for row in result.rows(ceilings):
            if row["note"]:
                table.add_row(row["op"], row["implementation"], "", "", "", "", row["note"], style="yellow")
                continue
            ratio = row["ratio"]
            table.add_row(
                row["op"],
                row["implementation"],
                f"{row['ms']:.4f}",
                f"{row['tflops']:.2f}",
                f"{row['gbytes']:.1f}",
                f"{row['share']:.0%}",
                "" if ratio is None else f"{ratio[0]:.2f}× [{ratio[1]:.2f}, {ratio[2]:.2f}]",
            )
    console.print(table)


def write_json(
    results: Iterable[LayerResult], ceilings: Ceilings, facts: dict[str, Any], path: str | Path
) -> None:
    """Writes environment, ceilings, and every operation's rows with the raw samples."""
    operations = [
        {
            "name": r.name,
            "family": r.family,
            "dtype": r.dtype,
            "batch_size": r.batch_size,
            "training": r.training,
            "bytes": r.moved,
            "flops": r.flops,
            "rows": r.rows(ceilings),
            "samples": {n: s.times for n, s in r.comparison.samples.items()} if r.comparison else {},
        }
        for r in results
    ]
    whole = {
        "schema": SCHEMA,
        "environment": facts,
        "ceilings": dataclasses.asdict(ceilings),
        "operations": operations,
    }
    Path(path).write_text(json.dumps(whole, indent=1))
