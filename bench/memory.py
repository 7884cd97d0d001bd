"""Peak memory of inference on the CPU: ``python -m fastnets.bench.memory [MODEL] [-b BATCH]``.

Each variant runs in a process of its own. After two forwards the kernel's high-water mark of resident pages
is reset, and what a third one reaches counts, above what the process held before it made the model. What
fastnets may need more than channels-last eager is what it packs: the convolution weights, once.
"""

from __future__ import annotations

import gc
import subprocess
import sys

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import fastnets
from fastnets.fused.measure import begin_resident_peak, resident_bytes
from fastnets.models import create_model

VARIANTS = ("eager", "eager, channels-last", "fastnets")


def peak_in_this_process(variant: str, name: str, batch: int, size: int) -> int:
    """MiB of resident pages, above those before the model, that this process reaches in a forward."""
    torch.manual_seed(0)
    with torch.inference_mode():  # what all this imports is not the network's
        fastnets.optimize(create_model("mobilenet_v2").eval())(torch.randn(2, 3, 32, 32))
    gc.collect()
    x = torch.randn(batch, 3, size, size)
    before = resident_bytes("VmRSS")
    net = create_model(name).eval()
    if variant == "eager, channels-last":
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if variant == "fastnets":
        net = fastnets.optimize(net, inplace=True)
    with torch.inference_mode():
        net(x)
        net(x)
        gc.collect()
        begin_resident_peak()
        net(x)
    return (resident_bytes("VmHWM") - before) >> 20


def measure_peak(variant: str, name: str, batch: int, size: int) -> int:
    """The same, MiB, in a fresh process."""
    call = f"peak_in_this_process({variant!r}, {name!r}, {batch}, {size})"
    program = f"from fastnets.bench import memory; print(memory.{call})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{variant}: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout)


def packed_bytes(net: nn.Module) -> int:
    """Bytes of the convolution weights, which the CPU library path keeps a packed copy of."""
    return sum(m.weight.nbytes for m in net.modules() if isinstance(m, nn.Conv2d))


def main(
    model: str = "resnet50", batch: int = typer.Option(8, "-b", "--batch-size"), img_size: int = 224
) -> None:
    """Peak memory of eager, channels-last eager and fastnets."""
    table = Table("variant", "peak with the model, MiB")
    for variant in VARIANTS:
        table.add_row(variant, str(measure_peak(variant, model, batch, img_size)))
    console = Console()
    console.print(table)
    console.print(f"packed convolution weights: {packed_bytes(create_model(model)) >> 20} MiB")


if __name__ == "__main__":
    typer.run(main)
