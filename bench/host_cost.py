"""What one fused call costs the host: ``python -m fastnets.bench.host_cost``, ``--cuda-path`` for CUDA's.

On feature maps of 4×4 pixels nothing but the calls themselves takes time. The baseline is the stock call of
the convolution alone: the difference is the price of everything fused behind it. Times are process CPU
time, since one thread never waits, and another process on the core then does not count.

``--cuda-path`` measures calls that launch our kernels. Where there is a GPU they are launched; elsewhere a
Triton driver stands in that compiles for sm_90 and launches nothing, so that all is counted but the driver's
own launch. The convolution beside it is then the CPU's, and says little.

``--network NAME`` is a whole optimized forward on that path, of few and small images, with what stays stock
in it on the CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import types
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastnets.bench.networks import arguments, load
from fastnets.fused import dispatch
from fastnets.fused.attention import attention
from fastnets.fused.batch_norm import bn_add_act_inference
from fastnets.fused.conv import call_conv_bn_act
from fastnets.fused.measure import Comparison, measure
from fastnets.fused.optimize import optimize

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


def measure_cuda_path(rounds: int = 30) -> Comparison:
    """Times of fused inference calls that launch our kernels, of each kind, and of a stock convolution."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16

    def layer(channels: int, filters: int, taps: int, **options) -> tuple:
        conv = nn.Conv2d(channels, filters, taps, bias=False, **options)
        modules = (conv, nn.BatchNorm2d(filters), nn.ReLU())
        return tuple(m.to(device, dtype, memory_format=torch.channels_last).eval() for m in modules)

    def image(channels: int, pixels: int = PIXELS) -> torch.Tensor:
        x = torch.randn(2, channels, pixels, pixels, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    pointwise, depthwise = layer(64, 64, 1), layer(64, 64, 3, padding=1, groups=64)
    stem, (conv, bn, _) = layer(3, 64, 7, padding=3, stride=2), layer(64, 64, 3, padding=1)
    x, residual, picture = image(64), image(64), image(3, 16)
    q, k, v, dout = (torch.randn(2, 4, 16, 64, device=device, dtype=dtype) for _ in range(4))
    saved = (0.125, -1, -1, False, 0.0, 0.0, False, "triton")
    out, lse = torch.randn_like(q), torch.zeros(2, 4, 16, device=device)
    vectors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    variants = {
        "stock convolution": lambda: conv(x),
        "conv 1×1 + BN + ReLU": lambda: call_conv_bn_act(*pointwise, x, None, "relu"),
        "conv 1×1 + BN + add + ReLU": lambda: call_conv_bn_act(*pointwise, x, residual, "relu"),
        "conv 7×7/2 of 3 channels + BN + ReLU": lambda: call_conv_bn_act(*stem, picture, None, "relu"),
        "depthwise conv 3×3 + BN + ReLU": lambda: call_conv_bn_act(*depthwise, x, None, "relu"),
        "BN + add + ReLU": lambda: bn_add_act_inference(
            x, None, *vectors, residual, 1e-5, "relu", 0.0, "triton"
        ),
        "attention": lambda: attention(q, k, v),
        "attention, backward": lambda: torch.ops.fastnets.attention_backward(
            dout, None, q, k, v, out, lse, *(None,) * 6, *saved
        ),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(dispatch.backend("triton"))
        if device == "cpu":
            stack.enter_context(dry_launches())
        return measure(variants, rounds=rounds, threads=1)


def measure_network(name: str, rounds: int = 20) -> tuple[list[float], int]:
    """Seconds of host time of forwards of an optimized network all on our kernels, and their launches."""
    from fastnets.kernels.launch import observe_launches

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    network = load(name)
    stock = network.model.to(device, dtype, memory_format=torch.channels_last).eval()

    def image(size: int) -> tuple[torch.Tensor]:
        x = torch.randn(2, network.input_shape[0], size, size, device=device, dtype=dtype)
        return (x.contiguous(memory_format=torch.channels_last),)

    if len(network.input_shape) != 3:
        inputs = arguments(network.inputs(2, dtype=dtype, device=device))
    else:
        inputs = image(min(64, network.input_shape[1]))
        try:
            with torch.no_grad():
                stock(*inputs)
        except (RuntimeError, ValueError):  # it takes images of one size
            inputs = image(network.input_shape[1])
    fast = optimize(stock, inplace=True, backend="triton")
    launches = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device == "cpu":
            stack.enter_context(dry_launches())
        with observe_launches(launches.append):
            fast(*inputs)
        comparison = measure({"fused": lambda: fast(*inputs)}, rounds=rounds, threads=1)
    return comparison.samples["fused"].cpu, len(launches)


@contextlib.contextmanager
def dry_launches(launched: list | None = None) -> Iterator[None]:
    """Launches inside specialise, compile for sm_90 and end there; their arguments go to ``launched``."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from fastnets.kernels.device import assume_device

    def launcher(source, metadata):
        if launched is None:
            return lambda *arguments: None
        return lambda *arguments: launched.append(arguments)

    class DryDriver:
        launcher_cls = staticmethod(launcher)
        utils = types.SimpleNamespace(
            load_binary=lambda *arguments: (None, 1, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 910_090  # kernels compiled in this process are kept per device number

        def get_current_stream(self, device=None):
            return 0

    before = driver._active
    driver.set_active(DryDriver())
    try:
        with assume_device("h200"):
            yield
    finally:
        driver._active = before


def network_table(name: str) -> Table:
    """Microseconds of host time per forward, median and least."""
    seconds, launches = measure_network(name)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: nothing is launched"
    table = Table(where, "launches of ours", "median, µs of the host", "least", "median per launch")
    median = statistics.median(seconds) * 1e6
    times = (f"{median:.0f}", f"{min(seconds) * 1e6:.0f}", f"{median / launches:.1f}")
    table.add_row(name, str(launches), *times)
    return table


def overhead(comparison: Comparison, name: str = "fused") -> float:
    """Microseconds that a call of ``name`` takes beyond the convolution alone: the median over rounds."""
    pairs = zip(comparison.samples[name].cpu, comparison.samples["convolution"].cpu)
    return statistics.median(a - b for a, b in pairs) * 1e6


def cuda_table() -> Table:
    """Microseconds of host time per call, median and least."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: nothing is launched"
    table = Table(where, "median, µs of the host", "least")
    for name, samples in measure_cuda_path().samples.items():
        times = [seconds * 1e6 for seconds in samples.cpu]
        table.add_row(name, f"{statistics.median(times):.1f}", f"{min(times):.1f}")
    return table


def cpu_table() -> Table:
    """What the fused call costs above the convolution's, with and without gradients."""
    table = Table("batch", "gradients", "convolution, µs", "stock above it", "fused above it")
    for batch in (1, 2):
        for grad in (False, True):
            comparison = measure_host_cost(batch, grad)
            alone = statistics.median(comparison.samples["convolution"].cpu) * 1e6
            above = [f"{overhead(comparison, name):.1f}" for name in ("stock", "fused")]
            table.add_row(str(batch), "on" if grad else "off", f"{alone:.1f}", *above)
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuda-path", action="store_true", help="calls that launch our kernels")
    parser.add_argument("--network", metavar="NAME", help="whole forwards, all on our kernels")
    arguments = parser.parse_args()
    if arguments.network:
        Console().print(network_table(arguments.network))
    else:
        Console().print(cuda_table() if arguments.cuda_path else cpu_table())


if __name__ == "__main__":
    main()
