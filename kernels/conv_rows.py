"""Convolution of few channels, row by row of its filters: the stems of image networks in 16-bit types.

    Y [M, K] = Σ_r A_r [M, LANES] · B_r [LANES, K]        M = N·P·Q output pixels

What a window reads of one input row lies together: S·C values where channels are innermost, S of each
channel in an image [N, C, H, W]. A_r is that run, padded to LANES; B_r is row r of each filter in the same
order, zero in the padding, written by ``pack_rows_kernel`` before (64 filters of 7×7 over 3 channels are 28
KiB: too little to keep between calls, and to watch for changes). In ``conv_joint`` every element of A finds
its own address; here all that changes from row to row is one number, and one bit per pixel that says whether
the row is inside the image.

A run begins at an odd value where padding·C is odd, so it is read from the multiple of VECTOR before it, in
accesses of VECTOR values. What they bring along is replaced by zeros, as a NaN next to the window must not
reach its sum.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv_configs import JOINT_CHANNELS, products_of, representative
from fastnets.kernels.conv_joint import joint_conv
from fastnets.kernels.conv_shape import SIZES, ConvCall, ConvPlan, ceil_div
from fastnets.kernels.conv_tile import aligned, finish_tile, tile_of_program, window_origin, within
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch

__all__ = ["configs", "few_channels_conv", "representative_calls", "rows_conv", "serves"]


@triton.jit(do_not_specialize=SIZES)
def conv_rows_kernel(
    x, packed, y, bias, running_mean, running_var, bn_weight, bn_bias, residual,
    M, H, W, K, P, Q, y_pitch, x_n, x_c, x_h,
    residual_n, residual_k, residual_p, residual_q, eps, negative_slope, mean, m2, count,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
    SHIFT: tl.constexpr, LANES: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_Y: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of Y: grid (tiles,). packed [R·LANES, PITCH], BLOCK_N dividing PITCH.

    STEP: values from one pixel to the next, C or 1. RUN: lanes of one run, of which the first SHIFT and those
    past S·STEP more are padding; runs of other channels, where STEP is 1, follow.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    K = aligned(K, VECTOR_Y, tl.int32)
    y_pitch = aligned(y_pitch, VECTOR_Y, INDEX)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_c = aligned(x_c, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    tile_m, tile_n = tile_of_program(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    tile_m = tile_m.to(INDEX)
    # Rows past the end repeat the last one: they load without a mask and are never stored.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n, h, w = window_origin(m, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W)

    lanes = tl.arange(0, LANES)
    channel = lanes // RUN
    place = lanes % RUN - SHIFT
    in_window = (place >= 0) & (place < S * STEP) & (channel * STEP < C)
    # The same of a whole access: it is loaded if any of it is in the window, and no access crosses an edge of
    # the image.
    access = lanes % RUN // VECTOR_X * VECTOR_X - SHIFT
    touched = (access + VECTOR_X > 0) & (access < S * STEP) & (channel * STEP < C)
    begin = tl.multiple_of(w * STEP - SHIFT, VECTOR_X)
    column = begin[:, None] + (lanes % RUN)[None, :]
    inside = touched[None, :] & within(column, W * STEP)
    rows_inside = tl.zeros((BLOCK_M,), tl.int32)
    for i in tl.static_range(R):
        rows_inside |= within(h + i * DILATION_H, H).to(tl.int32) << i
    # One bit per filter row of each value: whether it is loaded.
    loaded = tl.where(inside, rows_inside[:, None], 0)
    loaded = tl.max_constancy(loaded, (1, VECTOR_X))
    offsets = (n * x_n + h * x_h)[:, None] + (column.to(INDEX) + (channel * x_c)[None, :])
    offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, VECTOR_X)), (1, VECTOR_X))

    filters = packed + (lanes * PITCH)[:, None] + k[None, :]
    row = tl.zeros((), INDEX)
    bit = 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(R):
        row = tl.multiple_of(row, VECTOR_X)
        here = (loaded & bit) != 0
        # What is masked is read from inside the tensor all the same: an asynchronous copy may touch it.
        lies_at = tl.where(here, offsets, (lanes % VECTOR_X)[None, :] - row)
        lies_at = tl.max_contiguous(tl.multiple_of(lies_at, (1, VECTOR_X)), (1, VECTOR_X))
        a = tl.load(x + row + lies_at, mask=here, other=0.0)
        b = tl.load(filters)
        if SHIFT % VECTOR_X != 0 or S * STEP % VECTOR_X != 0:
            a = tl.where(in_window[None, :], a, 0.0)
        acc = tl.dot(a, b, acc)
        row += DILATION_H * x_h
        bit <<= 1
        filters += LANES * PITCH

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    statistics = None
    if mean is not None:
        statistics = (mean, m2, count, tile_m, M)
    finish_tile(
        acc, m, m < M, tile_n * BLOCK_N, K, 0, y, y_pitch, vectors, eps, added, negative_slope,
        VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, HALVES, statistics,
    )  # fmt: skip


@triton.jit(do_not_specialize=["K", "weight_k", "weight_c", "weight_r", "weight_s", "shift"])
def pack_rows_kernel(
    weight, packed, K, weight_k, weight_c, weight_r, weight_s, shift,
    C: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """packed [R·LANES, PITCH]: the filters' rows in the order of ``conv_rows_kernel``'s lanes, then zeros.

    Grid (R, PITCH / BLOCK_N).
    """
    lanes = tl.arange(0, LANES)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.maximum(lanes % RUN - shift, 0)
    c = place % STEP + lanes // RUN
    present = (lanes % RUN >= shift) & (place < S * STEP) & (c < C)
    of_lane = tl.where(present, place // STEP * weight_s + c * weight_c, 0)
    taps = weight + (tl.program_id(0) * weight_r + of_lane)[:, None]
    inside = present[:, None] & (k < K)[None, :]
    value = tl.load(taps + (tl.minimum(k, K - 1) * weight_k)[None, :], mask=inside, other=0.0)
    row = tl.program_id(0) * LANES + lanes
    tl.store(packed + row[:, None] * PITCH + k[None, :], value)


def few_channels_conv(call: ConvCall) -> tuple[torch.Tensor, Statistics]:
    """A call that ``conv_configs.kernel_of`` gives to "joint": by rows where its input lies well for that."""
    return rows_conv(call) if serves(call) else joint_conv(call)


def serves(call: ConvCall) -> bool:
    """Whether this file's kernels serve a call of few channels, and load its input several values at once."""
    shape = call.shape
    return (
        (call.config is None or "BLOCK_K" not in call.config.meta)
        and shape.groups == 1
        and shape.C < JOINT_CHANNELS
        and 1 < shape.S
        and shape.R <= 32
        and shape.dilation[1] == 1
        and call.prologue is None
        and products_of(call.x.element_size(), call.precision, current_device(call.x)) == "16-bit"
        and _lanes(call) is not None
    )


def _lanes(call: ConvCall) -> dict[str, int] | None:
    """How a window's row is laid out in lanes; None where that would take single values or many lanes."""
    shape = call.shape
    x_n, x_c, x_h, x_w = (s if size > 1 else 0 for s, size in zip(call.x.stride(), call.x.shape))
    if shape.C > 1 and x_c == 1 and x_w in (0, shape.C):
        step, steps = shape.C, (x_n, x_h)
    elif x_w in (0, 1):
        step, steps = 1, (x_n, x_h, x_c)
    else:
        return None
    vector = next(
        v for v in (4, 2, 1) if not any(s % v for s in (*steps, shape.stride[1] * step, shape.W * step))
    )
    if vector == 1:
        return None
    shift = -shape.padding[1] * step % vector
    run = ceil_div(shift + shape.S * step, vector) * vector
    if step == 1 and shape.C > 1:
        run = triton.next_power_of_2(run)  # taken apart by shifts
    used = run if step == shape.C else run * shape.C
    lanes = max(16, triton.next_power_of_2(used))
    if lanes > 64:
        return None
    run = lanes if step == shape.C else run
    return {"STEP": step, "RUN": run, "SHIFT": shift, "LANES": lanes, "VECTOR_X": vector}


def rows_conv(call: ConvCall) -> tuple[torch.Tensor, Statistics]:
    """Runs this file's kernels for a call that it ``serves``: y, and the statistics of its row tiles."""
    y = call.empty_output()
    shape = call.shape
    if shape.M == 0:
        return y, call.empty_statistics(0)
    plan, packing = call.plan(_plan)
    rows, pitch = shape.R * plan.constexprs["LANES"], plan.constexprs["PITCH"]
    packed = torch.empty((rows, pitch), dtype=y.dtype, device=y.device)
    launch(
        pack_rows_kernel, packing.grid, call.weight, packed, *packing.sizes, config=packing.config,
        reads=(call.weight,), writes=(packed,), **packing.constexprs,
    )  # fmt: skip
    moments = call.empty_statistics(plan.tiles_m)
    launch(
        conv_rows_kernel, plan.grid, call.x, packed, y, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, *moments, config=plan.config, flops=shape.flops,
        reads=(call.x, packed, *call.vectors, call.residual), writes=(y, *moments), **plan.constexprs,
    )  # fmt: skip
    return y, moments


def _plan(call: ConvCall) -> tuple[ConvPlan, ConvPlan]:
    shape, lanes = call.shape, _lanes(call)
    flags = call.flags(shape.M * call.pitch)
    config = call.config
    if config is None:
        config = _choose(shape.M, shape.K, current_device(call.x), flags["WIDE"])
    if call.statistics and config.maxnreg is None:
        config = config.replace(maxnreg=255)  # as in conv_configs
    tiles_m = ceil_div(shape.M, config.BLOCK_M)
    x_n, x_c, x_h, _, *of_weight_and_residual = call.strides()
    kept = ("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "VECTOR_Y", "DENSE_RESIDUAL", "WIDE")
    of_rows = {"C": shape.C, "S": shape.S, "PITCH": ceil_div(shape.K, 64) * 64, **lanes}
    plan = ConvPlan(
        config,
        (tiles_m * ceil_div(shape.K, config.BLOCK_N),),
        (
            *(shape.M, shape.H, shape.W, shape.K, shape.P, shape.Q, call.pitch),
            *(x_n, x_c if lanes["STEP"] != shape.C else 0, x_h, *of_weight_and_residual[4:]),
        ),
        {"R": shape.R, **of_rows, "ACTIVATION": call.activation, **{name: flags[name] for name in kept}},
        tiles_m,
    )
    sizes = (shape.K, *of_weight_and_residual[:4], lanes["SHIFT"])
    of_rows = {name: size for name, size in of_rows.items() if name not in ("SHIFT", "VECTOR_X")}
    packing = ConvPlan(_PACKING, (shape.R, of_rows["PITCH"] // _PACKING.BLOCK_N), sizes, of_rows, 0)
    return plan, packing


_PACKING = Config(BLOCK_N=64, num_warps=4, num_stages=1)


def _config(BLOCK_M: int, BLOCK_N: int) -> Config:
    return Config(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, GROUP_M=8, HALVES=False, num_warps=4, num_stages=3)


def _choose(M: int, K: int, device: Device, wide: bool) -> Config:
    """Tall tiles unless they leave multiprocessors idle; no wider than there are filters."""
    BLOCK_N = 32 if K <= 32 else 64
    tall = ceil_div(M, 128) * ceil_div(K, BLOCK_N) >= 2 * device.multiprocessors and not wide
    return _config(128 if tall else 64, BLOCK_N)


def configs(device: Device) -> list[Config]:
    """Every config of ``conv_rows_kernel`` that may be picked on this device."""
    if device.capability < 80:
        return []
    return [_config(BLOCK_M, BLOCK_N) for BLOCK_M in (128, 64) for BLOCK_N in (64, 32)]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernels: see ``kernels``."""

    def run(call: ConvCall) -> torch.Tensor:
        if not serves(call):
            raise UnsupportedConfig(f"not by rows: {call.config}")
        return rows_conv(call)[0]

    call = functools.partial(representative, run=run, candidates=configs)
    stem = {"x": (8, 3, 224, 224), "filters": (64, 7, 7), "stride": 2, "padding": 3}
    small = {"x": (8, 3, 224, 224), "filters": (32, 3, 3), "stride": 2, "padding": 1}
    contiguous = {"memory_format": torch.contiguous_format}
    return [
        call("7x7/2", **stem),
        call("7x7/2, bf16, contiguous", **stem, **contiguous, dtype=torch.bfloat16),
        call("7x7/2, statistics", **stem, statistics=True),
        call("3x3/2", **small, activation="relu6"),
        call("3x3/2, contiguous, SiLU", **small, **contiguous, activation="silu"),
        call("3x3/2, statistics", **small, statistics=True),
        call("11x11/4, padding 2", x=(8, 3, 224, 224), filters=(64, 11, 11), stride=4, padding=2),
    ]
