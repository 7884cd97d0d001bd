"""Convolution of few channels: the columns of the implicit matrix product are taken (r, s, c) jointly.

    Y [M, K] = A [M, R·S·C] · B [R·S·C, K]        as in ``conv``

A network's stem has C = 3 and a filter of 7×7: tap by tap, each tap would pad its 3 channels to a block of
16. Here a block is 32 successive columns of A whatever tap they belong to, and 147 columns pad to 160. The
price is that every element finds its own address and tests its own bounds; with so few columns that is cheap.
The input may lie in any way, the NCHW images that users pass included; a channels-last one whose C is a
multiple of 8 still loads 16 bytes at a time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv_configs import config_for, kernel_configs, representative
from fastnets.kernels.conv_shape import SIZES, ConvCall, ConvPlan, ceil_div
from fastnets.kernels.conv_tile import aligned, finish_tile, tile_of_program, window_origin, within
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch

__all__ = ["configs", "joint_conv", "representative_calls"]


@triton.jit(do_not_specialize=SIZES)
def conv_joint_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, residual,
    M, H, W, K, P, Q, y_pitch,
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s,
    residual_n, residual_k, residual_p, residual_q, eps, negative_slope, mean, m2, count,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    VECTOR_X: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One tile of Y, its columns taken (r, s, c) jointly: column = (r·S + s)·C + c. Grid (tiles,).

    C, R and S are compile-time numbers, so that taking a column apart costs a multiplication, not a division.
    """
    tl.static_assert(SPLIT_K == 1, "few channels make few columns: there is nothing to split")
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    COLUMNS: tl.constexpr = R * S * C

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
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    k = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
    n, h, w = window_origin(m, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    windows = tl.multiple_of(n * x_n + h * x_h + w * x_w, VECTOR_X)
    filters = k * weight_k

    lanes = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, COLUMNS, BLOCK_K):
        column = first + lanes
        present = column < COLUMNS
        r = column // (S * C)
        s = column // C % S
        c = (column % C).to(INDEX)
        x_column = r * DILATION_H * x_h + s * DILATION_W * x_w + c * x_c
        weight_column = r * weight_r + s * weight_s + c * weight_c
        # As in conv_kernel, what is masked is read from inside the tensor all the same. The columns of one
        # vector are of one tap: they are inside the image, or outside, as a whole.
        x_column = tl.where(present, x_column, lanes % VECTOR_X)
        x_column = tl.max_contiguous(tl.multiple_of(x_column, VECTOR_X), VECTOR_X)
        weight_column = tl.where(present, weight_column, lanes % VECTOR_WEIGHT)
        weight_column = tl.max_contiguous(tl.multiple_of(weight_column, VECTOR_WEIGHT), VECTOR_WEIGHT)
        offsets = windows[:, None] + x_column[None, :]
        inside = present[None, :]
        if PADDED:
            inside &= within(h[:, None] + (r * DILATION_H)[None, :], H)
            inside &= within(w[:, None] + (s * DILATION_W)[None, :], W)
            inside = tl.max_constancy(inside, (1, VECTOR_X))
            offsets = tl.where(inside, offsets, (lanes % VECTOR_X)[None, :])
        a = tl.load(x + offsets, mask=inside, other=0.0)
        # B is loaded transposed, with lanes along the columns: each then takes one column apart, not many.
        b = tl.load(weight + (filters[:, None] + weight_column[None, :]), mask=present[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

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


def joint_conv(call: ConvCall) -> tuple[torch.Tensor, Statistics]:
    """Runs ``conv_joint_kernel`` for a call that ``conv_configs.kernel_of`` gave to it, as ``taps_conv``."""
    y = call.empty_output()
    if call.shape.M == 0:
        return y, call.empty_statistics(0)
    plan = call.plan(_plan)
    moments = call.empty_statistics(plan.tiles_m)
    launch(
        conv_joint_kernel, plan.grid, call.x, call.weight, y, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, *moments, config=plan.config, flops=call.shape.flops,
        reads=(call.x, call.weight, *call.vectors, call.residual), writes=(y, *moments), **plan.constexprs,
    )  # fmt: skip
    return y, moments


def _plan(call: ConvCall) -> ConvPlan:
    shape = call.shape
    flags = call.flags(shape.M * call.pitch)
    config = config_for(call, flags)
    if config.SPLIT_K > 1:
        raise UnsupportedConfig(f"SPLIT_K={config.SPLIT_K}: {shape.C} channels make too few columns to split")
    tiles_m = ceil_div(shape.M, config.BLOCK_M)
    sizes = (shape.M, shape.H, shape.W, shape.K, shape.P, shape.Q, call.pitch, *call.strides())
    grid = (tiles_m * ceil_div(shape.K, config.BLOCK_N),)
    return ConvPlan(config, grid, sizes, {"C": shape.C, **flags}, tiles_m)


def configs(device: Device) -> list[Config]:
    """Every config of ``conv_joint_kernel`` that ``choose_config`` may pick on this device."""
    return kernel_configs("joint", device)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""
    call = functools.partial(representative, run=joint_conv)
    full, contiguous = torch.float32, torch.contiguous_format
    stem = {"x": (8, 3, 224, 224), "filters": (64, 7, 7), "stride": 2, "padding": 3}
    return [
        call("7x7/2 over 3 channels", **stem),
        call("3x3/2 over contiguous images", x=(8, 3, 224, 224), filters=(32, 3, 3), stride=2, padding=1,
             activation="relu6", memory_format=contiguous),
        call("7x7/2, TF32", **stem, dtype=full, precision="tf32"),
        call("7x7/2, fp32", **stem, dtype=full),
        call("5x5 over 6 channels, no padding", x=(8, 6, 14, 14), filters=(16, 5, 5), activation="tanh"),
        call("3x3 over 24 channels", x=(8, 24, 56, 56), filters=(24, 3, 3), padding=1,
             residual=True, activation="silu"),
        call("7x7/2, statistics", **stem, statistics=True),
        call("7x7/2, statistics, fp32", **stem, statistics=True, dtype=full),
        call("3x3 past 2^31 elements", x=(65536, 3, 112, 112), filters=(64, 3, 3), padding=1),
    ]  # fmt: skip
