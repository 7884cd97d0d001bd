"""What one fused call costs the host: ``python -m fastnets.bench.host_cost``.

On feature maps of 4×4 pixels nothing but the calls themselves takes time. The baseline is the stock call of
the convolution alone: the difference is the price of everything fused behind it. Times are process CPU
time, since one thread never waits, and another process on the core then does not count.
"""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.measure import Comparison, measure

CHANNELS, PIXELS = 8, 4


def measure_host_cost(batch: int, grad: bool, rounds: int = 30) -> Comparison:
    """Times of the convolution alone, of the stock conv, BN and ReLU, and of the fused call; one thread."""
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    bn, act = nn.BatchNorm2d(CHANNELS).eval(), nn.ReLU()
    x = torch.randn(batch, CHANNELS, PIXELS, PIXELS).contiguous(memory_format=torch.channels_last)
    variants = {
        "convolution": lambda: conv(x),
        "stock": lambda: act(bn(conv(x))),
        "fused": lambda: call_conv_bn_act(conv, bn, act, x, None, "relu"),
    }
    with torch.set_grad_enabled(grad):
        return measure(variants, rounds=rounds, threads=1)


def overhead(comparison: Comparison, name: str = "fused") -> float:
    """Microseconds that a call of ``name`` takes beyond the convolution alone: the median over rounds."""
    pairs = zip(comparison.samples[name].cpu, comparison.samples["convolution"].cpu)
    return statistics.median(a - b for a, b in pairs) * 1e6


def main() -> None:
    """Print the table."""
    table = Table("batch", "gradients", "convolution, µs", "stock above it", "fused above it")
    for batch in (1, 2):
        for grad in (False, True):
            comparison = measure_host_cost(batch, grad)
            alone = statistics.median(comparison.samples["convolution"].cpu) * 1e6
            above = [f"{overhead(comparison, name):.1f}" for name in ("stock", "fused")]
            table.add_row(str(batch), "on" if grad else "off", f"{alone:.1f}", *above)
    Console().print(table)


if __name__ == "__main__":
    main()
