"""Depthwise convolution and the layer norm over its channels behind it, in one launch (ConvNeXt).

    z[n, :, p, q] = bias + Σ over r, s of x[n, :, h, w] · weight[:, 0, r, s],  rounded to x's dtype
    y[n, p, q, :] = (z − mean z) / sqrt(var z + eps) · norm_weight + norm_bias,  over channels

h = p · stride + r · dilation − padding, w likewise. A program owns some columns of pixels with all their
channels: BLOCK_M columns of BLOCK_P pixels, one below the other, times PARTS blocks of BLOCK_K channels,
which it convolves one after the other as ``depthwise`` does and keeps in registers. Then it takes the
statistics of each pixel, as ``layer_norm`` does, and stores. z is never stored. Inference only: there is no
backward of this.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.channel_tiles import contiguous_vectors
from fastnets.kernels.depthwise import (
    MAX_UNROLLED_ROWS,
    _in_units,
    _output_shape,
    _power_of_two_divisor,
    walk_rows,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.layer_norm import inverse_deviation

__all__ = ["MOST_CHANNELS", "configs", "depthwise_layer_norm", "representative_calls", "why_not_normed"]

MOST_CHANNELS = 1024


@triton.jit
def _mean(values, k_masks, centers, K, PARTS: tl.constexpr):
    """The mean over channels of values − centers [BLOCK_M], PARTS tiles of them."""
    total = tl.zeros_like(values[0])
    for part in tl.static_range(PARTS):
        total += tl.where(k_masks[part], values[part] - centers, 0.0)
    return tl.div_rn(tl.sum(total, 1), tl.zeros((total.shape[0],), tl.float32) + K)


@triton.jit(
    do_not_specialize=[
        *("columns", "k_units", "H", "W", "P", "Q", "p_tiles", "pad_h", "pad_w"),
        *("x_n", "x_h", "x_w", "w_r", "w_s"),
    ],
    do_not_specialize_on_alignment=["x_c", "w_k"],
)
def depthwise_norm_kernel(
    x, weight, y, bias, norm_weight, norm_bias,
    columns, k_units, H, W, P, Q, p_tiles, pad_h, pad_w, x_n, x_c, x_h, x_w, w_k, w_r, w_s, eps,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    # Elements per access, as in ``depthwise``.
    VEC: tl.constexpr, X_VEC: tl.constexpr, W_VEC: tl.constexpr, WIDE_OFFSETS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of columns. Strides: those of channels in elements, the others in units."""
    K = k_units * VEC
    column_tile = tl.program_id(0)
    if WIDE_OFFSETS:
        column_tile = column_tile.to(tl.int64)
    m = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < columns
    q = m % Q
    n = (m // Q) // p_tiles
    p0 = ((m // Q) % p_tiles) * BLOCK_P
    h0 = p0 * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w

    convolved = ()  # of each part BLOCK_P tiles, one after the other
    k_masks = ()
    for part in tl.static_range(PARTS):
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < K
        image = x + (n * x_n * X_VEC)[:, None] + (k * x_c)[None, :]
        sums = ()
        for _ in tl.static_range(BLOCK_P):
            sums = sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
        # A loop at run time, see ``depthwise``.
        for s in range(S):
            w = w0 + s * DILATION_W
            w_mask = m_mask & (w >= 0) & (w < W)
            taps = ()
            for r in tl.static_range(R):
                tap = tl.load(weight + k * w_k + (r * w_r + s * w_s) * W_VEC, mask=k_mask, other=0.0)
                taps = taps + (tap.to(tl.float32)[None, :],)
            sums = walk_rows(
                sums, taps, image, h0, w, w_mask, k_mask, H, x_h, x_w, None,
                X_VEC, BLOCK_P, R, STRIDE_H, DILATION_H,
            )  # fmt: skip
        shift = tl.zeros((BLOCK_K,), tl.float32)
        if bias is not None:
            shift += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)
        for p in tl.static_range(BLOCK_P):
            rounded = (sums[p] + shift[None, :]).to(y.dtype.element_ty)
            convolved = convolved + (rounded.to(tl.float32),)
        k_masks = k_masks + (k_mask[None, :],)

    for p in tl.static_range(BLOCK_P):
        values = ()
        for part in tl.static_range(PARTS):
            values = values + (convolved[part * BLOCK_P + p],)
        # In two passes; what rounding leaves of the mean is taken off as well.
        center = _mean(values, k_masks, 0.0, K, PARTS)
        center += _mean(values, k_masks, center[:, None], K, PARTS)
        squares = tl.zeros_like(values[0])
        for part in tl.static_range(PARTS):
            deviation = tl.where(k_masks[part], values[part] - center[:, None], 0.0)
            squares += deviation * deviation
        scale = inverse_deviation(tl.sum(squares, 1), K, eps)
        pixel = ((n * P + p0 + p) * Q + q) * k_units * VEC
        for part in tl.static_range(PARTS):
            k = part * BLOCK_K + tl.arange(0, BLOCK_K)
            k_mask = k < K
            value = (values[part] - center[:, None]) * scale[:, None]
            if norm_weight is not None:
                value *= tl.load(norm_weight + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            if norm_bias is not None:
                value += tl.load(norm_bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            mask = (m_mask & (p0 + p < P))[:, None] & k_mask[None, :]
            tl.store(y + pixel[:, None] + k[None, :], value.to(y.dtype.element_ty), mask=mask)


# By channels of a program, 2^i or 3 · 2^i: (PARTS, BLOCK_K, pixels, warps), up to 48 values a thread.
_TILES = {
    32: (1, 32, 64, 4), 48: (3, 16, 64, 4), 64: (1, 64, 64, 4), 96: (3, 32, 64, 4), 128: (1, 128, 32, 4),
    192: (3, 64, 32, 4), 256: (1, 256, 32, 8), 384: (3, 128, 32, 8), 512: (2, 256, 16, 8),
    768: (3, 256, 16, 8), 1024: (4, 256, 8, 8),
}  # fmt: skip


def _configs(channels: int) -> list[Config]:
    """From many pixels for a program to few."""
    parts, block_k, pixels, warps = _TILES[channels]
    return [
        Config(
            PARTS=parts, BLOCK_K=block_k, BLOCK_M=pixels // down, BLOCK_P=block_p, num_warps=warps,
            num_stages=1,
        )
        for down, block_p in ((4, 4), (8, 4), (8, 2))
    ]  # fmt: skip


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return [config for channels in _TILES for config in _configs(channels)]


def why_not_normed(C: int, K: int, R: int) -> str | None:
    """Why a depthwise convolution is not normalised in its own launch, or None where it is."""
    if C != K:
        return f"{C} channels give {K} outputs"
    if K > MOST_CHANNELS:
        return f"{K} channels are more than the {MOST_CHANNELS} that a program holds"
    if R > MAX_UNROLLED_ROWS:
        return f"{R} filter rows are more than {MAX_UNROLLED_ROWS}"
    return None


@functools.lru_cache(maxsize=4096)
def _plan(
    x_shape, x_strides, weight_shape, weight_strides, itemsize, stride, padding, dilation, config, device
):
    """(output [N, K, P, Q], grid, config, integer arguments, constexprs, FLOPs)."""
    output = N, K, P, Q = _output_shape(x_shape, weight_shape, None, stride, padding, dilation, None)
    C, H, W = x_shape[1:]
    R, S = weight_shape[2:]
    if (reason := why_not_normed(C, K, R)) is not None:
        raise UnsupportedConfig(f"depthwise_layer_norm: {reason}; convolve and normalise one after the other")
    fitting = _configs(next(channels for channels in _TILES if channels >= K))
    if config is None:
        programs = [tiles(N * tiles(P, c.BLOCK_P) * Q, c.BLOCK_M) for c in fitting]
        config = next((c for c, n in zip(fitting, programs) if n >= device.multiprocessors), fitting[-1])
    elif config not in fitting:
        raise UnsupportedConfig(f"{config} is not for {K} channels")
    block_p = config.BLOCK_P
    columns = N * tiles(P, block_p) * Q
    vec = _power_of_two_divisor(16 // itemsize, K)
    x_units, x_vec = _in_units(x_shape, x_strides, vec)
    w_k, _, w_r, w_s = (step if size > 1 else 0 for size, step in zip(weight_shape, weight_strides))
    w_vec = _power_of_two_divisor(vec, w_r, w_s) if w_k == 1 else 1
    extent = max(N * K * P * Q, sum((size - 1) * at for size, at in zip(x_shape, x_strides)))
    constexprs = {
        "R": R, "S": S, "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "DILATION_H": dilation[0], "DILATION_W": dilation[1],
        "VEC": vec, "X_VEC": x_vec, "W_VEC": w_vec,
        # Columns overhang the image by a tile and a halo.
        "WIDE_OFFSETS": 2 * extent >= 2**31,
    }  # fmt: skip
    integers = (
        *(columns, K // vec, H, W, P, Q, tiles(P, block_p), *padding),
        *(*x_units, w_k, w_r // w_vec, w_s // w_vec),
    )
    flops = 2 * N * K * P * Q * R * S
    config = config.replace(maxnreg=255)  # left to itself, ptxas spills to fit one more block
    return output, (tiles(columns, config.BLOCK_M),), config, integers, constexprs, flops


def depthwise_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    eps: float = 1e-6,
    config: Config | None = None,
) -> torch.Tensor:
    """Layer norm over the channels of ``conv2d(x, weight, bias, groups=C)``, in one launch.

    x: [N, C, H, W]; weight: [C, 1, R, S]; both of one dtype (fp32, fp16 or bf16), any strides. The vectors
    are [C], any float dtype, any may be None. Returns [N, P, Q, C], contiguous. Raises ``ValueError`` and
    ``TypeError`` for what is no depthwise convolution, ``UnsupportedConfig`` where ``why_not_normed`` has a
    reason.
    """
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise TypeError(
            f"depthwise_layer_norm: x is {x.dtype}, weight {weight.dtype}; convert both to one of float32, "
            "float16 and bfloat16"
        )
    output, grid, config, integers, constexprs, flops = _plan(
        tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(), x.element_size(), tuple(stride),
        tuple(padding), tuple(dilation), config, current_device(x),
    )  # fmt: skip
    N, K, P, Q = output
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (K,):
            raise ValueError(f"depthwise_layer_norm: {name} has shape {tuple(vector.shape)}, expected ({K},)")
    y = torch.empty((N, P, Q, K), dtype=x.dtype, device=x.device)
    if N == 0:
        return y
    bias, norm_weight, norm_bias = contiguous_vectors(bias, norm_weight, norm_bias)
    launch(
        depthwise_norm_kernel, grid, x, weight, y, bias, norm_weight, norm_bias, *integers, eps,
        config=config, reads=(x, weight, bias, norm_weight, norm_bias), writes=(y,), flops=flops,
        **constexprs,
    )  # fmt: skip
    return y


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of ConvNeXt's blocks, and others: see ``kernels``."""

    def call(C, size, dtype, taps=7, stride=1, affine=True, last=True):
        def thunk(config=None):
            x = torch.empty(32, C, size, size, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last) if last else x
            weight = torch.empty(C, 1, taps, taps, dtype=dtype, device="meta")
            vectors = [torch.empty(C, device="meta") if affine else None for _ in range(3)]
            return depthwise_layer_norm(
                x, weight, *vectors, stride=(stride, stride), padding=(taps // 2, taps // 2), config=config
            )

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("ConvNeXt-T, 96 channels, bf16", call(96, 56, bf16)),
        ("ConvNeXt-T, 96 channels, fp32", call(96, 56, full)),
        ("ConvNeXt-T, 192 channels, fp16", call(192, 28, half)),
        ("ConvNeXt-T, 384 channels, fp32", call(384, 14, full)),
        ("ConvNeXt-T, 768 channels, bf16", call(768, 7, bf16)),
        ("ConvNeXt-T, 768 channels, fp32", call(768, 7, full)),
        ("ConvNeXt-B, 128 channels, fp32", call(128, 56, full)),
        ("ConvNeXt-B, 256 channels, fp32", call(256, 28, full)),
        ("ConvNeXt-B, 512 channels, fp32", call(512, 14, full)),
        ("ConvNeXt-B, 1024 channels, fp32", call(1024, 7, full)),
        ("3x3 of stride 2, 64 channels, plain", call(64, 28, half, taps=3, stride=2, affine=False)),
        ("5x5, 44 channels, contiguous fp32", call(44, 14, full, taps=5, last=False)),
        ("3x3, 24 channels", call(24, 14, half, taps=3)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
