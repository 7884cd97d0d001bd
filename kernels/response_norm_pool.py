"""Local response normalization across channels and the maximum pooling behind it, in one launch.

    v = relu(x) or x;   z[c] = v[c] · (k + α / size · Σ v[c']²)^−β;   y = max of z over a window

x [N, C, H, W], c' as in ``response_norm``. A program owns BLOCK_M columns of y times BLOCK_K channels; a
column is BLOCK_P pixels of one q, one below the other. For each column s of the windows it walks down the
input rows, normalises each once and lets it take part in every window that has it: with windows of 3 and
steps of 2 (AlexNet, GoogLeNet) seven and a half norms for each result, where windows that know nothing of one
another take nine. z is never stored. Inference only: there is no backward of this.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.depthwise import block_configs, filter_row, is_used, pick_config
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.pool_windows import Windows, fixed_windows
from fastnets.kernels.response_norm import BETAS, inverse_power

__all__ = ["configs", "local_response_norm_max_pool", "representative_calls", "why_not_pooled"]

MOST_ELEMENTS = 9  # of a window
_TILE = 512  # results of one row of a program: four a thread, more run out of registers
_TALLEST = 2


@triton.jit
def _rectified_channel(x, pixels, inside_pixel, c, C, x_c, RELU: tl.constexpr):
    """Channels c of pixels in fp32, zeros outside of the tensor."""
    inside = (c >= 0) & (c < C)
    at = pixels[:, None] + (tl.where(inside, c, 0) * x_c)[None, :]
    value = tl.load(x + at, mask=inside_pixel[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else value


@triton.jit(
    do_not_specialize=["columns", "C", "H", "W", "P", "Q", "p_tiles", "x_n", "x_h", "x_w"],
    do_not_specialize_on_alignment=["x_c"],
)
def response_norm_pool_kernel(
    x, y, columns, C, H, W, P, Q, p_tiles, x_n, x_c, x_h, x_w, alpha, beta, k,
    SIZE: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [N, C, P, Q] channels-last. Grid (tiles of columns × tiles of channels,)."""
    c_tiles = tl.cdiv(C, BLOCK_K)
    column_tile = tl.program_id(0) // c_tiles
    c = tl.program_id(0) % c_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        column_tile = column_tile.to(tl.int64)
        c = c.to(tl.int64)
    m = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < columns
    q = m % Q
    n = m // Q // p_tiles
    p0 = m // Q % p_tiles * BLOCK_P
    h0 = p0 * STRIDE_H - PADDING_H
    w0 = q * STRIDE_W - PADDING_W

    best = ()
    for _ in tl.static_range(BLOCK_P):
        best = best + (tl.full((BLOCK_M, BLOCK_K), float("-inf"), tl.float32),)
    for s in range(S):
        w = w0 + s * DILATION_W
        inside_w = exists & (w >= 0) & (w < W)
        for row in tl.static_range((BLOCK_P - 1) * STRIDE_H + (R - 1) * DILATION_H + 1):
            if is_used(row, BLOCK_P, STRIDE_H, DILATION_H, R):
                h = h0 + row
                inside = inside_w & (h >= 0) & (h < H)
                pixels = tl.where(inside, n * x_n + h * x_h + w * x_w, 0)
                own = _rectified_channel(x, pixels, inside, c, C, x_c, RELU)
                total = tl.zeros_like(own)
                # Not unrolled: all rows' channels at a time are more than there are registers for.
                for i in range(SIZE):
                    of = _rectified_channel(x, pixels, inside, c + (i - SIZE // 2), C, x_c, RELU)
                    total += of * of
                value = own * inverse_power(k + alpha * total, beta, BETA)
                value = tl.where(inside[:, None], value, float("-inf"))
                rest = ()
                for p in tl.static_range(BLOCK_P):
                    if filter_row(row, p, STRIDE_H, DILATION_H, R) >= 0:
                        greater = tl.maximum(best[p], value, propagate_nan=tl.PropagateNan.ALL)
                        rest = rest + (greater,)
                    else:
                        rest = rest + (best[p],)
                best = rest

    for p in tl.static_range(BLOCK_P):
        at = (((n * P + p0 + p) * Q + q) * C)[:, None] + c[None, :]
        mask = (exists & (p0 + p < P))[:, None] & (c < C)[None, :]
        tl.store(y + at, best[p].to(y.dtype.element_ty), mask=mask)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: those of depthwise convolutions, which walk alike, but
    for the tall columns, whose roots and quotients have no registers."""
    return [config for config in block_configs(_TILE) if config.BLOCK_P <= _TALLEST]


def why_not_pooled(windows: Windows) -> str | None:
    """Why a norm is not pooled in its own launch, or None where it is."""
    if windows.adaptive:
        return "adaptive windows are not served"
    if windows.R * windows.S > MOST_ELEMENTS:
        return f"a window of {windows.R}x{windows.S} has more than {MOST_ELEMENTS} pixels"
    return None


@functools.lru_cache(maxsize=4096)
def _plan(shape, strides, windows: Windows, config: Config | None, multiprocessors: int):
    """(grid, config, integer arguments, constexprs)."""
    N, C = shape[:2]
    P, Q = windows.P, windows.Q
    if config is None:
        config = pick_config(N, C, P, Q, True, multiprocessors, _TILE)
        config = config.replace(BLOCK_P=min(config.BLOCK_P, _TALLEST))
    elif config not in configs(None):
        raise UnsupportedConfig(f"{config} is for another kernel")
    p_tiles = tiles(P, config.BLOCK_P)
    columns = N * p_tiles * Q
    extent = max(N * C * P * Q, sum((size - 1) * at for size, at in zip(shape, strides)))
    n, c, h, w = (at if size > 1 else 0 for size, at in zip(shape, strides))
    constexprs = {
        "R": windows.R, "S": windows.S, "STRIDE_H": windows.stride[0], "STRIDE_W": windows.stride[1],
        "PADDING_H": windows.padding[0], "PADDING_W": windows.padding[1],
        "DILATION_H": windows.dilation[0], "DILATION_W": windows.dilation[1],
        # Columns overhang the image by a tile and a halo.
        "WIDE": 2 * extent >= 2**31,
    }  # fmt: skip
    integers = (columns, C, windows.H, windows.W, P, Q, p_tiles, n, c, h, w)
    grid = (tiles(columns, config.BLOCK_M) * tiles(C, config.BLOCK_K),)
    # Left to itself, ptxas spills to fit one more block.
    return grid, config.replace(maxnreg=255), integers, constexprs


def local_response_norm_max_pool(
    x: torch.Tensor,
    size: int,
    windows: Windows,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    relu: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """The maximum over ``windows`` of the norm of ``relu(x)`` or x -> [N, C, P, Q], dense channels-last.

    x: [N, C, H, W], fp32, fp16 or bf16, any strides; channels-last is read in whole runs. Computed in fp32,
    rounded once. Raises ``ValueError`` and ``TypeError`` for what does not fit, ``UnsupportedConfig`` where
    ``why_not_pooled`` has a reason.
    """
    if x.dim() != 4 or tuple(x.shape[2:]) != (windows.H, windows.W):
        raise ValueError(
            f"local_response_norm_max_pool: x is {tuple(x.shape)}, the windows are for "
            f"[N, C, {windows.H}, {windows.W}]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"local_response_norm_max_pool: x is {x.dtype}, expected float32, float16 or bfloat16"
        )
    if size < 1:
        raise ValueError(f"local_response_norm_max_pool: size={size} must be at least 1")
    if (reason := why_not_pooled(windows)) is not None:
        raise UnsupportedConfig(f"local_response_norm_max_pool: {reason}; norm and pool one after the other")
    y = torch.empty(
        (*x.shape[:2], windows.P, windows.Q), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if y.numel() == 0:
        return y
    multiprocessors = 0 if config is not None else current_device(x).multiprocessors
    grid, config, integers, constexprs = _plan(tuple(x.shape), x.stride(), windows, config, multiprocessors)
    launch(
        response_norm_pool_kernel, grid, x, y, *integers, alpha / size, beta, k, config=config,
        reads=(x,), writes=(y,), SIZE=size, BETA=BETAS.get(beta, "any"), RELU=relu, **constexprs,
    )  # fmt: skip
    return y


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the networks that have it, AlexNet and GoogLeNet: see ``kernels``."""

    def call(shape, dtype, stride=2, padding=0, beta=0.75, relu=False, size=5, ceil_mode=False, last=True):
        def thunk(config=None):
            memory_format = torch.channels_last if last else torch.contiguous_format
            x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
            pairs = ((3, 3), (stride, stride), (padding, padding), (1, 1))
            windows = fixed_windows(tuple(shape[2:]), *pairs, ceil_mode)
            return local_response_norm_max_pool(x, size, windows, beta=beta, relu=relu, config=config)

        return thunk

    half, full = torch.float16, torch.float32
    table = [
        ("AlexNet, fp16", call((32, 96, 55, 55), half)),
        ("AlexNet, fp32, relu", call((32, 256, 27, 27), full, relu=True)),
        ("GoogLeNet, fp32", call((32, 192, 56, 56), full, ceil_mode=True)),
        (
            "bf16, another exponent, padded",
            call((8, 64, 28, 28), torch.bfloat16, padding=1, beta=0.6, size=9),
        ),
        ("contiguous fp16, steps of 1", call((8, 48, 28, 28), half, stride=1, last=False)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
