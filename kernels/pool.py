"""2-D pooling: maximum and average, fixed and adaptive windows, forward and backward.

    y[n, c, p, q] = max or mean of x[n, c, h, w] over the window (p, q)

A tile is [pixels, planes] of the tensor that is written, where a pixel is (p, q) of one image and a plane is
(n, c); its fast axis, planes for channels-last and pixels for contiguous tensors, is a run of memory. What
depends on pixels alone (where windows begin and end) is computed for one axis of the tile. Tensors that are
read may have any strides.

Maximum pooling keeps for its backward which element of the window won, as r·S + s in one byte (two where a
window has more than 255 elements), and nothing else. Ties and NaN are decided as PyTorch does: the first of
equal maxima wins, and any NaN wins over numbers, the last one over other NaNs.

The backward gathers: each input pixel sums, in fp32 and in a fixed order, over the few windows that contain
it, so there are no atomics and each value is written once.
"""

import torch
import triton
import triton.language as tl

from fastnets.kernels.launch import Config, RepresentativeCall, launch
from fastnets.kernels.plane_mean import plane_mean
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
from fastnets.kernels.pool_windows import Windows, adaptive_windows, fixed_windows, is_channels_last

__all__ = ["average_pool", "configs", "max_pool", "representative_calls"]


@triton.jit
def _visit(
    x, plane_offset, plane_mask, h, w, h_mask, w_mask, tap, taps, best, winner, x_h, x_w,
    READ_VEC: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """One element of each window: a greater or NaN one wins the maximum, or it goes into the sum."""
    inside = h_mask & w_mask
    mask = inside & plane_mask
    # Outside of the image the address is that of its corner.
    pixel_offset = (tl.where(inside, h, 0) * x_h + tl.where(inside, w, 0) * x_w) * READ_VEC
    if MAXIMUM:
        value = tl.load(x + (plane_offset + pixel_offset), mask=mask, other=float("-inf")).to(tl.float32)
        # The first element wins even where all are -inf.
        wins = mask & ((value > best) | (value != value) | (winner == taps))
        return tl.where(wins, value, best), tl.where(wins, tap, winner)
    else:
        value = tl.load(x + (plane_offset + pixel_offset), mask=mask, other=0.0).to(tl.float32)
        return best + value, winner


@triton.jit
def _visit_row(
    x, plane_offset, plane_mask, h, h_mask, w_begin, w_limit, r, S, taps, best, winner, x_h, x_w,
    DILATION: tl.constexpr, UNROLL_S: tl.constexpr, READ_VEC: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Row r of each window."""
    if UNROLL_S > 0:
        for s in tl.static_range(UNROLL_S):
            w = w_begin + s * DILATION
            best, winner = _visit(
                x, plane_offset, plane_mask, h, w, h_mask, (w >= 0) & (w < w_limit), r * UNROLL_S + s, taps,
                best, winner, x_h, x_w, READ_VEC, MAXIMUM,
            )  # fmt: skip
    else:
        for s in range(S):
            w = w_begin + s * DILATION
            best, winner = _visit(
                x, plane_offset, plane_mask, h, w, h_mask, (w >= 0) & (w < w_limit), r * S + s, taps,
                best, winner, x_h, x_w, READ_VEC, MAXIMUM,
            )  # fmt: skip
    return best, winner


@triton.jit(
    do_not_specialize=["images", "channel_units", "pixel_units", "H", "W", "P", "Q", "R", "S", "divisor"],
    do_not_specialize_on_alignment=["x_n", "x_c", "x_h", "x_w"],
)
def pool_kernel(
    x,
    y,
    # Which element won, or None.
    window,
    # C and P·Q, the fast one of them in units of VEC.
    images,
    channel_units,
    pixel_units,
    H,
    W,
    P,
    Q,
    R,
    S,
    # In units of READ_VEC, but x_c.
    x_n,
    x_c,
    x_h,
    x_w,
    # 0: what the window has.
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
    # The window where it is small enough to unroll, else 0.
    UNROLL_R: tl.constexpr,
    UNROLL_S: tl.constexpr,
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
    p = pixel // Q
    q = pixel % Q
    h_begin = window_begin(p, H, P, STRIDE_H, PADDING_H, ADAPTIVE)
    w_begin = window_begin(q, W, Q, STRIDE_W, PADDING_W, ADAPTIVE)
    h_end = window_end(p, h_begin, H, P, R, PADDING_H, ADAPTIVE)
    w_end = window_end(q, w_begin, W, Q, S, PADDING_W, ADAPTIVE)
    if ADAPTIVE:
        h_limit = h_end
        w_limit = w_end
    else:
        h_limit = H
        w_limit = W
    plane_offset = n * x_n * READ_VEC + c * x_c

    taps = R * S
    if MAXIMUM:
        best = tl.full([1, 1], float("-inf"), tl.float32) + tl.zeros_like(pixel + c).to(tl.float32)
        winner = tl.zeros_like(pixel + c).to(tl.int32) + taps
    else:
        best = tl.zeros_like(pixel + c).to(tl.float32)
        winner = 0
    if UNROLL_R > 0:
        for r in tl.static_range(UNROLL_R):
            h = h_begin + r * DILATION_H
            best, winner = _visit_row(
                x, plane_offset, plane_mask, h, (h >= 0) & (h < h_limit) & pixel_mask, w_begin, w_limit, r, S,
                taps, best, winner, x_h, x_w, DILATION_W, UNROLL_S, READ_VEC, MAXIMUM,
            )  # fmt: skip
    else:
        for r in range(R):
            h = h_begin + r * DILATION_H
            best, winner = _visit_row(
                x, plane_offset, plane_mask, h, (h >= 0) & (h < h_limit) & pixel_mask, w_begin, w_limit, r, S,
                taps, best, winner, x_h, x_w, DILATION_W, UNROLL_S, READ_VEC, MAXIMUM,
            )  # fmt: skip

    mask = pixel_mask & plane_mask
    offset = dense_offset(pixel, n, c, pixels, channels, PLANES_LAST)
    if not MAXIMUM:
        count = window_length(h_begin, h_end, H, COUNT_PADDING) * window_length(
            w_begin, w_end, W, COUNT_PADDING
        )
        count = tl.where(divisor != 0, divisor, count).to(tl.float32)
        best = tl.div_rn(best, tl.broadcast_to(count, best.shape))
    tl.store(y + offset, best.to(y.dtype.element_ty), mask=mask)
    if window is not None:
        tl.store(window + offset, winner.to(window.dtype.element_ty), mask=mask)


def _forward(x, windows, window, divisor, count_include_pad, maximum, config) -> torch.Tensor:
    channels_last = is_channels_last(x)
    y = empty_dense(x, (windows.P, windows.Q), channels_last)
    if y.numel() == 0:
        return y
    plan = plan_launch(y, x, windows, channels_last, config)
    unrolled = not windows.adaptive and windows.R * windows.S <= UNROLLED
    launch(
        pool_kernel,
        plan.grid,
        x,
        y,
        window,
        *plan.sizes,
        divisor,
        config=plan.config,
        reads=(x,),
        writes=(y,) if window is None else (y, window),
        MAXIMUM=maximum,
        COUNT_PADDING=count_include_pad,
        UNROLL_R=windows.R if unrolled else 0,
        UNROLL_S=windows.S if unrolled else 0,
        **plan.constexprs,
    )
    return y


def max_pool(
    x: torch.Tensor, windows: Windows, *, keep_window: bool = False, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, window): the maximum of each window, and with ``keep_window`` which element it was.

    x: [N, C, H, W], fp32, fp16 or bf16, any strides. y: [N, C, P, Q] of x's dtype, window: likewise, uint8
    (int32 where a window has more than 255 elements) r·S + s, or R·S where the window has no element; both
    dense in x's memory format. Raises ``ValueError`` and ``TypeError`` for what does not fit the windows.
    """
    check_pooled("max_pool: x", x, (windows.H, windows.W))
    window = None
    if keep_window:
        window = empty_dense(x, (windows.P, windows.Q), is_channels_last(x), windows.index_dtype)
    return _forward(x, windows, window, 0, False, True, config), window


def average_pool(
    x: torch.Tensor,
    windows: Windows,
    *,
    count_include_pad: bool = True,
    divisor: int = 0,
    config: Config | None = None,
) -> torch.Tensor:
    """The mean of each window of x [N, C, H, W] (any strides): y [N, C, P, Q], dense in x's memory format.

    count_include_pad: padding counts as zeros, not as absent. divisor: what sums are divided by instead of
    their number (0: their number). The sum is kept in fp32. Raises as ``max_pool``.
    """
    check_pooled("average_pool: x", x, (windows.H, windows.W))
    if windows.is_whole_plane and config is None:
        return plane_mean(x, channels_last=is_channels_last(x))
    return _forward(x, windows, None, divisor, count_include_pad, False, config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts, dtypes and windows that networks have: see ``kernels``."""
    last, first = torch.channels_last, torch.contiguous_format
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32

    def forward(maximum, shape, dtype, memory_format, windows, **options):
        def thunk(config=None):
            x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
            chosen = windows(tuple(shape[2:]))
            if maximum:
                return max_pool(x, chosen, config=config, **options)
            return average_pool(x, chosen, config=config, **options)

        return thunk

    def fixed(k, stride, padding=0, dilation=1, ceil_mode=False):
        pairs = [(v, v) for v in (k, stride, padding, dilation)]
        return lambda size: fixed_windows(size, *pairs, ceil_mode)

    def adaptive(count):
        return lambda size: adaptive_windows(size, (count, count))

    stem, pixels = (32, 64, 112, 112), (8, 24, 28, 28)
    table = [
        ("max 3/2 bf16, channels-last", forward(True, stem, bf16, last, fixed(3, 2, 1), keep_window=True)),
        ("max 3/2 fp32, no window kept", forward(True, stem, full, last, fixed(3, 2, 1, 1, True))),
        ("max 2/2 fp16, contiguous", forward(True, stem, half, first, fixed(2, 2), keep_window=True)),
        ("max 3/2 fp32, contiguous", forward(True, stem, full, first, fixed(3, 2), keep_window=True)),
        ("max 5/1 bf16, looped", forward(True, pixels, bf16, last, fixed(5, 1, 2), keep_window=True)),
        ("max 3/1 dilated fp16", forward(True, pixels, half, last, fixed(3, 1, 1, 2), keep_window=True)),
        ("max adaptive fp32", forward(True, pixels, full, last, adaptive(6), keep_window=True)),
        ("average 3/1 bf16", forward(False, pixels, bf16, last, fixed(3, 1, 1), count_include_pad=False)),
        ("average 2/2 fp32, contiguous", forward(False, pixels, full, first, fixed(2, 2))),
        ("average adaptive fp16", forward(False, pixels, half, last, adaptive(7))),
        ("average adaptive fp32, contiguous", forward(False, pixels, full, first, adaptive(6))),
        ("global average fp32", forward(False, (8, 64, 7, 7), full, last, adaptive(1))),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
