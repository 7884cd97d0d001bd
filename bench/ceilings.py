"""What the device at hand can do at best, measured: copy bandwidth and matrix products.

A kernel's bytes or FLOPs per second say little by themselves; beside these two they say how much is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastnets.fused.measure import measure

__all__ = ["Ceilings", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """``bytes_per_second`` of a large copy, reads and writes counted; ``flops`` per second of a large square
    matrix product in ``dtype``, on random numbers."""

    device: str
    dtype: str
    bytes_per_second: float
    flops: float

    def seconds(self, moved: int, flops: int) -> float:
        """The least time for so many bytes and FLOPs: the longer of the two."""
        return max(moved / self.bytes_per_second, flops / self.flops)

    def __str__(self) -> str:
        return (
            f"ceilings of {self.device}, measured: copy {self.bytes_per_second / 1e9:,.0f} GB/s, "
            f"{self.dtype} matrix product {self.flops / 1e12:,.2f} TFLOP/s"
        )


def measure_ceilings(device: torch.device | str, dtype: torch.dtype, rounds: int = 7) -> Ceilings:
    """Measures both on ``device``: a few seconds. float32 follows torch's TF32 switches, as products do."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    source = torch.randn((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    N = 8192 if on_gpu else 1536
    a, b = (torch.randn(N, N, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b)}
    with torch.inference_mode():
        found = measure(calls, device=device, rounds=rounds, max_seconds=5)
    if found.interrupted:
        raise KeyboardInterrupt
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(
        str(device),
        str(dtype).removeprefix("torch."),
        moved / found.samples["copy"].median,
        2 * N**3 / found.samples["product"].median,
    )
