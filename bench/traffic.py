"""Counts what a forward pass or a training step moves: bytes, FLOPs, launches, tensors saved for backward.

    from fastnets.bench.traffic import compare
    print(compare(stock, fastnets.optimize(stock), torch.empty(32, 3, 224, 224, device="meta")))

or ``python -m fastnets.bench.traffic resnet50 -b 32``; with ``--training`` first every way to run the step
beside eager (``bench.step_traffic``), then the layers. Nothing is timed and no GPU is needed: on meta tensors
only shapes are computed, and kernels are not launched but reported.

The convention is that of ``fastnets.bench.passes``: every op that PyTorch dispatches reads its tensor
arguments once and writes its results once, with one table of exceptions; views are free. Fused ops are opened
up: what is counted are the ops and the Triton kernels that the chosen implementation runs. Attention
(``scaled_dot_product_attention``) is one op, and the fast path of ``nn.TransformerEncoder`` is off. FLOPs are
those of convolutions, matrix products and attention (a multiply-add is two); pointwise arithmetic is not
counted.

Each op belongs to a layer: in the forward the module that runs it, for a fused op the module that owns its
first parameter (the convolution), in the backward the layer whose forward recorded the node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnets.bench.counter import Counter, Moved, Traffic, mebibytes
from fastnets.fused import dispatch

if TYPE_CHECKING:
    from fastnets.bench.networks import Inputs, Network
    from fastnets.bench.step_traffic import StepTable

__all__ = ["Comparison", "Moved", "Traffic", "compare", "count", "summary"]


DTYPES = {
    **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")},
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def count(
    target: nn.Module | Callable[..., Any],
    *inputs: Any,
    training: bool = False,
    model: nn.Module | None = None,
    **options: Any,
) -> Traffic:
    """Counts ``target(*inputs, **options)``.

    target: a module, or any function. A module runs in eval mode without gradients, and the second of two
        calls is counted; with ``training=True`` in train mode, forward and backward, from a gradient of ones
        that costs nothing. Modes, buffers and gradients are put back. A function (a whole step with loss and
        optimizer, say) runs once, as it is.
    inputs: real or meta tensors. For meta tensors ``fused.dispatch.assume_device_type`` says which device
        type is meant, and ``kernels.device.assume_device`` which GPU.
    model: where ``target`` is a function, the module whose layers and parameters are meant.

    Raises what ``target`` raises; ``ValueError`` for ``training=True`` with a function.
    """
    if isinstance(target, nn.Module):
        model = target
    elif training:
        raise ValueError("count: training=True is for modules; a function runs its own backward")
    counter = Counter(model)
    with contextlib.ExitStack() as stack:
        if isinstance(target, nn.Module):
            stack.enter_context(_put_back(target, training))
            stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(counter.watching())
        if isinstance(target, nn.Module) and not training:
            # Folded and packed weights are made in the first call and kept: they are no part of a forward.
            target(*inputs, **options)
            counter.traffic = Traffic()
        result = target(*inputs, **options)
        if training:
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            with counter.pause():
                ones = [torch.ones((), dtype=t.dtype, device=t.device).expand_as(t) for t in outputs]
            torch.autograd.backward(outputs, ones)
    return counter.traffic


@contextlib.contextmanager
def _put_back(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the block; then modes, buffers and gradients as they were."""
    modes = {module: module.training for module in model.modules()}
    switch = any(mode != training for mode in modes.values())
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()] if training else []
    for parameter, _ in gradients:
        parameter.grad = None
    if switch:
        model.train(training)
    try:
        yield
    finally:
        if switch:
            model.train(modes[model])
            for module, mode in modes.items():
                module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@dataclass(frozen=True)
class Comparison:
    """Two counts of the same work. ``ratio``: the fused network's bytes as a share of stock's."""

    stock: Traffic
    fast: Traffic
    title: str = ""

    @property
    def ratio(self) -> float:
        return self.fast.bytes / self.stock.bytes if self.stock.bytes else 1.0

    def rows(self, depth: int = 2) -> list[tuple[str, Moved, Moved]]:
        """(layer, stock, fused) in stock's order of execution; a layer that was fused away has zeros.

        depth: how many parts of the module path make a row (0: all of it).
        """
        stock, fast = self.stock.grouped(depth), self.fast.grouped(depth)
        layers = [*stock, *(layer for layer in fast if layer not in stock)]
        return [(layer, stock.get(layer, Moved()), fast.get(layer, Moved())) for layer in layers]

    def table(self, depth: int = 2) -> Any:
        """A ``rich`` table of the rows and the total."""
        from rich.table import Table

        table = Table(title=self.title or None, caption="counted, not measured: see fastnets.bench.traffic")
        table.add_column("layer", overflow="fold")
        for header in ("stock MiB", "fused MiB", "ratio", "launches", "GFLOP"):
            table.add_column(header, justify="right", no_wrap=True)
        for layer, stock, fast in self.rows(depth):
            table.add_row(layer or "(top level)", *_cells(stock, fast))
        table.add_section()
        table.add_row("total", *_cells(self.stock.total, self.fast.total), style="bold")
        if self.stock.saved_bytes or self.fast.saved_bytes:
            saved = (self.stock.saved_bytes, self.fast.saved_bytes)
            table.add_row("saved", *map(mebibytes, saved), _ratio(*saved))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def to_json(self) -> dict[str, Any]:
        """The totals and the layers, as plain numbers (bytes, FLOPs, launches)."""

        def plain(moved: Moved) -> dict[str, int]:
            return {"bytes": moved.bytes, **asdict(moved)}

        return {
            "title": self.title,
            "ratio": self.ratio,
            "stock": {**plain(self.stock.total), "saved_bytes": self.stock.saved_bytes},
            "fused": {**plain(self.fast.total), "saved_bytes": self.fast.saved_bytes},
            "layers": [
                {"layer": layer, "stock": plain(stock), "fused": plain(fast)}
                for layer, stock, fast in self.rows(depth=0)
            ],
        }


def compare(
    stock: nn.Module,
    fast: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    training: bool = False,
    title: str = "",
) -> Comparison:
    """Counts both networks on the same inputs (see ``count``); print the result for a table."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return Comparison(
        count(stock, *inputs, training=training), count(fast, *inputs, training=training), title=title
    )


def summary(comparisons: Iterable[Comparison]) -> Any:
    """A ``rich`` table with a line for each comparison."""
    from rich.table import Table

    table = Table(caption="counted, not measured: see fastnets.bench.traffic")
    table.add_column("network", overflow="fold")
    for header in ("stock MiB", "fused MiB", "ratio", "launches", "GFLOP"):
        table.add_column(header, justify="right", no_wrap=True)
    for comparison in comparisons:
        table.add_row(comparison.title, *_cells(comparison.stock.total, comparison.fast.total))
    return table


def _cells(stock: Moved, fast: Moved) -> list[str]:
    return [
        mebibytes(stock.bytes),
        mebibytes(fast.bytes) if fast.ops else "-",
        _ratio(stock.bytes, fast.bytes) if fast.ops else "",
        f"{stock.launches} → {fast.launches}",
        f"{stock.flops / 1e9:.2f}" if stock.flops else "",
    ]


def _ratio(stock: int, fast: int) -> str:
    return f"{fast / stock:.3f}" if stock else ""


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastnets.bench.traffic MODEL...``: prints stock beside fused; returns the exit status."""
    from rich.console import Console

    from fastnets.bench import networks

    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    found = []
    for name in options.models:
        try:
            network = networks.load(name, img_size=options.img_size)
            if options.training and options.device == "cuda":
                found.append(_count_ways(network, options))
                console.print(found[-1].table())
            found.append(_compare_layers(network, options))
        except (networks.UnknownNetwork, networks.MissingPackage, ValueError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        if not options.summary:
            console.print(found[-1].table(options.depth))
    if options.summary:
        console.print(summary(result for result in found if isinstance(result, Comparison)))
    if options.json is not None:
        options.json.write_text(json.dumps([result.to_json() for result in found], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastnets.bench.traffic",
        description="Count what a network moves, stock beside fused. Nothing is timed; no GPU is needed.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME, torchvision:NAME or timm:NAME")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, help="pixels of each side (the network's own by default)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, default="auto")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cuda: what a GPU would launch, counted on meta tensors (default); cpu: a real run on this CPU",
    )
    parser.add_argument(
        "--gpu", help="with --device cuda: the GPU that kernels are configured for, e.g. h100"
    )
    parser.add_argument("--training", action="store_true", help="a forward and backward pass in train mode")
    parser.add_argument(
        "--ways",
        metavar="WAY,...",
        help="with --training: the ways to count beside eager, all by default "
        "(eager, inductor, library, library-less, triton, triton-less); inductor takes minutes",
    )
    parser.add_argument("--depth", type=int, default=2, help="parts of the module path per row (0: all)")
    parser.add_argument("--summary", action="store_true", help="one line per network, not one per layer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every layer there")
    return parser


def _stock_and_inputs(network: Network, options: argparse.Namespace) -> tuple[nn.Module, Inputs, str]:
    """The stock network and its inputs where the options want them, and a title for what is counted."""
    from fastnets.bench.networks import arguments

    dtype = DTYPES[options.dtype]
    device = "meta" if options.device == "cuda" else "cpu"
    x = network.inputs(options.batch_size, dtype=dtype, device=device)
    what = "forward and backward" if options.training else "inference"
    shapes = " and ".join("×".join(map(str, t.shape)) for t in arguments(x))
    title = f"{network.name}, {what}, {shapes}, {str(dtype).removeprefix('torch.')}"
    return network.model.to(device=device, dtype=dtype), x, title


def _compare_layers(network: Network, options: argparse.Namespace) -> Comparison:
    from fastnets.fused.optimize import optimize

    stock, x, title = _stock_and_inputs(network, options)
    title += f", {options.device}, backend {options.backend}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.backend(options.backend))
        stack.enter_context(dispatch.assume_device_type(options.device))
        if options.gpu is not None:
            from fastnets.kernels.device import assume_device

            stack.enter_context(assume_device(options.gpu))
        return compare(stock, optimize(stock), x, training=options.training, title=title)


def _count_ways(network: Network, options: argparse.Namespace) -> StepTable:
    from fastnets.bench.step_traffic import WAYS, count_step

    stock, x, title = _stock_and_inputs(network, options)
    ways = options.ways.split(",") if options.ways is not None else tuple(WAYS)
    gpu = options.gpu or "h100"

    def tell(way: str) -> None:
        print(f"{network.name}: counting {way}", file=sys.stderr, flush=True)

    return count_step(stock, x, ways=ways, gpu=gpu, title=f"{title}, {gpu}", tell=tell)


if __name__ == "__main__":
    sys.exit(main())
