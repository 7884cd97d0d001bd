"""The gradient of a convolution's input, as an implicit matrix product over channels-last tensors.

    dx[n, h, w, c] = Σ_{k, r, s} dy[n, p, q, k] · weight[k, c, r, s]        h + pad = p·stride + r·dilation

Read from the pixels of dx, this is a convolution of dy whose window walks backwards. With a stride, a pixel
is reached only by the taps r for which h + pad - r·dilation is a multiple of it. Pixels of one residue class,
h and w modulo the stride, share those taps: each class is a dense convolution at stride 1 with a filter of
its own, a subset of the taps. All classes run in one launch, side by side, so that they share dy in L2; which
taps a class has is scalar arithmetic at the head of a program, and nothing is tested per element. Pixels that
no tap reaches are a class without taps.

What follows the products, up to the first half of the backward pass of the layer below, is in
``conv_gradient_tile``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.bitmask import bytes_of
from fastnets.kernels.conv_configs import groups_per_tile, kernel_configs, reduce_config
from fastnets.kernels.conv_gradient_configs import (
    choose_input_gradient,
    input_gradient_candidates,
    mirrored,
    table_of,
)
from fastnets.kernels.conv_gradient_tile import class_taps, finish_gradient, finish_gradient_kernel
from fastnets.kernels.conv_shape import (
    INT32_ELEMENTS,
    ConvShape,
    Prologue,
    ceil_div,
    convolution_shape,
    span,
    stepping,
    vector_width,
)
from fastnets.kernels.conv_tile import aligned, tile_of_program, within
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch
from fastnets.kernels.partial_sums import sum_rows

__all__ = ["InputGradientCall", "Normalized", "configs", "input_gradient", "representative_calls"]


_SIZES = (
    *("N", "H", "W", "P", "Q", "pitch", "filters", "dy_n", "dy_p", "dy_q", "weight_k", "weight_r"),
    *("weight_s", "added_n", "added_h", "added_w", "z_n", "z_h", "z_w", "C", "K"),
)


@triton.jit(do_not_specialize=_SIZES)
def conv_input_gradient_kernel(
    dy, weight, dx, added, z, mean, rstd, bn_weight, bn_bias, mask, sums,
    N, C, H, W, K, P, Q, pitch, filters,
    dy_n, dy_k, dy_p, dy_q, weight_k, weight_c, weight_r, weight_s,
    added_n, added_c, added_h, added_w, z_n, z_c, z_h, z_w, negative_slope,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr, GROUP_C: tl.constexpr, GROUP_K: tl.constexpr,
    PACK: tl.constexpr, VECTOR_DY: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, VECTOR_DX: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_K: tl.constexpr, DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr,
    BYTES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of dx: pixels of one residue class, channels of one bundle of groups.

    Grid (tiles · classes, bundles, SPLIT_K). C and K are the channels and filters of a bundle of PACK groups,
    pitch and filters those of all. Several groups make one product with a block-diagonal weight, as in
    ``conv_grouped``. With SPLIT_K > 1, dx is the fp32 workspace [SPLIT_K, N·H·W, pitch] of partial sums.

    STEP_*: taps of a class are this far apart. VECTOR_*: elements of an aligned vector access. EVEN_*: a
    multiple of the block. WIDE: offsets need 64 bits.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    # Taps of the largest class, and how many outputs apart they are.
    TAPS_R: tl.constexpr = (R + STEP_R - 1) // STEP_R
    TAPS_S: tl.constexpr = (S + STEP_S - 1) // STEP_S
    STEP_P: tl.constexpr = DILATION_H * STEP_R // STRIDE_H
    STEP_Q: tl.constexpr = DILATION_W * STEP_S // STRIDE_W
    CHECKED: tl.constexpr = R > 1 or S > 1  # the one tap of a 1×1 filter is always inside
    BITS: tl.constexpr = TAPS_R * TAPS_S <= 32
    # An epilogue that reads z holds two tiles more beside the accumulator.
    PARTS: tl.constexpr = 1 if not HALVES else 2 if z is None else 4
    COLUMNS: tl.constexpr = BLOCK_N // PARTS

    C = aligned(C, VECTOR_DX, tl.int32)
    K = aligned(K, VECTOR_DY, tl.int32)
    pitch = aligned(pitch, VECTOR_DX, INDEX)
    filters = aligned(filters, VECTOR_DY, tl.int32)
    dy_n = aligned(dy_n, VECTOR_DY, INDEX)
    dy_p = aligned(dy_p, VECTOR_DY, INDEX)
    dy_q = aligned(dy_q, VECTOR_DY, INDEX)
    weight_k = aligned(weight_k, VECTOR_WEIGHT, INDEX)
    weight_r = aligned(weight_r, VECTOR_WEIGHT, INDEX)
    weight_s = aligned(weight_s, VECTOR_WEIGHT, INDEX)

    # The class of pixels: their first (h, w), how many there are, which taps reach them.
    place = tl.program_id(0) % CLASSES
    first_h = place // STRIDE_W
    first_w = place % STRIDE_W
    rows = (H - first_h + STRIDE_H - 1) // STRIDE_H
    columns = (W - first_w + STRIDE_W - 1) // STRIDE_W
    M = N * rows * columns
    r_0, taps_r, p_0 = class_taps(first_h, R, STRIDE_H, PAD_H, DILATION_H, STEP_R)
    s_0, taps_s, q_0 = class_taps(first_w, S, STRIDE_W, PAD_W, DILATION_W, STEP_S)

    # The grid is that of the first class, which has most pixels.
    tile = tl.program_id(0) // CLASSES
    most = N * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W)
    tile_m, tile_n = tile_of_program(most, C, BLOCK_M, BLOCK_N, GROUP_M, tile)
    bundle = tl.program_id(1)
    channels_left = tl.minimum(pitch.to(tl.int32) - bundle * C, C)
    filters_left = tl.minimum(filters - bundle * K, K)

    # Rows past the end repeat the last one, as in conv_kernel: they load without a mask and are never stored.
    m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = m < M
    m = tl.maximum(tl.minimum(m, M - 1), 0)
    columns = tl.maximum(columns, 1)
    rows = tl.maximum(rows, 1)
    n = m // columns // rows
    h = m // columns % rows
    w = m % columns
    p = h + p_0
    q = w + q_0
    windows = n * dy_n + p * dy_p + q * dy_q + bundle.to(INDEX) * K * dy_k
    valid = tl.full((BLOCK_M,), True, tl.int1)
    if CHECKED and BITS:
        taps_inside = tl.zeros((BLOCK_M,), tl.int32)
        for i in tl.static_range(TAPS_R):
            for j in tl.static_range(TAPS_S):
                inside = within(p - i * STEP_P, P) & within(q - j * STEP_Q, Q)
                taps_inside |= inside.to(tl.int32) << (i * TAPS_S + j)

    # B, the weight: one row per filter, one column per channel of its group.
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_c = c < channels_left
    columns_b = c
    if not EVEN_C or PACK > 1:
        columns_b = tl.where(inside_c, c, tl.arange(0, BLOCK_N) % VECTOR_WEIGHT)
    if PACK > 1:
        columns_b = tl.max_contiguous(tl.multiple_of(columns_b % GROUP_C, VECTOR_WEIGHT), VECTOR_WEIGHT)
    columns_b = columns_b.to(INDEX) * weight_c

    # The walk over the class's taps, filters from k on, one block at a time. Its state is all scalar.
    blocks_per_tap = tl.cdiv(filters_left, BLOCK_K)
    first = 0
    last = taps_r * taps_s * blocks_per_tap
    if CLASSES > 1:
        last = tl.where(tile_m * BLOCK_M < M, last, 0)
    if SPLIT_K > 1:
        share = tl.cdiv(last, SPLIT_K)
        first = tl.program_id(2) * share
        last = tl.minimum(first + share, last)
    across = tl.maximum(taps_s, 1)
    tap = first // blocks_per_tap
    k = first % blocks_per_tap * BLOCK_K
    r = tap // across
    s = tap % across

    lanes = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        # Masked addresses are drawn back into the tensor: an asynchronous copy may touch them all the same.
        present = k + lanes < filters_left
        if EVEN_K:
            lanes_a = k + lanes
            lanes_b = lanes_a
        else:
            lanes_a = tl.where(present, k + lanes, lanes % VECTOR_DY)
            lanes_b = tl.minimum(k + lanes, filters_left - 1)
        if CHECKED:
            if BITS:
                valid = (taps_inside & (1 << (r * TAPS_S + s))) != 0
            else:
                valid = within(p - r * STEP_P, P) & within(q - s * STEP_Q, Q)
        dy_tap = tl.multiple_of(-(r * STEP_P * dy_p + s * STEP_Q * dy_q), VECTOR_DY)
        weight_tap = (r_0 + r * STEP_R) * weight_r + (s_0 + s * STEP_S) * weight_s
        weight_tap = tl.multiple_of(weight_tap, VECTOR_WEIGHT)
        rows_a = tl.multiple_of(tl.where(valid, windows, -dy_tap), VECTOR_DY)
        a_pointers = (dy + dy_tap) + (rows_a[:, None] + (lanes_a.to(INDEX) * dy_k)[None, :])
        rows_b = (bundle * K + lanes_b).to(INDEX) * weight_k
        b_pointers = (weight + weight_tap) + (rows_b[:, None] + columns_b[None, :])
        a_mask = valid[:, None]
        b_mask = tl.full((BLOCK_K, BLOCK_N), True, tl.int1)
        if not EVEN_K:
            a_mask &= present[None, :]
            b_mask &= present[:, None]
        if not EVEN_C:
            b_mask &= inside_c[None, :]
        if PACK > 1:
            b_mask &= (lanes // GROUP_K)[:, None] == (c // GROUP_C)[None, :]
        a = tl.load(a_pointers, mask=a_mask, other=0.0)
        b = tl.load(b_pointers, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        k += BLOCK_K
        tap_done = k >= filters_left
        row_done = tap_done & (s == across - 1)
        k = tl.where(tap_done, 0, k)
        r += row_done.to(tl.int32)
        s = tl.where(row_done, 0, s + tap_done.to(tl.int32))

    # Rows of dx, whatever their class.
    pixel = (n * H + h * STRIDE_H + first_h) * W + w * STRIDE_W + first_w
    if SPLIT_K > 1:
        # Partial sums go to the workspace as they are; finish_gradient_kernel finishes them.
        dx += tl.program_id(2).to(INDEX) * N * H * W * pitch
        finish_gradient(
            acc, pixel, inside_m, tile_n * BLOCK_N, channels_left, bundle * C, tile_m, dx, pitch, H, W,
            (None, 0, 0, 0, 0), (None, 0, 0, 0, 0, None, None, None, None), 0.0, None, None,
            VECTOR_DX, True, True, False, "none", INDEX, BLOCK_N,
        )  # fmt: skip
    else:
        finish_gradient(
            acc, pixel, inside_m, tile_n * BLOCK_N, channels_left, bundle * C, tile_m * CLASSES + place, dx,
            pitch, H, W, (added, added_n, added_c, added_h, added_w),
            (z, z_n, z_c, z_h, z_w, mean, rstd, bn_weight, bn_bias), negative_slope, sums, mask,
            VECTOR_DX, DENSE_ADDED, DENSE_Z, BYTES, ACTIVATION, INDEX, COLUMNS,
        )  # fmt: skip


class Normalized(NamedTuple):
    """The convolution's input came from z [N, C, H, W], as act((z - mean) · rstd · bn_weight + bn_bias).

    mask: where a residual was added before the activation, one bit per element of z in its memory order (bit
    i % 8 of byte i // 8 is element i's) says where act' is 1, and where 0; see ``bitmask``.
    """

    z: torch.Tensor
    prologue: Prologue
    mask: torch.Tensor | None = None


@dataclass
class InputGradientCall:
    """The operands of a checked call; see ``conv_backward.conv_input_gradient``."""

    shape: ConvShape
    dy: torch.Tensor
    weight: torch.Tensor
    added: torch.Tensor | None
    normalized: Normalized | None
    dtype: torch.dtype
    precision: str
    config: Config | None


@dataclass(frozen=True)
class Layout:
    """How the operands of a call lie: strides (0 along dimensions of one element) of each, and what follows.

    Strides of an absent operand are zeros. wide: offsets need 64 bits. vectors, crowded: as ``suits`` asks.
    """

    dy: tuple[int, ...]
    weight: tuple[int, ...]
    added: tuple[int, ...]
    z: tuple[int, ...]
    dense_added: bool
    dense_z: bool
    vector_weight: int
    wide: bool
    vectors: bool
    crowded: bool


def layout(shape: ConvShape, element_size: int, strides: tuple[tuple[int, ...] | None, ...]) -> Layout:
    """strides: of dy, weight, added and z, the last two None where there are none."""
    sizes_x = (shape.N, shape.C, shape.H, shape.W)
    sizes_dy = (shape.N, shape.K, shape.P, shape.Q)
    sizes = (sizes_dy, (shape.K, shape.group_channels, shape.R, shape.S), sizes_x, sizes_x)
    spans = [math.prod(sizes_x), *(span(size, s) for size, s in zip(sizes, strides) if s is not None)]
    wide = max(spans) > INT32_ELEMENTS
    dy, weight, added, z = ((0,) * 4 if s is None else stepping(size, s) for size, s in zip(sizes, strides))
    channels_last = stepping(sizes_x, (shape.C * shape.H * shape.W, 1, shape.C * shape.W, shape.C))
    scattered = any(s is not None and stepping(sizes_x, s) != channels_last for s in strides[2:])
    vector_weight, vector_dy = (
        vector_width(element_size, run, step, down, right) if unit == 1 else 1
        for run, (step, unit, down, right) in ((shape.group_channels, weight), (shape.group_outputs, dy))
    )
    return Layout(
        dy, weight, added, z, added == channels_last, z == channels_last, vector_weight, wide,
        min(vector_weight, vector_dy) > 1, wide or scattered,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: ConvShape,
    element_sizes: tuple[int, int],
    precision: str,
    strides: tuple[tuple[int, ...] | None, ...],
    config: Config | None,
    device: Device,
) -> tuple[Config, tuple[int, ...], dict[str, object]]:
    """What follows from sizes and strides alone: (config, the kernel's arguments N to z_w, its flags).

    element_sizes: of dy and of dx. strides: of dy, weight, added and z.
    """
    lies = layout(shape, element_sizes[0], strides)
    if config is None:
        config = choose_input_gradient(shape, element_sizes[0], precision, device, lies.vectors, lies.crowded)
    wide = lies.wide
    if config.maxnreg is None and element_sizes[0] == 4:
        # Left to itself, ptxas spills on sm_80 to fit one more block.
        config = config.replace(maxnreg=255)
    if config.SPLIT_K > 1:
        wide |= config.SPLIT_K * shape.N * shape.C * shape.H * shape.W > INT32_ELEMENTS
    pack = 1
    if table_of(shape) == "packed":
        pack = groups_per_tile(mirrored(shape), config)
        if pack == 0 or config.SPLIT_K > 1:
            raise UnsupportedConfig(
                f"{config}: no group of {shape.group_outputs} filters and {shape.group_channels} channels "
                "fits, or its filters are split; use a config of the packed table with larger blocks"
            )
    C, K = pack * shape.group_channels, pack * shape.group_outputs
    arguments = (
        *(shape.N, C, shape.H, shape.W, K, shape.P, shape.Q, shape.C, shape.K),
        *lies.dy, *lies.weight, *lies.added, *lies.z,
    )  # fmt: skip
    dy_n, dy_k, dy_p, dy_q = lies.dy
    flags = {
        "R": shape.R,
        "S": shape.S,
        "STRIDE_H": shape.stride[0],
        "STRIDE_W": shape.stride[1],
        "PAD_H": shape.padding[0],
        "PAD_W": shape.padding[1],
        "DILATION_H": shape.dilation[0],
        "DILATION_W": shape.dilation[1],
        "STEP_R": shape.stride[0] // math.gcd(shape.stride[0], shape.dilation[0]),
        "STEP_S": shape.stride[1] // math.gcd(shape.stride[1], shape.dilation[1]),
        # A group's sizes shape the compiled kernel only where several of them share a tile.
        "GROUP_C": shape.group_channels if pack > 1 else 0,
        "GROUP_K": shape.group_outputs if pack > 1 else 0,
        "PACK": pack,
        "VECTOR_DY": vector_width(element_sizes[0], K, shape.K, dy_n, dy_p, dy_q) if dy_k == 1 else 1,
        "VECTOR_WEIGHT": lies.vector_weight,
        "VECTOR_DX": vector_width(element_sizes[1], C, shape.C),
        "EVEN_C": C % config.BLOCK_N == 0 and shape.C % C == 0,
        "EVEN_K": K % config.BLOCK_K == 0 and shape.K % K == 0,
        "DENSE_ADDED": lies.dense_added,
        "DENSE_Z": lies.dense_z,
        "BYTES": lies.dense_z and shape.group_channels % 8 == 0,
        "WIDE": wide,
    }
    return config, arguments, flags


def input_gradient(call: InputGradientCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the kernels for a call that is not depthwise: (dx, None), or (dv, sums) with ``normalized``."""
    shape, device = call.shape, call.dy.device
    size = (shape.N, shape.C, shape.H, shape.W)
    dx = torch.empty(size, dtype=call.dtype, device=device, memory_format=torch.channels_last)
    z, prologue, mask = call.normalized or (None, None, None)
    sums = None if z is None else torch.empty((2, shape.C), dtype=torch.float32, device=device)
    if dx.numel() == 0:
        return dx, None if sums is None else sums.zero_()
    strides = tuple(None if t is None else t.stride() for t in (call.dy, call.weight, call.added, z))
    element_sizes = (call.dy.element_size(), dx.element_size())
    config, arguments, flags = _plan(
        shape, element_sizes, call.precision, strides, call.config, current_device(call.dy)
    )
    SPLIT_K = config.SPLIT_K
    pixels = shape.N * shape.H * shape.W
    classes = shape.stride[0] * shape.stride[1]
    most = shape.N * ceil_div(shape.H, shape.stride[0]) * ceil_div(shape.W, shape.stride[1])
    tiles_m = ceil_div(most, config.BLOCK_M)
    finishing = config
    if SPLIT_K > 1:
        # The epilogue holds tiles of z, added and the mask beside the sum.
        finishing = reduce_config(shape).replace(maxnreg=255)
    tiles = ceil_div(pixels, finishing.BLOCK_M) if SPLIT_K > 1 else tiles_m * classes
    partial_sums = None
    if z is not None:
        partial_sums = torch.empty((tiles, 2, shape.C), dtype=torch.float32, device=device)
    vectors = (None,) * 4 if prologue is None else prologue.tensors
    activation, slope = ("none", 0.0) if prologue is None else (prologue.activation, prologue.negative_slope)
    epilogue = (call.added, z, *vectors, mask)
    out = dx
    if SPLIT_K > 1:
        out = torch.empty((SPLIT_K, pixels, shape.C), dtype=torch.float32, device=device)
    C = arguments[1]
    launch(
        conv_input_gradient_kernel,
        (tiles_m * ceil_div(C, config.BLOCK_N) * classes, ceil_div(shape.C, C), SPLIT_K),
        call.dy, call.weight, out, *epilogue, partial_sums, *arguments, slope,
        config=config, flops=shape.flops,
        reads=(call.dy, call.weight) if SPLIT_K > 1 else (call.dy, call.weight, *epilogue),
        writes=(out,) if SPLIT_K > 1 or partial_sums is None else (out, partial_sums),
        PRECISION=call.precision, ACTIVATION=activation, **flags,
    )  # fmt: skip
    if SPLIT_K > 1:
        launch(
            finish_gradient_kernel, (tiles, ceil_div(shape.C, finishing.BLOCK_N)),
            out, dx, *epilogue, partial_sums, pixels, shape.H, shape.W, shape.C, *arguments[17:], slope,
            config=finishing, reads=(out, *epilogue),
            writes=(dx,) if partial_sums is None else (dx, partial_sums),
            SPLIT_K=SPLIT_K, ACTIVATION=activation,
            **{name: flags[name] for name in ("VECTOR_DX", "DENSE_ADDED", "DENSE_Z", "BYTES", "WIDE")},
        )  # fmt: skip
    if sums is not None:
        sum_rows(partial_sums, sums)
    return dx, sums


def configs(device: Device) -> list[Config]:
    """Every config that ``choose_input_gradient`` may pick on this device."""
    return list(dict.fromkeys([*kernel_configs("taps", device), *kernel_configs("packed", device)]))


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernels: see ``kernels``."""

    def call(
        name, x, filters, *, stride=1, padding=0, dilation=1, groups=1, added=False, activation=None,
        mask=False, dtype=torch.float16, precision="ieee", memory_format=torch.channels_last,
    ):  # fmt: skip
        def thunk(config: Config | None = None):
            def tensor(*size):
                return torch.empty(size, dtype=dtype, device="meta").to(memory_format=memory_format)

            geometry = ((stride, stride), (padding, padding), (dilation, dilation), groups)
            K, R, S = filters
            shape = convolution_shape(x, (K, x[1] // groups, R, S), *geometry)
            normalized = None
            if activation is not None:
                vectors = (torch.empty(shape.C, device="meta") for _ in range(4))
                z = tensor(*x)
                bits = torch.empty(bytes_of(z), dtype=torch.uint8, device="meta") if mask else None
                normalized = Normalized(z, Prologue(*vectors, activation), bits)
            dy, weight = tensor(shape.N, K, shape.P, shape.Q), tensor(K, shape.group_channels, R, S)
            other = tensor(*x) if added else None
            operands = (dy, weight, other, normalized and normalized.z)
            lies = layout(shape, dtype.itemsize, tuple(t if t is None else t.stride() for t in operands))
            served = input_gradient_candidates(
                shape, dtype.itemsize, precision, current_device(dy), lies.vectors, lies.crowded
            )
            if config is not None and config not in served:
                raise UnsupportedConfig(f"{name}: {config} is never chosen for such a call")
            return input_gradient(
                InputGradientCall(shape, dy, weight, other, normalized, dtype, precision, config)
            )

        return RepresentativeCall(name, thunk)

    half, full, contiguous = torch.bfloat16, torch.float32, torch.contiguous_format
    layer = {"x": (8, 64, 28, 28), "filters": (64, 3, 3), "padding": 1}
    return [
        call("3x3", **layer),
        call("3x3, added, relu", **layer, added=True, activation="relu"),
        call("3x3, bf16, gelu", **layer, dtype=half, activation="gelu"),
        call("3x3, fp32, relu", **layer, dtype=full, activation="relu"),
        call("3x3, TF32, relu", **layer, dtype=full, precision="tf32", activation="relu"),
        call("3x3, contiguous, relu", **layer, added=True, activation="relu", memory_format=contiguous),
        call("3x3, past 2^31 elements", **{**layer, "x": (4096, 64, 112, 112)}, activation="relu"),
        call("3x3, stride 2", **layer, stride=2, activation="relu"),
        call("3x3, stride 2, odd C and K", x=(8, 40, 28, 28), filters=(72, 3, 3), padding=1, stride=2),
        call("1x1, added", x=(8, 256, 28, 28), filters=(64, 1, 1), added=True),
        call("1x1, added, masked relu", x=(8, 256, 28, 28), filters=(64, 1, 1), added=True,
             activation="relu", mask=True),
        call("3x3, odd C, masked relu", x=(8, 37, 28, 28), filters=(64, 3, 3), activation="relu", mask=True),
        call("1x1, relu", x=(8, 64, 28, 28), filters=(256, 1, 1), activation="relu"),
        call("1x1, stride 2, added", x=(8, 64, 28, 28), filters=(128, 1, 1), stride=2, added=True),
        call("7x7 over many channels", x=(8, 64, 28, 28), filters=(64, 7, 7), padding=3),
        call("5x5 in 2 groups", x=(8, 128, 27, 27), filters=(256, 5, 5), padding=2, groups=2),
        call("3x3, 32 groups of 4", x=(8, 128, 56, 56), filters=(128, 3, 3), padding=1, groups=32),
        call("3x3, 32 groups of 16, stride 2, relu", x=(8, 512, 28, 28), filters=(512, 3, 3), padding=1,
             stride=2, groups=32, activation="relu"),
        call("3x3, 4 groups of 6 to 10, fp32", x=(8, 24, 14, 14), filters=(40, 3, 3), padding=1, groups=4,
             dtype=full, memory_format=contiguous, added=True),
        call("3x3, 32 groups of 4, TF32", x=(8, 128, 56, 56), filters=(128, 3, 3), padding=1, groups=32,
             dtype=full, precision="tf32"),
    ]  # fmt: skip
