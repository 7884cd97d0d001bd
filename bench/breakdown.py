"""Where a network's time goes: each distinct fused layer by itself, stock beside fused.

The layers are timed on the tensors of a forward, as choosing by measurement does (``fused.selection``), and
their FLOPs and compulsory bytes are counted. Beside them stands the traffic of the whole network, counted on
meta tensors (``bench.traffic``). Times of single layers do not add up to the network's: caches are warm for
them, and what is between fused layers is not among them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastnets.bench import traffic
from fastnets.bench.ceilings import Ceilings, measure_ceilings
from fastnets.bench.networks import Inputs, arguments, first
from fastnets.bench.passes import nbytes, tensors_in
from fastnets.fused import dispatch, packing
from fastnets.fused.measure import measure
from fastnets.fused.selection import Calls

__all__ = ["Breakdown", "Layer", "break_down"]


@dataclass
class Layer:
    """One distinct layer: ``calls`` in a forward; seconds, FLOPs and compulsory bytes of one call.

    ``kind`` and ``shape`` are the op's name, and its sizes in buckets of powers of two.
    """

    kind: str
    shape: str
    calls: int = 0
    stock_seconds: float = 0.0
    fused_seconds: float = 0.0
    flops: int = 0
    moved: int = 0


@dataclass
class Breakdown:
    """The layers, the ceilings of the device they ran on, and bytes of a forward as counted."""

    layers: list[Layer] = field(default_factory=list)
    ceilings: Ceilings | None = None
    stock_traffic: int | None = None
    fused_traffic: int | None = None


class _Timed(Calls):
    def __init__(self, device: torch.device, seconds: float):
        super().__init__()
        self.layers: dict[tuple[str, str, str], Layer] = {}
        self.device, self.seconds = device, seconds

    def decided(self, func, args, decision, result):
        layer = self.layers.get(decision[:3])
        if layer is None:
            layer = self.layers[decision[:3]] = Layer(decision.op, decision.shape)
            self._measure(layer, func, args, result)
        layer.calls += 1
        return result

    def _measure(self, layer: Layer, func, args: tuple, result: Tensor) -> None:
        calls = {
            "stock": lambda: func(*args[:-1], "reference"),
            "fused": lambda: func(*args[:-1], dispatch.UNMEASURED),
        }
        found = measure(calls, device=self.device, rounds=7, visit_seconds=0.004, max_seconds=self.seconds)
        if found.interrupted:
            raise KeyboardInterrupt
        layer.stock_seconds, layer.fused_seconds = (found.samples[name].median for name in calls)
        formula = torch.utils.flop_counter.flop_registry.get(func._overloadpacket)
        layer.flops = formula(*args, out_val=result) if formula is not None else 0
        layer.moved = sum(map(nbytes, tensors_in([*args, result])))


def break_down(stock: nn.Module, x: Inputs, seconds_per_layer: float = 0.4) -> Breakdown:
    """Take the fused form of ``stock``, in eval mode on x's device, apart on the batch x."""
    import fastnets

    found = Breakdown()
    fast = fastnets.optimize(stock)
    device, dtype = first(x).device, next(p.dtype for p in stock.parameters() if p.is_floating_point())
    images = x.contiguous(memory_format=torch.channels_last) if first(x).dim() == 4 else x
    with torch.inference_mode():
        packing.bump()
        with _Timed(device, seconds_per_layer) as timed:
            fast(*arguments(images))
    found.layers = list(timed.layers.values())
    found.ceilings = measure_ceilings(device, dtype, rounds=5)
    counted = _traffic(stock, x)
    if counted is not None:
        found.stock_traffic, found.fused_traffic = counted
    return found


def _traffic(stock: nn.Module, x: Inputs) -> tuple[int, int] | None:
    """Bytes of a stock and a fused forward; None where the network does not run on meta tensors."""
    import fastnets

    try:
        twin = copy.deepcopy(stock).to("meta")
        images = tuple(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in arguments(x))
        with dispatch.assume_device_type(first(x).device.type):
            both = traffic.compare(twin, fastnets.optimize(twin, select="shipped"), images)
    except Exception:  # the network may look at values
        return None
    return both.stock.bytes, both.fast.bytes
