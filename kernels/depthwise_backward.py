"""The gradients of a depthwise convolution, as direct sums in fp32: here, that of its input.

    dx[n, c, h, w] = Σ_{j, r, s} dy[n, k, p, q] · weight[k, 0, r, s]      h + pad = p·stride + r·dilation

with k = c·m + j, j < m. Bound by memory, it walks as the forward does (``depthwise``): a program owns BLOCK_M
columns of BLOCK_P pixels one below the other, times BLOCK_K channels, and a row of dy, loaded once, serves
every pixel of the column. With a stride, pixels of one residue class (h and w modulo the stride) share their
taps, and each class is a walk at stride 1 over dy with a subset of the filter; all run in one launch, next to
each other, so that they share dy in L2. Which taps a class has is scalar arithmetic. The epilogue is that of
``conv_gradient_tile``.

The weight's gradient is in ``depthwise_weight_gradient``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_gradient_tile import class_taps, store_gradient
from fastnets.kernels.conv_shape import Prologue, span, stepping, vector_width
from fastnets.kernels.conv_tile import aligned, within
from fastnets.kernels.depthwise import MAX_UNROLLED_ROWS, block_configs, pick_config, walk_rows
from fastnets.kernels.depthwise_weight_gradient import (
    Plan,
    depthwise_shape,
    depthwise_weight_gradient,
    wide_offsets,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles
from fastnets.kernels.partial_sums import sum_rows

if TYPE_CHECKING:
    from fastnets.kernels.conv_input_gradient import Normalized

__all__ = ["configs", "depthwise_input_gradient", "depthwise_weight_gradient", "representative_calls"]

UNROLLED = tl.constexpr(MAX_UNROLLED_ROWS)

_SIZES = (
    *("N", "C", "H", "W", "P", "Q", "dy_n", "dy_p", "dy_q", "weight_r", "weight_s"),
    *("added_n", "added_h", "added_w", "z_n", "z_h", "z_w"),
)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("dy_k", "weight_k", "added_c", "z_c"))
def depthwise_input_gradient_kernel(
    dy, weight, dx, added, z, mean, rstd, bn_weight, bn_bias, mask, sums,
    N, C, H, W, P, Q, dy_n, dy_k, dy_p, dy_q, weight_k, weight_r, weight_s,
    added_n, added_c, added_h, added_w, z_n, z_c, z_h, z_w, negative_slope,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr, MULTIPLIER: tl.constexpr, VECTOR: tl.constexpr,
    VECTOR_DY: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr,
    BYTES: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_M columns of BLOCK_P pixels of one class: grid (classes · channel tiles · tiles of columns,).

    STEP_*: taps of a class are this far apart. VECTOR divides C; VECTOR_*: elements of an aligned access.
    WIDE: offsets need 64 bits. sums [tiles of columns · classes, 2, C], see ``conv_gradient_tile``.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    TAPS: tl.constexpr = (R + STEP_R - 1) // STEP_R  # filter rows of the largest class
    ROWS: tl.constexpr = TAPS if TAPS <= UNROLLED else 1  # those walked at once
    STEP_P: tl.constexpr = DILATION_H * STEP_R // STRIDE_H
    STEP_Q: tl.constexpr = DILATION_W * STEP_S // STRIDE_W

    C = aligned(C, VECTOR, tl.int32)
    dy_n = aligned(dy_n, VECTOR_DY, INDEX)
    weight_r = aligned(weight_r, VECTOR_WEIGHT, INDEX)
    weight_s = aligned(weight_s, VECTOR_WEIGHT, INDEX)
    place = tl.program_id(0) % CLASSES
    first_h = place // STRIDE_W
    first_w = place % STRIDE_W
    r_0, taps_r, p_0 = class_taps(first_h, R, STRIDE_H, PAD_H, DILATION_H, STEP_R)
    s_0, taps_s, q_0 = class_taps(first_w, S, STRIDE_W, PAD_W, DILATION_W, STEP_S)

    # Columns are numbered as in the first class, which has most pixels.
    tile = tl.program_id(0) // CLASSES
    c_tiles = tl.cdiv(C, BLOCK_K)
    column_tile = (tile // c_tiles).to(INDEX)
    columns = tl.cdiv(W, STRIDE_W)
    row_tiles = tl.cdiv(tl.cdiv(H, STRIDE_H), BLOCK_P)
    m = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    w = m % columns
    n = m // columns // row_tiles
    h0 = m // columns % row_tiles * BLOCK_P
    inside_w = (n < N) & (w * STRIDE_W + first_w < W)
    c = tile % c_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_c = c < C

    acc = ()
    for _ in tl.static_range(BLOCK_P):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    complete = None
    walks = 1
    if ROWS < TAPS:
        walks = taps_r
    if STEP_R > 1:
        taps_s = tl.where(taps_r > 0, taps_s, 0)
        if ROWS == TAPS:
            complete = taps_r == TAPS
    for j in range(MULTIPLIER):
        k = c.to(INDEX) * MULTIPLIER + j
        image = dy + (n * dy_n)[:, None] + (k * dy_k)[None, :]
        filters = weight + k * weight_k
        for s in range(taps_s):
            q = w + q_0 - s * STEP_Q
            inside_q = inside_w & within(q, Q)
            for walk in range(walks):
                # The window walks backwards: the last tap of the class meets the topmost row of dy.
                taps = ()
                for row in tl.static_range(ROWS):
                    i = walk + ROWS - 1 - row
                    at = filters + (r_0 + i * STEP_R) * weight_r + (s_0 + s * STEP_S) * weight_s
                    tap = tl.load(at, mask=inside_c & (i < taps_r), other=0.0)
                    taps = taps + (tap.to(tl.float32)[None, :],)
                top = h0 + p_0 - (walk + ROWS - 1) * STEP_P
                acc = walk_rows(
                    acc, taps, image, top, q, inside_q, inside_c, P, dy_p.to(INDEX) // VECTOR_DY,
                    dy_q.to(INDEX) // VECTOR_DY, complete, VECTOR_DY, BLOCK_P, ROWS, 1, STEP_P,
                )  # fmt: skip

    c = c.to(INDEX)
    sum_dv = tl.zeros((BLOCK_K,), tl.float32)
    sum_dv_x = tl.zeros((BLOCK_K,), tl.float32)
    for p in tl.static_range(BLOCK_P):
        h = (h0 + p) * STRIDE_H + first_h
        pixel = (n * H + h) * W + w * STRIDE_W + first_w
        of_row, of_row_x = store_gradient(
            acc[p], pixel, inside_w & (h < H), c, inside_c, dx, C, H, W,
            (added, added_n, added_c, added_h, added_w),
            (z, z_n, z_c, z_h, z_w, mean, rstd, bn_weight, bn_bias), negative_slope,
            DENSE_ADDED, DENSE_Z, ACTIVATION, mask, BYTES,
        )  # fmt: skip
        sum_dv += of_row
        sum_dv_x += of_row_x
    if sums is not None:
        to = sums + (column_tile * CLASSES + place).to(tl.int64) * 2 * C + c
        tl.store(to, sum_dv, mask=inside_c)
        tl.store(to + C, sum_dv_x, mask=inside_c)


def depthwise_input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    input_shape: Sequence[int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int | None = None,
    added: torch.Tensor | None = None,
    normalized: Normalized | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``conv_backward.conv_input_gradient``, which checks the operands, for weight [K, 1, R, S].

    Returns dx [N, C, H, W], dense channels-last; with ``normalized``, (dv, sums [2, C]). config: one of
    ``depthwise.configs``.
    """
    shape = depthwise_shape(input_shape, weight.shape, stride, padding, dilation, groups)
    dtype = dy.dtype if dtype is None else dtype
    dx = torch.empty(tuple(input_shape), dtype=dtype, device=dy.device, memory_format=torch.channels_last)
    z, prologue, mask = normalized or (None, None, None)
    sums = None if z is None else torch.empty((2, shape.C), dtype=torch.float32, device=dy.device)
    if dx.numel() == 0:
        return dx if sums is None else (dx, sums.zero_())
    strides = tuple(None if t is None else t.stride() for t in (dy, weight, added, z))
    multiprocessors = 0 if config is not None else current_device(dy).multiprocessors
    plan = _plan_input_gradient(shape, strides, dy.element_size(), config, multiprocessors)
    partial = None
    if z is not None:
        partial = torch.empty((plan.parts, 2, shape.C), dtype=torch.float32, device=dy.device)
    vectors = (None,) * 4 if prologue is None else prologue.tensors
    activation, slope = ("none", 0.0) if prologue is None else (prologue.activation, prologue.negative_slope)
    launch(
        depthwise_input_gradient_kernel, plan.grid,
        dy, weight, dx, added, z, *vectors, mask, partial, *plan.sizes_and_strides, slope,
        config=plan.config, reads=(dy, weight, added, z, *vectors, mask), writes=(dx, partial),
        flops=shape.flops,
        ACTIVATION=activation, **plan.constexprs,
    )  # fmt: skip
    return dx if sums is None else (dx, sum_rows(partial, sums))


@functools.lru_cache(maxsize=4096)
def _plan_input_gradient(shape, strides, element_size, config, multiprocessors) -> Plan:
    """strides: of dy, weight, added and z. element_size: of dy."""
    sizes_x = (shape.N, shape.C, shape.H, shape.W)
    sizes_dy = (shape.N, shape.K, shape.P, shape.Q)
    sizes = (sizes_dy, (shape.K, 1, shape.R, shape.S), sizes_x, sizes_x)
    extents = [math.prod(sizes_x), *(span(size, s) for size, s in zip(sizes, strides) if s is not None)]
    dy, weight, added, z = ((0,) * 4 if s is None else stepping(size, s) for size, s in zip(sizes, strides))
    dense = stepping(sizes_x, (shape.C * shape.H * shape.W, 1, shape.C * shape.W, shape.C))
    classes = shape.stride[0] * shape.stride[1]
    rows, columns = tiles(shape.H, shape.stride[0]), tiles(shape.W, shape.stride[1])
    if config is None:
        config = pick_config(shape.N, shape.C, rows, classes * columns, True, multiprocessors)
    if config.maxnreg is None:
        # Left to itself, ptxas spills here and there to fit one more block.
        config = config.replace(maxnreg=255)
    column_tiles = tiles(shape.N * tiles(rows, config.BLOCK_P) * columns, config.BLOCK_M)
    weight_k, _, weight_r, weight_s = weight
    constexprs = {
        **shape.geometry,
        "MULTIPLIER": shape.group_outputs,
        "STEP_R": shape.stride[0] // math.gcd(shape.stride[0], shape.dilation[0]),
        "STEP_S": shape.stride[1] // math.gcd(shape.stride[1], shape.dilation[1]),
        "VECTOR": vector_width(2, shape.C),
        "VECTOR_DY": vector_width(element_size, shape.C, dy[0], *dy[2:]) if dy[1] == 1 else 1,
        "VECTOR_WEIGHT": vector_width(element_size, weight_r, weight_s) if weight_k == 1 else 1,
        "DENSE_ADDED": added == dense,
        "DENSE_Z": z == dense,
        "BYTES": z == dense and shape.C % 8 == 0,
        "WIDE": wide_offsets(*extents),
    }
    return Plan(
        grid=(classes * tiles(shape.C, config.BLOCK_K) * column_tiles,),
        config=config,
        parts=column_tiles * classes,
        sizes_and_strides=(
            *(shape.N, shape.C, shape.H, shape.W, shape.P, shape.Q, *dy),
            *(weight_k, weight_r, weight_s, *added, *z),
        ),
        constexprs=constexprs,
    )


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return block_configs()


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the geometries that networks have: see ``kernels``."""
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    contiguous = torch.contiguous_format

    def call(
        name, C, size, R, dtype, stride=1, dilation=1, multiplier=1, added=False, activation=None,
        memory_format=torch.channels_last, N=32,
    ):  # fmt: skip
        def thunk(config: Config | None = None):
            from fastnets.kernels.conv_input_gradient import Normalized

            def tensor(*sizes):
                return torch.empty(sizes, dtype=dtype, device="meta").to(memory_format=memory_format)

            padding = R // 2 * dilation
            P = (size + 2 * padding - dilation * (R - 1) - 1) // stride + 1
            x = tensor(N, C, size, size)
            normalized = None
            if activation is not None:
                vectors = (torch.empty(C, device="meta") for _ in range(4))
                normalized = Normalized(x, Prologue(*vectors, activation))
            return depthwise_input_gradient(
                tensor(N, multiplier * C, P, P), tensor(multiplier * C, 1, R, R), x.shape,
                stride=(stride, stride), padding=(padding, padding), dilation=(dilation, dilation),
                added=x if added else None, normalized=normalized, config=config,
            )  # fmt: skip

        return RepresentativeCall(name, thunk)

    return [
        call("3x3 fp16", 144, 56, 3, half),
        call("3x3 fp16, relu6", 144, 56, 3, half, activation="relu6"),
        call("3x3 stride 2 bf16, relu6", 96, 112, 3, bf16, stride=2, activation="relu6"),
        call("3x3 fp32, added, silu", 384, 14, 3, full, added=True, activation="silu"),
        call("3x3 dilation 2 fp16, added", 64, 28, 3, half, dilation=2, added=True),
        call("3x3 contiguous fp16, added, relu", 64, 28, 3, half, added=True, activation="relu",
             memory_format=contiguous),
        call("5x5 stride 2 fp32, hardswish", 240, 28, 5, full, stride=2, activation="hardswish"),
        call("7x7 bf16, gelu", 192, 28, 7, bf16, activation="gelu"),
        call("7x7 stride 2 fp32", 96, 28, 7, full, stride=2),
        call("3x3 multiplier 2 fp16", 32, 28, 3, half, multiplier=2),
        call("11x11 fp16", 96, 14, 11, half),
        call("3x3 past 2^31 elements", 144, 112, 3, half, activation="relu6", N=2048),
    ]  # fmt: skip
