"""How the kernels of a linear layer begin and end: which rows of an operand a tile loads, the epilogue.

The epilogue, on the fp32 accumulator and before the one rounding, with every term but the first optional:

    y[m, n] = residual[m mod rows, n] + layer_scale[n] · act(acc[m, n] + bias[n])

or, where the product is a gradient, acc[m, n] · act'(u[m, n]) and the sums of its columns. A norm that reads
y can be given the statistics of its rows.
"""

import triton
import triton.language as tl

from fastnets.kernels.activation import activate, activation_backward
from fastnets.kernels.row_statistics import row_moments

__all__ = ["finish_tile", "operand_rows"]


@triton.jit
def finish_tile(
    acc, m, inside_m, first_n, N, y, terms, saved, negative_slope, sums, tile_m, statistics,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The epilogue of acc [rows, columns], fp32, stored to y, a row-major [M, N].

    Rows are m where inside_m, columns first_n on. terms: (bias, layer_scale, residual, its pitch, its rows),
    pointers or None; a residual of fewer rows than M repeats. saved: (z, u), both [M, N]: where the
    pre-activation goes, and the pre-activation whose act' the product is multiplied by, instead of being
    activated. sums: None, or [row tiles, N], where the sums of the tile's columns go. statistics: None, or
    where those of y's rows go, a part for each tile: see ``row_statistics``. HALVES: finish the left half of
    the columns before the right, which takes half the registers beside the accumulator.
    """
    if HALVES:
        BLOCK_M: tl.constexpr = acc.shape[0]
        BLOCK_N: tl.constexpr = acc.shape[1]
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _finish_columns(
            left, m, inside_m, first_n, N, y, terms, saved, negative_slope, sums, tile_m,
            statistics, ACTIVATION, INDEX,
        )  # fmt: skip
        _finish_columns(
            right, m, inside_m, first_n + BLOCK_N // 2, N, y, terms, saved, negative_slope, sums, tile_m,
            statistics, ACTIVATION, INDEX,
        )  # fmt: skip
    else:
        _finish_columns(
            acc, m, inside_m, first_n, N, y, terms, saved, negative_slope, sums, tile_m,
            statistics, ACTIVATION, INDEX,
        )  # fmt: skip


@triton.jit
def _finish_columns(
    acc, m, inside_m, first_n, N, y, terms, saved, negative_slope, sums, tile_m, statistics,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    bias, layer_scale, residual, residual_pitch, residual_rows = terms
    z, u = saved
    n = first_n + tl.arange(0, acc.shape[1])
    inside_n = n < N
    inside = inside_m[:, None] & inside_n[None, :]
    n = n.to(INDEX)
    offsets = (m * N)[:, None] + n[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        tl.store(z + offsets, acc.to(z.dtype.element_ty), mask=inside)
    if u is not None:
        acc = activation_backward(
            acc, tl.load(u + offsets, mask=inside, other=0.0).to(tl.float32), ACTIVATION, negative_slope
        )
    else:
        acc = activate(acc, ACTIVATION, negative_slope)
    if layer_scale is not None:
        acc *= tl.load(layer_scale + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        # Rows past the end are masked, but their remainder must be one of a row that is there.
        row = tl.where(inside_m, m, 0) % residual_rows
        lies_at = (row * residual_pitch)[:, None] + n[None, :]
        acc += tl.load(residual + lies_at, mask=inside, other=0.0).to(tl.float32)
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + offsets, rounded, mask=inside)
    if statistics is not None:
        WIDTH: tl.constexpr = acc.shape[1]
        count = tl.maximum(tl.minimum(N - first_n, WIDTH), 1).to(tl.float32)
        mean, squares = row_moments(rounded.to(tl.float32), inside, count)
        at = statistics + 2 * (m * tl.cdiv(N, WIDTH) + first_n // WIDTH)
        here = inside_m & (first_n + tl.zeros_like(m) < N)
        tl.store(at, mean, mask=here)
        tl.store(at + 1, squares, mask=here)
    if sums is not None:
        tl.store(sums + tile_m * N + n, tl.sum(tl.where(inside, acc, 0.0), 0), mask=inside_n)


@triton.jit
def operand_rows(row, rows, VECTOR: tl.constexpr):
    """Rows of an operand, those past the end replaced by ones that are there: they are never stored.

    VECTOR > 1: they are adjacent in memory, and load so many at a time.
    """
    if VECTOR == 1:
        return tl.minimum(row, rows - 1)
    return tl.max_contiguous(tl.multiple_of(tl.where(row < rows, row, row % VECTOR), VECTOR), VECTOR)
