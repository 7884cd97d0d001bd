"""Where a network's time and memory go, by op and by layer: ``fastnets profile MODEL --trace out.json``.

torch.profiler watches a few steps; around every op stands a range named by the layer it belongs to, which is
found as ``bench.counter`` finds it: a fused op belongs to the layer that owns its first parameter, an op of
the backward to the layer whose forward recorded it. Nothing of this exists outside the profiled block.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from fastnets.bench import training
from fastnets.bench.counter import Counter, following_modules
from fastnets.bench.networks import Inputs, arguments, first

__all__ = ["Profile", "Share", "profile", "tool_commands"]

_RANGE = "fastnets|"  # layer and op follow, each after a bar


@dataclass(frozen=True)
class Share:
    """One op or layer: calls per step, and milliseconds per step on the host and on the device."""

    name: str
    calls: float
    host_ms: float
    device_ms: float


@dataclass
class Profile:
    """What :func:`profile` found. ``ops`` and ``layers``: the costliest first; times are per step.

    ``memory``: (seconds since the first step, bytes allocated) after every change; ``peaks``: the layers that
    were running when the most was allocated, with those bytes.
    """

    device: str
    steps: int
    ops: list[Share]
    layers: list[Share]
    memory: list[tuple[float, int]] = field(default_factory=list)
    peaks: list[tuple[str, int]] = field(default_factory=list)
    _profiler: Any = None

    def export_trace(self, path: str | Path) -> None:
        """Writes a trace for chrome://tracing and Perfetto."""
        self._profiler.export_chrome_trace(str(path))

    def plot_memory(self, path: str | Path) -> None:
        """Draws allocated memory over time (.png, .svg)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        axes.step([t * 1e3 for t, _ in self.memory], [b / 2**20 for _, b in self.memory], where="post")
        axes.set(
            xlabel="ms", ylabel="MiB allocated", title=f"memory over {self.steps} steps on {self.device}"
        )
        figure.savefig(path)

    def print(self, console: Console, top: int = 15) -> None:
        """The costliest ops and layers, and the peak of memory."""
        on_device = any(share.device_ms for share in self.ops)
        for title, shares in (("by op", self.ops), ("by layer", self.layers)):
            table = Table(title=f"{title}, per step (of {self.steps})")
            table.add_column(title.removeprefix("by "))
            for heading in ("calls", "host ms", *(("device ms", "share") if on_device else ("share",))):
                table.add_column(heading, justify="right")
            total = sum(s.device_ms if on_device else s.host_ms for s in shares) or 1.0
            for share in shares[:top]:
                spent = share.device_ms if on_device else share.host_ms
                device = (f"{share.device_ms:.3f}",) if on_device else ()
                row = (f"{share.calls:g}", f"{share.host_ms:.3f}", *device, f"{spent / total:.1%}")
                table.add_row(share.name, *row)
            console.print(table)
            if len(shares) > top:
                console.print(f"and {len(shares) - top} more")
        for layer, size in self.peaks[:1]:
            console.print(f"most memory: {size / 2**20:.1f} MiB above the start, in {layer}")


class _Ranges(Counter):
    """Puts a range with its layer's name around every op, and counts nothing."""

    def __init__(self, model: nn.Module, nvtx: bool):
        super().__init__(model)
        self.nvtx = nvtx

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.remember_node()
        layer = self.owner_of(args) or self.layer() or "(network)"
        if torch._C._current_autograd_node() is not None:
            layer = f"{layer}, backward"
        name = f"{_RANGE}{layer}|{func._schema.name.replace('::', '.')}"
        with record_function(name), _nvtx(name) if self.nvtx else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _nvtx(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def profile(
    model: nn.Module,
    x: Inputs,
    *,
    step: Callable[[], Any] | None = None,
    steps: int = 3,
    warmup: int = 2,
    nvtx: bool = False,
) -> Profile:
    """Profiles ``steps`` calls of ``step``; by default inference, or training steps where the model trains.

    Args:
        model: gives the ranges their names; a stock or an optimized network.
        x: the inputs of the default step; their device decides what is watched.
        step: what one step runs.
        nvtx: the same ranges for Nsight, which needs CUDA.

    Raises:
        ValueError: ``steps`` below one, or ``nvtx`` without CUDA.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    if nvtx and not first(x).is_cuda:
        raise ValueError("NVTX ranges need a CUDA device; leave --nvtx out on the CPU")
    if step is None:
        step = training.training_step(model, x) if model.training else lambda: model(*arguments(x))
    device = first(x).device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ranges = _Ranges(model, nvtx)
    with torch.inference_mode(not model.training):
        for _ in range(warmup):
            step()
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            with following_modules(ranges), ranges:
                for _ in range(steps):
                    step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    found = Profile(str(device), steps, *_shares(profiler, steps), _profiler=profiler)
    _read_memory(found, profiler, device.type)
    return found


def _shares(profiler: torch.profiler.profile, steps: int) -> tuple[list[Share], list[Share]]:
    """Totals of our ranges by op and by layer."""
    sums: dict[tuple[int, str], list[float]] = {}
    for event in profiler.key_averages():
        if not event.key.startswith(_RANGE) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        _, layer, op = event.key.split("|", 2)
        for key in ((0, op), (1, layer)):
            entry = sums.setdefault(key, [0.0, 0.0, 0.0])
            entry[0] += event.count
            entry[1] += event.cpu_time_total
            entry[2] += event.device_time_total
    tables: tuple[list[Share], list[Share]] = ([], [])
    for (table, name), (count, host, device) in sums.items():
        tables[table].append(Share(name, count / steps, host / steps / 1e3, device / steps / 1e3))
    for table in tables:
        table.sort(key=lambda share: (-share.device_ms, -share.host_ms))
    return tables


def _read_memory(found: Profile, profiler: torch.profiler.profile, device_type: str) -> None:
    """Allocations over time, and the ranges that were open at the peak."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (e.start_ns(), e.nbytes())
        for e in events
        if e.name() == "[memory]" and e.device_type().name.lower() == device_type
    )
    if not changes:
        return
    allocated, start, peak = 0, changes[0][0], (0, 0)
    for at, size in changes:
        allocated += size
        found.memory.append(((at - start) / 1e9, allocated))
        peak = max(peak, (allocated, at))
    open_then = [
        e.name().split("|")[1]
        for e in events
        if e.name().startswith(_RANGE) and e.start_ns() <= peak[1] <= e.start_ns() + e.duration_ns()
    ]
    found.peaks = [(layer, peak[0]) for layer in dict.fromkeys(open_then)]


def tool_commands(arguments: list[str]) -> list[str]:
    """Command lines that put the same run under Nsight Compute and Nsight Systems.

    arguments: those of ``fastnets profile``, without ``--nvtx``.
    """
    run = shlex.join(["python", "-m", "fastnets", "profile", *arguments, "--nvtx", "--steps", "1"])
    return [
        f"ncu --nvtx --nvtx-include 'regex:fastnets.*/' --set full -o fastnets {run}",
        f"nsys profile --trace cuda,nvtx,cudnn,cublas -o fastnets {run}",
    ]
