"""A convolution, batch norm, activation and the pooling of whole windows, in one launch.

    y = pool(act(bn(conv2d(x, weight) + bias)))

pool is the maximum or the mean of windows of at most four pixels that lie side by side. What lies between
convolution and pooling is never stored.

Of few channels, x [N, C, H, W] has C·R·S columns that are taken jointly, as in ``conv_joint``. A program of
``conv_pool_kernel`` holds pooled pixels: for each element of their windows it computes a tile of the
convolution, and keeps the maximum or sum in registers. This is for the small networks that launches alone
would bound.

Of more channels, as in VGG, the kernel is that of ``conv``: its rows are then the pixels of the windows,
window by window, and the epilogue pools successive rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels import conv
from fastnets.kernels.activation import activate
from fastnets.kernels.conv_configs import addressing, holds_pool, pool_pays, products_of, representative
from fastnets.kernels.conv_shape import (
    INT32_ELEMENTS,
    Pool,
    conv_call,
    span,
    stepping,
)
from fastnets.kernels.conv_tile import within
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = ["configs", "conv_pool", "pools_result", "representative_calls", "why_not_pooled"]

# Over more channels than these, outputs may be as many as they like, and windows have 2 or 4 pixels.
MOST_CHANNELS, MOST_OUTPUTS, MOST_ELEMENTS = 31, 64, 4


@triton.jit(do_not_specialize=("M", "H", "W", "P", "Q", "x_n", "x_c", "x_h", "x_w"))
def conv_pool_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, M, H, W, K, P, Q,
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s, eps, negative_slope,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, MAXIMUM: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the M pooled pixels [N, P, Q], all K outputs, stored to y [M, K]. Grid (row tiles,)."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    COLUMNS: tl.constexpr = R * S * C
    m = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = m < M
    pixel = tl.minimum(m, M - 1)
    n = pixel // Q // P
    p = pixel // Q % P
    q = pixel % Q
    k = tl.arange(0, BLOCK_N)
    inside_k = k < K
    filters = tl.where(inside_k, k, 0) * weight_k
    lanes = tl.arange(0, BLOCK_K)

    shift = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + k, mask=inside_k, other=0.0).to(tl.float32)
    if running_mean is not None:
        shift -= tl.load(running_mean + k, mask=inside_k, other=0.0).to(tl.float32)

    pooled = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(POOL_H):
        for j in tl.static_range(POOL_W):
            h = (p * POOL_H + i) * STRIDE_H - PAD_H
            w = (q * POOL_W + j) * STRIDE_W - PAD_W
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for first in range(0, COLUMNS, BLOCK_K):
                column = first + lanes
                present = column < COLUMNS
                column = tl.where(present, column, 0)
                r = column // (S * C)
                s = column // C % S
                c = (column % C).to(INDEX)
                row = h[:, None] + (r * DILATION_H)[None, :]
                across = w[:, None] + (s * DILATION_W)[None, :]
                inside = present[None, :] & within(row, H) & within(across, W)
                offsets = (n * x_n)[:, None] + (c * x_c)[None, :] + row * x_h + across * x_w
                a = tl.load(x + tl.where(inside, offsets, 0), mask=inside, other=0.0)
                of_column = r * weight_r + s * weight_s + c * weight_c
                b_pointers = weight + (filters[:, None] + of_column[None, :])
                b = tl.load(b_pointers, mask=inside_k[:, None] & present[None, :], other=0.0)
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            acc += shift[None, :]
            if running_var is not None:
                scale = tl.rsqrt(tl.load(running_var + k, mask=inside_k, other=1.0).to(tl.float32) + eps)
                if bn_weight is not None:
                    scale *= tl.load(bn_weight + k, mask=inside_k, other=0.0).to(tl.float32)
                acc *= scale[None, :]
                if bn_bias is not None:
                    acc += tl.load(bn_bias + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
            acc = activate(acc, ACTIVATION, negative_slope)
            if i + j == 0:
                pooled = acc
            elif MAXIMUM:
                pooled = tl.maximum(pooled, acc, propagate_nan=tl.PropagateNan.ALL)
            else:
                pooled += acc
    if not MAXIMUM:
        pooled = pooled / (POOL_H * POOL_W)
    lies_at = (m * K)[:, None] + k[None, :]
    tl.store(y + lies_at, pooled.to(y.dtype.element_ty), mask=rows[:, None] & inside_k[None, :])


def conv_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    *,
    window: tuple[int, int],
    maximum: bool = True,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """pool(act(bn(conv2d(x, weight, bias)))) -> y [N, K, P // window[0], Q // window[1]], channels-last.

    x [N, C, H, W] and weight [K, C, R, S] share a dtype (fp32, fp16, bf16), any strides; the vectors are [K],
    fp32 or of it. window: of the pooling, with a stride of its size, no padding, pixels that fill no window
    left out; maximum: or the mean. All after the products is fp32, rounded once. config: one of ``configs``
    that is of the kernel in question, or None to have it chosen.

    Raises ``ValueError`` or ``TypeError`` for what is no convolution; ``UnsupportedConfig`` where
    ``why_not_pooled`` has a reason.
    """
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    call = conv_call(
        x, weight, vectors, None, stride, padding, dilation, 1, eps, activation, negative_slope, config
    )
    shape = call.shape
    reason = why_not_pooled(shape.C, shape.K, window)
    if reason is not None:
        raise UnsupportedConfig(f"conv_pool: {reason}; convolve and pool one after the other")
    P, Q = shape.P // window[0], shape.Q // window[1]
    if min(P, Q) < 1:
        raise ValueError(f"a window of {window} does not fit {shape.P}x{shape.Q} pixels")
    if shape.C > MOST_CHANNELS:
        call.pool = Pool(tuple(window), maximum)
        call.shape = call.pool.covered(shape)
        return conv.taps_conv(call)[0]
    M, K = shape.N * P * Q, shape.K
    y = torch.empty_strided(
        (shape.N, K, P, Q), (K * P * Q, 1, K * Q, K), dtype=x.dtype, device=x.device
    )  # fmt: skip
    if M == 0:
        return y
    x_strides, weight_strides = stepping(x.shape, x.stride()), stepping(weight.shape, weight.stride())
    extents = (span(x.shape, x_strides), span(weight.shape, weight_strides), M * K)
    device = current_device(x)
    products = products_of(x.element_size(), call.precision, device)
    if config is None:
        config = _choose(products, M, K, device)
    elif config not in _configs(products, device) or config.BLOCK_N < K:
        raise UnsupportedConfig(f"{config} is not for {K} outputs of {products} products")
    launch(
        conv_pool_kernel, (tiles(M, config.BLOCK_M),), x, weight, y, *call.vectors,
        *(M, shape.H, shape.W, K, P, Q, *x_strides, *weight_strides, eps, negative_slope),
        config=config, flops=2 * M * window[0] * window[1] * K * shape.C * shape.taps,
        reads=(x, weight, *call.vectors), writes=(y,),
        C=shape.C, **shape.geometry, POOL_H=window[0], POOL_W=window[1], MAXIMUM=maximum,
        WIDE=max(extents) > INT32_ELEMENTS, PRECISION=call.precision, ACTIVATION=activation,
    )  # fmt: skip
    return y


def why_not_pooled(C: int, K: int, window: tuple[int, int]) -> str | None:
    """Why a convolution of C channels to K outputs is not pooled in its own launch, or None where it is."""
    pixels = window[0] * window[1]
    if pixels > MOST_ELEMENTS:
        return f"a window of {window[0]}x{window[1]} has more than {MOST_ELEMENTS} pixels"
    if C > MOST_CHANNELS:
        if pixels not in (2, 4):
            return f"a window of {window[0]}x{window[1]} over {C} channels has {pixels} pixels, not 2 or 4"
    elif K > MOST_OUTPUTS:
        return f"{K} outputs are more than {MOST_OUTPUTS}, of {C} channels"
    return None


def pools_result(
    x: torch.Tensor,
    weight: torch.Tensor,
    window: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> bool:
    """Whether ``conv_pool`` serves this convolution, and is predicted not to lose by it."""
    call = conv_call(x, weight, (None,) * 5, None, stride, padding, dilation, 1, 0.0, "none", 0.0, None)
    shape = call.shape
    if why_not_pooled(shape.C, shape.K, window) is not None:
        return False
    if shape.C <= MOST_CHANNELS:
        return True
    addresses = addressing(call, call.flags())
    device = current_device(x)
    return pool_pays(shape, Pool(tuple(window)), x.element_size(), call.precision, device, *addresses)


def _configs(products: str, device: Device) -> list[Config]:
    BLOCK_K = 16 if products == "fma" else 32
    spills = (32, 16) if products == "fma" and device.capability in (100, 103) else None
    return [
        Config(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=2)
        for BLOCK_M, BLOCK_N in ((32, 16), (32, 32), (32, 64), (64, 16), (64, 32))  # larger ones spill
        if (BLOCK_M, BLOCK_N) != spills
    ]


def _choose(products: str, M: int, K: int, device: Device) -> Config:
    """The narrowest columns that hold K; tall tiles where they are enough for every multiprocessor."""
    BLOCK_N = max(16, triton.next_power_of_2(K))
    BLOCK_M = 64 if BLOCK_N < 64 and tiles(M, 64) >= 2 * device.multiprocessors else 32
    fitting = [c for c in _configs(products, device) if c.BLOCK_N == BLOCK_N]
    return next((c for c in fitting if c.BLOCK_M == BLOCK_M), fitting[0])


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on this device."""
    kinds = ("fma",) if device.capability < 80 else ("16-bit", "fma")
    few = [config for kind in kinds for config in _configs(kind, device)]
    return [*few, *filter(holds_pool, conv.configs(device))]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def call(x, filters, dtype, bn=False, precision="ieee", **options):
        def thunk(config=None):
            image = torch.empty(x, dtype=dtype, device="meta")
            K, R, S = filters
            weight = torch.empty(K, x[1], R, S, dtype=dtype, device="meta")
            vectors = [torch.empty(K, device="meta") if i == 0 or bn else None for i in range(5)]
            switch = torch.backends.cudnn.conv
            before, switch.fp32_precision = switch.fp32_precision, precision
            try:
                return conv_pool(image, weight, *vectors, window=(2, 2), config=config, **options)
            finally:
                switch.fp32_precision = before

        return thunk

    half, full = torch.bfloat16, torch.float32
    first = {"x": (256, 1, 28, 28), "filters": (6, 5, 5), "padding": (2, 2)}
    second = {"x": (256, 6, 14, 14), "filters": (16, 5, 5)}
    cifar = {"x": (64, 3, 32, 32), "filters": (64, 3, 3), "padding": (1, 1), "activation": "relu", "bn": True}
    table = [
        ("5x5 over 1 channel, max, bf16", call(**first, dtype=half, activation="relu")),
        ("5x5 over 1 channel, mean, fp32", call(**first, dtype=full, activation="sigmoid", maximum=False)),
        ("5x5 over 6 channels, mean, bf16", call(**second, dtype=half, activation="tanh", maximum=False)),
        ("5x5 over 6 channels, max, fp32", call(**second, dtype=full, activation="relu")),
        ("3x3 over 3 channels, BN, max, fp16", call(**cifar, dtype=torch.float16)),
        ("3x3 over 3 channels, BN, max, TF32", call(**cifar, dtype=full, precision="tf32")),
    ]
    return [*(RepresentativeCall(name, thunk) for name, thunk in table), *_of_more_channels()]


def _of_more_channels() -> list[RepresentativeCall]:
    half, full, last = torch.bfloat16, torch.float32, torch.channels_last
    whole, mean, pairs = Pool((2, 2)), Pool((2, 2), False), Pool((1, 2), False)
    layer = {"x": (8, 64, 56, 56), "filters": (128, 3, 3), "padding": 1, "memory_format": last}
    deep = {"x": (8, 512, 28, 28), "filters": (512, 3, 3), "padding": 1}
    call = functools.partial(representative, run=conv.taps_conv)
    return [
        call("3x3, pooled", **layer, pool=whole),
        call("3x3 over many channels, pooled, bf16", **deep, dtype=half, pool=whole),
        call("3x3, pooled, fp32", **layer, dtype=full, pool=whole),
        call("3x3, pooled, TF32", **layer, dtype=full, precision="tf32", pool=whole),
        call("3x3, pooled, past 2^31 elements", **{**layer, "x": (1024, 64, 224, 224)}, pool=whole),
        call("3x3, pooled, contiguous", **{**layer, "memory_format": torch.contiguous_format}, pool=whole),
        call("3x3, mean, gelu, fp32", **layer, dtype=full, activation="gelu", pool=mean),
        call("3x3 over odd C, mean of pairs", **{**layer, "x": (8, 72, 28, 28)}, pool=pairs),
    ]
