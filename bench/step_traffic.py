"""The training step of one network in every way to run it, counted by the rules of ``bench.traffic``.

``python -m fastnets.bench.traffic resnet50 -b 32 --training --dtype bf16`` prints the table. Forward and
backward are counted on meta tensors, from a gradient that costs nothing; loss and optimizer are not part of
it. All ways but eager work in channels-last.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastnets.bench.baselines import lay_out
from fastnets.bench.counter import Traffic, mebibytes
from fastnets.bench.networks import Inputs, arguments, first
from fastnets.fused import dispatch

__all__ = ["WAYS", "StepTable", "Way", "count_step"]


@dataclass(frozen=True)
class Way:
    """One way to run a training step; ``count(stock, x)`` gives its traffic."""

    name: str
    description: str
    count: Callable[[nn.Module, Inputs], Traffic]


def _eager(stock: nn.Module, x: Inputs) -> Traffic:
    from fastnets.bench.traffic import count

    return count(stock, *arguments(x), training=True)


def _inductor(stock: nn.Module, x: Inputs) -> Traffic:
    from fastnets.bench.inductor import count_compiled

    return count_compiled(*lay_out(copy.deepcopy(stock), x))


def _fastnets(backend: str, save: str = "auto") -> Callable[[nn.Module, Inputs], Traffic]:
    def run(stock: nn.Module, x: Inputs) -> Traffic:
        from fastnets.bench.traffic import count
        from fastnets.fused.optimize import optimize

        fast, laid_out = lay_out(optimize(stock, backend=backend, save=save), x)
        return count(fast, *arguments(laid_out), training=True)

    return run


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("eager", "stock PyTorch", _eager),
        Way("inductor", "torch.compile, as lowered for the GPU", _inductor),
        Way("library", "fastnets on the vendor's dense convolutions", _fastnets("auto")),
        Way("library-less", 'the same, optimize(save="less")', _fastnets("auto", "less")),
        Way("triton", "fastnets on its own convolutions", _fastnets("triton")),
        Way("triton-less", 'the same, optimize(save="less")', _fastnets("triton", "less")),
    )
}
"""Every way by name, in the order of the table. The first one is what the others are compared with."""


@dataclass(frozen=True)
class StepTable:
    """The counts of one network by way; ``str`` gives the table."""

    title: str
    traffic: dict[str, Traffic]

    def share(self, way: str) -> float:
        """Bytes moved by ``way``, as a share of eager's."""
        return self.traffic[way].bytes / self.traffic["eager"].bytes

    def saved_share(self, way: str) -> float:
        """Bytes that ``way`` saves for its backward, as a share of eager's."""
        return self.traffic[way].saved_bytes / self.traffic["eager"].saved_bytes

    def table(self) -> Any:
        """A ``rich`` table."""
        from rich.table import Table

        table = Table(title=self.title, caption="counted, not measured: see fastnets.bench.traffic")
        table.add_column("way", no_wrap=True)
        for header in ("MiB moved", "ratio", "launches", "MiB saved", "ratio"):
            table.add_column(header, justify="right", no_wrap=True)
        for name, traffic in self.traffic.items():
            table.add_row(
                name,
                mebibytes(traffic.bytes),
                f"{self.share(name):.3f}",
                str(traffic.launches),
                mebibytes(traffic.saved_bytes),
                f"{self.saved_share(name):.3f}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def to_json(self) -> dict[str, Any]:
        """The totals of every way as plain numbers."""
        ways = {
            name: {
                **asdict(traffic.total),
                "bytes": traffic.bytes,
                "saved_bytes": traffic.saved_bytes,
                "share": self.share(name),
                "saved_share": self.saved_share(name),
            }
            for name, traffic in self.traffic.items()
        }
        return {"title": self.title, "ways": ways}


def count_step(
    stock: nn.Module,
    x: Inputs,
    *,
    ways: Sequence[str] = tuple(WAYS),
    gpu: str = "h100",
    title: str = "",
    tell: Callable[[str], None] = lambda way: None,
) -> StepTable:
    """Counts a training step of ``stock`` on meta inputs ``x`` in each of the ``ways``, as for ``gpu``.

    tell: called with each way's name before it is counted. Raises ``ValueError`` for an unknown way, one
    without eager to compare with, and for inputs that are not on the meta device.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ValueError(f"unknown way {unknown[0]!r} to run a training step; known: {', '.join(WAYS)}")
    if not first(x).is_meta:
        raise ValueError(f"x is on {first(x).device}: the ways are counted for a GPU, on meta tensors")
    traffic = {}
    for way in ("eager", *(way for way in ways if way != "eager")):
        tell(way)
        with _as_on(gpu):
            traffic[way] = WAYS[way].count(stock, x)
    return StepTable(title, traffic)


@contextlib.contextmanager
def _as_on(gpu: str) -> Iterator[None]:
    from fastnets.kernels.device import assume_device

    with torch.enable_grad(), dispatch.assume_device_type("cuda"), assume_device(gpu):
        yield
