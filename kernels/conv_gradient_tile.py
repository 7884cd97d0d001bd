"""How a tile of an input gradient begins and ends: which taps reach its pixels, what follows the products.

The epilogue, on the fp32 accumulator, with every term but the first optional:

    g  = dx + added                                        the gradient that came another way
    dv = g · act'(u),  u = (z - mean) · rstd · bn_weight + bn_bias
    sums = Σ dv, Σ dv · (z - mean) · rstd                  per channel, of the rounded dv

where a residual joined z, u is not known here, and act'(u) is read as one bit per element (``mask``). The
last two are the first half of the backward pass of the batch norm and activation that made the convolution's
input from z: they cost no pass of their own. Each tile adds its rows, ``partial_sums`` adds the
tiles.
"""

import triton
import triton.language as tl

from fastnets.kernels.activation import activation_backward
from fastnets.kernels.bitmask import load_bits
from fastnets.kernels.conv_tile import aligned

__all__ = ["class_taps", "finish_gradient", "store_gradient"]


@triton.jit
def class_taps(
    first, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One dimension of the class of pixels first, first + STRIDE, ...: (r, taps, p).

    Taps r, r + STEP, ... reach the class; pixel first lies under tap r of output p, which may be negative.
    """
    residue = (first + PAD) % STRIDE
    r = first * 0 + R
    CANDIDATES: tl.constexpr = STEP if STEP < R else R
    for candidate in tl.static_range(CANDIDATES):
        r = tl.where(residue == candidate * DILATION % STRIDE, candidate, r)
    taps = (R - r + STEP - 1) // STEP
    # Exact, and of something positive: R·DILATION is added before and taken off behind.
    p = (first + PAD + R * DILATION * STRIDE - r * DILATION) // STRIDE - R * DILATION
    return r, taps, p


@triton.jit
def finish_gradient(
    acc, pixel, inside_m, first_c, C, channel, tile, dx, pitch, H, W, added, normalized, negative_slope, sums,
    mask, VECTOR: tl.constexpr, DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr, BYTES: tl.constexpr,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue of acc [BLOCK_M, BLOCK_N], stored to the rows ``pixel`` of dx, a row-major [N·H·W, pitch].

    Columns are a group's channels c < C from first_c on; channel is the group's first. added: (pointer or
    None, its strides n, c, h, w). normalized: (z or None, its strides, mean, rstd, bn_weight, bn_bias); then
    sums [tiles, 2, pitch] takes this tile's. DENSE_*: lies as dx does. COLUMNS: finish so many columns at a
    time, left to right, which takes fewer registers beside the accumulator.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    if BLOCK_N > COLUMNS:
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        finish_gradient(
            left, pixel, inside_m, first_c, C, channel, tile, dx, pitch, H, W, added, normalized,
            negative_slope, sums, mask, VECTOR, DENSE_ADDED, DENSE_Z, BYTES, ACTIVATION, INDEX, COLUMNS,
        )  # fmt: skip
        finish_gradient(
            right, pixel, inside_m, first_c + BLOCK_N // 2, C, channel, tile, dx, pitch, H, W, added,
            normalized, negative_slope, sums, mask, VECTOR, DENSE_ADDED, DENSE_Z, BYTES, ACTIVATION, INDEX,
            COLUMNS,
        )  # fmt: skip
    else:
        _finish_columns(
            acc, pixel, inside_m, first_c, C, channel, tile, dx, pitch, H, W, added, normalized,
            negative_slope, sums, mask, VECTOR, DENSE_ADDED, DENSE_Z, BYTES, ACTIVATION, INDEX,
        )  # fmt: skip


@triton.jit
def _finish_columns(
    acc, pixel, inside_m, first_c, C, channel, tile, dx, pitch, H, W, added, normalized, negative_slope, sums,
    mask, VECTOR: tl.constexpr, DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr, BYTES: tl.constexpr,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    c = first_c + tl.arange(0, acc.shape[1])
    inside_c = c < C
    c = (channel + c).to(INDEX)
    sum_dv, sum_dv_x = store_gradient(
        acc, pixel, inside_m, c, inside_c, dx, pitch, H, W, added, normalized, negative_slope,
        DENSE_ADDED, DENSE_Z, ACTIVATION, mask, BYTES,
    )  # fmt: skip
    if sums is not None:
        to = sums + tile.to(INDEX) * 2 * pitch + c
        tl.store(to, sum_dv, mask=inside_c)
        tl.store(to + pitch, sum_dv_x, mask=inside_c)


@triton.jit
def store_gradient(
    acc, pixel, inside_m, c, inside_c, dx, pitch, H, W, added, normalized, negative_slope,
    DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr, ACTIVATION: tl.constexpr,
    mask=None, BYTES: tl.constexpr = False,
):  # fmt: skip
    """The epilogue of acc, gradients of the pixels where inside_m and the channels c where inside_c.

    Arguments as ``finish_gradient``'s. mask: one bit per element of z in its memory order, where act'(u) is
    1, or None. BYTES: z lies as dx does, and no byte has bits of two pixels or groups. Returns, per channel,
    Σ dv and Σ dv · x̂ (zeros without z).
    """
    inside = inside_m[:, None] & inside_c[None, :]
    offsets = (pixel * pitch)[:, None] + c[None, :]
    sum_dv = tl.zeros((acc.shape[1],), tl.float32)
    sum_dv_x = sum_dv
    added, added_n, added_c, added_h, added_w = added
    if added is not None:
        lies_at = offsets
        if not DENSE_ADDED:
            rows = pixel // W // H * added_n + pixel // W % H * added_h + pixel % W * added_w
            lies_at = rows[:, None] + (c * added_c)[None, :]
        acc += tl.load(added + lies_at, mask=inside, other=0.0).to(tl.float32)
    z, z_n, z_c, z_h, z_w, mean, rstd, bn_weight, bn_bias = normalized
    if z is None:
        tl.store(dx + offsets, acc.to(dx.dtype.element_ty), mask=inside)
    else:
        lies_at = offsets
        if not DENSE_Z:
            rows = pixel // W // H * z_n + pixel // W % H * z_h + pixel % W * z_w
            lies_at = rows[:, None] + (c * z_c)[None, :]
        centred = tl.load(z + lies_at, mask=inside, other=0.0).to(tl.float32)
        centred -= tl.load(mean + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        rstd_c = tl.load(rstd + c, mask=inside_c, other=0.0).to(tl.float32)
        if mask is not None:
            if BYTES:
                passing = _bits_of_rows(mask, pixel * pitch, inside_m, c, inside_c)
            else:
                passing = load_bits(mask, lies_at, inside)
            acc = tl.where(passing, acc, 0.0)
        elif ACTIVATION != "none":
            scale = rstd_c
            if bn_weight is not None:
                scale *= tl.load(bn_weight + c, mask=inside_c, other=0.0).to(tl.float32)
            u = centred * scale[None, :]
            if bn_bias is not None:
                u += tl.load(bn_bias + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
            acc = activation_backward(acc, u, ACTIVATION, negative_slope)
        rounded = acc.to(dx.dtype.element_ty)
        tl.store(dx + offsets, rounded, mask=inside)
        dv = tl.where(inside, rounded.to(tl.float32), 0.0)
        sum_dv = tl.sum(dv, axis=0)
        sum_dv_x = tl.sum(dv * centred, axis=0) * rstd_c
    return sum_dv, sum_dv_x


@triton.jit
def _bits_of_rows(mask, rows, inside_m, c, inside_c):
    """The bits of elements rows + c, a byte of eight neighbouring channels at a time."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    BYTES: tl.constexpr = c.shape[0] // 8
    first = tl.min(tl.reshape(c, (BYTES, 8)), axis=1) // 8
    inside = tl.max(tl.reshape(inside_c.to(tl.int32), (BYTES, 8)), axis=1) > 0
    at = (rows // 8)[:, None] + first[None, :]
    byte = tl.load(mask + at, mask=inside_m[:, None] & inside[None, :], other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BYTES * 8)) > 0


_SIZES = ("M", "H", "W", "pitch", "added_n", "added_h", "added_w", "z_n", "z_h", "z_w")


@triton.jit(do_not_specialize=_SIZES)
def finish_gradient_kernel(
    partial, dx, added, z, mean, rstd, bn_weight, bn_bias, mask, sums, M, H, W, pitch,
    added_n, added_c, added_h, added_w, z_n, z_c, z_h, z_w, negative_slope,
    SPLIT_K: tl.constexpr, VECTOR_DX: tl.constexpr, DENSE_ADDED: tl.constexpr, DENSE_Z: tl.constexpr,
    BYTES: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx [M, pitch] = epilogue(Σ partial [SPLIT_K, M, pitch]): grid (row tiles, column tiles)."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    pitch = aligned(pitch, VECTOR_DX, INDEX)
    tile = tl.program_id(0)
    m = tile.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_c = tl.program_id(1) * BLOCK_N
    c = first_c + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (c < pitch)[None, :]
    offsets = (m * pitch)[:, None] + c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial + offsets + share * (M.to(INDEX) * pitch), mask=inside, other=0.0)
    finish_gradient(
        acc, m, m < M, first_c, pitch, 0, tile, dx, pitch, H, W,
        (added, added_n, added_c, added_h, added_w),
        (z, z_n, z_c, z_h, z_w, mean, rstd, bn_weight, bn_bias), negative_slope, sums, mask,
        VECTOR_DX, DENSE_ADDED, DENSE_Z, BYTES, ACTIVATION, INDEX, BLOCK_N,
    )  # fmt: skip
