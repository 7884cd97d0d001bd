"""Mean and squared deviations of rows, whole or in parts: what a norm at the head of a linear layer reads.

    statistics[m, t] = (mean, Σ (x − mean)²) of x[m, t·W : (t + 1)·W]

x [M, K], statistics fp32 [M, T, 2]; W is the least power of two with T·W ≥ K, so that T tells it. The parts
of a row are merged where they are read (``scale_of_rows``), by Chan's formula: their order is fixed, and what
rounding leaves in a mean is taken off as in ``layer_norm``, so that rows with a mean of 10^6 deviations lose
nothing. They come from ``row_statistics_kernel``, which reads x once (T = 1), or from the epilogue of the
product that makes x (``linear_tile``), a part for each tile of columns.

``linear`` normalises with them as it loads x, and so the norm's result is neither written nor read.
After Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm", 1979.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.channel_tiles import contiguous_vectors
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.layer_norm import check_rows, inverse_deviation, is_wide, pick_config
from fastnets.kernels.layer_norm import configs as layer_norm_configs
from fastnets.kernels.row_tiles import clamp_columns, row_start, strided_rows

__all__ = [
    "Norm",
    "check_norm",
    "configs",
    "normalise_tile",
    "representative_calls",
    "row_moments",
    "row_statistics",
    "scale_of_rows",
    "width_of_parts",
]


class Norm(NamedTuple):
    """A layer norm (an RMS norm where not ``centred``) of rows of K columns, before something reads them.

    weight, bias: [K] of any float dtype, or None. statistics: as above, where somebody has made them.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    centred: bool = True
    statistics: torch.Tensor | None = None


@triton.jit
def row_moments(value, mask, count):
    """(mean, Σ (value − mean)²) of the rows of a tile, of the ``count`` ≥ 1 columns where mask."""
    center = tl.sum(tl.where(mask, value, 0.0), 1) / count
    deviation = tl.where(mask, value - center[:, None], 0.0)
    rest = tl.sum(deviation, 1) / count
    deviation = tl.where(mask, deviation - rest[:, None], 0.0)
    return center + rest, tl.sum(deviation * deviation, 1)


@triton.jit
def scale_of_rows(statistics, m, K, eps, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """(mean, 1 / deviation) of rows m, fp32; the mean of RMS norm is 0."""
    parts = tl.cdiv(K, WIDTH)
    at = statistics + m * (2 * parts)
    first = tl.load(at)
    mean = tl.zeros_like(first)
    if CENTRED:
        for part in range(1, parts):
            count = tl.minimum(K - part * WIDTH, WIDTH).to(tl.float32)
            mean += count * (tl.load(at + 2 * part) - first)
        mean = first + tl.div_rn(mean, tl.zeros_like(mean) + K)
    squares = tl.zeros_like(first)
    for part in range(parts):
        count = tl.minimum(K - part * WIDTH, WIDTH).to(tl.float32)
        apart = tl.load(at + 2 * part) - mean
        squares += tl.load(at + 2 * part + 1) + count * apart * apart
    return mean, inverse_deviation(squares, K, eps)


@triton.jit
def normalise_tile(a, mean, scale, weight, bias, k, present, EVEN_K: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of x's columns k, normalised and rounded as a norm's result is; zeros where not present."""
    wide = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
    if EVEN_K:
        if weight is not None:
            wide *= tl.load(weight + k).to(tl.float32)[None, :]
        if bias is not None:
            wide += tl.load(bias + k).to(tl.float32)[None, :]
    else:
        if weight is not None:
            wide *= tl.load(weight + k, mask=present, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            wide += tl.load(bias + k, mask=present, other=0.0).to(tl.float32)[None, :]
        wide = tl.where(present[None, :], wide, 0.0)
    return wide.to(DTYPE)


@triton.jit(do_not_specialize=["rows", "units", "sizes", "x_steps"])
def row_statistics_kernel(
    x, statistics, rows, units, sizes, x_steps,
    ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK_ROWS rows, each whole in registers: see ``row_tiles``."""
    N = units * VEC
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    mask = valid[:, None] & inside[None, :]
    read = tl.where(valid, row, 0)
    if WIDE:
        read = read.to(tl.int64)
    n = clamp_columns(n, inside, VEC)
    x_at = row_start(read, sizes, x_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
    value = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    mean, squares = row_moments(value, mask, N.to(tl.float32))
    tl.store(statistics + 2 * read, mean, mask=valid)
    tl.store(statistics + 2 * read + 1, squares, mask=valid)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: a norm's own."""
    return layer_norm_configs(device)


def row_statistics(x: torch.Tensor, *, config: Config | None = None) -> torch.Tensor:
    """(mean, squared deviations) of x's rows [..., K], K at most 16384 -> fp32 [M, 1, 2], in one read.

    x: fp32, fp16 or bf16, any strides. config: one of ``configs``, or None.
    """
    check_rows("row_statistics", x, 1)
    K = x.shape[-1]
    if not 0 < K or is_wide(K):
        raise UnsupportedConfig(f"row_statistics: rows of {K} columns, 1 to 16384 are served")
    of, (x,) = strided_rows(1, x)
    statistics = torch.empty((of.rows, 1, 2), dtype=torch.float32, device=x.device)
    multiprocessors = 0 if config is not None else current_device(x).multiprocessors
    config = pick_config(of.rows, of.columns, config, multiprocessors)
    launch(
        row_statistics_kernel, (tiles(of.rows, config.BLOCK_ROWS),), x, statistics, of.rows, of.units,
        of.sizes, *of.steps, config=config, reads=(x,), writes=(statistics,), **of.constexprs,
    )  # fmt: skip
    return statistics


def width_of_parts(K: int, parts: int) -> int:
    """The columns of a part, where a row of K has so many parts."""
    return 1 << (tiles(K, parts) - 1).bit_length()


def check_norm(norm: Norm, x: torch.Tensor) -> Norm:
    """The norm with the statistics of x [..., K], computed where it has none, and vectors as kernels read
    them. Raises ``ValueError`` for what does not fit x."""
    K = x.shape[-1]
    M = x.numel() // K if K else 0
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.shape != (K,):
            raise ValueError(f"the norm's {name} has shape {list(vector.shape)}, expected [{K}]")
    statistics = norm.statistics
    if statistics is None:
        statistics = row_statistics(x)
    elif (
        statistics.dim() != 3
        or (statistics.shape[0], statistics.shape[2]) != (M, 2)
        or statistics.dtype != torch.float32
        or not statistics.is_contiguous()
        or not 1 <= statistics.shape[1] <= K
        or tiles(K, width_of_parts(K, statistics.shape[1])) != statistics.shape[1]
    ):
        raise ValueError(
            f"statistics are {list(statistics.shape)} {statistics.dtype}, expected contiguous fp32 "
            f"[{M}, parts, 2] of rows of {K} columns"
        )
    weight, bias = contiguous_vectors(norm.weight, norm.bias)
    return norm._replace(weight=weight, bias=bias, statistics=statistics)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the widths that networks have: see ``kernels``."""

    def call(rows, columns, dtype, transposed=False):
        def thunk(config=None):
            x = torch.empty(rows, columns, dtype=dtype, device="meta")
            if transposed:
                x = torch.empty(rows // 8, 8, columns, dtype=dtype, device="meta").transpose(0, 1)
            return row_statistics(x, config=config)

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("odd columns, fp32", call(4096, 27, full)),
        ("48 columns", call(4096, 48, half)),
        ("96 columns", call(32 * 56 * 56, 96, bf16)),
        ("192 columns", call(32 * 197, 192, half)),
        ("384 columns, fp32", call(32 * 197, 384, full)),
        ("768 columns, transposed", call(32 * 200, 768, bf16, transposed=True)),
        ("768 columns, fp32", call(32 * 197, 768, full)),
        ("1280 columns, fp32", call(4096, 1280, full)),
        ("4096 columns", call(4096, 4096, bf16)),
        ("8192 columns, fp32", call(4096, 8192, full)),
        ("16384 columns, fp32", call(1024, 16384, full)),
        ("past 2^31 elements", call(1 << 22, 768, half)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
