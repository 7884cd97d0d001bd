"""Tensors [N, C, ...] of any strides as tiles of (inner × channels), for every kernel that works per channel.

The dims of a tensor of 2 to 5 dims, sorted by the strides of a dense one (the result, or the memory order of
the input), are nested loops over memory. Neighbouring dims that are one run in every tensor of the call are
merged, the channel is kept apart. What is left is the channel, the innermost of the others ("inner"), and at
most three more ("outer"): channels-last is [N*H*W inner, C channels], contiguous is N outer, [H*W inner, C
channels]. A step is one tile [BLOCK_INNER, BLOCK_CHANNELS] at one outer index. The outer index is a scalar,
so that no element pays a division, and strides come in units of a compile-time power of two, which is how
the compiler learns that a tile is read in vectors.

Statistics are one per channel, or, PER_GROUP, one per sample and group of channels: samples are then the
outermost of the outer dims, whatever their stride.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastnets.kernels.device import current_device
from fastnets.kernels.launch import DTYPES, Config, UnsupportedConfig, tiles

__all__ = [
    "ChannelTiles",
    "channel_tiles",
    "check_gradient",
    "check_input",
    "check_vectors",
    "contiguous_vectors",
    "memory_order",
    "pass_config",
    "pass_configs",
    "reduction_config",
    "reduction_configs",
    "share_of_program",
    "small_pass_configs",
    "statistic_index",
    "step_index",
    "step_offsets",
]


@triton.jit
def step_index(
    step,
    channel_tile,
    sizes,
    INNER_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """(outer, inner [BLOCK_INNER], channels [BLOCK_CHANNELS], valid inner, valid channels) of a step."""
    inner_total = sizes[2] * INNER_UNIT
    channel_total = sizes[3] * CHANNEL_UNIT
    inner_tiles = tl.cdiv(inner_total, BLOCK_INNER)
    outer = step // inner_tiles
    inner = (step % inner_tiles) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    channels = channel_tile * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    valid_inner = inner < inner_total
    valid_channels = channels < channel_total
    if WIDE_OFFSETS:
        outer = outer.to(tl.int64)
        inner = inner.to(tl.int64)
        channels = channels.to(tl.int64)
    return outer, inner, channels, valid_inner, valid_channels


@triton.jit
def step_offsets(outer, inner, channels, sizes, strides, LAYOUT: tl.constexpr, OUTER_DIMS: tl.constexpr):
    """Offsets [BLOCK_INNER, BLOCK_CHANNELS] of a step in a tensor with these strides and LAYOUT."""
    CONTIGUOUS: tl.constexpr = LAYOUT[0]
    UNIT: tl.constexpr = LAYOUT[1]
    start = 0
    if OUTER_DIMS == 1:
        start = outer * strides[0]
    elif OUTER_DIMS == 2:
        start = (outer % sizes[0]) * strides[0] + (outer // sizes[0]) * strides[1]
    elif OUTER_DIMS == 3:
        rest = outer // sizes[0]
        start = (outer % sizes[0]) * strides[0] + (rest % sizes[1]) * strides[1]
        start += (rest // sizes[1]) * strides[2]
    if CONTIGUOUS == "channel":
        return ((start + inner * strides[3]) * UNIT)[:, None] + channels[None, :]
    elif CONTIGUOUS == "inner":
        return ((start + channels * strides[4]) * UNIT)[None, :] + inner[:, None]
    else:
        return (start + inner * strides[3])[:, None] + (channels * strides[4])[None, :]


@triton.jit
def statistic_index(
    outer, channels, outer_per_sample, group_channels, channel_total, PER_GROUP: tl.constexpr
):
    """Which statistic belongs to each channel of a step at this outer index."""
    if PER_GROUP:
        groups = channel_total // group_channels
        return (outer // outer_per_sample) * groups + channels // group_channels
    else:
        return channels


@triton.jit
def share_of_program(steps, steps_per_split, blocks):
    """(block of channels, row of partial results, first step, end) of a reduction's program.

    Each sample (all of x is one, where statistics are per channel) has ``steps``, shared by several programs;
    the row is split * samples + sample.
    """
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    splits = tl.cdiv(steps, steps_per_split)
    samples = tl.num_programs(0) // (blocks * splits)
    sample = rest // splits
    split = rest % splits
    begin = sample * steps + split * steps_per_split
    end = tl.minimum(begin + steps_per_split, (sample + 1) * steps)
    return block, split * samples + sample, begin, end


@dataclass(frozen=True, eq=False)
class ChannelTiles:
    """The tiles of one call; kept, as finding them costs more than launching.

    ``sizes`` (two outer sizes from the inside out, inner and channels in units) and one tuple of ``strides``
    per tensor are arguments of the kernel; ``layouts`` (contiguous dim, unit) and ``constexprs`` are what it
    is compiled for.
    """

    samples: int
    outer: int
    inner: int
    channels: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    layouts: tuple[tuple[str, int], ...]
    constexprs: dict

    @property
    def outer_per_sample(self) -> int:
        return self.outer // self.samples

    def steps(self, config: Config) -> int:
        return self.outer * tiles(self.inner, config.BLOCK_INNER)

    def channel_tiles(self, config: Config) -> int:
        return tiles(self.channels, config.BLOCK_CHANNELS)


@functools.lru_cache(maxsize=4096)
def channel_tiles(
    shape: tuple, strides: tuple[tuple[int, ...], ...], itemsize: int, per_sample: bool = False
) -> ChannelTiles:
    """How the dims of tensors of one shape [N, C, ...] become tiles.

    strides: of each tensor; the first decides the order, and should be that of a dense tensor where one is
    written. itemsize: the smallest element, in bytes. per_sample: no step is of two samples.
    """
    dims = [d for d in range(1 if per_sample else 0, len(shape)) if shape[d] > 1 or d == 1]
    order = sorted(dims, key=lambda d: -strides[0][d])
    # Merged dims from the outside in: (size, stride in each tensor).
    merged: list[tuple[int, tuple[int, ...]]] = []
    mergeable = False
    for d in order:
        size, at = shape[d], tuple(s[d] for s in strides)
        if d == 1:
            channels, channel_strides = size, at if size > 1 else (0,) * len(at)
            # With one channel the dim is not there, and its neighbours may merge.
            mergeable = mergeable and size == 1
        elif mergeable and all(outer == size * inner for outer, inner in zip(merged[-1][1], at)):
            merged[-1] = (merged[-1][0] * size, at)
        else:
            merged.append((size, at))
            mergeable = True
    *outer, (inner, inner_strides) = merged or [(1, (0,) * len(strides))]
    outer.reverse()
    if per_sample:
        outer.append((shape[0], tuple(s[0] for s in strides)))

    limit = 16 // itemsize
    contiguous = tuple(
        "channel" if channel == 1 else "inner" if within == 1 else "none"
        for channel, within in zip(channel_strides, inner_strides)
    )
    channel_unit = power_of_two_divisor(limit, channels) if "channel" in contiguous else 1
    inner_unit = power_of_two_divisor(limit, inner) if "inner" in contiguous else 1
    units, scaled = [], []
    for i, kind in enumerate(contiguous):
        others = [dim[1][i] for dim in outer]
        others += {"channel": [inner_strides[i]], "inner": [channel_strides[i]], "none": []}[kind]
        largest = {"channel": channel_unit, "inner": inner_unit, "none": 1}[kind]
        unit = power_of_two_divisor(largest, *others)
        row = [dim[1][i] // unit for dim in outer] + [0] * (3 - len(outer))
        # The stride of the contiguous dim is not used.
        row += [s[i] // unit if s[i] != 1 else 1 for s in (inner_strides, channel_strides)]
        units.append(unit)
        scaled.append(tuple(row))
    extent = max(sum((size - 1) * at for size, at in zip(shape, s)) for s in strides)
    sizes = [dim[0] for dim in outer]
    return ChannelTiles(
        samples=shape[0] if per_sample else 1,
        outer=math.prod(sizes),
        inner=inner,
        channels=channels,
        sizes=(*(sizes + [1, 1])[:2], inner // inner_unit, channels // channel_unit),
        strides=tuple(scaled),
        layouts=tuple(zip(contiguous, units)),
        constexprs={
            "OUTER_DIMS": len(outer),
            "INNER_UNIT": inner_unit,
            "CHANNEL_UNIT": channel_unit,
            # Tiles overhang, by less than a tile's rows and columns.
            "WIDE_OFFSETS": extent + _overhang(scaled, units) >= 2**31,
        },
    )


def _overhang(strides, units) -> int:
    """What a masked element of a tile may lie behind the tensor's end, at most."""
    return max(
        1024 * unit * max(row[3], 1) + 256 * unit * max(row[4], 1) for row, unit in zip(strides, units)
    )


def power_of_two_divisor(limit: int, *values: int) -> int:
    """The largest power of two up to ``limit`` (itself one) that divides all values."""
    while any(v % limit for v in values):
        limit //= 2
    return limit


# Blocks from long runs of channels to long runs of pixels: (BLOCK_INNER, BLOCK_CHANNELS). 4096 elements are
# 32 a thread, four 16-byte loads in flight of 16-bit data; 64 channels fill a cache line and keep the loads
# of the channels' vectors few. Reductions hold two sums per element of a block: 16 elements a thread.
_PASS_BLOCKS = ((64, 64), (128, 32), (32, 128), (16, 256), (1024, 4), (256, 16))
_SMALL_PASS_BLOCKS = ((16, 64), (32, 32), (8, 128), (4, 256), (256, 4), (64, 16))
_REDUCTION_BLOCKS = ((32, 64), (64, 32), (16, 128), (8, 256), (512, 4), (128, 16), (256, 8))


def _config(block: tuple[int, int]) -> Config:
    return Config(BLOCK_INNER=block[0], BLOCK_CHANNELS=block[1], num_warps=4, num_stages=1)


def pass_configs() -> list[Config]:
    """Every config of ``pass_config``: the same on all devices, such kernels are bound by memory."""
    return [_config(block) for block in (*_PASS_BLOCKS, *_SMALL_PASS_BLOCKS)]


def small_pass_configs() -> list[Config]:
    """Those of ``pass_configs`` for kernels that hold many values for each element: 8 elements a thread."""
    return [_config(block) for block in _SMALL_PASS_BLOCKS]


def reduction_configs() -> list[Config]:
    """Every config of ``reduction_config``."""
    return [_config(block) for block in _REDUCTION_BLOCKS]


def pass_config(
    of: ChannelTiles, x: torch.Tensor, config: Config | None = None, small: bool = False
) -> Config:
    """The config of a kernel that visits each element once, one step a program; or the one given.

    small: of ``small_pass_configs``.
    """
    if config is not None:
        return _one_of(small_pass_configs() if small else pass_configs(), config)
    if small:
        return _config(_pick(of, _SMALL_PASS_BLOCKS))
    return _pass_config(of, current_device(x).multiprocessors)


@functools.lru_cache(maxsize=4096)
def _pass_config(of: ChannelTiles, multiprocessors: int) -> Config:
    config = _config(_pick(of, _PASS_BLOCKS))
    # Smaller tiles where large ones would leave multiprocessors with less than four.
    if of.steps(config) * of.channel_tiles(config) < 4 * multiprocessors:
        return _config(_pick(of, _SMALL_PASS_BLOCKS))
    return config


def reduction_config(
    of: ChannelTiles, x: torch.Tensor, config: Config | None = None, most: int = 2**31
) -> tuple[Config, int, int]:
    """(config, programs that share a sample's steps of one tile of channels, steps of each) of a reduction.

    most: parts that the second stage takes at once. Programs are enough for eight on every multiprocessor,
    but with four steps each, so that partial results stay small beside what is read; with fewer where
    multiprocessors would have nothing to do at all.
    """
    if config is not None:
        config = _one_of(reduction_configs(), config)
    return _reduction_config(of, config, most, current_device(x).multiprocessors)


@functools.lru_cache(maxsize=4096)
def _reduction_config(
    of: ChannelTiles, config: Config | None, most: int, multiprocessors: int
) -> tuple[Config, int, int]:
    config = config or _config(_pick(of, _REDUCTION_BLOCKS))
    steps, columns = of.steps(config) // of.samples, of.channel_tiles(config) * of.samples
    least = min(steps, tiles(multiprocessors, columns))
    splits = max(min(tiles(8 * multiprocessors, columns), steps // 4), least, 1)
    each = tiles(steps, min(splits, most))
    # No program without a step.
    return config, tiles(steps, each), each


def _one_of(shipped: list[Config], config: Config) -> Config:
    if config not in shipped:
        raise UnsupportedConfig(f"{config} is for another kernel (this one has {len(shipped)} of its own)")
    return config


def _pick(of: ChannelTiles, blocks: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The block that wastes least on overhanging tiles.

    Runs of memory shorter than 32 elements count as half wasted. Among equals the first where channels are
    contiguous in the first tensor, else the last.
    """
    by_channel = of.layouts[0][0] == "channel"

    def waste(block: tuple[int, int]) -> float:
        inner, channels = block
        volume = tiles(of.inner, inner) * inner * tiles(of.channels, channels) * channels
        run, extent = (channels, of.channels) if by_channel else (inner, of.inner)
        return volume * (1.5 if run < min(32, extent) else 1.0)

    return min(blocks if by_channel else blocks[::-1], key=waste)


def memory_order(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor in x's memory format."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def contiguous_vectors(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The vectors as kernels read them: stride 1, None where there is none."""
    return [v if v is None or v.is_contiguous() else v.contiguous() for v in vectors]


def check_input(function: str, x: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{function}: x has {x.dim()} dims, expected 2 to 5 ([N, C, ...])")
    if x.dtype not in DTYPES:
        raise TypeError(f"{function}: x is {x.dtype}, expected float32, float16 or bfloat16; convert it")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"{function}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, as x"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"{function}: residual is {residual.dtype}, x is {x.dtype}; convert one")


def check_gradient(function: str, dy: torch.Tensor, x: torch.Tensor) -> None:
    if dy.shape != x.shape:
        raise ValueError(f"{function}: dy has shape {tuple(dy.shape)}, expected {tuple(x.shape)}, as x")
    if dy.dtype not in DTYPES:
        raise TypeError(f"{function}: dy is {dy.dtype}, expected float32, float16 or bfloat16; convert it")


def check_vectors(function: str, x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    expected = x.shape[1:2]
    for name, vector in vectors.items():
        if vector is not None and vector.shape != expected:
            raise ValueError(
                f"{function}: {name} has shape {tuple(vector.shape)}, expected {tuple(expected)}, as x"
            )
