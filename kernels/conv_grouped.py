"""Grouped convolution with narrow groups, several of them packed into each matrix product.

A ResNeXt layer convolves 4 channels to 4 outputs, 32 times over. No tile is that narrow, and a launch
per group would be worse. So PACK neighbouring groups make one product with a block-diagonal right factor:

    Y [M, PACK·Kg] = Σ_taps A [M, PACK·Cg] · B [PACK·Cg, PACK·Kg]

    B = ⎡ weights of group 0            0         ⎤
        ⎣         0             weights of group 1 ⎦        Cg, Kg: channels, outputs of a group

A is a plain run of channels, as wide as a dense convolution's, and the input is read once. The zeros cost
PACK times the multiply-adds; tensor cores have those to spare, as these layers wait for memory. One tap is
one block: the loop has R·S steps. The one difference to a convolution group by group: where an input is not
finite, 0 · NaN makes NaN of its neighbour groups' outputs in the tile too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.batch_norm_training import Statistics
from fastnets.kernels.conv_configs import (
    config_for,
    groups_per_tile,
    kernel_configs,
    representative,
)
from fastnets.kernels.conv_shape import SIZES, ConvCall, ConvPlan, ceil_div, vector_width
from fastnets.kernels.conv_tile import aligned, finish_tile, tile_of_program, window_origin, within
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch

__all__ = ["configs", "packed_conv", "representative_calls"]


@triton.jit(do_not_specialize=(*SIZES, "C"))
def conv_packed_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, residual,
    M, C, H, W, K, P, Q, y_pitch,
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s,
    residual_n, residual_k, residual_p, residual_q, eps, negative_slope, mean, m2, count,
    GROUP_CHANNELS: tl.constexpr, GROUP_OUTPUTS: tl.constexpr, PACK: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    VECTOR_X: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, VECTOR_Y: tl.constexpr, DENSE_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels of PACK groups: grid (row tiles · bundles of groups,). C and K count all groups.

    GROUP_CHANNELS·PACK <= BLOCK_K and GROUP_OUTPUTS·PACK <= BLOCK_N; the lanes left over are masked, as
    are those of groups past the last in the last bundle.
    """
    tl.static_assert(SPLIT_K == 1, "a group has too few columns to split")
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    CHANNELS: tl.constexpr = GROUP_CHANNELS * PACK
    OUTPUTS: tl.constexpr = GROUP_OUTPUTS * PACK

    C = aligned(C, VECTOR_X, tl.int32)
    K = aligned(K, VECTOR_Y, tl.int32)
    y_pitch = aligned(y_pitch, VECTOR_Y, INDEX)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    x_w = aligned(x_w, VECTOR_X, INDEX)
    weight_k = aligned(weight_k, VECTOR_WEIGHT, INDEX)
    weight_r = aligned(weight_r, VECTOR_WEIGHT, INDEX)
    weight_s = aligned(weight_s, VECTOR_WEIGHT, INDEX)

    bundles = tl.cdiv(K, OUTPUTS)
    tile_m, bundle = tile_of_program(M, bundles * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    tile_m = tile_m.to(INDEX)
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n, h, w = window_origin(m, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    windows = n * x_n + h * x_h + w * x_w
    valid = tl.full((BLOCK_M,), True, tl.int1)

    # A's columns: the bundle's channels, then lanes that read zeros, from the address of its first ones.
    lane = tl.arange(0, BLOCK_K)
    channels_left = tl.minimum(C - bundle * CHANNELS, CHANNELS)
    present = lane < channels_left
    channel = tl.where(present, lane, lane % VECTOR_X) + tl.multiple_of(bundle * CHANNELS, VECTOR_X)
    channel = channel.to(INDEX) * x_c

    # B: filter k takes lane c only if both are of the same group.
    k = tl.arange(0, BLOCK_N)
    outputs_left = tl.minimum(K - bundle * OUTPUTS, OUTPUTS)
    filters = (bundle * OUTPUTS + tl.minimum(k, outputs_left - 1)).to(INDEX) * weight_k
    diagonal = (lane // GROUP_CHANNELS)[:, None] == (k // GROUP_OUTPUTS)[None, :]
    diagonal = diagonal & present[:, None]
    b_offsets = filters[None, :] + ((lane % GROUP_CHANNELS).to(INDEX) * weight_c)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(R * S):
        r = tap // S
        s = tap % S
        x_tap = tl.multiple_of(r * DILATION_H * x_h + s * DILATION_W * x_w, VECTOR_X)
        weight_tap = tl.multiple_of(r * weight_r + s * weight_s, VECTOR_WEIGHT)
        if PADDED:
            valid = within(h + r * DILATION_H, H) & within(w + s * DILATION_W, W)
        rows = tl.multiple_of(tl.where(valid, windows, -x_tap), VECTOR_X)
        a_pointers = (x + x_tap) + (rows[:, None] + channel[None, :])
        a = tl.load(a_pointers, mask=valid[:, None] & present[None, :], other=0.0)
        b = tl.load((weight + weight_tap) + b_offsets, mask=diagonal, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    statistics = None
    if mean is not None:
        statistics = (mean, m2, count, tile_m, M)
    finish_tile(
        acc, m, m < M, 0, outputs_left, bundle * OUTPUTS, y, y_pitch, vectors, eps, added, negative_slope,
        VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, HALVES, statistics,
    )  # fmt: skip


def packed_conv(call: ConvCall) -> tuple[torch.Tensor, Statistics]:
    """Runs ``conv_packed_kernel`` for a call that ``conv_configs.kernel_of`` gave to it, as ``taps_conv``."""
    y = call.empty_output()
    if call.shape.M == 0:
        return y, call.empty_statistics(0)
    plan = call.plan(_plan)
    moments = call.empty_statistics(plan.tiles_m)
    launch(
        conv_packed_kernel, plan.grid, call.x, call.weight, y, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, *moments, config=plan.config, flops=call.shape.flops,
        reads=(call.x, call.weight, *call.vectors, call.residual), writes=(y, *moments), **plan.constexprs,
    )  # fmt: skip
    return y, moments


def _plan(call: ConvCall) -> ConvPlan:
    shape = call.shape
    flags = call.flags(shape.M * shape.K)
    config = config_for(call, flags)
    pack = groups_per_tile(shape, config)
    if pack == 0 or config.SPLIT_K > 1:
        raise UnsupportedConfig(
            f"{config}: no group of {shape.group_channels} channels and {shape.group_outputs} outputs fits, "
            "or its columns are split; use a config of conv_grouped.configs with larger blocks"
        )
    strides = x_n, x_c, x_h, x_w, *_ = call.strides()
    size = call.x.element_size()
    if x_c == 1:
        # A tile's channels run through all its groups.
        flags["VECTOR_X"] = vector_width(size, pack * shape.group_channels, shape.C, x_n, x_h, x_w)
    flags["VECTOR_Y"] = vector_width(size, pack * shape.group_outputs, shape.K)
    tiles_m = ceil_div(shape.M, config.BLOCK_M)
    sizes = (shape.M, shape.C, shape.H, shape.W, shape.K, shape.P, shape.Q, shape.K, *strides)
    groups = {"GROUP_CHANNELS": shape.group_channels, "GROUP_OUTPUTS": shape.group_outputs, "PACK": pack}
    grid = (tiles_m * ceil_div(shape.groups, pack),)
    return ConvPlan(config, grid, sizes, {**groups, **flags}, tiles_m)


def configs(device: Device) -> list[Config]:
    """Every config of ``conv_packed_kernel`` that ``choose_config`` may pick on this device."""
    return kernel_configs("packed", device)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""
    call = functools.partial(representative, run=packed_conv)
    layer = {"x": (8, 128, 56, 56), "filters": (128, 3, 3), "padding": 1, "groups": 32}
    return [
        call("3x3, 32 groups of 4", **layer),
        call("3x3, 32 groups of 16, stride 2", x=(8, 512, 28, 28), filters=(512, 3, 3), padding=1,
             stride=2, groups=32),
        call("3x3, 4 groups of 6 to 10, contiguous", x=(8, 24, 14, 14), filters=(40, 3, 3), padding=1,
             groups=4, residual=True, memory_format=torch.contiguous_format),
        call("1x1, 8 groups of 8", x=(8, 64, 28, 28), filters=(64, 1, 1), groups=8, residual=True),
        call("3x3, 32 groups of 4, fp32", **layer, dtype=torch.float32),
        call("3x3, 32 groups of 4, TF32", **layer, dtype=torch.float32, precision="tf32"),
        call("3x3, 32 groups of 4, statistics", **layer, statistics=True),
        call("3x3, 32 groups of 4, statistics, fp32", **layer, statistics=True, dtype=torch.float32),
    ]  # fmt: skip
