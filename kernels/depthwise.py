"""Depthwise convolution with its full epilogue, as a direct sum in fp32.

    y[n, k, p, q] = act(bn(bias + sum over r, s of x[n, k / m, h, w] * weight[k, 0, r, s]) + residual)

with h = p * stride + r * dilation - padding, w likewise, and K = m * C.

There is no reduction over channels, so matrix units have nothing to do and the work is bound by memory: the
kernel is built around how often an input element is fetched and converted. A program owns BLOCK_M columns of
the output times BLOCK_K channels; a column is BLOCK_P pixels of one q, one below the other. For each filter
column s it walks down the input rows, and a row, loaded once, feeds every output pixel that any filter row r
maps onto it: S * (rows of input) / BLOCK_P loads per output instead of R * S. What neighbouring q share is
found in L1.

Columns are numbered (n, tile of p, q) in one run, so small images waste no lanes. Addresses are masked, not
clamped: nothing here is loaded asynchronously.

Weights may have any strides. With those of ``torch.nn.Conv2d`` a lane loads its taps one by one; with
channels innermost (``weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)``) it loads them as
vectors.
"""

import functools
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, check_activation
from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv_shape import NO_STATISTICS, empty_statistics
from fastnets.kernels.conv_tile import moments
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = ["configs", "depthwise_conv_bn_act", "representative_calls"]

# Filters of up to 7 rows are walked down as described; taller ones run as a loop over taps, or registers run
# out.
MAX_UNROLLED_ROWS = 7


@triton.constexpr_function
def filter_row(row, p, stride, dilation, taps):
    """The filter row that maps input row ``row`` of the column onto its output pixel ``p``, or -1."""
    offset = row - p * stride
    return offset // dilation if offset % dilation == 0 and 0 <= offset // dilation < taps else -1


@triton.constexpr_function
def is_used(row, pixels, stride, dilation, taps):
    return any((row - p * stride) in range(0, taps * dilation, dilation) for p in range(pixels))


@triton.jit
def walk_rows(
    sums, taps, image, h0, w, w_mask, k_mask, H, x_h, x_w, complete,
    X_VEC: tl.constexpr, BLOCK_P: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_P] of [BLOCK_M, BLOCK_K], and what the R taps of one filter column add to them.

    image: pointers [BLOCK_M, BLOCK_K] to row 0; h0, w: the first pixel under the filter, x_h and x_w its
    strides in units of X_VEC. complete: None, or whether taps[0] takes part; 0 · NaN would be NaN.
    """
    for row in tl.static_range((BLOCK_P - 1) * STRIDE + (R - 1) * DILATION + 1):
        if is_used(row, BLOCK_P, STRIDE, DILATION, R):
            h = h0 + row
            mask = (w_mask & (h >= 0) & (h < H))[:, None] & k_mask[None, :]
            offset = ((h * x_h + w * x_w) * X_VEC)[:, None]
            value = tl.load(image + offset, mask=mask, other=0.0).to(tl.float32)
            added = ()
            for p in tl.static_range(BLOCK_P):
                if filter_row(row, p, STRIDE, DILATION, R) >= 0:
                    product = value * taps[filter_row(row, p, STRIDE, DILATION, R)]
                    if complete is not None and filter_row(row, p, STRIDE, DILATION, R) == 0:
                        product = tl.where(complete, product, 0.0)
                    added = added + (sums[p] + product,)
                else:
                    added = added + (sums[p],)
            sums = added
    return sums


@triton.jit(
    do_not_specialize=[
        *("columns_total", "k_units", "H", "W", "P", "Q", "p_tiles", "pad_h", "pad_w"),
        *("x_n", "x_h", "x_w", "w_r", "w_s", "r_n", "r_p", "r_q"),
    ],
    do_not_specialize_on_alignment=["x_c", "w_k", "r_k"],
)
def depthwise_conv_kernel(
    x, weight, y, residual, bias, mean, var, bn_weight, bn_bias,
    columns_total, k_units, H, W, P, Q, p_tiles, pad_h, pad_w,
    # Strides: those of channels in elements, the others in units of the tensor's VEC.
    x_n, x_c, x_h, x_w, w_k, w_r, w_s, r_n, r_k, r_p, r_q,
    eps, negative_slope,
    # Where the statistics of the tile's pixels go, or None: [T, K], [T, K] and [T].
    tile_mean, tile_m2, tile_count,
    ACTIVATION: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, MULTIPLIER: tl.constexpr, UNROLL_ROWS: tl.constexpr,
    # Elements per access: VEC divides K; X_VEC, W_VEC and R_VEC divide the strides of x, weight and residual.
    VEC: tl.constexpr, X_VEC: tl.constexpr, W_VEC: tl.constexpr, R_VEC: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    K = k_units * VEC
    k_tiles = tl.cdiv(K, BLOCK_K)
    column_tile = pid // k_tiles
    if WIDE_OFFSETS:
        column_tile = column_tile.to(tl.int64)
    m = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (pid % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_mask = m < columns_total
    k_mask = k < K
    q = m % Q
    n = (m // Q) // p_tiles
    p0 = ((m // Q) % p_tiles) * BLOCK_P

    if MULTIPLIER == 1:
        c = k
    else:
        c = k // MULTIPLIER
    if WIDE_OFFSETS:
        c = c.to(tl.int64)
    h0 = p0 * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    image = x + (n * x_n * X_VEC)[:, None] + (c * x_c)[None, :]
    filters = weight + (k * w_k)

    sums = ()
    for _ in tl.static_range(BLOCK_P):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    if UNROLL_ROWS:
        # A loop at run time: were it unrolled too, all taps would be loaded up front and registers run out.
        for s in range(S):
            w = w0 + s * DILATION_W
            w_mask = m_mask & (w >= 0) & (w < W)
            taps = ()
            for r in tl.static_range(R):
                tap = tl.load(filters + (r * w_r + s * w_s) * W_VEC, mask=k_mask, other=0.0)
                taps = taps + (tap.to(tl.float32)[None, :],)
            sums = walk_rows(
                sums, taps, image, h0, w, w_mask, k_mask, H, x_h, x_w, None,
                X_VEC, BLOCK_P, R, STRIDE_H, DILATION_H,
            )  # fmt: skip
    else:
        for rs in range(R * S):
            r = rs // S
            s = rs % S
            tap = tl.load(filters + (r * w_r + s * w_s) * W_VEC, mask=k_mask, other=0.0).to(tl.float32)[
                None, :
            ]
            w = w0 + s * DILATION_W
            added = ()
            for p in tl.static_range(BLOCK_P):
                h = h0 + p * STRIDE_H + r * DILATION_H
                mask = (m_mask & (w >= 0) & (w < W) & (h >= 0) & (h < H))[:, None] & k_mask[None, :]
                offset = ((h * x_h + w * x_w) * X_VEC)[:, None]
                value = tl.load(image + offset, mask=mask, other=0.0).to(tl.float32)
                added = added + (sums[p] + value * tap,)
            sums = added

    # y = (sum + before) * scale + after, all [1, BLOCK_K].
    before = tl.zeros((1, BLOCK_K), tl.float32)
    scale = tl.full((1, BLOCK_K), 1.0, tl.float32)
    after = tl.zeros((1, BLOCK_K), tl.float32)
    if bias is not None:
        before += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if mean is not None:
        before -= tl.load(mean + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if var is not None:
        scale *= tl.rsqrt(tl.load(var + k, mask=k_mask, other=1.0).to(tl.float32) + eps)[None, :]
    if bn_weight is not None:
        scale *= tl.load(bn_weight + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if bn_bias is not None:
        after += tl.load(bn_bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]

    if WIDE_OFFSETS:
        k = k.to(tl.int64)
    finished = ()
    pixels = 0.0
    for p in tl.static_range(BLOCK_P):
        value = (sums[p] + before) * scale + after
        mask = (m_mask & (p0 + p < P))[:, None] & k_mask[None, :]
        if residual is not None:
            pixel = (n * r_n + (p0 + p) * r_p + q * r_q) * R_VEC
            r_offset = pixel[:, None] + (k * r_k)[None, :]
            value += tl.load(residual + r_offset, mask=mask, other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION, negative_slope)
        y_pixel = ((n * P + p0 + p) * Q + q) * k_units * VEC
        y_pointers = y + y_pixel[:, None] + k[None, :]
        stored = value.to(y.dtype.element_ty)
        tl.store(y_pointers, stored, mask=mask)
        if tile_mean is not None:
            finished = finished + (tl.where(mask, stored.to(tl.float32), 0.0),)
            pixels += tl.sum((m_mask & (p0 + p < P)).to(tl.float32), 0)

    if tile_mean is not None:
        total = tl.zeros((BLOCK_K,), tl.float32)
        for p in tl.static_range(BLOCK_P):
            total += tl.sum(finished[p], 0)
        rough = (total / pixels)[None, :]
        deviation = tl.zeros((BLOCK_K,), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for p in tl.static_range(BLOCK_P):
            apart = tl.where((m_mask & (p0 + p < P))[:, None], finished[p] - rough, 0.0)
            deviation += tl.sum(apart, 0)
            squares += tl.sum(apart * apart, 0)
        exact, squares = moments(total, deviation, squares, pixels)
        of_tile = column_tile.to(tl.int64) * K + k
        tl.store(tile_mean + of_tile, exact, mask=k_mask)
        tl.store(tile_m2 + of_tile, squares, mask=k_mask)
        tl.store(tile_count + column_tile, pixels, mask=pid % k_tiles == 0)


# 1024 outputs of one row per block of 4 warps: in 16-bit types, one 16-byte vector of channels a thread.
_BLOCK_K = (64, 32, 16)
_BLOCK_P = (4, 2, 1)


def _config(block_k: int, block_p: int, elements: int = 1024) -> Config:
    return Config(BLOCK_M=elements // block_k, BLOCK_K=block_k, BLOCK_P=block_p, num_warps=4, num_stages=1)


def block_configs(elements: int = 1024) -> list[Config]:
    """Every config that ``pick_config`` may pick."""
    return [_config(block_k, block_p, elements) for block_k in _BLOCK_K for block_p in _BLOCK_P]


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return block_configs()


def pick_config(
    N: int, K: int, P: int, Q: int, unroll: bool, multiprocessors: int, elements: int = 1024
) -> Config:
    """Wide channel blocks unless much of them is padding; tall columns unless they leave the device idle."""
    padded = {b: tiles(K, b) * b for b in _BLOCK_K}
    least_padded = min(_BLOCK_K, key=lambda b: (padded[b], -b))
    block_k = next((b for b in _BLOCK_K if padded[b] <= 1.2 * K), least_padded)
    if not unroll:
        return _config(block_k, 1, elements)
    for block_p in _BLOCK_P:
        blocks = tiles(N * tiles(P, block_p) * Q, elements // block_k) * tiles(K, block_k)
        if tiles(P, block_p) * block_p <= 1.2 * P + 1 and blocks >= 4 * multiprocessors:
            break
    return _config(block_k, block_p, elements)


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides; kept, as finding it costs more than launching."""

    output: tuple[int, int, int, int]
    grid: tuple[int] = (0,)
    config: Config | None = None
    sizes_and_strides: tuple[int, ...] = ()
    constexprs: dict = field(default_factory=dict)
    flops: int = 0
    column_tiles: int = 0


@functools.lru_cache(maxsize=4096)
def _plan(
    x_shape, x_strides, weight_shape, weight_strides, residual_shape, residual_strides, itemsize,
    stride, padding, dilation, groups, config, multiprocessors,
) -> Plan:  # fmt: skip
    output = N, K, P, Q = _output_shape(
        x_shape, weight_shape, residual_shape, stride, padding, dilation, groups
    )
    C, H, W = x_shape[1:]
    R, S = weight_shape[2:]
    if N == 0 or K == 0:
        return Plan(output)
    unroll = R <= MAX_UNROLLED_ROWS
    if config is None:
        config = pick_config(N, K, P, Q, unroll, multiprocessors)
    block_p = config.BLOCK_P
    if block_p > 1 and not unroll:
        raise UnsupportedConfig(f"{_WHO}: {R} filter rows need BLOCK_P=1, not {block_p}")
    if config.maxnreg is None and unroll and (R > 5 or K != C):
        # Left to itself, ptxas spills on some architectures to fit one more block.
        config = config.replace(maxnreg=255)
    columns = N * tiles(P, block_p) * Q
    column_tiles = tiles(columns, config.BLOCK_M)
    vec = _power_of_two_divisor(16 // itemsize, K)
    x_units, x_vec = _in_units(x_shape, x_strides, vec if K == C else 1)
    residual_units, residual_vec = (0, 0, 0, 0), 1
    if residual_strides is not None:
        residual_units, residual_vec = _in_units(output, residual_strides, vec)
    extent = max(N * K * P * Q, _extent(x_shape, x_strides), _extent(output, residual_strides or (0,) * 4))
    w_k, _, w_r, w_s = (stride if size > 1 else 0 for size, stride in zip(weight_shape, weight_strides))
    w_vec = _power_of_two_divisor(vec, w_r, w_s) if w_k == 1 else 1
    return Plan(
        output,
        grid=(column_tiles * tiles(K, config.BLOCK_K),),
        config=config,
        sizes_and_strides=(
            *(columns, K // vec, H, W, P, Q, tiles(P, block_p), *padding),
            *(*x_units, w_k, w_r // w_vec, w_s // w_vec, *residual_units),
        ),
        constexprs={
            "R": R,
            "S": S,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "MULTIPLIER": K // C,
            "UNROLL_ROWS": unroll,
            "VEC": vec,
            "X_VEC": x_vec,
            "W_VEC": w_vec,
            "R_VEC": residual_vec,
            # Columns overhang the image by a tile and a halo.
            "WIDE_OFFSETS": 2 * extent >= 2**31,
        },
        flops=2 * N * K * P * Q * R * S,
        column_tiles=column_tiles,
    )


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """``act(bn(conv2d(x, weight, bias, groups=C)) + residual)`` in one launch.

    x: [N, C, H, W]; weight: [K, 1, R, S] with K a multiple of C; residual: [N, K, P, Q]; all of one dtype
    (fp32, fp16 or bf16) with any strides. bias, running_mean, running_var, bn_weight, bn_bias: [K], any
    float dtype, any may be None. Accumulated and finished in fp32, rounded once. Returns [N, K, P, Q], dense
    channels-last. Channels-last x is read in 16-byte accesses where the strides allow; a contiguous x is
    read element by element.

    Raises ``ValueError`` and ``TypeError`` for what does not fit.
    """
    return depthwise_conv(
        x, weight, (bias, running_mean, running_var, bn_weight, bn_bias), residual, stride, padding, dilation,
        groups, eps, activation, negative_slope, config,
    )[0]  # fmt: skip


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int | None,
    eps: float,
    activation: str,
    negative_slope: float,
    config: Config | None,
    statistics: bool = False,
) -> tuple[torch.Tensor, Statistics]:
    """``depthwise_conv_bn_act``, and what it wrote: the statistics of each tile of columns (or Nones)."""
    check_activation(activation)
    _check_dtypes(x, weight, residual)
    plan = _plan(
        tuple(x.shape), x.stride(), tuple(weight.shape), weight.stride(),
        None if residual is None else tuple(residual.shape),
        None if residual is None else residual.stride(),
        x.element_size(), tuple(stride), tuple(padding), tuple(dilation), groups, config,
        0 if config is not None else current_device(x).multiprocessors,
    )  # fmt: skip
    K = plan.output[1]
    for name, vector in zip(_VECTOR_NAMES, vectors):
        if vector is not None and vector.shape != (K,):
            raise ValueError(f"{_WHO}: {name} has shape {tuple(vector.shape)}, expected ({K},)")
    vectors = [v if v is None or v.is_contiguous() else v.contiguous() for v in vectors]
    y = torch.empty(plan.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tile_moments = empty_statistics(plan.column_tiles, K, x.device) if statistics else NO_STATISTICS
    if plan.config is None:
        return y, tile_moments
    launch(
        depthwise_conv_kernel, plan.grid,
        x, weight, y, residual, *vectors, *plan.sizes_and_strides, eps, negative_slope, *tile_moments,
        config=plan.config, reads=(x, weight, residual, *vectors), writes=(y, *tile_moments),
        flops=plan.flops, ACTIVATION=activation, **plan.constexprs,
    )  # fmt: skip
    return y, tile_moments


_WHO = "depthwise_conv_bn_act"
_VECTOR_NAMES = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")


def _in_units(shape, strides, limit: int) -> tuple[tuple[int, int, int, int], int]:
    """Strides of (n, c, h, w), all but c's divided by the longest access they allow, and that access."""
    # The stride of a single element is never used, and may be anything.
    n, c, h, w = (stride if size > 1 else 0 for size, stride in zip(shape, strides))
    vec = _power_of_two_divisor(limit, n, h, w) if c == 1 else 1
    return (n // vec, c, h // vec, w // vec), vec


def _power_of_two_divisor(limit: int, *values: int) -> int:
    """The largest power of two up to ``limit`` (itself one) that divides all values."""
    while any(v % limit for v in values):
        limit //= 2
    return limit


def _extent(shape, strides) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides))


def _check_dtypes(x, weight, residual) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{_WHO}: x is {x.dtype}, expected float32, float16 or bfloat16; convert it")
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{_WHO}: {name} is {tensor.dtype}, x is {x.dtype}; convert one of them")


def _output_shape(x, weight, residual, stride, padding, dilation, groups) -> tuple[int, int, int, int]:
    """[N, K, P, Q] from the shapes of the tensors; raises for what is not a depthwise convolution."""
    if len(x) != 4 or len(weight) != 4:
        raise ValueError(f"{_WHO}: x has {len(x)} dims and weight {len(weight)}, expected 4 and 4")
    N, C, H, W = x
    K, per_group, R, S = weight
    if groups not in (None, C) or per_group != 1 or C == 0 or K % C:
        raise ValueError(
            f"{_WHO}: weight {weight} with groups={groups} is not depthwise for x with {C} channels "
            f"(groups must be {C} and weight [multiple of {C}, 1, R, S])"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(f"{_WHO}: stride={stride}, dilation={dilation}, padding={padding} are out of range")
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    if P < 1 or Q < 1:
        raise ValueError(
            f"{_WHO}: the padded input is smaller than the filter: image {H}x{W}, padding {padding}, "
            f"filter {R}x{S}, dilation {dilation}"
        )
    if residual is not None and residual != (N, K, P, Q):
        raise ValueError(f"{_WHO}: residual has shape {residual}, expected {(N, K, P, Q)}")
    return N, K, P, Q


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the geometries that networks have: see ``kernels``."""
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32

    def call(
        C, size, R, dtype, stride=1, dilation=1, multiplier=1, residual=False, activation="relu6",
        statistics=False,
    ):  # fmt: skip
        def thunk(config=None):
            K = multiplier * C
            x = torch.empty(32, C, size, size, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last)
            weight = torch.empty(K, 1, R, R, dtype=dtype, device="meta")
            bn = (None if statistics else torch.empty(K, dtype=full, device="meta") for _ in range(4))
            return depthwise_conv(
                x, weight, (None, *bn), torch.empty_like(x) if residual else None,
                (stride, stride), (R // 2 * dilation,) * 2, (dilation, dilation), None, 1e-5,
                "none" if statistics else activation, 0.01, config, statistics,
            )  # fmt: skip

        return thunk

    table = [
        ("3x3 fp16", call(144, 56, 3, half)),
        ("3x3 stride 2 bf16", call(96, 112, 3, bf16, stride=2)),
        ("3x3 fp32", call(384, 14, 3, full)),
        ("3x3 dilation 2 fp16, add", call(64, 28, 3, half, dilation=2, residual=True)),
        ("5x5 fp16 hardswish", call(240, 14, 5, half, activation="hardswish")),
        ("5x5 stride 2 fp32 silu", call(240, 28, 5, full, stride=2, activation="silu")),
        ("7x7 bf16", call(192, 28, 7, bf16, activation="none")),
        ("7x7 stride 2 fp32 gelu", call(96, 28, 7, full, stride=2, activation="gelu")),
        ("3x3 multiplier 2 fp16", call(32, 28, 3, half, multiplier=2)),
        ("11x11 fp16", call(96, 14, 11, half)),
        ("3x3 fp16, statistics", call(144, 56, 3, half, statistics=True)),
        ("5x5 stride 2 fp32, statistics", call(240, 28, 5, full, stride=2, statistics=True)),
        ("7x7 bf16, statistics", call(192, 28, 7, bf16, statistics=True)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
