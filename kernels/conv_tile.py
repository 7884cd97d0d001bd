"""How every convolution kernel begins and ends: a program's tile, where its windows lie, the epilogue.

The epilogue, on the fp32 accumulator and before the one rounding, with every term but the first optional:

    y[m, k] = act((acc[m, k] + bias[k] - mean[k]) · gamma[k] / √(var[k] + eps) + beta[k] + residual[m, k])

This is eager's act(bn(conv(x) + bias) + residual). BN's own four vectors are read, so nothing folded can go
stale. The mean is subtracted before scaling: folded into beta it would cancel where it is large. Or nothing
is added: the residual's channels and the result's take turns, the channel shuffle of both (ShuffleNet v2).

Where successive rows are the pixels of one window of a pooling, their maximum or mean alone is stored.

In training the epilogue also says, of every channel of its tile, what batch norm asks of the *stored* values:
their mean, and the sum of squared deviations from it. And a tile of the input may be normalised while it is
loaded (``normalized``), where only the statistics of an earlier convolution's output are known yet.
"""

import triton
import triton.language as tl

from fastnets.kernels.activation import activate

__all__ = [
    "aligned",
    "channel_vectors",
    "finish_tile",
    "moments",
    "normalized",
    "normalized_sums",
    "pooled",
    "tile_of_program",
    "window_origin",
    "within",
]


@triton.jit
def tile_of_program(
    M, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, program=None
):  # fmt: skip
    """Row and column of this program's tile among those of an [M, K] matrix.

    program: its number among the tiles' programs, where that is not program_id(0).

    Programs that run together cover a band GROUP_M tiles high rather than one long row of tiles, so that
    they share both windows and weights in L2.
    """
    columns = tl.cdiv(K, BLOCK_N)
    if program is None:
        program = tl.program_id(0)
    band = program // (GROUP_M * columns)
    place = program % (GROUP_M * columns)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - band * GROUP_M, GROUP_M)
    return band * GROUP_M + place % height, place // height


@triton.jit
def aligned(value, VECTOR: tl.constexpr, INDEX: tl.constexpr):
    """value, which the launcher knows to be a multiple of VECTOR, so written that the compiler knows too."""
    return value.to(INDEX) // VECTOR * VECTOR


@triton.jit
def window_origin(
    m, P, Q,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
):  # fmt: skip
    """Output pixel m -> its image n, and the input pixel (h, w) under its window's first tap.

    h and w are negative where the window begins in the padding.
    """
    row = m // Q
    return row // P, row % P * STRIDE_H - PAD_H, m % Q * STRIDE_W - PAD_W


@triton.jit
def within(position, extent):
    """0 <= position < extent in one comparison: a negative position is huge when read as unsigned."""
    return position.to(tl.uint32) < extent.to(tl.uint32)


@triton.jit
def channel_vectors(c, inside_c, vectors, eps=None):
    """(mean, scale, shift) of the channels c where inside_c, as ``normalized`` takes them.

    vectors: pointers (mean, rstd, bn_weight or None, bn_bias or None). eps: with one, rstd holds variances.
    """
    mean, rstd, bn_weight, bn_bias = vectors
    scale = tl.load(rstd + c, mask=inside_c, other=1.0).to(tl.float32)
    if eps is not None:
        scale = tl.rsqrt(scale + eps)
    if bn_weight is not None:
        scale *= tl.load(bn_weight + c, mask=inside_c, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bn_bias is not None:
        shift = tl.load(bn_bias + c, mask=inside_c, other=0.0).to(tl.float32)
    return tl.load(mean + c, mask=inside_c, other=0.0).to(tl.float32), scale, shift


@triton.jit
def normalized(x, inside, channels, negative_slope, ACTIVATION: tl.constexpr):
    """act(bn(x)) of a tile x [rows, channels] in x's dtype, as if it had been stored; 0 where not inside.

    channels: what ``channel_vectors`` gives for them.
    """
    mean, scale, shift = channels
    value = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    return tl.where(inside, activate(value, ACTIVATION, negative_slope), 0.0).to(x.dtype)


@triton.jit
def moments(total, deviations, squares, count):
    """(mean, M2) of count values from a rough mean's total and the sums of deviations from it.

    A rough mean, rounded, is off by as much as small deviations are; what is left of them corrects both.
    """
    m2 = squares - deviations * deviations / count
    return total / count + deviations / count, tl.where(m2 < 0.0, 0.0, m2)  # NaN stays


@triton.jit
def normalized_sums(acc, k, inside_k, vectors, eps):
    """bn(acc + bias) of acc [BLOCK_M, BLOCK_N], columns k where inside_k; vectors as in ``finish_tile``."""
    bias, running_mean, running_var, bn_weight, bn_bias = vectors
    if bias is not None or running_mean is not None:
        shift = tl.zeros(k.shape, tl.float32)
        if bias is not None:
            shift += tl.load(bias + k, mask=inside_k, other=0.0).to(tl.float32)
        if running_mean is not None:
            shift -= tl.load(running_mean + k, mask=inside_k, other=0.0).to(tl.float32)
        acc += shift[None, :]
    if running_var is not None:
        # Channels past K take variance 1: no NaN even where nothing is stored.
        scale = tl.rsqrt(tl.load(running_var + k, mask=inside_k, other=1.0).to(tl.float32) + eps)
        if bn_weight is not None:
            scale *= tl.load(bn_weight + k, mask=inside_k, other=0.0).to(tl.float32)
        acc *= scale[None, :]
        if bn_bias is not None:
            acc += tl.load(bn_bias + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish_tile(
    acc, m, inside_m, first_k, K, channel, y, y_pitch, vectors, eps, residual, negative_slope,
    VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
    HALVES: tl.constexpr, statistics=None, POOL: tl.constexpr = 1, MAXIMUM: tl.constexpr = True,
    INTERLEAVED: tl.constexpr = 0,
):  # fmt: skip
    """The epilogue of acc [BLOCK_M, BLOCK_N], stored to y, a row-major [M, y_pitch].

    Rows are the output pixels m where inside_m, or with POOL > 1 the pixels of the windows m, POOL for each:
    their MAXIMUM, or mean, is stored. Columns are a group's outputs k < K, from first_k on. channel is the
    group's first output channel.
    vectors: (bias, running_mean, running_var, bn_weight, bn_bias), pointers or None. residual: (pointer or
    None, its strides n, k, p, q, P, Q); DENSE_RESIDUAL where it lies as y does. HALVES: finish the left half
    of the columns before the right, which takes half the registers beside the accumulator. statistics: None,
    or (pointers mean, m2 [T, y_pitch] and count [T]; this row tile's number among T; rows in all).
    INTERLEAVED: unless 0, the residual is not added: its columns and these take turns, in a y of twice as
    many, [M, 2 * y_pitch]. Its rows are runs of columns, stride q apart, which is a multiple of that number.
    """
    if HALVES:
        BLOCK_M: tl.constexpr = acc.shape[0]
        BLOCK_N: tl.constexpr = acc.shape[1]
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        finish_columns(
            left, m, inside_m, first_k, K, channel, y, y_pitch, vectors, eps, residual, negative_slope,
            VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, statistics, POOL, MAXIMUM, INTERLEAVED,
        )  # fmt: skip
        finish_columns(
            right, m, inside_m, first_k + BLOCK_N // 2, K, channel, y, y_pitch, vectors, eps, residual,
            negative_slope, VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, statistics, POOL, MAXIMUM,
            INTERLEAVED,
        )  # fmt: skip
    else:
        finish_columns(
            acc, m, inside_m, first_k, K, channel, y, y_pitch, vectors, eps, residual, negative_slope,
            VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, statistics, POOL, MAXIMUM, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pooled(acc, POOL: tl.constexpr, MAXIMUM: tl.constexpr):
    """The maximum, or the mean, of each POOL successive rows of acc; NaN stays."""
    windows = acc.reshape(acc.shape[0] // POOL, POOL, acc.shape[1])
    if MAXIMUM:
        acc = tl.reduce(windows, 1, _greater)
    else:
        acc = tl.sum(windows, 1) / POOL
    return acc


@triton.jit
def finish_columns(
    acc, m, inside_m, first_k, K, channel, y, y_pitch, vectors, eps, residual, negative_slope,
    VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
    statistics, POOL: tl.constexpr, MAXIMUM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    k = first_k + tl.arange(0, acc.shape[1])
    inside_k = k < K
    inside = inside_m[:, None] & inside_k[None, :]
    k = (channel + k).to(INDEX)
    offsets = (m * y_pitch)[:, None] + k[None, :]

    acc = normalized_sums(acc, k, inside_k, vectors, eps)
    added, residual_n, residual_k, residual_p, residual_q, P, Q = residual
    if added is not None and INTERLEAVED == 0:
        if DENSE_RESIDUAL:
            acc += tl.load(added + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            pixels = m // Q // P * residual_n + m // Q % P * residual_p + m % Q * residual_q
            lies_at = pixels[:, None] + (k * residual_k)[None, :]
            acc += tl.load(added + lies_at, mask=inside, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION, negative_slope)
    if POOL > 1:
        tl.static_assert(added is None and statistics is None, "neither is of windows")
        acc = pooled(acc, POOL, MAXIMUM)
    stored = acc.to(y.dtype.element_ty)
    if INTERLEAVED > 0:
        tl.static_assert(statistics is None, "statistics are of a convolution's own columns")
        passes_at = (m * aligned(residual_q, INTERLEAVED, INDEX))[:, None] + k[None, :]
        passed = tl.load(added + passes_at, mask=inside, other=0.0)
        columns = 2 * first_k + tl.arange(0, 2 * acc.shape[1])
        inside = inside_m[:, None] & (columns < 2 * K)[None, :]
        offsets = (m * (2 * y_pitch))[:, None] + (2 * channel + columns).to(INDEX)[None, :]
        stored = tl.interleave(passed, stored)
    tl.store(y + offsets, stored, mask=inside)

    if statistics is not None:
        mean, m2, count, tile, M = statistics
        value = tl.where(inside_m[:, None], stored.to(tl.float32), 0.0)
        rows = tl.minimum(M - tile * acc.shape[0], acc.shape[0]).to(tl.float32)
        total = tl.sum(value, 0)
        deviation = tl.where(inside_m[:, None], value - (total / rows)[None, :], 0.0)
        exact, squares = moments(total, tl.sum(deviation, 0), tl.sum(deviation * deviation, 0), rows)
        of_tile = tile.to(INDEX) * y_pitch + k
        tl.store(mean + of_tile, exact, mask=inside_k)
        tl.store(m2 + of_tile, squares, mask=inside_k)
        tl.store(count + tile, rows, mask=channel + first_k == 0)
