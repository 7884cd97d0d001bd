"""The second pass of every reduction that many programs share: rows of fp32 partial sums, added in order.

    out[l] = Σ_t partial[t, l]        partial [T, L] fp32, out [L]

Each column is added by one program in a fixed order, so results are the same bits from run to run, however
the programs of the first pass were scheduled. Where rows are many and columns few, they are added in two
stages, each of which fills the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["configs", "representative_calls", "sum_rows"]

# Rows that one program adds before a second stage is worth its launch.
ROWS_PER_PROGRAM = 512

_WIDE = Config(BLOCK_T=16, BLOCK_L=256, num_warps=4, num_stages=1)
_TALL = Config(BLOCK_T=64, BLOCK_L=32, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["T", "L", "rows"])
def sum_rows_kernel(
    partial, out, T, L, rows,
    VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Row j of out [stages, L] = Σ of rows j·rows to (j+1)·rows of partial [T, L]. Grid (columns, stages).

    VECTOR divides L: what one access may take.
    """
    L = L // VECTOR * VECTOR
    column = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = column < L
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, T)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_L), tl.float32)
    for start in range(first, last, BLOCK_T):
        row = (start + t).to(tl.int64) * L
        mask = (start + t < last)[:, None] & inside[None, :]
        total += tl.load(partial + (row[:, None] + column[None, :]), mask=mask, other=0.0)
    to = tl.program_id(1).to(tl.int64) * L + column
    tl.store(out + to, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def sum_rows(partial: torch.Tensor, out: torch.Tensor, *, config: Config | None = None) -> torch.Tensor:
    """out = the sum of partial over its first dimension, in fp32, rounded once to out's dtype.

    partial: contiguous fp32 [T, ...], T > 0. out: as many elements as a row of partial, dense in the memory
    order that the rows have; it is written in that order whatever its shape. Returns out.
    """
    T = partial.shape[0]
    L = out.numel()
    if partial.dtype != torch.float32 or not partial.is_contiguous() or partial.numel() != T * L or T == 0:
        raise ValueError(
            f"partial {list(partial.shape)} {partial.dtype} must be contiguous float32 rows of {L} elements"
        )
    if config is None:
        config = _TALL if T >= 64 else _WIDE
    vector = 4 if L % 4 == 0 else 1
    stages = tiles(T, ROWS_PER_PROGRAM)
    if stages > 1:
        between = torch.empty((stages, L), dtype=torch.float32, device=partial.device)
        _add(partial, between, T, L, ROWS_PER_PROGRAM, vector, config)
        return sum_rows(between, out, config=config)
    _add(partial, out, T, L, T, vector, config)
    return out


def _add(partial, out, T, L, rows, vector, config) -> None:
    launch(
        sum_rows_kernel, (tiles(L, config.BLOCK_L), tiles(T, rows)), partial, out, T, L, rows,
        config=config, reads=(partial,), writes=(out,), VECTOR=vector,
    )  # fmt: skip


def configs(device: Device) -> list[Config]:
    """Both configs, on every device: rows for many columns and columns for many rows."""
    return [_WIDE, _TALL]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def call(name, T, L, dtype=torch.float32):
        def thunk(config: Config | None = None):
            partial = torch.empty((T, L), device="meta")
            return sum_rows(partial, torch.empty(L, dtype=dtype, device="meta"), config=config)

        return RepresentativeCall(name, thunk)

    return [
        call("channel sums of many tiles", 784, 128),
        call("a filter's gradient, bf16", 12, 64 * 576, torch.bfloat16),
        call("odd columns, fp16", 7, 147, torch.float16),
    ]
