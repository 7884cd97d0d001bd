"""The gradient of a depthwise convolution's weight, as a direct sum in fp32.

    dw[k, 0, r, s] = Σ_{n, p, q} dy[n, k, p, q] · x[n, k / m, h, w]       h + pad = p·stride + r·dilation

R·S sums over all pixels, for each of K channels: nothing for matrix units. A program keeps ROWS × COLUMNS
taps of BLOCK_K filters in registers (all of a 3×3 or 5×5 filter) while it goes over its share of the pixels,
in tiles of BLOCK_M columns of BLOCK_P pixels one below the other: a row of x, loaded once for a filter
column, meets every gradient of its column. Shares write fp32 partial sums, which ``partial_sums`` adds in
order. There are as many as fill the device, unless that makes the workspace more than a tenth of dy and x.

With a prologue x is z, the output of an earlier convolution, and act(bn(z)) is computed as it is loaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import (
    INT32_ELEMENTS,
    ConvShape,
    Prologue,
    convolution_shape,
    span,
    stepping,
    vector_width,
)
from fastnets.kernels.conv_tile import aligned, channel_vectors, normalized, within
from fastnets.kernels.depthwise import block_configs, filter_row, is_used, pick_config
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles
from fastnets.kernels.partial_sums import sum_rows

__all__ = ["configs", "depthwise_weight_gradient", "representative_calls"]

_SIZES = (*("N", "K", "H", "W", "P", "Q", "tiles_each", "dy_n", "dy_p", "dy_q", "x_n", "x_h", "x_w"),)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("dy_k", "x_c"))
def depthwise_weight_gradient_kernel(
    dy, x, partial, mean, rstd, bn_weight, bn_bias,
    N, K, H, W, P, Q, tiles_each, dy_n, dy_k, dy_p, dy_q, x_n, x_c, x_h, x_w, negative_slope,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, VECTOR_DY: tl.constexpr, VECTOR_X: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Partial sums of ROWS × COLUMNS taps of BLOCK_K filters, over tiles_each tiles of columns.

    Grid (channel tiles · blocks of taps, shares); partial [shares, K, R·S] fp32. VECTOR divides K. mean to
    bn_bias, negative_slope and ACTIVATION: x is normalised while it is loaded (``Prologue``), or None.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    BLOCKS_R: tl.constexpr = (R + ROWS - 1) // ROWS
    REACH: tl.constexpr = (BLOCK_P - 1) * STRIDE_H + (ROWS - 1) * DILATION_H + 1  # rows of x under a column
    K = aligned(K, VECTOR, tl.int32)
    dy_n = aligned(dy_n, VECTOR_DY, INDEX)
    dy_p = aligned(dy_p, VECTOR_DY, INDEX)
    dy_q = aligned(dy_q, VECTOR_DY, INDEX)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    x_w = aligned(x_w, VECTOR_X, INDEX)
    k_tiles = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) // k_tiles
    r_0 = block % BLOCKS_R * ROWS
    s_0 = block // BLOCKS_R * COLUMNS
    k = tl.program_id(0) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_k = k < K
    c = k
    if MULTIPLIER > 1:
        c = k // MULTIPLIER
    if mean is not None:
        vectors = channel_vectors(c, inside_k, (mean, rstd, bn_weight, bn_bias))
    row_tiles = tl.cdiv(P, BLOCK_P)

    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    first = tl.program_id(1) * tiles_each
    m = first.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in range(tiles_each):
        q = m % Q
        n = m // Q // row_tiles
        p_0 = m // Q % row_tiles * BLOCK_P
        inside_m = n < N
        gradients = ()
        for p in tl.static_range(BLOCK_P):
            at = dy + (n * dy_n + (p_0 + p) * dy_p + q * dy_q)[:, None] + (k.to(INDEX) * dy_k)[None, :]
            inside = (inside_m & (p_0 + p < P))[:, None] & inside_k[None, :]
            gradients = gradients + (tl.load(at, mask=inside, other=0.0),)
        h_0 = p_0 * STRIDE_H - PAD_H + r_0 * DILATION_H
        w_0 = q * STRIDE_W - PAD_W + s_0 * DILATION_W
        image = x + (n * x_n)[:, None] + (c.to(INDEX) * x_c)[None, :]
        for column in tl.static_range(COLUMNS):
            w = w_0 + column * DILATION_W
            inside_w = inside_m & within(w, W)
            for row in tl.static_range(REACH):
                if is_used(row, BLOCK_P, STRIDE_H, DILATION_H, ROWS):
                    h = h_0 + row
                    inside = (inside_w & within(h, H))[:, None] & inside_k[None, :]
                    value = tl.load(image + (h * x_h + w * x_w)[:, None], mask=inside, other=0.0)
                    if mean is not None:
                        value = normalized(value, inside, vectors, negative_slope, ACTIVATION)
                    value = value.to(tl.float32)
                    sums = _add_taps(
                        sums, value, gradients, row, column, ROWS, COLUMNS, STRIDE_H, DILATION_H, BLOCK_P
                    )
        m += BLOCK_M

    to = partial + (tl.program_id(1).to(tl.int64) * K + k) * (R * S)
    for r in tl.static_range(ROWS):
        for s in tl.static_range(COLUMNS):
            mask = inside_k & (r_0 + r < R) & (s_0 + s < S)
            tl.store(to + (r_0 + r) * S + s_0 + s, tl.sum(sums[r * COLUMNS + s], 0), mask=mask)


@triton.jit
def _add_taps(
    sums, value, gradients, row: tl.constexpr, column: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sums [ROWS · COLUMNS] and what row ``row`` of x, under filter column ``column``, adds to its taps."""
    result = ()
    for r in tl.static_range(ROWS):
        for s in tl.static_range(COLUMNS):
            tap = sums[r * COLUMNS + s]
            if s == column:
                for p in tl.static_range(BLOCK_P):
                    if filter_row(row, p, STRIDE, DILATION, ROWS) == r:
                        tap += value * gradients[p].to(tl.float32)
            result = result + (tap,)
    return result


# Elements of a tile of one row: half of the forward's, as there is a sum in registers for every tap.
_ELEMENTS = 512
# Registers of a thread that those sums and the loads in flight may take (fewer where what is loaded is first
# computed with), and filter rows of one block of taps.
_REGISTERS = {"products": 180, "normalised products": 110}
_MAX_ROWS = 7
# Blocks that a multiprocessor may hold at once.
_BLOCKS_PER_MULTIPROCESSOR = 4


def depthwise_weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight_shape: Sequence[int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int | None = None,
    prologue: Prologue | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """``conv_backward.conv_weight_gradient``, which checks the operands, for weight_shape [K, 1, R, S].

    Returns dw, dense channels-last. Where an image's rows do not fill a tile's, a gradient of 0 may meet
    pixels that it has no part in; if those are not finite, dw is NaN at more taps than stock's.

    config: one of ``configs``; splits: shares of the pixels.
    """
    shape = depthwise_shape(x.shape, weight_shape, stride, padding, dilation, groups)
    dtype = dy.dtype if dtype is None else dtype
    size = tuple(weight_shape)
    dw = torch.empty(size, dtype=dtype, device=dy.device, memory_format=torch.channels_last)
    if dy.numel() == 0:
        return dw.zero_()
    multiprocessors = current_device(dy).multiprocessors
    plan = _plan_weight_gradient(
        shape, (dy.stride(), x.stride()), dy.element_size(), prologue is not None, config, splits,
        multiprocessors,
    )  # fmt: skip
    partial = torch.empty((plan.parts, *size), dtype=torch.float32, device=dy.device)
    vectors = (None,) * 4 if prologue is None else prologue.tensors
    activation, slope = ("none", 0.0) if prologue is None else (prologue.activation, prologue.negative_slope)
    launch(
        depthwise_weight_gradient_kernel, plan.grid,
        dy, x, partial, *vectors, *plan.sizes_and_strides, slope,
        config=plan.config, reads=(dy, x, *vectors), writes=(partial,), flops=shape.flops,
        ACTIVATION=activation, **plan.constexprs,
    )  # fmt: skip
    return sum_rows(partial, dw)


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides; parts: rows of partial sums."""

    grid: tuple[int, ...]
    config: Config
    parts: int
    sizes_and_strides: tuple[int, ...]
    constexprs: dict[str, object]


def depthwise_shape(x, weight, stride, padding, dilation, groups) -> ConvShape:
    shape = convolution_shape(x, weight, stride, padding, dilation, x[1] if groups is None else groups)
    if shape.groups != shape.C:
        raise ValueError(f"groups={groups} is not depthwise for {shape.C} channels; use conv_backward")
    return shape


def wide_offsets(*extents: int) -> bool:
    """Whether offsets into tensors that reach so far need 64 bits."""
    # Tiles overhang the image by a column and a halo.
    return 2 * max(extents) > INT32_ELEMENTS


@functools.lru_cache(maxsize=4096)
def _plan_weight_gradient(
    shape, strides, element_size, normalises, config, splits, multiprocessors
) -> Plan:  # fmt: skip
    """strides: of dy and x, which have the same element_size."""
    sizes = ((shape.N, shape.K, shape.P, shape.Q), (shape.N, shape.C, shape.H, shape.W))
    extents = [span(size, s) for size, s in zip(sizes, strides)]
    dy, x = (stepping(size, s) for size, s in zip(sizes, strides))
    if config is None:
        config = pick_config(shape.N, shape.K, shape.P, shape.Q, True, 0, _ELEMENTS)
    if config.maxnreg is None:
        # Left to itself, ptxas spills sums to fit one more block.
        config = config.replace(maxnreg=255)
    rows = min(shape.R, _MAX_ROWS)
    elements = config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps)
    reach = (config.BLOCK_P - 1) * shape.stride[0] + (rows - 1) * shape.dilation[0] + 1
    loads = min(reach, config.BLOCK_P * rows)
    of_a_column = elements * rows + loads * elements * element_size // 4
    registers = _REGISTERS["normalised products" if normalises else "products"]
    blocks_s = tiles(shape.S, max(1, registers // of_a_column))
    columns = tiles(shape.S, blocks_s)
    programs = tiles(shape.K, config.BLOCK_K) * tiles(shape.R, rows) * blocks_s
    column_tiles = tiles(shape.N * tiles(shape.P, config.BLOCK_P) * shape.Q, config.BLOCK_M)
    if splits is None:
        moved = element_size * sum(math.prod(size) for size in sizes)
        within_a_tenth = moved // (10 * 2 * 4 * shape.K * shape.taps)  # written and read, 4 bytes each
        least = tiles(multiprocessors, programs)
        splits = min(_BLOCKS_PER_MULTIPROCESSOR * least, max(within_a_tenth, least))
    tiles_each = tiles(column_tiles, splits)
    shares = tiles(column_tiles, tiles_each)
    same = shape.C == shape.K
    constexprs = {
        **shape.geometry,
        "MULTIPLIER": shape.group_outputs,
        "ROWS": rows,
        "COLUMNS": columns,
        "VECTOR": vector_width(2, shape.K),
        "VECTOR_DY": vector_width(element_size, shape.K, dy[0], *dy[2:]) if dy[1] == 1 else 1,
        "VECTOR_X": vector_width(element_size, shape.C, x[0], *x[2:]) if x[1] == 1 and same else 1,
        "WIDE": wide_offsets(*extents),
    }
    return Plan(
        grid=(programs, shares),
        config=config,
        parts=shares,
        sizes_and_strides=(*(shape.N, shape.K, shape.H, shape.W, shape.P, shape.Q, tiles_each, *dy, *x),),
        constexprs=constexprs,
    )


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return block_configs(_ELEMENTS)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the geometries that networks have: see ``kernels``."""
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32

    def call(
        name, C, size, R, dtype, stride=1, dilation=1, multiplier=1, activation=None,
        memory_format=torch.channels_last, N=32,
    ):  # fmt: skip
        def thunk(config: Config | None = None):
            def tensor(*sizes):
                return torch.empty(sizes, dtype=dtype, device="meta").to(memory_format=memory_format)

            padding = R // 2 * dilation
            P = (size + 2 * padding - dilation * (R - 1) - 1) // stride + 1
            prologue = None
            if activation is not None:
                prologue = Prologue(*(torch.empty(C, device="meta") for _ in range(4)), activation)
            return depthwise_weight_gradient(
                tensor(N, multiplier * C, P, P), tensor(N, C, size, size), (multiplier * C, 1, R, R),
                stride=(stride, stride), padding=(padding, padding), dilation=(dilation, dilation),
                prologue=prologue, config=config,
            )  # fmt: skip

        return RepresentativeCall(name, thunk)

    return [
        call("3x3 fp16", 144, 56, 3, half),
        call("3x3 fp16, relu6 before", 144, 56, 3, half, activation="relu6"),
        call("3x3 stride 2 bf16, relu6 before", 96, 112, 3, bf16, stride=2, activation="relu6"),
        call("3x3 fp32, silu before", 384, 14, 3, full, activation="silu"),
        call("3x3 dilation 2 fp16", 64, 28, 3, half, dilation=2),
        call("3x3 contiguous fp16", 64, 28, 3, half, memory_format=torch.contiguous_format),
        call("5x5 fp16", 240, 14, 5, half),
        call("5x5 stride 2 fp32, hardswish before", 240, 28, 5, full, stride=2, activation="hardswish"),
        call("7x7 bf16", 192, 28, 7, bf16),
        call("7x7 stride 2 fp32, gelu before", 96, 28, 7, full, stride=2, activation="gelu"),
        call("3x3 multiplier 2 fp16", 32, 28, 3, half, multiplier=2),
        call("11x11 fp16", 96, 14, 11, half),
        call("3x3 past 2^31 elements", 144, 112, 3, half, N=2048),
    ]
