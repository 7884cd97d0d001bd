"""Batch norm of training: statistics, the normalising pass, and the two passes of its backward.

    mean, var = over all but channel 1 of x;   rstd = 1 / sqrt(var + eps);   x̂ = (x - mean) * rstd
    u = x̂ * bn_weight + bn_bias + residual;   y = act(u)
    dv = dy * act'(u)                                          is the residual's gradient
    sums = (Σ dv, Σ dv * x̂)                                    are those of bn_bias and bn_weight
    dx = bn_weight * rstd * (dv - sums[0] / count - x̂ * sums[1] / count)

Statistics are kept as (mean, m2, count) of disjoint parts and merged as Chan, Golub and LeVeque do ("Updating
formulae and a pairwise algorithm for computing sample variances", 1979). Sums within a part are taken of
deviations from the mean of its first tile, so that a large mean costs no digits. Reductions have a fixed
order: results are the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import BINARY_DERIVATIVE, check_activation
from fastnets.kernels.batch_norm import launch_bn_add_act
from fastnets.kernels.batch_norm_backward import bn_backward_input, bn_backward_sums
from fastnets.kernels.bitmask import bytes_of
from fastnets.kernels.channel_tiles import (
    channel_tiles,
    check_input,
    check_vectors,
    contiguous_vectors,
    memory_order,
    pass_configs,
    reduction_config,
    reduction_configs,
    share_of_program,
    step_index,
    step_offsets,
)
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = [
    "Statistics",
    "bn_backward_input",
    "bn_backward_sums",
    "channel_statistics",
    "configs",
    "finalize_statistics",
    "merge_statistics",
    "normalize_add_act",
    "representative_calls",
]


class Statistics(NamedTuple):
    """Of T disjoint tiles: mean and m2 (sum of squared deviations from it) [T, C], count [T], all fp32.

    The mean of ``channel_statistics`` of an fp32 tensor is fp64: rounded to fp32, means of 10^4 would say
    more of the variance between tiles than a standard deviation of 10^-2 does.
    """

    mean: torch.Tensor
    m2: torch.Tensor
    count: torch.Tensor


# --- statistics ---------------------------------------------------------------------------------------------


@triton.jit
def _on_grid(pivot, spread):
    """The pivot rounded to an eighth of the power of two below the spread, as far as fp32 goes.

    Differences of short numbers (16-bit data, integers) from it are then exact. From a pivot of 24 bits all
    of them would be rounded alike, and their sum be off by as much.
    """
    power = (spread.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Adding it leaves no room for digits below power / 8.
    shift = tl.where(power < 1e30, power, 0.0) * 1572864.0
    return (pivot + shift) - shift


@triton.jit(do_not_specialize=["sizes", "x_strides", "steps", "steps_per_split"])
def channel_statistics_kernel(
    x,
    mean,
    m2,
    count,
    sizes,
    x_strides,
    steps,
    steps_per_split,
    X_LAYOUT: tl.constexpr,
    OUTER_DIMS: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_total = sizes[3] * CHANNEL_UNIT
    blocks = tl.cdiv(channel_total, BLOCK_CHANNELS)
    block, row, begin, end = share_of_program(steps, steps_per_split, blocks)

    outer, inner, channels, valid_inner, valid_channels = step_index(
        begin, block, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS, BLOCK_INNER, BLOCK_CHANNELS
    )
    valid = valid_inner[:, None] & valid_channels[None, :]
    offset = step_offsets(outer, inner, channels, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    counted = valid_inner.to(tl.int32)
    pivot = tl.sum(value, axis=0) / tl.sum(counted, axis=0)
    # An infinite pivot would make the finite values' sums NaN too.
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    pivot = _on_grid(pivot, tl.max(tl.where(valid, tl.abs(value - pivot[None, :]), 0.0), axis=0))
    total = tl.where(valid, value - pivot[None, :], 0.0)
    squares = total * total
    for step in range(begin + 1, end):
        outer, inner, channels, valid_inner, valid_channels = step_index(
            step, block, sizes, INNER_UNIT, CHANNEL_UNIT, WIDE_OFFSETS, BLOCK_INNER, BLOCK_CHANNELS
        )
        valid = valid_inner[:, None] & valid_channels[None, :]
        offset = step_offsets(outer, inner, channels, sizes, x_strides, X_LAYOUT, OUTER_DIMS)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        deviation = tl.where(valid, value - pivot[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
        counted += valid_inner.to(tl.int32)

    n = tl.sum(counted, axis=0).to(tl.float32)
    from_pivot = tl.sum(total, axis=0)
    deviations = tl.sum(squares, axis=0) - from_pivot * (from_pivot / n)
    at = row.to(tl.int64) * channel_total + channels
    wide = mean.dtype.element_ty
    tl.store(mean + at, pivot.to(wide) + (from_pivot / n).to(wide), mask=valid_channels)
    # max would drop a NaN.
    tl.store(m2 + at, tl.where(deviations < 0.0, 0.0, deviations), mask=valid_channels)
    if block == 0:
        # Samples, where statistics are theirs, are cut alike: all write the same.
        samples = tl.num_programs(0) // (blocks * tl.cdiv(steps, steps_per_split))
        if row % samples == 0:
            tl.store(count + row // samples, n)


def channel_statistics(
    x: torch.Tensor, *, per_sample: bool = False, config: Config | None = None
) -> Statistics:
    """Statistics of each channel of x [N, C, ...], of 2 to 5 dims and any strides, in one read.

    Returns those of as many parts of x as were taken in parallel; m2 and count are fp32, mean is fp64 where x
    is fp32. An empty x has one part with count 0. per_sample=True has columns for each sample, [T, N * C].
    """
    check_input("channel_statistics", x)
    mean_dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    channels = x.shape[1] * (x.shape[0] if per_sample else 1)
    if x.numel() == 0:
        return Statistics(
            x.new_zeros(1, channels, dtype=mean_dtype),
            x.new_zeros(1, channels, dtype=torch.float32),
            x.new_zeros(1, dtype=torch.float32),
        )
    of = channel_tiles(tuple(x.shape), (memory_order(x), x.stride()), x.element_size(), per_sample)
    config, splits, steps_per_split = reduction_config(of, x, config)
    mean = x.new_empty(splits, channels, dtype=mean_dtype)
    m2 = x.new_empty(splits, channels, dtype=torch.float32)
    count = x.new_empty(splits, dtype=torch.float32)
    launch(
        channel_statistics_kernel,
        (of.samples * splits * of.channel_tiles(config),),
        x,
        mean,
        m2,
        count,
        of.sizes,
        of.strides[1],
        of.steps(config) // of.samples,
        steps_per_split,
        config=config,
        reads=(x,),
        writes=(mean, m2, count),
        X_LAYOUT=of.layouts[1],
        **of.constexprs,
    )
    return Statistics(mean, m2, count)


@triton.jit
def _part_offsets(part, channels, channel_total, members):
    row = (part // members).to(tl.int64) * channel_total
    return ((row[:, None] + channels[None, :]) * members) + (part % members)[:, None]


@triton.jit(do_not_specialize=["parts", "channel_total", "members"])
def merge_statistics_kernel(
    mean,
    m2,
    count,
    merged_mean,
    merged_m2,
    merged_count,
    rstd,
    running_mean,
    running_var,
    # Parts of each of the ``channel_total`` results: ``members`` neighbouring columns of each row.
    parts,
    channel_total,
    members,
    momentum,
    eps,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    valid_channels = channels < channel_total
    total = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float32)
    counts = tl.zeros([BLOCK_PARTS], tl.float64)
    # Deviations are taken from the mean of the first parts: exact, or nearly, where means are large. A part
    # without elements may hold anything.
    part = tl.arange(0, BLOCK_PARTS)
    n = tl.load(count + part // members, mask=part < parts, other=0.0)
    valid = (n > 0.0)[:, None] & valid_channels[None, :]
    at = _part_offsets(part, channels, channel_total, members)
    first = tl.load(mean + at, mask=valid, other=0.0).to(tl.float32)
    pivot = tl.sum(first * n[:, None], axis=0) / tl.maximum(tl.sum(n, axis=0), 1.0)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    pivot = _on_grid(pivot, tl.max(tl.where(valid, tl.abs(first - pivot[None, :]), 0.0), axis=0))
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        n = tl.load(count + part // members, mask=part < parts, other=0.0)
        valid = (n > 0.0)[:, None] & valid_channels[None, :]
        at = _part_offsets(part, channels, channel_total, members)
        deviation = tl.load(mean + at, mask=valid, other=0.0) - pivot.to(mean.dtype.element_ty)[None, :]
        deviation = tl.where(valid, deviation.to(tl.float32), 0.0)
        within = tl.load(m2 + at, mask=valid, other=0.0)
        weighted = n[:, None] * deviation
        total += weighted
        squares += within + weighted * deviation
        counts += n.to(tl.float64)
    # One value per channel is left: fp64 costs nothing now.
    n = tl.sum(counts, axis=0)
    pivot = pivot.to(tl.float64)
    at_least_one = tl.maximum(n, 1.0)
    from_pivot = tl.sum(total.to(tl.float64), axis=0)
    deviations = tl.sum(squares.to(tl.float64), axis=0) - from_pivot * from_pivot / at_least_one
    deviations = tl.where(deviations < 0.0, 0.0, deviations)
    middle = tl.where(n > 0.0, pivot + from_pivot / at_least_one, 0.0)
    tl.store(merged_mean + channels, middle.to(tl.float32), mask=valid_channels)
    if merged_m2 is not None:
        tl.store(merged_m2 + channels, deviations.to(tl.float32), mask=valid_channels)
        if tl.program_id(0) == 0:
            tl.store(merged_count, n.to(tl.float32))
    if rstd is not None:
        inverse = 1.0 / tl.sqrt(deviations / at_least_one + eps)
        tl.store(rstd + channels, inverse.to(tl.float32), mask=valid_channels)
    # As F.batch_norm: the unbiased variance, and nothing where there was nothing.
    share = tl.where(n > 0.0, momentum, 0.0).to(tl.float64)
    if running_mean is not None:
        before = tl.load(running_mean + channels, mask=valid_channels, other=0.0).to(tl.float64)
        after = before * (1.0 - share) + share * middle
        tl.store(running_mean + channels, after.to(running_mean.dtype.element_ty), mask=valid_channels)
    if running_var is not None:
        before = tl.load(running_var + channels, mask=valid_channels, other=0.0).to(tl.float64)
        unbiased = deviations / tl.maximum(n - 1.0, 1.0)
        after = before * (1.0 - share) + share * unbiased
        tl.store(running_var + channels, after.to(running_var.dtype.element_ty), mask=valid_channels)


def merge_statistics(statistics: Statistics, *, config: Config | None = None) -> Statistics:
    """The statistics of all parts together as those of one (T = 1), all fp32; count 0 where there is none."""
    mean, m2, count = _check_statistics("merge_statistics", statistics)
    merged = Statistics(m2.new_empty(1, m2.shape[1]), m2.new_empty(1, m2.shape[1]), m2.new_empty(1))
    _merge(mean, m2, count, 1, merged, None, None, None, 0.0, 0.0, config)
    return merged


def finalize_statistics(
    statistics: Statistics,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    momentum: float,
    eps: float,
    members: int = 1,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [C], rstd [C]), fp32, of all parts together; rstd = 1 / sqrt(m2 / count + eps).

    members: neighbouring columns of the statistics that make one result (the channels of a group).

    running_mean, running_var: [C] of any float dtype, updated in place by the same launch as
    ``F.batch_norm`` does: ``running = (1 - momentum) * running + momentum * new``, with the unbiased
    variance. They stay as they are where the statistics are of no element.
    """
    mean, m2, count = _check_statistics("finalize_statistics", statistics)
    if m2.shape[1] % members:
        raise ValueError(f"finalize_statistics: members={members} does not divide {m2.shape[1]} columns")
    channels = m2.shape[1] // members
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and running.shape != (channels,):
            raise ValueError(
                f"finalize_statistics: {name} has shape {tuple(running.shape)}, expected ({channels},)"
            )
    merged, rstd = m2.new_empty(channels), m2.new_empty(channels)
    written = contiguous_vectors(running_mean, running_var)
    _merge(mean, m2, count, members, Statistics(merged, None, None), rstd, *written, momentum, eps, config)
    for running, new in zip((running_mean, running_var), written):
        if new is not running:
            running.copy_(new)
    return merged, rstd


def _merge(mean, m2, count, members, merged, rstd, running_mean, running_var, momentum, eps, config) -> None:
    parts, channels = m2.shape[0] * members, m2.shape[1] // members
    if config is None:
        config = _MANY_PARTS if parts > 64 else _FEW_PARTS
    if config.get("BLOCK_PARTS") is None:
        raise UnsupportedConfig(f"{config} has no BLOCK_PARTS: it is for another kernel of this file")
    running = (running_mean, running_var)
    launch(
        merge_statistics_kernel,
        (tiles(channels, config.BLOCK_CHANNELS),),
        mean,
        m2,
        count,
        *merged,
        rstd,
        *running,
        parts,
        channels,
        members,
        momentum,
        eps,
        config=config,
        reads=(mean, m2, count, *running),
        writes=tuple(t for t in (*merged, rstd, *running) if t is not None),
    )


# --- the normalising pass -----------------------------------------------------------------------------------


def normalize_add_act(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    mask: bool = False,
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``act((x - mean) * rstd * bn_weight + bn_bias + residual)`` in one pass of ``bn_add_act``'s kernel.

    x: [N, C, ...] of 2 to 5 dims, fp32, fp16 or bf16, any strides. residual: like x in shape and dtype, any
    strides. The vectors are [C]. Computed in fp32 and rounded once; y is dense in the memory format of x.

    mask=True returns (y, bits) with one bit per element of y, in its memory order, that tells where the
    activation's derivative is 1 (uint8 [ceil(numel / 8)], see ``bitmask``). ValueError for activations whose
    derivative has other values than 0 and 1.
    """
    check_activation(activation)
    check_input("normalize_add_act", x, residual=residual)
    check_vectors("normalize_add_act", x, mean=mean, rstd=rstd, bn_weight=bn_weight, bn_bias=bn_bias)
    if mask and activation not in BINARY_DERIVATIVE:
        raise ValueError(
            f"normalize_add_act: mask=True with activation {activation!r}, whose derivative is not one bit "
            f"(only {', '.join(BINARY_DERIVATIVE)}); save what it is recomputed from instead"
        )
    y = torch.empty_like(x)
    bits = torch.empty(bytes_of(x), dtype=torch.uint8, device=x.device) if mask else None
    if x.numel():
        vectors = (None, mean, None, rstd, bn_weight, bn_bias)
        launch_bn_add_act(y, x, residual, bits, vectors, 0.0, activation, negative_slope, config)
    return (y, bits) if mask else y


# --- configs and checks -------------------------------------------------------------------------------------

_FEW_PARTS = Config(BLOCK_PARTS=64, BLOCK_CHANNELS=32, num_warps=4, num_stages=1)
# Few programs read many rows: many warps each, and 32 bytes of a row, which is what memory hands out.
_MANY_PARTS = Config(BLOCK_PARTS=512, BLOCK_CHANNELS=8, num_warps=8, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config of this file's launchers: of the first pass of statistics, of merging, of normalising."""
    return [*reduction_configs(), _FEW_PARTS, _MANY_PARTS, *pass_configs()]


def _check_statistics(function: str, statistics: Statistics) -> list[torch.Tensor]:
    mean, m2, count = statistics
    if mean.dim() != 2 or m2.shape != mean.shape or count.shape != mean.shape[:1]:
        raise ValueError(
            f"{function}: mean {tuple(mean.shape)}, m2 {tuple(m2.shape)} and count {tuple(count.shape)} must "
            "be [T, C], [T, C] and [T]"
        )
    return contiguous_vectors(*statistics)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""

    def tensor(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        return torch.empty(*shape, dtype=dtype, device="meta").to(memory_format=memory_format)

    def statistics(*shape, dtype, memory_format=torch.contiguous_format):
        x = tensor(*shape, dtype=dtype, memory_format=memory_format)
        return lambda config=None: channel_statistics(x, config=config)

    def parts(count, channels, mean_dtype=torch.float32, running=None):
        of = Statistics(tensor(count, channels, dtype=mean_dtype), tensor(count, channels), tensor(count))

        def thunk(config=None):
            if running is None:
                return merge_statistics(of, config=config)
            vectors = [None if running == "none" else tensor(channels, dtype=running) for _ in range(2)]
            return finalize_statistics(of, *vectors, momentum=0.1, eps=1e-5, config=config)

        return thunk

    def normalized(dtype, memory_format, shape=(32, 64, 56, 56), activation="relu", residual=True):
        x = tensor(*shape, dtype=dtype, memory_format=memory_format)
        vectors = [tensor(shape[1]) for _ in range(4)]

        def thunk(config=None):
            return normalize_add_act(
                x, *vectors, x if residual else None, activation=activation, mask=True, config=config
            )

        return thunk

    last = torch.channels_last
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("statistics, channels-last fp16", statistics(32, 64, 56, 56, dtype=half, memory_format=last)),
        ("statistics, channels-last fp32", statistics(32, 256, 14, 14, dtype=full, memory_format=last)),
        ("statistics, channels-last bf16, odd C", statistics(8, 27, 9, 9, dtype=bf16, memory_format=last)),
        ("statistics, contiguous bf16", statistics(32, 64, 56, 56, dtype=bf16)),
        ("statistics, contiguous fp32, 7x7", statistics(32, 512, 7, 7, dtype=full)),
        ("merge", parts(1056, 64)),
        ("merge, fp64 means", parts(33, 2048, torch.float64)),
        ("finalize", parts(784, 128, running=full)),
        ("finalize, fp64 means, bf16 running statistics", parts(132, 256, torch.float64, bf16)),
        ("finalize without running statistics", parts(33, 2048, running="none")),
        ("normalise with mask, channels-last fp16", normalized(half, last)),
        ("normalise with mask, channels-last fp32, relu6", normalized(full, last, activation="relu6")),
        ("normalise with mask, contiguous bf16", normalized(bf16, torch.contiguous_format, residual=False)),
        (
            "normalise, then mask, contiguous fp16, 7x7, relu6",
            normalized(half, torch.contiguous_format, (32, 512, 7, 7), "relu6", False),
        ),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
