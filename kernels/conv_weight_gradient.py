"""The gradient of a convolution's weight, as an implicit matrix product over channels-last tensors.

    dw[k, r, s, c] = Σ_{n, p, q} dy[n, p, q, k] · x[n, p·stride - pad + r·dilation, ..., c]

    dw [K, R·S·C] = dyᵀ [K, N·P·Q] · A [N·P·Q, R·S·C]        A: the windows of ``conv``

The matrix is small and the sum over pixels long, so programs share the pixels: each share is added into a
workspace of its own in fp32, and ``partial_sums`` adds those in order. The workspace is written and read
beside dy and x, so there are no more shares than it takes to fill the device (``conv_gradient_configs``).

Columns are taken (r, s, c) jointly: a block of them may hold several taps, which serves stems of 3 channels
as well as tiles wider than C. Which tap and channel a column is is found once; in the loop only the pixels
move, by a constant step whose carries are two comparisons.

Narrow groups are packed as in ``conv_grouped``, here as the wanted blocks of a product whose others are
dropped. With a prologue x is z, the output of an earlier convolution, and act(bn(z)) is computed as it is
loaded, so that the activation need not have been kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_configs import kernel_configs
from fastnets.kernels.conv_gradient_configs import (
    TABLE,
    choose_weight_gradient,
    groups_packed,
    tiles_of,
    weight_gradient_candidates,
)
from fastnets.kernels.conv_shape import (
    INT32_ELEMENTS,
    ConvShape,
    Prologue,
    ceil_div,
    convolution_shape,
    pixel_pitch,
    span,
    stepping,
    vector_width,
)
from fastnets.kernels.conv_tile import aligned, channel_vectors, normalized, tile_of_program, within
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch
from fastnets.kernels.partial_sums import sum_rows

__all__ = ["WeightGradientCall", "configs", "representative_calls", "weight_gradient"]

_SIZES = (
    *("N", "C", "H", "W", "K", "P", "Q", "channels", "filters", "columns", "splits"),
    *("dy_n", "dy_p", "dy_q", "x_n", "x_h", "x_w"),
)


@triton.jit(do_not_specialize=_SIZES)
def conv_weight_gradient_kernel(
    dy, x, out, mean, rstd, bn_weight, bn_bias,
    N, C, H, W, K, P, Q, channels, filters,
    dy_n, dy_k, dy_p, dy_q, x_n, x_c, x_h, x_w, negative_slope,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUP_C: tl.constexpr, GROUP_K: tl.constexpr, PACK: tl.constexpr,
    VECTOR_DY: tl.constexpr, VECTOR_X: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_TAP: tl.constexpr, FLAT_DY: tl.constexpr, FLAT_X: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of dw, [filters, R·S·C], over one share of the pixels.

    Grid (tiles, bundles, shares). C and K are the channels and filters of a bundle of PACK groups, channels
    and filters those of all. out: [shares, filters, R·S·channels of a group], in fp32 or, of one share, dw's
    dtype.

    VECTOR_*: elements of an aligned vector access. EVEN_K: K is a multiple of BLOCK_M. ONE_TAP: the columns
    of a block are channels of one tap. FLAT_*: pixels lie in one run, dy_q or x_w apart (x: windows are
    single pixels, too). WIDE: offsets need 64 bits. SPLIT_K and HALVES are those of the tables that all
    convolutions share; here the grid says how many shares there are, and nothing follows the products.
    """
    tl.static_assert(SPLIT_K == 1, "the shares of pixels are the grid's third dimension")
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0

    C = aligned(C, VECTOR_X, tl.int32)
    K = aligned(K, VECTOR_DY, tl.int32)
    channels = aligned(channels, VECTOR_X, tl.int32)
    filters = aligned(filters, VECTOR_DY, tl.int32)
    dy_n = aligned(dy_n, VECTOR_DY, INDEX)
    dy_p = aligned(dy_p, VECTOR_DY, INDEX)
    dy_q = aligned(dy_q, VECTOR_DY, INDEX)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    x_w = aligned(x_w, VECTOR_X, INDEX)

    tile_m, tile_n = tile_of_program(K, R * S * C, BLOCK_M, BLOCK_N, GROUP_M)
    bundle = tl.program_id(1)
    channels_left = tl.minimum(channels - bundle * C, C)
    filters_left = tl.minimum(filters - bundle * K, K)

    # Rows of the tile: filters.
    lane_m = tl.arange(0, BLOCK_M)
    k = tile_m * BLOCK_M + lane_m
    inside_k = k < filters_left
    rows = k
    if not EVEN_K:
        rows = tl.where(inside_k, k, lane_m % VECTOR_DY)
    rows = (tl.multiple_of(bundle * K, VECTOR_DY) + rows).to(INDEX) * dy_k

    # Columns: a tap and a channel. Those past the end stay at the first ones, and are never stored.
    lane_n = tl.arange(0, BLOCK_N)
    column = tile_n * BLOCK_N + lane_n
    if ONE_TAP:
        tap = tile_n * BLOCK_N // C
        c = column - tap * C
        inside_c = c < channels_left
        c_here = tl.where(inside_c, c, lane_n % VECTOR_X)
        x_tap = tl.multiple_of(tap // S * DILATION_H * x_h + tap % S * DILATION_W * x_w, VECTOR_X)
    else:
        tap = column // C
        c = column % C
        inside_c = (tap < R * S) & (c < channels_left)
        c_here = tl.where(inside_c, c, lane_n % VECTOR_X)
        c_here = tl.max_contiguous(tl.multiple_of(c_here, VECTOR_X), VECTOR_X)
        tap = tl.where(inside_c, tap, 0)
        x_tap = tap // S * DILATION_H * x_h + tap % S * DILATION_W * x_w
    down = tap // S * DILATION_H - PAD_H
    right = tap % S * DILATION_W - PAD_W
    lies_at = (tl.multiple_of(bundle * C, VECTOR_X) + c_here).to(INDEX) * x_c
    if not ONE_TAP:
        lies_at = tl.max_contiguous(tl.multiple_of(lies_at + x_tap, VECTOR_X), VECTOR_X)

    if mean is not None:
        vectors = (mean, rstd, bn_weight, bn_bias)
        of_channels = channel_vectors(bundle * C + c_here, inside_c, vectors)

    # The walk over the pixels, a block of them at a time: where its first one is, and where the others are
    # from there. Both are positions (n, p, q), whose sum carries at most once each.
    M = N * P * Q
    blocks = tl.cdiv(M, BLOCK_K)
    share = tl.cdiv(blocks, tl.num_programs(2))
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, blocks)
    start = tl.minimum(first, blocks).to(INDEX) * BLOCK_K
    start_q = start % Q
    start_p = start // Q % P
    start_n = start // Q // P
    lane = tl.arange(0, BLOCK_K)
    lane_q = lane % Q
    lane_p = lane // Q % P
    lane_images = lane // Q // P
    step_q = BLOCK_K % Q
    step_p = BLOCK_K // Q % P
    step_n = BLOCK_K // Q // P

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        m = start + lane
        present = m < M
        if not (FLAT_DY and FLAT_X and not PADDED):
            q = start_q + lane_q
            p = start_p + lane_p
            n = start_n + lane_images
            p += (q >= Q).to(tl.int32)
            q = tl.where(q >= Q, q - Q, q)
            n += (p >= P).to(tl.int32)
            p = tl.where(p >= P, p - P, p)

        if FLAT_DY:
            pixels = tl.where(present, m, 0) * dy_q
        else:
            pixels = tl.where(present, n * dy_n + p * dy_p + q * dy_q, 0)
        pixels = tl.multiple_of(pixels, VECTOR_DY)
        a_mask = present[None, :]
        if not EVEN_K:
            a_mask &= inside_k[:, None]
        a = tl.load(dy + (pixels[None, :] + rows[:, None]), mask=a_mask, other=0.0)

        # Masked addresses are drawn back into the tensor: an asynchronous copy may touch them all the same.
        inside = present[:, None] & inside_c[None, :]
        if FLAT_X:
            windows = tl.multiple_of(tl.where(present, m, 0) * x_w, VECTOR_X)
            offsets = windows[:, None] + lies_at[None, :]
        else:
            h = p * STRIDE_H
            w = q * STRIDE_W
            windows = n * x_n + (h - PAD_H) * x_h + (w - PAD_W) * x_w
            if ONE_TAP:
                if PADDED:
                    present &= within(h + down, H) & within(w + right, W)
                    inside = present[:, None] & inside_c[None, :]
                windows = tl.multiple_of(tl.where(present, windows + x_tap, 0), VECTOR_X)
                offsets = windows[:, None] + lies_at[None, :]
            else:
                if PADDED:
                    inside &= within(h[:, None] + down[None, :], H) & within(w[:, None] + right[None, :], W)
                    inside = tl.max_constancy(inside, (1, VECTOR_X))
                windows = tl.multiple_of(windows, VECTOR_X)
                offsets = tl.where(inside, windows[:, None] + lies_at[None, :], (lane_n % VECTOR_X)[None, :])
        b = tl.load(x + offsets, mask=inside, other=0.0)
        if mean is not None:
            b = normalized(b, inside, of_channels, negative_slope, ACTIVATION)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        start += BLOCK_K
        start_q += step_q
        start_p += step_p
        start_n += step_n
        start_p += (start_q >= Q).to(tl.int32)
        start_q = tl.where(start_q >= Q, start_q - Q, start_q)
        start_n += (start_p >= P).to(tl.int32)
        start_p = tl.where(start_p >= P, start_p - P, start_p)

    # dw's rows are the filters of all groups, its columns the taps of a group's channels.
    inside = inside_k[:, None] & inside_c[None, :]
    if PACK > 1:
        inside &= (k // GROUP_K)[:, None] == (c // GROUP_C)[None, :]
        column = (tap * GROUP_C + c % GROUP_C).to(INDEX)
        pitch = R * S * GROUP_C
    else:
        column = column.to(INDEX)
        pitch = R * S * C
    of_share = tl.program_id(2).to(INDEX) * filters
    offsets = ((of_share + bundle * K + k) * pitch)[:, None] + column[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=inside)


@dataclass
class WeightGradientCall:
    """The operands of a checked call; see ``conv_backward.conv_weight_gradient``."""

    shape: ConvShape
    dy: torch.Tensor
    x: torch.Tensor
    prologue: Prologue | None
    dtype: torch.dtype
    precision: str
    config: Config | None
    splits: int | None


def vector_widths(
    shape: ConvShape, element_size: int, dy: tuple[int, ...], x: tuple[int, ...], pack: int = 1
) -> tuple[int, int]:
    """Elements of an aligned access to dy and x, of these strides; pack: groups that a tile runs through."""
    of_dy = (pack * shape.group_outputs, shape.K, dy[0], dy[2], dy[3])
    of_x = (pack * shape.group_channels, shape.C, x[0], x[2], x[3])
    return (
        vector_width(element_size, *of_dy) if dy[1] == 1 else 1,
        vector_width(element_size, *of_x) if x[1] == 1 else 1,
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: ConvShape,
    element_size: int,
    precision: str,
    dy: tuple[int, ...],
    x: tuple[int, ...],
    normalizes: bool,
    config: Config | None,
    splits: int | None,
    device: Device,
) -> tuple[Config, tuple[int, int, int], tuple[int, ...], dict[str, object]]:
    """What follows from sizes and the strides of dy and x: (config, grid, arguments N to x_w, flags)."""
    sizes_x, sizes_dy = (shape.N, shape.C, shape.H, shape.W), (shape.N, shape.K, shape.P, shape.Q)
    extent = max(span(sizes_x, x), span(sizes_dy, dy))
    wide = extent > INT32_ELEMENTS
    x, dy = stepping(sizes_x, x), stepping(sizes_dy, dy)
    vectors = min(vector_widths(shape, element_size, dy, x)) > 1
    config, chosen = choose_weight_gradient(
        shape, element_size, precision, device, vectors, wide, normalizes, config
    )
    splits = chosen if splits is None else min(splits, ceil_div(shape.M, config.BLOCK_K))
    if config.maxnreg is None and (config.BLOCK_M < 64 or element_size == 4):
        # Left to itself, ptxas spills to fit one more block: small tiles on sm_90, fp32 on sm_80.
        config = config.replace(maxnreg=255)
    pack = groups_packed(shape, config)
    C, K = pack * shape.group_channels, pack * shape.group_outputs
    vector_dy, vector_x = vector_widths(shape, element_size, dy, x, pack)
    tiles, bundles = tiles_of(shape, config)
    single_pixels = shape.taps == 1 and shape.stride == (1, 1) and shape.padding == (0, 0)
    dy_pitch = pixel_pitch(sizes_dy, dy)
    x_pitch = pixel_pitch(sizes_x, x) if single_pixels else None
    arguments = (
        *(shape.N, C, shape.H, shape.W, K, shape.P, shape.Q, shape.C, shape.K),
        *(*dy[:3], dy[3] if dy_pitch is None else dy_pitch),
        *(*x[:3], x[3] if x_pitch is None else x_pitch),
    )
    flags = {
        "R": shape.R,
        "S": shape.S,
        "STRIDE_H": shape.stride[0],
        "STRIDE_W": shape.stride[1],
        "PAD_H": shape.padding[0],
        "PAD_W": shape.padding[1],
        "DILATION_H": shape.dilation[0],
        "DILATION_W": shape.dilation[1],
        # A group's sizes shape the compiled kernel only where several of them share a tile.
        "GROUP_C": shape.group_channels if pack > 1 else 0,
        "GROUP_K": shape.group_outputs if pack > 1 else 0,
        "PACK": pack,
        "VECTOR_DY": vector_dy,
        "VECTOR_X": vector_x,
        "EVEN_K": K % config.BLOCK_M == 0 and shape.K % K == 0,
        "ONE_TAP": shape.taps == 1 or C % config.BLOCK_N == 0,
        "FLAT_DY": dy_pitch is not None,
        "FLAT_X": x_pitch is not None,
        "WIDE": wide or splits * shape.K * shape.group_channels * shape.taps > INT32_ELEMENTS,
    }
    return config, (tiles, bundles, splits), arguments, flags


def weight_gradient(call: WeightGradientCall) -> torch.Tensor:
    """Runs the kernels for a call that is not depthwise."""
    shape, device = call.shape, call.dy.device
    size = (shape.K, shape.group_channels, shape.R, shape.S)
    dw = torch.empty(size, dtype=call.dtype, device=device, memory_format=torch.channels_last)
    if shape.M == 0:
        return dw.zero_()
    config, grid, arguments, flags = _plan(
        shape, call.dy.element_size(), call.precision, call.dy.stride(), call.x.stride(),
        call.prologue is not None, call.config, call.splits, current_device(call.dy),
    )  # fmt: skip
    vectors, activation, slope = (None,) * 4, "none", 0.0
    if call.prologue is not None:
        vectors, activation = call.prologue.tensors, call.prologue.activation
        slope = call.prologue.negative_slope
    out = dw
    if grid[2] > 1:
        columns = shape.taps * shape.group_channels
        out = torch.empty((grid[2], shape.K, columns), dtype=torch.float32, device=device)
    launch(
        conv_weight_gradient_kernel, grid, call.dy, call.x, out, *vectors, *arguments, slope,
        config=config, reads=(call.dy, call.x, *vectors), writes=(out,), flops=shape.flops,
        PRECISION=call.precision, ACTIVATION=activation, **flags,
    )  # fmt: skip
    return dw if out is dw else sum_rows(out, dw)


def configs(device: Device) -> list[Config]:
    """Every config that ``choose_weight_gradient`` may pick on this device."""
    return kernel_configs(TABLE, device)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def call(
        name, x, filters, *, stride=1, padding=0, groups=1, activation=None, splits=None, dtype=torch.float16,
        precision="ieee", memory_format=torch.channels_last,
    ):  # fmt: skip
        def thunk(config: Config | None = None):
            def tensor(*size):
                return torch.empty(size, dtype=dtype, device="meta").to(memory_format=memory_format)

            K, R, S = filters
            geometry = ((stride, stride), (padding, padding), (1, 1), groups)
            shape = convolution_shape(x, (K, x[1] // groups, R, S), *geometry)
            dy = tensor(shape.N, K, shape.P, shape.Q)
            prologue = None
            if activation is not None:
                prologue = Prologue(*(torch.empty(shape.C, device="meta") for _ in range(4)), activation)
            image, device = tensor(*x), current_device(dy)
            vectors = min(vector_widths(shape, dtype.itemsize, dy.stride(), image.stride())) > 1
            wide = max(image.numel(), dy.numel()) > INT32_ELEMENTS
            served = weight_gradient_candidates(
                dtype.itemsize, precision, device, vectors, wide, prologue is not None
            )
            if config is not None and config not in served:
                raise UnsupportedConfig(f"{name}: {config} is never chosen for such a call")
            return weight_gradient(
                WeightGradientCall(shape, dy, image, prologue, dtype, precision, config, splits)
            )

        return RepresentativeCall(name, thunk)

    half, full, contiguous = torch.bfloat16, torch.float32, torch.contiguous_format
    layer = {"x": (8, 64, 28, 28), "filters": (64, 3, 3), "padding": 1}
    stem = {"x": (8, 3, 224, 224), "filters": (64, 7, 7), "padding": 3, "stride": 2}
    return [
        call("3x3", **layer),
        call("3x3, one share", **layer, splits=1),
        call("3x3, bf16, relu on load", **layer, dtype=half, activation="relu"),
        call("3x3, gelu on load", **layer, activation="gelu"),
        call("3x3, fp32, relu on load", **layer, dtype=full, activation="relu"),
        call("3x3, TF32", **layer, dtype=full, precision="tf32"),
        call("3x3, contiguous", **layer, memory_format=contiguous),
        call("3x3, past 2^31 elements", **{**layer, "x": (4096, 64, 112, 112)}),
        call("3x3, stride 2, 40 channels", x=(8, 40, 28, 28), filters=(72, 3, 3), padding=1, stride=2),
        call("1x1", x=(8, 256, 28, 28), filters=(64, 1, 1)),
        call("1x1, relu on load", x=(8, 64, 28, 28), filters=(256, 1, 1), activation="relu"),
        call("1x1, stride 2", x=(8, 64, 28, 28), filters=(128, 1, 1), stride=2),
        call("7x7/2 over 3 channels", **stem),
        call("7x7/2 over contiguous images, TF32", **stem, dtype=full, precision="tf32",
             memory_format=contiguous),
        call("5x5 in 2 groups", x=(8, 128, 27, 27), filters=(256, 5, 5), padding=2, groups=2),
        call("3x3, 32 groups of 4", x=(8, 128, 56, 56), filters=(128, 3, 3), padding=1, groups=32),
        call("3x3, 32 groups of 16, stride 2, relu on load", x=(8, 512, 28, 28), filters=(512, 3, 3),
             padding=1, stride=2, groups=32, activation="relu"),
        call("3x3, 4 groups of 6 to 10, fp32", x=(8, 24, 14, 14), filters=(40, 3, 3), padding=1, groups=4,
             dtype=full, memory_format=contiguous),
    ]  # fmt: skip
