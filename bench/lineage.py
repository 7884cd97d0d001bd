"""The tour of the lineage in ``docs/lineage.md``: ``python -m fastnets.bench.lineage``.

What each network brought is the first paragraph of its module; parameters and traffic are counted here, on
meta tensors, as a GPU would launch it: nothing is timed.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastnets.bench import networks
from fastnets.bench.traffic import Comparison, compare
from fastnets.fused import dispatch
from fastnets.fused.explain import explain
from fastnets.fused.optimize import optimize
from fastnets.kernels.device import assume_device

__all__ = ["LINEAGE", "Stop", "draw", "markdown", "visit"]

LINEAGE = (
    "lenet5",
    "alexnet_2012",
    "vgg16_bn",
    "nin",
    "googlenet_2014",
    "inception_v3",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "squeezenet1_0",
    "mobilenet_v1",
    "transformer",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "minilm_l6",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "dinov2_s_14",
    "eva02_b_14",
    "llama_small",
)
"""The networks of the tour, by year."""


@dataclass
class Stop:
    """One network of the tour. ``kinds``: how often each fused pattern occurs; ``stock``: what stays so."""

    name: str
    brought: str
    source: str
    parameters: int
    traffic: Comparison
    kinds: dict[str, int]
    stock: dict[str, int]
    coverage: float


def visit(name: str, *, batch_size: int, dtype: torch.dtype, gpu: str, img_size: int | None = None) -> Stop:
    """Builds, fuses and counts one network."""
    network = networks.load(name, img_size=img_size)
    stock = network.model.to(device="meta", dtype=dtype)
    x = network.inputs(batch_size, dtype=dtype, device="meta")
    with dispatch.assume_device_type("cuda"), assume_device(gpu):
        fast = optimize(stock)
        report = explain(fast, networks.arguments(x))
        traffic = compare(stock, fast, x, title=name)
    paragraphs = [p for p in _module_of(name).split("\n\n") if not p.startswith("=")]  # tables stay out
    return Stop(
        name,
        _one_line(paragraphs[0]),
        _one_line(paragraphs[1]) if len(paragraphs) > 1 else "",
        sum(p.numel() for p in stock.parameters()),
        traffic,
        dict(Counter(row.kind for row in report.rows if row.fused).most_common()),
        dict(Counter(f"{row.kind} ({row.reason})" for row in report.rows if not row.fused).most_common()),
        report.coverage,
    )


def _module_of(name: str) -> str:
    from fastnets.models import registry

    return inspect.getdoc(inspect.getmodule(registry._entry(name).build)) or name


def _one_line(text: str) -> str:
    return " ".join(text.split())


def draw(stops: Iterable[Stop], path: str | Path) -> None:
    """Bars of the bytes moved before and after, a pair for each network (.svg, .png)."""
    from matplotlib.figure import Figure

    stops = list(stops)
    figure = Figure(figsize=(9, 0.32 * len(stops) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(stops))
    shares = [stop.traffic.ratio for stop in stops]
    axes.barh(places, [1.0] * len(stops), color="#d5dde0", label="stock")
    axes.barh(places, shares, color="#00897b", label="fused")
    for place, share in zip(places, shares):
        axes.text(share + 0.01, place, f"{share:.2f}", va="center", fontsize=8)
    axes.set_yticks(places, [stop.name for stop in stops], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("bytes moved by one inference, as a share of stock's (counted)")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def markdown(stops: Iterable[Stop], conditions: str, picture: str) -> str:
    """The page: the table, the picture, and a section for each network."""
    stops = list(stops)
    lines = [
        "# The lineage",
        "",
        "From LeNet-5 to today, what each network brought, what `optimize` fuses in it, and the bytes that",
        "one inference moves before and after. The networks are in `models/`, in plain `torch.nn`.",
        "",
        f"*Counted, not measured: `python -m fastnets.bench.lineage`. {conditions}*",
        "",
        f"![bytes moved, fused over stock]({picture})",
        "",
        "| network | parameters | stock MiB | fused MiB | ratio | launches | FLOPs in fused layers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stop in stops:
        before, after = stop.traffic.stock.total, stop.traffic.fast.total
        lines.append(
            f"| [{stop.name}](#{stop.name}) | {stop.parameters:,} | {before.bytes / 2**20:,.1f} "
            f"| {after.bytes / 2**20:,.1f} | {stop.traffic.ratio:.3f} | {before.launches} → {after.launches} "
            f"| {stop.coverage:.1%} |"
        )
    for stop in stops:
        lines += ["", f"## {stop.name} {{#{stop.name}}}", "", stop.brought, "", stop.source, ""]
        lines.append(
            "Fused: " + (", ".join(f"{kind} × {n}" for kind, n in stop.kinds.items()) or "nothing") + "."
        )
        if stop.stock:
            lines.append("Stock: " + "; ".join(f"{why} × {n}" for why, n in stop.stock.items()) + ".")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and its picture, and prints the table as it goes."""
    parser = argparse.ArgumentParser(prog="python -m fastnets.bench.lineage", description=__doc__)
    parser.add_argument("models", nargs="*", default=LINEAGE, metavar="MODEL")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--gpu", default="h100", help="the GPU that kernels are configured for")
    parser.add_argument("--img-size", type=int, help="pixels of each side (the network's own by default)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/lineage.md"))
    options = parser.parse_args(arguments)
    stops = []
    for name in options.models:
        try:
            networks.refuse_unknown(name)
        except networks.UnknownNetwork as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
    for name in options.models:
        stop = visit(
            name,
            batch_size=options.batch_size,
            dtype=getattr(torch, options.dtype),
            gpu=options.gpu,
            img_size=options.img_size,
        )
        stops.append(stop)
        print(f"{name:22} {stop.traffic.ratio:.3f}  {stop.traffic.fast.launches} launches", flush=True)
    picture = options.output.with_suffix(".svg")
    draw(stops, picture)
    conditions = (
        f"Batch {options.batch_size}, {options.dtype}, the implementations that the heuristic takes on an "
        f"assumed {options.gpu}; torch {torch.__version__}."
    )
    options.output.write_text(markdown(stops, conditions, picture.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
