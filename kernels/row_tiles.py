"""Tensors as rows: the leading dims count rows, the trailing ones are a row's columns, a run of memory.

Kernels that work per row (layer norm) read rows of any strides without a copy: the leading dims are merged
where all tensors of a call allow it, into at most three, and a row's offset is found from what is left.
Strides come in units of a compile-time power of two, VEC, which is how the compiler learns that rows are
read in vectors. What is written is dense, [rows, N].
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width

__all__ = ["RowTiles", "clamp_columns", "columns_in_a_run", "row_start", "row_tiles", "strided_rows"]

_MOST_ROW_DIMS = 3


@triton.jit
def row_start(row, sizes, steps, ROW_DIMS: tl.constexpr, VEC: tl.constexpr):
    """Offsets of rows in a tensor with these steps: see ``RowTiles``."""
    if ROW_DIMS == 1:
        return row * steps[0] * VEC
    elif ROW_DIMS == 2:
        return ((row // sizes[1]) * steps[0] + (row % sizes[1]) * steps[1]) * VEC
    else:
        rest = row // sizes[1]
        start = (rest // sizes[0]) * steps[0] + (rest % sizes[0]) * steps[1] + (row % sizes[1]) * steps[2]
        return start * VEC


@triton.jit
def clamp_columns(n, inside, VEC: tl.constexpr):
    """Column 0 where masked; VEC columns are masked together and stay side by side."""
    return tl.max_contiguous(tl.multiple_of(tl.where(inside, n, 0), VEC), VEC)


class RowTiles(NamedTuple):
    """How the tensors of one call are read by rows.

    ``sizes``, ``steps`` (of each tensor) and ``units`` are arguments of the kernel, the latter columns in
    units of VEC; ``constexprs`` is what it is compiled for: ROW_DIMS, VEC and WIDE (offsets pass 2^31).
    """

    rows: int
    columns: int
    units: int
    sizes: tuple[int, int]
    steps: tuple[tuple[int, ...], ...]
    constexprs: dict


def columns_in_a_run(shape: tuple[int, ...], strides: tuple[int, ...], dims: int) -> bool:
    """Whether the last ``dims`` dims are one run of memory."""
    step = 1
    for size, stride in zip(shape[: -dims - 1 : -1], strides[: -dims - 1 : -1]):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@functools.lru_cache(maxsize=4096)
def row_tiles(
    shape: tuple[int, ...], dims: int, strides: tuple[tuple[int, ...], ...], itemsize: int
) -> RowTiles | None:
    """The tiles of tensors of one shape, rows of which end in ``dims`` dims; None where they need a copy.

    strides: of each tensor. itemsize: of the smallest element, in bytes.
    """
    leading = len(shape) - dims
    if not all(columns_in_a_run(shape, s, dims) for s in strides):
        return None
    merged: list[tuple[int, tuple[int, ...]]] = []
    for d in range(leading):
        size, at = shape[d], tuple(s[d] for s in strides)
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], at)):
            merged[-1] = (merged[-1][0] * size, at)
        else:
            merged.append((size, at))
    merged = merged or [(1, (0,) * len(strides))]
    if len(merged) > _MOST_ROW_DIMS:
        return None
    rows, columns = math.prod(shape[:leading]), math.prod(shape[leading:])
    vec = vector_width(itemsize, columns, *(step for _, at in merged for step in at))
    steps = tuple(tuple(at[i] // vec for _, at in merged) for i in range(len(strides)))
    sizes = [size for size, _ in merged[1:]]
    reach = max(sum((size - 1) * abs(at[i]) for size, at in merged) for i in range(len(strides)))
    # Masked rows and columns are clamped, so nothing reaches further; products of indices may.
    wide = max(reach, rows * columns) + 2**20 >= 2**31
    return RowTiles(
        rows,
        columns,
        columns // vec,
        (1, 1, *sizes)[-2:],
        steps,
        {"ROW_DIMS": len(merged), "VEC": vec, "WIDE": wide},
    )


def strided_rows(dims: int, *tensors: torch.Tensor | None) -> tuple[RowTiles, list[torch.Tensor | None]]:
    """The tiles of tensors of one shape, and the tensors: copies of those that are no rows of runs.

    A None among the tensors has the steps of the first one.
    """
    first = tensors[0]
    strides = tuple([first.stride() if t is None else t.stride() for t in tensors])
    itemsize = min([t.element_size() for t in tensors if t is not None])
    of = row_tiles(tuple(first.shape), dims, strides, itemsize)
    if of is not None:
        return of, tensors
    # One by one: the rows of the others may be read where they lie.
    copied = [
        t if t is None or columns_in_a_run(t.shape, t.stride(), dims) else t.contiguous() for t in tensors
    ]
    strides = tuple([copied[0].stride() if t is None else t.stride() for t in copied])
    of = row_tiles(tuple(first.shape), dims, strides, itemsize)
    if of is None:
        copied = [None if t is None else t.contiguous() for t in copied]
        strides = (copied[0].stride(),) * len(copied)
        of = row_tiles(tuple(first.shape), dims, strides, itemsize)
    return of, copied
