"""Two-dimensional convolution and its epilogue, as an implicit matrix product over channels-last tensors.

    y = act(bn(conv2d(x, weight) + bias) + residual)

The convolution is read as a matrix product, with nothing copied:

    Y [M, K] = A [M, R·S·C] · B [R·S·C, K]        M = N·P·Q output pixels

Row m of A is the window of pixel m: R·S *taps*, each a run of C channels, zero where the window hangs over
the edge. B is the weight. In channels-last memory both are runs of channels, loaded 16 bytes at a time.

``conv_kernel`` walks A's columns tap by tap, in blocks of channels. Its loop is that of a matrix product; all
it adds is one shift for all rows (a scalar), and one bit per row that says whether the tap is inside the
image. A 1×1 filter drops even these.

Where the residual is a convolution, a block's 1×1 *shortcut*, the same program computes it, in an accumulator
of its own: it is never stored. Where whole windows are pooled (``conv_pool``), A's rows are ordered window by
window, and the epilogue makes one row of each. Or the residual's channels and the result's take turns in an
output of twice as many: the channel *shuffle* of what a ShuffleNet v2 unit passes on and what it filters.

``conv_reduce_kernel`` is the second half of split-K: where the tiles are too few to fill the GPU, SPLIT_K
programs share the columns of each, and their fp32 partial sums are added here, always in the same order.

Groups that are wide enough for a tile run here too, each in its own grid column. ``conv_bn_act`` sends the
rest where it belongs: few channels to ``conv_joint`` or, where windows touch and do not overlap, to
``patch_embedding``, narrow groups to ``conv_grouped``, depthwise filters to ``depthwise``. How a tile begins
and ends, epilogue included, is in ``conv_tile``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv_configs import (
    checked_out,
    checked_passed,
    checked_prologue,
    checked_shortcut,
    choose_config,
    config_for,
    holds_pool,
    holds_shortcut,
    kernel_configs,
    kernel_of,
    reduce_config,
    representative,
    shortcut_pays,
    why_no_out,
    why_no_passed,
    why_no_shortcut,
)
from fastnets.kernels.conv_shape import (
    NO_POOL,
    NO_STATISTICS,
    SIZES,
    ConvCall,
    ConvPlan,
    Prologue,
    Shortcut,
    ceil_div,
    conv_call,
    convolution_shape,
    pixel_pitch,
    product_precision,
    span,
    stepping,
    vector_width,
)
from fastnets.kernels.conv_tile import (
    aligned,
    channel_vectors,
    finish_tile,
    normalized,
    normalized_sums,
    tile_of_program,
    window_origin,
    within,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch

__all__ = [
    "choose_config",
    "configs",
    "conv_bn_act",
    "joins_shortcut",
    "representative_calls",
    "shuffles",
    "writes_slices",
]


@triton.jit(do_not_specialize=(*SIZES, "C", "s_C", "s_n", "s_h", "s_w"))
def conv_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, residual,
    M, C, H, W, K, P, Q, y_pitch,
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s,
    residual_n, residual_k, residual_p, residual_q, eps, negative_slope,
    mean, m2, count, x_mean, x_rstd, x_bn_weight, x_bn_bias, x_slope, x_eps, x_gate,
    s_x, s_weight, s_bias, s_mean, s_var, s_bn_weight, s_bn_bias, s_C, s_n, s_h, s_w, s_eps,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    VECTOR_X: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, VECTOR_Y: tl.constexpr,
    EVEN_C: tl.constexpr, FLAT_X: tl.constexpr, FLAT_WEIGHT: tl.constexpr, DENSE_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, X_ACTIVATION: tl.constexpr,
    S_STRIDE_H: tl.constexpr, S_STRIDE_W: tl.constexpr, VECTOR_S: tl.constexpr, EVEN_S: tl.constexpr,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, MAXIMUM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of Y, for one group and one share of its columns.

    Grid (tiles, groups, SPLIT_K). C and K are those of one group. With SPLIT_K > 1, y is the fp32 workspace
    [SPLIT_K, M, y_pitch] of partial sums.

    mean, m2, count: where the statistics of the tile's rows go, or None. x_mean to x_gate: how x is
    normalised or gated while it is loaded, or None (see ``Prologue``). s_*: the ``Shortcut``, or None.

    VECTOR_*: elements of an aligned vector access. EVEN_C: C is a multiple of BLOCK_K. FLAT_X: windows are
    single pixels in one run, x_w apart. FLAT_WEIGHT: each filter is one run of R·S·C. WIDE: offsets need 64
    bits. HALVES, INTERLEAVED: see ``finish_tile``. POOL_H, POOL_W, MAXIMUM: of a ``Pool``; with one, P and Q
    are those of the pooled map, and the M rows the pixels of its windows, window by window.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    TAPS: tl.constexpr = R * S
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0  # without padding, every tap is inside
    POOL: tl.constexpr = POOL_H * POOL_W  # a power of two
    BITS: tl.constexpr = TAPS <= 32  # which taps are inside the image fits the bits of one int per row

    C = aligned(C, VECTOR_X, tl.int32)
    K = aligned(K, VECTOR_Y, tl.int32)
    y_pitch = aligned(y_pitch, VECTOR_Y, INDEX)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    x_w = aligned(x_w, VECTOR_X, INDEX)
    weight_k = aligned(weight_k, VECTOR_WEIGHT, INDEX)
    weight_r = aligned(weight_r, VECTOR_WEIGHT, INDEX)
    weight_s = aligned(weight_s, VECTOR_WEIGHT, INDEX)

    tile_m, tile_n = tile_of_program(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    tile_m = tile_m.to(INDEX)
    group = tl.program_id(1).to(INDEX)

    # Rows and columns past the end repeat the last one: they load without a mask and are never stored.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    k = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
    filters = (group * K + k) * weight_k
    valid = tl.full((BLOCK_M,), True, tl.int1)
    if FLAT_X:
        windows = m * x_w + group * C * x_c
    else:
        n, h, w = window_origin(m // POOL, P, Q, POOL_H * STRIDE_H, POOL_W * STRIDE_W, PAD_H, PAD_W)
        if POOL > 1:
            h += (m & POOL - 1) // POOL_W * STRIDE_H
            w += (m & POOL_W - 1) * STRIDE_W
        windows = n * x_n + h * x_h + w * x_w + group * C * x_c
        if PADDED and BITS:
            taps_inside = tl.zeros((BLOCK_M,), tl.int32)
            for i in tl.static_range(R):
                for j in tl.static_range(S):
                    inside = within(h + i * DILATION_H, H) & within(w + j * DILATION_W, W)
                    taps_inside |= inside.to(tl.int32) << (i * S + j)

    if x_gate is not None:
        gates_at = tl.multiple_of(m // (P * Q) * C, VECTOR_X)

    # The walk over the columns: tap (r, s), channels from c on, one block at a time. Its state is all scalar.
    blocks_per_tap = tl.cdiv(C, BLOCK_K)
    first = 0
    last = TAPS * blocks_per_tap
    if SPLIT_K > 1:
        share = tl.cdiv(last, SPLIT_K)
        first = tl.program_id(2) * share
        last = tl.minimum(first + share, last)
    tap = first // blocks_per_tap
    c = first % blocks_per_tap * BLOCK_K
    r = tap // S
    s = tap % S
    bit = 1 << tap
    x_tap = r * DILATION_H * x_h + s * DILATION_W * x_w
    weight_tap = r * weight_r + s * weight_s
    if FLAT_WEIGHT:
        weight_tap = (tap * blocks_per_tap).to(INDEX) * BLOCK_K + c

    lanes = tl.arange(0, BLOCK_K).to(INDEX)
    present = tl.full((BLOCK_K,), True, tl.int1)
    channels = lanes
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, last):
        # Taps outside the image and lanes past C read zeros. Their addresses are drawn back into the tensor,
        # since an asynchronous copy may touch even what its mask excludes.
        x_here = x_tap
        weight_here = weight_tap
        if EVEN_C:
            x_here += c.to(INDEX) * x_c
            if not FLAT_WEIGHT:
                weight_here += c.to(INDEX) * weight_c
        else:
            present = c + lanes < C
            channels = tl.where(present, c + lanes, lanes % VECTOR_X)
        if PADDED:
            if BITS:
                valid = (taps_inside & bit) != 0
            else:
                valid = within(h + r * DILATION_H, H) & within(w + s * DILATION_W, W)
        x_here = tl.multiple_of(x_here, VECTOR_X)
        weight_here = tl.multiple_of(weight_here, VECTOR_WEIGHT)
        rows = tl.multiple_of(tl.where(valid, windows, -x_here), VECTOR_X)
        a_pointers = (x + x_here) + (rows[:, None] + (channels * x_c)[None, :])
        b_pointers = (weight + weight_here) + (filters[None, :] + (channels * weight_c)[:, None])
        a = tl.load(a_pointers, mask=valid[:, None] & present[None, :], other=0.0)
        b = tl.load(b_pointers, mask=present[:, None], other=0.0)
        if x_mean is not None:
            vectors = (x_mean, x_rstd, x_bn_weight, x_bn_bias)
            of_channels = channel_vectors(group * C + c + lanes, present, vectors, x_eps)
            a = normalized(a, valid[:, None] & present[None, :], of_channels, x_slope, X_ACTIVATION)
        if x_gate is not None:
            # Rows of one image have the same gates: all but the first find them in L1.
            gates_here = gates_at[:, None] + channels[None, :]
            if EVEN_C:
                gates_here += tl.multiple_of(c, BLOCK_K)
            gates = tl.load(x_gate + gates_here, mask=present[None, :], other=0.0)
            a = (a.to(tl.float32) * gates.to(tl.float32)).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        c += BLOCK_K
        if FLAT_WEIGHT:
            weight_tap += BLOCK_K
        if TAPS > 1:
            tap_done = c >= C
            row_done = tap_done & (s == S - 1)
            c = tl.where(tap_done, 0, c)
            bit = tl.where(tap_done, bit << 1, bit)
            r += row_done.to(tl.int32)
            s = tl.where(row_done, 0, s + tap_done.to(tl.int32))
            x_next_row = DILATION_H * x_h - (S - 1) * DILATION_W * x_w
            x_tap += tl.where(row_done, x_next_row, tl.where(tap_done, DILATION_W * x_w, 0))
            if not FLAT_WEIGHT:
                weight_next_row = weight_r - (S - 1) * weight_s
                weight_tap += tl.where(row_done, weight_next_row, tl.where(tap_done, weight_s, 0))

    m = tile_m * (BLOCK_M // POOL) + tl.arange(0, BLOCK_M // POOL)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    statistics = None
    if mean is not None:
        statistics = (mean, m2, count, tile_m, M)
    if s_x is not None:
        tl.static_assert(SPLIT_K == 1, "a share of the columns cannot be normalised")
        outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = normalized_sums(acc, outputs, outputs < K, vectors, eps)
        of_shortcut = (s_C, s_n, s_h, s_w)
        more = _shortcut_product(
            s_x, s_weight, tl.minimum(m, M - 1), k.to(INDEX), P, Q, of_shortcut,
            S_STRIDE_H, S_STRIDE_W, VECTOR_S, EVEN_S, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, INDEX,
        )  # fmt: skip
        of_bn = (s_bias, s_mean, s_var, s_bn_weight, s_bn_bias)
        acc += normalized_sums(more, outputs, outputs < K, of_bn, s_eps)
        vectors = (None, None, None, None, None)
    if SPLIT_K > 1:
        tl.static_assert(POOL == 1, "a share of the columns cannot be pooled")
        # Partial sums go to the workspace as they are; conv_reduce_kernel finishes them.
        y += tl.program_id(2).to(INDEX) * M * y_pitch
        finish_tile(
            acc, m, m < M, tile_n * BLOCK_N, K, group * K, y, y_pitch, (None, None, None, None, None), eps,
            (None, 0, 0, 0, 0, P, Q), negative_slope, VECTOR_Y, False, "none", INDEX, False,
        )  # fmt: skip
    else:
        finish_tile(
            acc, m, m < M // POOL, tile_n * BLOCK_N, K, group * K, y, y_pitch, vectors, eps, added,
            negative_slope, VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, HALVES, statistics, POOL, MAXIMUM,
            INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _shortcut_product(
    x, weight, m, k, P, Q, sizes,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Of a 1×1 convolution, the tile of output pixels m and filters k, all inside. sizes: (C, n, h, w), of
    which the last three are strides of x. EVEN: C is a multiple of BLOCK_K."""
    C, x_n, x_h, x_w = sizes
    C = aligned(C, VECTOR, tl.int32)
    x_n = aligned(x_n, VECTOR, INDEX)
    x_h = aligned(x_h, VECTOR, INDEX)
    x_w = aligned(x_w, VECTOR, INDEX)
    n, h, w = window_origin(m, P, Q, STRIDE_H, STRIDE_W, 0, 0)
    pixels = tl.multiple_of(n * x_n + h * x_h + w * x_w, VECTOR)
    filters = tl.multiple_of(k * C, VECTOR)
    lanes = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_K):
        channels = lanes
        first = c
        if not EVEN:
            present = c + lanes < C
            channels = tl.where(present, c + lanes, lanes % VECTOR)
            channels = tl.max_contiguous(tl.multiple_of(channels, VECTOR), VECTOR)
            first = 0
        a_pointers = (x + first) + (pixels[:, None] + channels[None, :])
        b_pointers = (weight + first) + (filters[None, :] + channels[:, None])
        if EVEN:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            a = tl.load(a_pointers, mask=present[None, :], other=0.0)
            b = tl.load(b_pointers, mask=present[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=SIZES)
def conv_reduce_kernel(
    partial, y, bias, running_mean, running_var, bn_weight, bn_bias, residual, M, K, P, Q, y_pitch,
    residual_n, residual_k, residual_p, residual_q, eps, negative_slope, mean, m2, count,
    SPLIT_K: tl.constexpr, VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [M, K] = epilogue(Σ partial [SPLIT_K, M, K]): grid (row tiles, column tiles).

    mean, m2, count, INTERLEAVED: as in ``conv_kernel``.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    K = aligned(K, VECTOR_Y, tl.int32)
    y_pitch = aligned(y_pitch, VECTOR_Y, INDEX)
    tile_m = tl.program_id(0).to(INDEX)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (k < K)[None, :]
    offsets = (m * K)[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial + offsets + share * (M.to(INDEX) * K), mask=inside, other=0.0)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    statistics = None
    if mean is not None:
        statistics = (mean, m2, count, tile_m, M)
    finish_tile(
        acc, m, m < M, tl.program_id(1) * BLOCK_N, K, 0, y, y_pitch, vectors, eps, added, negative_slope,
        VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, False, statistics, INTERLEAVED=INTERLEAVED,
    )  # fmt: skip


def conv_bn_act(
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
    groups: int = 1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    prologue: Prologue | None = None,
    shortcut: Shortcut | None = None,
    out: torch.Tensor | None = None,
    passed: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """act(bn(conv2d(x, weight, bias)) + residual) -> y [N, K, P, Q], dense channels-last, of x's dtype.

    x [N, C, H, W], weight [K, C/groups, R, S] and residual [N, K, P, Q] share a dtype (fp32, fp16, bf16) and
    have any strides; channels-last x and weight load fastest. bias and BN's running statistics and affine
    vectors are [K], each optional (no running statistics: no BN), fp32 or x.dtype. All after the products is
    fp32, rounded once. activation: one of ``activation.ACTIVATIONS``; negative_slope is for "leaky_relu".
    config: one of ``configs`` of the file whose kernel serves the shape, or None to have it chosen.
    prologue: act(bn(x)), or x times a gate, takes the place of x, rounded to x's dtype, while x is loaded.
    shortcut: a 1×1 convolution whose normalised result takes the residual's place, and is not rounded.
    out: a slice of the channels of a channels-last tensor that y is written into; there is no residual then.
    passed: [N, K, P, Q], channels of a channels-last tensor, which y's take turns with, passed first:
    channel_shuffle(cat((passed, y), 1), 2) is returned, [N, 2K, P, Q]. There is no residual then either.

    Raises ``ValueError`` or ``TypeError`` for arguments that are no convolution, ``UnsupportedConfig`` for a
    config that does not fit the kernel, a prologue for which ``why_no_prologue`` has a reason, and likewise
    a shortcut, ``out`` and ``passed``.
    """
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    alone = prologue is None and shortcut is None and out is None and passed is None
    if groups > 1 and x.dim() == 4 and groups == x.shape[1] and alone:
        from fastnets.kernels.depthwise import depthwise_conv

        return depthwise_conv(
            x, weight, vectors, residual, stride, padding, dilation, groups,
            eps, activation, negative_slope, config,
        )[0]  # fmt: skip
    call = conv_call(
        x, weight, vectors, residual, stride, padding, dilation, groups,
        eps, activation, negative_slope, config,
    )  # fmt: skip
    if prologue is not None:
        call.prologue = checked_prologue(prologue, call.shape)
    if shortcut is not None:
        call.shortcut = checked_shortcut(shortcut, call)
    if out is not None:
        call.out = checked_out(out, call)
    if passed is not None:
        call.residual, call.shuffles = checked_passed(passed, call), True
    kernel = kernel_of(call.shape)
    if kernel == "joint":
        from fastnets.kernels.conv_rows import few_channels_conv
        from fastnets.kernels.patch_embedding import patch_embedding
        from fastnets.kernels.patch_embedding import serves as are_patches

        if out is None and are_patches(call):
            return patch_embedding(call)
        return few_channels_conv(call)[0]
    if kernel == "packed":
        from fastnets.kernels.conv_grouped import packed_conv

        return packed_conv(call)[0]
    return taps_conv(call)[0]


class _SecondPass(NamedTuple):
    """``conv_reduce_kernel``'s part of a plan, and the workspace between the two kernels."""

    workspace: tuple[int, int, int]
    plan: ConvPlan


def _plan(call: ConvCall) -> tuple[ConvPlan, _SecondPass | None]:
    shape = call.shape
    C, K, M = shape.group_channels, shape.group_outputs, shape.M
    outputs = M * call.pitch * (2 if call.shuffles else 1)
    if call.shortcut is not None:
        added = call.shortcut.x
        outputs = max(outputs, span(added.shape, added.stride()))
    flags = call.flags(outputs)
    config = config_for(call, flags)
    SPLIT_K = config.SPLIT_K
    if call.shortcut is not None and not holds_shortcut(config, current_device(call.x)):
        raise UnsupportedConfig(f"{config} has no room for a shortcut: its sums are too many, or not whole")
    if call.pool is not None and not holds_pool(config):
        raise UnsupportedConfig(f"{config} has no whole sums to pool")
    if SPLIT_K > 1:
        flags = call.flags(max(outputs, SPLIT_K * M * shape.K))
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s, *residual_strides = call.strides()
    even = C % config.BLOCK_K == 0
    run = weight_c == 1 and (shape.S == 1 or weight_s == C) and (shape.R == 1 or weight_r == shape.S * C)
    pitch = None
    pool = call.pool or NO_POOL
    if shape.taps == 1 and shape.padding == (0, 0) and shape.stride == (1, 1) and pool is NO_POOL:
        pitch = pixel_pitch(call.x.shape, (x_n, x_c, x_h, x_w))
    before = call.prologue
    of_shortcut = _shortcut_flags(call.shortcut, call.x.element_size(), config)
    interleaved = {"INTERLEAVED": 0}
    if call.shuffles:
        passes = pixel_pitch(call.residual.shape, call.residual.stride())
        residual_strides = (0, 1, 0, passes)
        vector = vector_width(call.x.element_size(), passes)
        interleaved = {"INTERLEAVED": vector, "DENSE_RESIDUAL": False}
    tiles_m = ceil_div(M, config.BLOCK_M)
    first = ConvPlan(
        config,
        (tiles_m * ceil_div(K, config.BLOCK_N), shape.groups, SPLIT_K),
        (
            *(M, C, shape.H, shape.W, K, *pool.of(shape.P, shape.Q)),
            call.pitch if SPLIT_K == 1 else shape.K,
            *(x_n, x_c, x_h, x_w if pitch is None else pitch),
            *(weight_k, weight_c, weight_r, weight_s, *residual_strides),
        ),
        {
            "EVEN_C": even,
            "FLAT_X": pitch is not None,
            "FLAT_WEIGHT": even and run,
            "X_ACTIVATION": "none" if before is None else before.activation,
            **of_shortcut,
            **pool.flags,
            **flags,
            **interleaved,
        },
        tiles_m,
    )
    if SPLIT_K == 1:
        return first, None
    finishing = reduce_config(shape)
    tiles_m = ceil_div(M, finishing.BLOCK_M)
    names = ("VECTOR_Y", "DENSE_RESIDUAL", "WIDE", "ACTIVATION")
    second = ConvPlan(
        finishing,
        (tiles_m, ceil_div(shape.K, finishing.BLOCK_N)),
        (M, shape.K, shape.P, shape.Q, call.pitch, *residual_strides),
        {"SPLIT_K": SPLIT_K, **{name: flags[name] for name in names}, **interleaved},
        tiles_m,
    )
    return first, _SecondPass((SPLIT_K, M, shape.K), second)


def _shortcut_flags(shortcut: Shortcut | None, element_size: int, config: Config) -> dict[str, object]:
    stride, vector, even = (1, 1), 1, True
    if shortcut is not None:
        C = shortcut.x.shape[1]
        stride, even = shortcut.stride, C % config.BLOCK_K == 0
        vector = vector_width(element_size, C, *_shortcut_sizes(shortcut)[1:])
    return {"S_STRIDE_H": stride[0], "S_STRIDE_W": stride[1], "VECTOR_S": vector, "EVEN_S": even}


def _shortcut_sizes(shortcut: Shortcut) -> tuple[int, ...]:
    """C, and the strides of its input along images, rows and columns."""
    x_n, _, x_h, x_w = stepping(shortcut.x.shape, shortcut.x.stride())
    return shortcut.x.shape[1], x_n, x_h, x_w


def joins_shortcut(
    x: torch.Tensor,
    weight: torch.Tensor,
    shortcut: Shortcut,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> bool:
    """Whether ``conv_bn_act`` serves the shortcut of this convolution, and is predicted not to lose by it."""
    shape = convolution_shape(x.shape, weight.shape, stride, padding, dilation, groups)
    if shape.M == 0 or why_no_shortcut(shape, shortcut) is not None:
        return False
    other = convolution_shape(shortcut.x.shape, shortcut.weight.shape, shortcut.stride, (0, 0), (1, 1), 1)
    return shortcut_pays(shape, other, x.element_size(), product_precision(x), current_device(x))


def writes_slices(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether ``conv_bn_act`` of these tensors takes an ``out``."""
    shape = convolution_shape(x.shape, weight.shape, stride, padding, dilation, groups)
    return why_no_out(shape) is None


def shuffles(
    x: torch.Tensor,
    weight: torch.Tensor,
    passed: torch.Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether ``conv_bn_act`` of these tensors takes ``passed``."""
    shape = convolution_shape(x.shape, weight.shape, stride, padding, dilation, groups)
    return why_no_passed(shape, passed) is None


def taps_conv(call: ConvCall) -> tuple[torch.Tensor, Statistics]:
    """Runs ``conv_kernel``, and ``conv_reduce_kernel`` after it where the config splits the columns.

    Returns y, and the statistics of its row tiles: None in place of each tensor unless call.statistics.
    """
    y = call.empty_output()
    if call.shape.M == 0:
        return y, call.empty_statistics(0)
    plan, second = call.plan(_plan)
    before = call.prologue
    prologue = _NO_PROLOGUE
    if before is not None:
        prologue = (*before.tensors, before.negative_slope, before.eps, before.gate)
    reads = (call.x, call.weight, *prologue[:4], prologue[-1])
    added, flops = _NO_SHORTCUT, call.shape.flops
    if call.shortcut is not None:
        added = (*call.shortcut[:7], *_shortcut_sizes(call.shortcut), call.shortcut.eps)
        reads = (*reads, *call.shortcut[:7])
        flops += 2 * call.shape.M * call.shape.K * call.shortcut.x.shape[1]
    if second is None:
        moments = call.empty_statistics(plan.tiles_m)
        launch(
            conv_kernel, plan.grid, call.x, call.weight, y, *call.vectors, call.residual, *plan.sizes,
            call.eps, call.negative_slope, *moments, *prologue, *added,
            config=plan.config, flops=flops,
            reads=(*reads, *call.vectors, call.residual), writes=(y, *moments), **plan.constexprs,
        )  # fmt: skip
        return y, moments
    partial = torch.empty(second.workspace, dtype=torch.float32, device=y.device)
    launch(
        conv_kernel, plan.grid, call.x, call.weight, partial, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, *NO_STATISTICS, *prologue, *added,
        config=plan.config, flops=flops, reads=reads, writes=(partial,), **plan.constexprs,
    )  # fmt: skip
    plan = second.plan
    moments = call.empty_statistics(plan.tiles_m)
    launch(
        conv_reduce_kernel, plan.grid, partial, y, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, *moments, config=plan.config,
        reads=(partial, *call.vectors, call.residual), writes=(y, *moments), **plan.constexprs,
    )  # fmt: skip
    return y, moments


_NO_PROLOGUE = (None,) * 7
_NO_SHORTCUT = (None,) * 12


def configs(device: Device) -> list[Config]:
    """Every config of ``conv_kernel`` that ``choose_config`` may pick on this device."""
    return kernel_configs("taps", device)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernels: see ``kernels``."""
    half, full, contiguous = torch.bfloat16, torch.float32, torch.contiguous_format
    layer = {"x": (8, 64, 28, 28), "filters": (64, 3, 3), "padding": 1}
    same = {**layer, "residual": True}
    pointwise = {"x": (8, 256, 28, 28), "filters": (64, 1, 1), "statistics": True}
    strided = {"x": (8, 72, 28, 28), "filters": (128, 1, 1), "stride": 2, "statistics": True}
    joined = {"x": (8, 64, 28, 28), "filters": (256, 1, 1)}
    preactivated = {"x": (8, 160, 28, 28), "filters": (128, 1, 1), "prologue": "relu"}
    gated = {"x": (8, 144, 28, 28), "filters": (40, 1, 1), "residual": True, "prologue": "gate"}
    halves = {"x": (8, 232, 14, 14), "filters": (232, 1, 1)}
    odd = {"x": (8, 58, 28, 28), "filters": (58, 1, 1)}
    call = functools.partial(representative, run=taps_conv)
    return [
        call("3x3", **same),
        call("3x3, bf16, gelu", **same, dtype=half, activation="gelu"),
        call("3x3, fp32", **same, dtype=full),
        call("3x3, TF32", **same, dtype=full, precision="tf32"),
        call("3x3, contiguous", **same, memory_format=contiguous),
        call("3x3, contiguous residual", **same, activation="gelu", residual_format=contiguous),
        call("3x3, past 2^31 elements", **{**same, "x": (4096, 64, 112, 112)}),
        call("3x3, stride 2, odd C and K", x=(8, 72, 28, 28), filters=(40, 3, 3), padding=1, stride=2),
        call("1x1", x=(8, 64, 28, 28), filters=(256, 1, 1), residual=True),
        call("1x1, stride 2", x=(8, 64, 28, 28), filters=(128, 1, 1), stride=2),
        call("7x7 over many channels", x=(8, 64, 28, 28), filters=(64, 7, 7), padding=3),
        call("5x5 in 2 groups", x=(8, 128, 27, 27), filters=(256, 5, 5), padding=2, groups=2),
        call("3x3, statistics", **layer, statistics=True),
        call("3x3, statistics, fp32", **layer, statistics=True, dtype=full),
        call("3x3, statistics, TF32", **layer, statistics=True, dtype=full, precision="tf32"),
        call("1x1, statistics, BN and ReLU before", **pointwise, prologue="relu"),
        call("1x1, statistics, BN and SiLU before, bf16", **pointwise, prologue="silu", dtype=half),
        call("1x1, stride 2, odd C, BN before", **strided, prologue="relu"),
        call("1x1, statistics, BN and ReLU before, fp32", **pointwise, prologue="relu", dtype=full),
        call("1x1, statistics, BN before, TF32", **pointwise, prologue="relu", dtype=full, precision="tf32"),
        call("1x1, running statistics before", **preactivated),
        call("1x1, running statistics before, bf16", **preactivated, dtype=half),
        call("1x1, running statistics before, fp32", **preactivated, dtype=full),
        call("1x1, running statistics before, TF32", **preactivated, dtype=full, precision="tf32"),
        call("1x1, gates before", **gated),
        call("1x1, gates before, odd C, bf16", **{**gated, "x": (8, 44, 28, 28)}, dtype=half),
        call("1x1, gates before, fp32", **gated, dtype=full),
        call("1x1, gates before, TF32", **gated, dtype=full, precision="tf32"),
        call("1x1 and its shortcut", **joined, shortcut=(64, 1)),
        call("1x1 and its shortcut, bf16, stride 2", **joined, dtype=half, shortcut=(128, 2)),
        call("1x1 and its shortcut of odd C, fp32", **joined, dtype=full, shortcut=(72, 2)),
        call("1x1 and its shortcut, TF32", **joined, dtype=full, precision="tf32", shortcut=(128, 2)),
        call("3x3 and its shortcut of odd C", **layer, shortcut=(36, 1)),
        call("1x1, shuffled with half of a wider tensor", **halves, passes="slice"),
        call("1x1, shuffled with another's result, fp32", **halves, passes="whole", dtype=full),
        call("1x1, shuffled, TF32", **halves, passes="slice", dtype=full, precision="tf32"),
        call("1x1, shuffled, odd C and K, bf16", **{**halves, **odd}, passes="slice", dtype=half),
        call("3x3, shuffled", **layer, passes="whole"),
    ]  # fmt: skip
