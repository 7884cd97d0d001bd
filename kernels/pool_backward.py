"""Gradients of 2-D pooling, gathered: each input pixel sums over the few windows that contain it.

    dx[n, c, h, w] = sum over windows (p, q) with (h, w) in them of dy[n, c, p, q]
                     · [(h, w) won the maximum]   or   / number of pixels that count in the mean

The sum is kept in fp32 in a fixed order and written once: no atomics, the same bits in every run. Windows,
tiles and layouts are those of ``kernels.pool``. Of maximum pooling only the winners' positions are read,
never its input.
"""

import torch
import triton
import triton.language as tl

from fastnets.kernels.launch import Config, RepresentativeCall, launch
from fastnets.kernels.pool_tile import (
    UNROLLED,
    check_pooled,
    dense_offset,
    empty_dense,
    plan_launch,
    tile_of,
    window_begin,
    window_end,
    window_length,
)
from fastnets.kernels.pool_tile import configs_of_tiles as configs
from fastnets.kernels.pool_windows import Windows, adaptive_windows, fixed_windows

__all__ = ["average_pool_backward", "configs", "max_pool_backward", "representative_calls"]


@triton.jit
def _collect(
    dy, window, total, dy_plane, window_plane, plane_mask, p, q, inside, element, count, Q,
    channels, dy_h, dy_w, READ_VEC: tl.constexpr, MAXIMUM: tl.constexpr, PLANES_LAST: tl.constexpr,
):  # fmt: skip
    """What one window hands back to the pixels that are its ``element``."""
    mask = inside & plane_mask
    p = tl.where(inside, p, 0)
    q = tl.where(inside, q, 0)
    if MAXIMUM:
        pixel_offset = p * Q + q
        if PLANES_LAST:
            pixel_offset = pixel_offset * channels
        winner = tl.load(window + (window_plane + pixel_offset), mask=mask, other=0).to(tl.int32)
    grad = tl.load(dy + (dy_plane + (p * dy_h + q * dy_w) * READ_VEC), mask=mask, other=0.0).to(tl.float32)
    if MAXIMUM:
        grad = tl.where(winner == element, grad, 0.0)
    else:
        grad = tl.div_rn(grad, tl.broadcast_to(tl.where(inside, count, 1).to(tl.float32), grad.shape))
    return total + grad


@triton.jit
def _candidate(
    h, j, extent, count, length, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """The j-th window that may contain pixel h: which, whether it does, and as which of its elements."""
    if ADAPTIVE:
        p = h * count // extent + j
        return p, p < ((h + 1) * count + extent - 1) // extent, h - p * extent // count
    else:
        last = (h + PADDING) // STRIDE
        p = last - j
        distance = h + PADDING - p * STRIDE
        within = (p >= 0) & (p < count) & (distance <= (length - 1) * DILATION)
        if DILATION > 1:
            within = within & (distance % DILATION == 0)
        return p, within, distance // DILATION


@triton.jit
def _share(p, extent, count, length, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
           COUNT_PADDING: tl.constexpr):  # fmt: skip
    """How many pixels of window p count in its mean, along one dimension."""
    begin = window_begin(p, extent, count, STRIDE, PADDING, ADAPTIVE)
    end = window_end(p, begin, extent, count, length, PADDING, ADAPTIVE)
    return window_length(begin, end, extent, COUNT_PADDING)


@triton.jit
def _collect_row(
    dy, window, total, dy_plane, window_plane, plane_mask, pixel_mask, h, w, j, H, W, P, Q, R, S, channels,
    dy_h, dy_w, divisor, MAXIMUM: tl.constexpr, ADAPTIVE: tl.constexpr, COUNT_PADDING: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, REACH_W: tl.constexpr, UNROLL: tl.constexpr,
    PLANES_LAST: tl.constexpr, READ_VEC: tl.constexpr,
):  # fmt: skip
    """Adds what the windows of the j-th row that may contain pixel (h, w) hand back."""
    p, p_mask, r = _candidate(h, j, H, P, R, STRIDE_H, PADDING_H, DILATION_H, ADAPTIVE)
    p_mask = p_mask & pixel_mask
    rows = _share(p, H, P, R, STRIDE_H, PADDING_H, ADAPTIVE, COUNT_PADDING)
    if UNROLL:
        for k in tl.static_range(REACH_W):
            q, q_mask, s = _candidate(w, k, W, Q, S, STRIDE_W, PADDING_W, DILATION_W, ADAPTIVE)
            columns = _share(q, W, Q, S, STRIDE_W, PADDING_W, ADAPTIVE, COUNT_PADDING)
            total = _collect(
                dy, window, total, dy_plane, window_plane, plane_mask, p, q, p_mask & q_mask, r * S + s,
                tl.where(divisor != 0, divisor, rows * columns), Q, channels, dy_h, dy_w, READ_VEC, MAXIMUM,
                PLANES_LAST,
            )  # fmt: skip
    else:
        for k in range(REACH_W):
            q, q_mask, s = _candidate(w, k, W, Q, S, STRIDE_W, PADDING_W, DILATION_W, ADAPTIVE)
            columns = _share(q, W, Q, S, STRIDE_W, PADDING_W, ADAPTIVE, COUNT_PADDING)
            total = _collect(
                dy, window, total, dy_plane, window_plane, plane_mask, p, q, p_mask & q_mask, r * S + s,
                tl.where(divisor != 0, divisor, rows * columns), Q, channels, dy_h, dy_w, READ_VEC, MAXIMUM,
                PLANES_LAST,
            )  # fmt: skip
    return total


@triton.jit(
    do_not_specialize=["images", "channel_units", "pixel_units", "H", "W", "P", "Q", "R", "S", "divisor"],
    do_not_specialize_on_alignment=["dy_n", "dy_c", "dy_h", "dy_w"],
)
def pool_backward_kernel(
    dy,
    window,
    dx,
    images,
    channel_units,
    pixel_units,
    H,
    W,
    P,
    Q,
    R,
    S,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    divisor,
    MAXIMUM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    # Windows that can contain one pixel, along each dimension.
    REACH_H: tl.constexpr,
    REACH_W: tl.constexpr,
    UNROLL: tl.constexpr,
    PLANES_LAST: tl.constexpr,
    VEC: tl.constexpr,
    READ_VEC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_SLOW: tl.constexpr,
    BLOCK_FAST: tl.constexpr,
):
    channels = channel_units * (VEC if PLANES_LAST else 1)
    pixels = pixel_units * (1 if PLANES_LAST else VEC)
    pixel, n, c, pixel_mask, plane_mask = tile_of(
        pixels, images, channels, PLANES_LAST, VEC, WIDE, BLOCK_SLOW, BLOCK_FAST
    )
    h = pixel // W
    w = pixel % W
    dy_plane = n * dy_n * READ_VEC + c * dy_c
    window_plane = dense_offset(0, n, c, P * Q, channels, PLANES_LAST)
    total = tl.zeros_like(pixel + c).to(tl.float32)
    if UNROLL:
        for j in tl.static_range(REACH_H):
            total = _collect_row(
                dy, window, total, dy_plane, window_plane, plane_mask, pixel_mask, h, w, j, H, W, P, Q, R, S,
                channels, dy_h, dy_w, divisor, MAXIMUM, ADAPTIVE, COUNT_PADDING, STRIDE_H, STRIDE_W,
                PADDING_H, PADDING_W, DILATION_H, DILATION_W, REACH_W, UNROLL, PLANES_LAST, READ_VEC,
            )  # fmt: skip
    else:
        for j in range(REACH_H):
            total = _collect_row(
                dy, window, total, dy_plane, window_plane, plane_mask, pixel_mask, h, w, j, H, W, P, Q, R, S,
                channels, dy_h, dy_w, divisor, MAXIMUM, ADAPTIVE, COUNT_PADDING, STRIDE_H, STRIDE_W,
                PADDING_H, PADDING_W, DILATION_H, DILATION_W, REACH_W, UNROLL, PLANES_LAST, READ_VEC,
            )  # fmt: skip
    offset = dense_offset(pixel, n, c, pixels, channels, PLANES_LAST)
    tl.store(dx + offset, total.to(dx.dtype.element_ty), mask=pixel_mask & plane_mask)


def _backward(dy, window, windows, divisor, count_include_pad, channels_last, config) -> torch.Tensor:
    check_pooled("pooling: dy", dy, (windows.P, windows.Q))
    dx = empty_dense(dy, (windows.H, windows.W), channels_last)
    if dx.numel() == 0:
        return dx
    plan = plan_launch(dx, dy, windows, channels_last, config)
    launch(
        pool_backward_kernel,
        plan.grid,
        dy,
        window,
        dx,
        *plan.sizes,
        divisor,
        config=plan.config,
        reads=(dy, window),
        writes=(dx,),
        MAXIMUM=window is not None,
        COUNT_PADDING=count_include_pad,
        REACH_H=windows.reach[0],
        REACH_W=windows.reach[1],
        UNROLL=windows.reach[0] * windows.reach[1] <= UNROLLED,
        **plan.constexprs,
    )
    return dx


def max_pool_backward(
    dy: torch.Tensor,
    window: torch.Tensor,
    windows: Windows,
    *,
    channels_last: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """dx [N, C, H, W] of ``max_pool``, dense and of dy's dtype, from dy (any strides) and its window."""
    if window.shape != dy.shape:
        raise ValueError(f"max_pool_backward: window is {tuple(window.shape)}, dy {tuple(dy.shape)}")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    window = window.contiguous(memory_format=memory_format)
    return _backward(dy, window, windows, 0, False, channels_last, config)


def average_pool_backward(
    dy: torch.Tensor,
    windows: Windows,
    *,
    count_include_pad: bool = True,
    divisor: int = 0,
    channels_last: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """dx [N, C, H, W] of ``average_pool``, dense and of dy's dtype, from dy (any strides)."""
    return _backward(dy, None, windows, divisor, count_include_pad, channels_last, config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts, dtypes and windows that networks have: see ``kernels``."""
    last, first = torch.channels_last, torch.contiguous_format
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32

    def backward(maximum, shape, dtype, memory_format, windows, expanded=False, **options):
        def thunk(config=None):
            chosen = windows(tuple(shape[2:]))
            size = (*shape[:2], chosen.P, chosen.Q)
            dy = torch.empty(size, dtype=dtype, device="meta").to(memory_format=memory_format)
            dy = dy[..., :1, :1].expand(size) if expanded else dy
            options.update(channels_last=memory_format is last, config=config)
            if maximum:
                window = torch.empty(size, dtype=chosen.index_dtype, device="meta")
                return max_pool_backward(dy, window.to(memory_format=memory_format), chosen, **options)
            return average_pool_backward(dy, chosen, **options)

        return thunk

    def fixed(k, stride, padding=0, dilation=1, ceil_mode=False):
        pairs = [(v, v) for v in (k, stride, padding, dilation)]
        return lambda size: fixed_windows(size, *pairs, ceil_mode)

    def adaptive(count):
        return lambda size: adaptive_windows(size, (count, count))

    stem, pixels = (32, 64, 112, 112), (8, 24, 28, 28)
    table = [
        ("max 3/2 bf16 backward", backward(True, stem, bf16, last, fixed(3, 2, 1))),
        ("max 2/2 fp16 backward, contiguous", backward(True, stem, half, first, fixed(2, 2))),
        ("max 3/2 fp32 backward", backward(True, stem, full, last, fixed(3, 2))),
        ("max 5/1 bf16 backward, looped", backward(True, pixels, bf16, last, fixed(5, 1, 2))),
        ("max 3/1 dilated fp16 backward", backward(True, pixels, half, last, fixed(3, 1, 1, 2))),
        ("max adaptive fp32 backward", backward(True, pixels, full, last, adaptive(6))),
        ("average 3/1 bf16 backward", backward(False, pixels, bf16, last, fixed(3, 1, 1))),
        ("average 2/2 fp32 backward", backward(False, pixels, full, first, fixed(2, 2), True)),
        ("average adaptive fp16 backward", backward(False, pixels, half, last, adaptive(7))),
        ("global average bf16 backward", backward(False, (32, 2048, 7, 7), bf16, last, adaptive(1))),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
