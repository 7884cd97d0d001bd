"""Convolution whose filter is as large as its stride: patches that touch and never overlap.

    y[n, p, q, :] = act(bn(weight · x[n, :, p·R : p·R + R, q·S : q·S + S] + bias) + residual)

ViT's 16×16, Swin's and ConvNeXt's 4×4: a matrix product of M = N·P·Q patches with K = C·R·S values each. An
image [N, C, H, W] has 3 channels, so it is no channels that are adjacent in memory but the S pixels of a
patch's row, and where channels are innermost all S·C values of it. Columns are taken in that order, run by
run, and load as vectors; the weight in the same order is a plain matrix. Every value of x is read by one row
of tiles and no other. The result [N, P, Q, K] is the sequence of tokens [N, P·Q, K] as it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_configs import JOINT_CHANNELS, table_configs, with_all_registers
from fastnets.kernels.conv_shape import ConvCall, ConvPlan, ceil_div, conv_call, vector_width
from fastnets.kernels.conv_tile import aligned, finish_tile, tile_of_program
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch
from fastnets.kernels.linear_configs import check_pairing, choose_config, suits

__all__ = ["configs", "patch_embedding", "representative_calls", "serves"]


@triton.jit(do_not_specialize=["M", "K", "COLUMNS", "P", "Q", "x_n", "x_c", "x_h", "x_q"])
def patch_embedding_kernel(
    x, weight, y, bias, running_mean, running_var, bn_weight, bn_bias, residual, M, K, COLUMNS, P, Q,
    x_n, x_c, x_h, x_q, residual_n, residual_k, residual_p, residual_q, eps, negative_slope,
    R: tl.constexpr, RUN: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_WEIGHT: tl.constexpr,
    VECTOR_Y: tl.constexpr, EVEN_K: tl.constexpr, DENSE_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of y [M, K]: grid (tiles,).

    weight [K, COLUMNS] is contiguous. Column j of a patch lies j % RUN after its run's start, and run i at
    (i / R)·x_c + (i % R)·x_h. x_q: from one patch to the next in a row. EVEN_K: BLOCK_K divides COLUMNS.
    """
    tl.static_assert(SPLIT_K == 1, "patches are many: their columns are not split")
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    K = aligned(K, VECTOR_Y, tl.int32)
    COLUMNS = aligned(COLUMNS, VECTOR_WEIGHT, tl.int32)
    x_n = aligned(x_n, VECTOR_X, INDEX)
    x_c = aligned(x_c, VECTOR_X, INDEX)
    x_h = aligned(x_h, VECTOR_X, INDEX)
    x_q = aligned(x_q, VECTOR_X, INDEX)
    tile_m, tile_n = tile_of_program(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    tile_m = tile_m.to(INDEX)
    # Rows and columns past the end repeat the last one: they load without a mask and are never stored.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1).to(INDEX)
    patches = m // Q // P * x_n + m // Q % P * (R * x_h) + m % Q * x_q
    filters = n * COLUMNS
    lanes = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, COLUMNS, BLOCK_K):
        present = k + lanes < COLUMNS
        column = k + lanes
        if not EVEN_K:
            column = tl.where(present, column, lanes % VECTOR_WEIGHT)
            column = tl.max_contiguous(tl.multiple_of(column, VECTOR_WEIGHT), VECTOR_WEIGHT)
        run = (column // RUN).to(INDEX)
        pixels = run // R * x_c + run % R * x_h + column % RUN
        a_pointers = x + (patches[:, None] + pixels[None, :])
        b_pointers = weight + (filters[None, :] + column[:, None])
        if EVEN_K:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            a = tl.load(a_pointers, mask=present[None, :], other=0.0)
            b = tl.load(b_pointers, mask=present[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    added = (residual, residual_n, residual_k, residual_p, residual_q, P, Q)
    finish_tile(
        acc, m, m < M, tile_n * BLOCK_N, K, 0, y, K, vectors, eps, added, negative_slope,
        VECTOR_Y, DENSE_RESIDUAL, ACTIVATION, INDEX, HALVES,
    )  # fmt: skip


def serves(call: ConvCall) -> bool:
    """Whether the patches of a call touch without overlapping, in runs that load as vectors."""
    shape = call.shape
    return (
        shape.stride == (shape.R, shape.S)
        and shape.padding == (0, 0)
        and shape.dilation == (1, 1)
        and shape.groups == 1
        and shape.S > 1
        and shape.C < JOINT_CHANNELS
        and not call.statistics
        and call.prologue is None
        and _run(call) is not None
    )


def _run(call: ConvCall) -> int | None:
    """The length of the runs that a patch lies in: S pixels of a channel, or S·C values; None if neither."""
    shape, strides = call.shape, call.x.stride()
    if strides[3] == 1 and shape.S % 2 == 0:
        return shape.S
    return shape.S * shape.C if strides[1] == 1 and strides[3] == shape.C else None


def patch_embedding(call: ConvCall) -> torch.Tensor:
    """y [N, K, P, Q], dense channels-last, of a call that this file ``serves``."""
    y = call.empty_output()
    if call.shape.M == 0:
        return y
    channels_last = call.x.stride(3) != 1
    weight = call.weight
    weight = weight.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    plan = call.plan(_plan)
    launch(
        patch_embedding_kernel, plan.grid, call.x, weight, y, *call.vectors, call.residual, *plan.sizes,
        call.eps, call.negative_slope, config=plan.config, flops=call.shape.flops,
        reads=(call.x, weight, *call.vectors, call.residual), writes=(y,), **plan.constexprs,
    )  # fmt: skip
    return y


def _plan(call: ConvCall) -> ConvPlan:
    shape, size = call.shape, call.x.element_size()
    flags = call.flags(shape.M * shape.K)
    columns, run = shape.C * shape.taps, _run(call)
    x_n, x_c, x_h, x_w = call.x.stride()
    steps = (x_n, 0 if run != shape.S else x_c, x_h, shape.S * x_w)
    vectors = vector_width(size, run, *steps), vector_width(size, columns)
    config = call.config
    if config is None:
        device = current_device(call.x)
        config = choose_config(
            shape.M, shape.K, columns, size, call.precision, device, min(vectors) > 1, True
        )
        config = config.replace(SPLIT_K=1)
    elif config.SPLIT_K > 1:
        raise UnsupportedConfig(f"SPLIT_K={config.SPLIT_K}: patches are many, their columns are not split")
    if config.maxnreg is None and config.BLOCK_M == 16:
        config = with_all_registers(config)
    tiles_m = ceil_div(shape.M, config.BLOCK_M)
    kept = ("VECTOR_Y", "DENSE_RESIDUAL", "WIDE", "PRECISION", "ACTIVATION")
    return ConvPlan(
        config,
        (tiles_m * ceil_div(shape.K, config.BLOCK_N),),
        (shape.M, shape.K, columns, shape.P, shape.Q, *steps, *call.strides()[8:]),
        {
            "R": shape.R,
            "RUN": run,
            "VECTOR_X": vectors[0],
            "VECTOR_WEIGHT": vectors[1],
            "EVEN_K": columns % config.BLOCK_K == 0,
            **{name: flags[name] for name in kept},
        },
        tiles_m,
    )


def configs(device: Device) -> list[Config]:
    """The tiles of the table "linear" that leave registers for a patch's addresses, unsplit."""
    kinds = ("fma",) if device.capability < 80 else ("16-bit", "tf32", "fma")
    found = [c for kind in kinds for c in table_configs("linear", kind, device) if suits(c, True, True)]
    return [config for config in found if config.SPLIT_K == 1]


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernel: see ``kernels``."""

    def call(name, K, size, dtype=torch.float16, layout=torch.contiguous_format):
        def thunk(config: Config | None = None):
            check_pairing(config, dtype, "tile")
            x, weight = (
                torch.empty(sizes, dtype=dtype, device="meta", memory_format=layout)
                for sizes in ((32, 3, 224, 224), (K, 3, size, size))
            )
            bias = torch.empty(K, device="meta")
            geometry = ((size, size), (0, 0), (1, 1), 1)
            vectors = (bias, None, None, None, None)
            return patch_embedding(conv_call(x, weight, vectors, None, *geometry, 0.0, "none", 0.0, config))

        return RepresentativeCall(name, thunk)

    return [
        call("ViT", 768, 16),
        call("ViT, channels-last, bf16", 768, 16, torch.bfloat16, torch.channels_last),
        call("ViT, fp32", 768, 16, torch.float32),
        call("Swin", 96, 4),
        call("14×14", 384, 14),
    ]
