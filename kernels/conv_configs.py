"""Which kernel and which tile a convolution runs with when nothing was measured.

A config is one output tile BLOCK_M × BLOCK_N, computed BLOCK_K columns at a time. ``choose_config`` predicts
each one's time for a shape from counts alone (tiles per multiprocessor, multiply-adds and bytes per tile) and
takes the least. The prediction ranks tiles; it is not a time to quote.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from fastnets.kernels.activation import check_activation
from fastnets.kernels.conv_shape import (
    ConvCall,
    ConvShape,
    Pool,
    Prologue,
    Shortcut,
    checked_vectors,
    conv_call,
    convolution_shape,
    pixel_pitch,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig

__all__ = [
    "addressing",
    "checked_out",
    "checked_passed",
    "checked_prologue",
    "checked_shortcut",
    "choose_config",
    "groups_per_tile",
    "holds_pool",
    "holds_shortcut",
    "kernel_configs",
    "kernel_of",
    "pool_pays",
    "predicted_seconds",
    "products_of",
    "representative",
    "seconds_of_tiles",
    "shortcut_pays",
    "slices_pay",
    "suits",
    "table_configs",
    "why_no_out",
    "why_no_passed",
    "why_no_prologue",
    "why_no_shortcut",
    "with_all_registers",
]

# Filters of several taps over fewer channels than this take (r, s, c) jointly: blocks of 32 channels would be
# mostly padding. Groups of no more channels and outputs than PACKED_CHANNELS are packed several to a tile.
JOINT_CHANNELS = 32
PACKED_CHANNELS = 32

_LAUNCH = 4e-6  # seconds that one more launch is taken to cost

# By kernel and by how the device multiplies: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, values of SPLIT_K).
# "fma" is for devices and precisions without a tensor-core path (sm_75 in Triton 3.6 and later, exact fp32).
_TABLES = {
    ("taps", "16-bit"): (
        (128, 128, 64, 4, 3, (1,)),
        (128, 128, 64, 8, 3, (1,)),
        (128, 128, 32, 4, 4, (1,)),
        (128, 64, 64, 4, 3, (1, 2, 4)),
        (128, 64, 32, 4, 4, (1,)),
        (128, 64, 16, 4, 4, (1,)),
        (64, 64, 64, 4, 4, (1, 2, 4, 8)),
        (64, 64, 32, 4, 4, (1,)),
        (128, 32, 32, 4, 4, (1,)),
        (64, 32, 64, 4, 4, (1, 4, 8)),
        (128, 16, 32, 4, 4, (1,)),
    ),
    ("taps", "tf32"): (
        (128, 128, 32, 8, 3, (1,)),
        (128, 64, 32, 4, 3, (1, 4)),
        (64, 64, 32, 4, 4, (1, 2, 4, 8)),
        (64, 64, 16, 4, 4, (1,)),
        (128, 32, 16, 4, 4, (1,)),
    ),
    ("taps", "fma"): (
        (64, 64, 16, 8, 3, (1, 4)),
        (32, 64, 16, 4, 3, (1, 4)),
        (32, 32, 16, 4, 3, (1, 4, 8)),
    ),
    ("joint", "16-bit"): ((128, 64, 32, 4, 3, (1,)), (64, 64, 32, 4, 3, (1,)), (64, 32, 32, 4, 3, (1,))),
    ("joint", "tf32"): ((128, 32, 32, 4, 3, (1,)), (64, 32, 32, 4, 3, (1,))),
    ("joint", "fma"): ((64, 32, 16, 4, 2, (1,)), (32, 32, 16, 4, 2, (1,))),
    ("packed", "16-bit"): (
        (128, 64, 64, 4, 3, (1,)),
        (64, 64, 64, 4, 3, (1,)),
        (128, 32, 32, 4, 3, (1,)),
        (64, 32, 32, 4, 3, (1,)),
    ),
    ("packed", "tf32"): ((64, 64, 64, 4, 2, (1,)), (128, 32, 32, 4, 3, (1,)), (64, 32, 32, 4, 3, (1,))),
    ("packed", "fma"): ((32, 32, 32, 4, 2, (1,)), (64, 32, 32, 4, 2, (1,))),
    # Of linear layers: rows, columns. Tiles of 16 and 32 rows are for small batches, where weights stream.
    ("linear", "16-bit"): (
        (128, 256, 64, 8, 3, (1,)),
        (128, 128, 64, 8, 3, (1,)),
        (128, 128, 64, 4, 3, (1,)),
        (128, 128, 32, 4, 4, (1,)),
        (128, 64, 64, 4, 3, (1, 2, 4)),
        (64, 128, 64, 4, 3, (1, 2, 4)),
        (64, 64, 64, 4, 4, (1, 2, 4, 8)),
        (32, 64, 128, 4, 4, (1, 2, 4, 8)),
        (16, 64, 128, 4, 4, (1, 2, 4, 8)),
        (16, 32, 256, 4, 3, (1, 2, 4, 8)),
    ),
    ("linear", "tf32"): (
        (128, 128, 32, 8, 3, (1,)),
        (128, 64, 32, 4, 3, (1, 4)),
        (64, 64, 32, 4, 4, (1, 2, 4, 8)),
        (32, 64, 64, 4, 3, (1, 2, 4, 8)),
        (16, 32, 128, 4, 3, (1, 2, 4, 8)),
    ),
    ("linear", "fma"): (
        (64, 64, 16, 8, 3, (1, 4)),
        (32, 64, 16, 4, 3, (1, 4)),
        (32, 32, 16, 4, 3, (1, 4, 8)),
        (16, 32, 32, 4, 3, (1, 4, 8)),
    ),
    # Of a weight's gradient: filters, columns of taps and channels, pixels.
    ("weight gradient", "16-bit"): (
        (128, 128, 64, 8, 3, (1,)),
        (128, 128, 32, 4, 4, (1,)),
        (128, 64, 64, 4, 3, (1,)),
        (64, 128, 64, 4, 3, (1,)),
        (64, 64, 64, 4, 4, (1,)),
        (64, 64, 32, 4, 4, (1,)),
        (32, 64, 64, 4, 4, (1,)),
        (64, 32, 64, 4, 4, (1,)),
        (32, 32, 64, 4, 4, (1,)),
    ),
    ("weight gradient", "tf32"): (
        (64, 64, 32, 4, 3, (1,)),
        (32, 64, 32, 4, 3, (1,)),
        (64, 32, 32, 4, 3, (1,)),
        (32, 32, 32, 4, 4, (1,)),
    ),
    ("weight gradient", "fma"): (
        (64, 64, 16, 8, 3, (1,)),
        (32, 64, 16, 4, 3, (1,)),
        (32, 32, 16, 4, 3, (1,)),
    ),
    ("tensor map", "16-bit"): (
        (128, 128, 64, 8, 3, (1,)),
        (128, 128, 64, 4, 4, (1,)),
        (128, 64, 64, 4, 4, (1,)),
        (64, 128, 64, 4, 4, (1,)),
        (64, 64, 64, 4, 4, (1,)),
        (128, 256, 64, 8, 3, (1,)),
    ),
}

# Tiles of the "fma" tables that spill somewhere: (kernel, capability) -> (BLOCK_M, BLOCK_N).
_SPILLING = {
    ("taps", 75): (32, 64),
    ("joint", 100): (64, 32),
    ("joint", 103): (64, 32),
    ("packed", 100): (64, 32),
    ("packed", 103): (64, 32),
}


def kernel_of(shape: ConvShape) -> str:
    """The kernel that serves a shape: "taps", "joint", "packed" or "depthwise"."""
    if shape.groups > 1:
        if shape.groups == shape.C:
            return "depthwise"
        return "packed" if max(shape.group_channels, shape.group_outputs) <= PACKED_CHANNELS else "taps"
    return "joint" if shape.taps > 1 and shape.C < JOINT_CHANNELS else "taps"


def why_no_prologue(shape: ConvShape) -> str | None:
    """Why a convolution cannot normalise its input while loading it, or None where it can."""
    if shape.taps > 1:
        return (
            f"a {shape.R}x{shape.S} filter would normalise every pixel {shape.taps} times; 1x1 is supported"
        )
    kernel = kernel_of(shape)
    if kernel != "taps":
        return f"groups={shape.groups} of {shape.group_channels} channels run in the {kernel} kernel"
    return None


def checked_prologue(prologue: Prologue, shape: ConvShape) -> Prologue:
    """The prologue with contiguous vectors; raises for what does not fit."""
    reason = why_no_prologue(shape)
    if reason is not None:
        raise UnsupportedConfig(f"prologue: {reason}; normalise x in a pass of its own")
    check_activation(prologue.activation)
    if prologue.gate is not None:
        return _checked_gate(prologue, shape)
    if prologue.mean is None or prologue.rstd is None:
        raise ValueError("prologue: give mean and rstd, or a gate")
    vectors = []
    for name, vector in zip(Prologue._fields, prologue.tensors):
        if vector is not None and vector.shape != (shape.C,):
            raise ValueError(f"prologue.{name} has shape {list(vector.shape)}, expected [{shape.C}], as x")
        vectors.append(vector if vector is None or vector.is_contiguous() else vector.contiguous())
    return prologue._replace(mean=vectors[0], rstd=vectors[1], bn_weight=vectors[2], bn_bias=vectors[3])


def why_no_shortcut(shape: ConvShape, shortcut: Shortcut) -> str | None:
    """Why a convolution cannot compute the shortcut that is added to it, or None where it can."""
    kernel = kernel_of(shape)
    if kernel != "taps" or shape.groups > 1:
        return f"groups={shape.groups} of {shape.group_channels} channels run in the {kernel} kernel"
    if (shortcut.x.stride(1) != 1 and shortcut.x.shape[1] > 1) or not shortcut.weight.is_contiguous():
        return f"its input has strides {shortcut.x.stride()}; channels-last is supported, and a dense filter"
    return None


def checked_shortcut(shortcut: Shortcut, call: ConvCall) -> Shortcut:
    """The shortcut with contiguous vectors; raises for what does not fit."""
    shape, x, weight = call.shape, shortcut.x, shortcut.weight
    if x.dtype != call.x.dtype or weight.dtype != x.dtype:
        raise TypeError(f"shortcut: x is {x.dtype}, weight {weight.dtype}, expected {call.x.dtype}")
    if tuple(weight.shape[2:]) != (1, 1) or weight.shape[0] != shape.K:
        raise ValueError(f"shortcut: weight is {list(weight.shape)}, expected [{shape.K}, C, 1, 1]")
    found = convolution_shape(x.shape, weight.shape, shortcut.stride, (0, 0), (1, 1), 1)
    if (found.N, found.P, found.Q) != (shape.N, shape.P, shape.Q):
        raise ValueError(
            f"shortcut gives {[found.N, found.K, found.P, found.Q]}, the convolution "
            f"{[shape.N, shape.K, shape.P, shape.Q]}"
        )
    reason = why_no_shortcut(shape, shortcut)
    if reason is not None or call.prologue is not None or call.residual is not None:
        reason = reason or "a prologue or a residual comes with it"
        raise UnsupportedConfig(f"shortcut: {reason}; compute it first and give it as the residual")
    vectors = checked_vectors(shortcut.vectors, shape.K)
    return Shortcut(x, weight, *vectors, tuple(shortcut.stride), shortcut.eps)


def checked_out(out: torch.Tensor, call: ConvCall) -> torch.Tensor:
    """The tensor that y goes into; raises for what does not fit."""
    shape = call.shape
    if tuple(out.shape) != (shape.N, shape.K, shape.P, shape.Q) or out.dtype != call.x.dtype:
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype}, the convolution gives "
            f"{[shape.N, shape.K, shape.P, shape.Q]} {call.x.dtype}"
        )
    pitch = pixel_pitch(out.shape, out.stride())
    if (out.stride(1) != 1 and shape.K > 1) or pitch is None or pitch < shape.K:
        raise ValueError(f"out has strides {out.stride()}, expected channels of a channels-last tensor")
    if call.residual is not None or (reason := why_no_out(shape)) is not None:
        reason = reason if call.residual is None else "a residual is added"
        raise UnsupportedConfig(f"out: {reason}; copy the result there")
    return out


def why_no_out(shape: ConvShape) -> str | None:
    """Why a convolution cannot write into a slice of a buffer's channels, or None where it can."""
    kernel = kernel_of(shape)
    if kernel not in ("taps", "joint"):
        return f"groups={shape.groups} of {shape.group_channels} channels run in the {kernel} kernel"
    return None


def checked_passed(passed: torch.Tensor, call: ConvCall) -> torch.Tensor:
    """The tensor whose channels y's take turns with; raises for what does not fit."""
    shape = call.shape
    size = [shape.N, shape.K, shape.P, shape.Q]
    if list(passed.shape) != size:
        raise ValueError(f"passed has shape {list(passed.shape)}, the convolution gives {size}")
    if passed.dtype != call.x.dtype:
        raise TypeError(f"passed is {passed.dtype} but x is {call.x.dtype}; cast one of them")
    reason = why_no_passed(shape, passed)
    others = (call.residual, call.prologue, call.shortcut, call.pool, call.out)
    if reason is None and any(other is not None for other in others):
        reason = "a residual, a prologue, a shortcut, a pool or an out comes with it"
    if reason is not None:
        raise UnsupportedConfig(f"passed: {reason}; shuffle the channels in a pass of its own")
    return passed


def why_no_passed(shape: ConvShape, passed: torch.Tensor) -> str | None:
    """Why a convolution cannot shuffle its channels with those of ``passed``, or None where it can."""
    kernel = kernel_of(shape)
    if kernel != "taps":
        return f"groups={shape.groups} of {shape.group_channels} channels run in the {kernel} kernel"
    if (passed.stride(1) != 1 and shape.K > 1) or pixel_pitch(passed.shape, passed.stride()) is None:
        return f"it has strides {passed.stride()}; channels of a channels-last tensor are supported"
    return None


def slices_pay(written: int, copies: int, device: Device) -> bool:
    """Whether to concatenate by slices: what convolutions write there, in bytes, is not read and written once
    more, but each of the other parts is copied by a launch of its own, where a concatenation is one."""
    return 2 * written / (1e9 * device.dram_bandwidth) >= _LAUNCH * (copies - 1)


def _checked_gate(prologue: Prologue, shape: ConvShape) -> Prologue:
    gate = prologue.gate
    if gate.shape != (shape.N, shape.C):
        raise ValueError(f"prologue.gate has shape {list(gate.shape)}, expected [{shape.N}, {shape.C}], as x")
    if shape.groups > 1 or prologue.activation != "none" or any(t is not None for t in prologue.tensors):
        raise UnsupportedConfig("prologue: a gate goes alone, before a convolution without groups")
    return prologue._replace(gate=gate.contiguous())


def products_of(element_size: int, precision: str, device: Device) -> str:
    """How the device multiplies: "16-bit" and "tf32" on tensor cores, else "fma"."""
    if device.capability < 80 or (element_size == 4 and precision == "ieee"):
        return "fma"
    return "16-bit" if element_size == 2 else "tf32"


def groups_per_tile(shape: ConvShape, config: Config) -> int:
    """How many whole groups ``conv_packed_kernel`` computes in one tile; 0 where none fits."""
    fitting = min(config.BLOCK_K // shape.group_channels, config.BLOCK_N // shape.group_outputs)
    return min(fitting, shape.groups)


@functools.cache
def table_configs(kernel: str, products: str, device: Device) -> tuple[Config, ...]:
    """The configs of one table that fit the device."""
    result = []
    for BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, splits in _TABLES[kernel, products]:
        element_size = 2 if products == "16-bit" else 4
        if num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K * element_size > device.shared_memory_per_block:
            continue
        if products == "fma" and _SPILLING.get((kernel, device.capability)) == (BLOCK_M, BLOCK_N):
            continue
        accumulators = BLOCK_M * BLOCK_N // (32 * num_warps)
        if accumulators >= 128 and device.capability in (100, 103):
            continue  # the accumulator comes back from tensor memory all at once, and spills
        if accumulators >= 128 and BLOCK_K >= 64 and device.capability != 90:
            continue  # operands pass through registers too, which only wgmma spares
        for SPLIT_K in splits:
            config = Config(
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                GROUP_M=8,
                SPLIT_K=SPLIT_K,
                HALVES=accumulators >= 64,
                num_warps=num_warps,
                num_stages=num_stages,
            )
            result.append(config)
    return tuple(result)


def kernel_configs(kernel: str, device: Device) -> list[Config]:
    """Every config that ``choose_config`` may pick for a kernel on this device."""
    kinds = ("fma",) if device.capability < 80 else ("16-bit", "tf32", "fma")
    tables = [table_configs(kernel, kind, device) for kind in kinds if (kernel, kind) in _TABLES]
    return list(dict.fromkeys(config for table in tables for config in table))


def suits(config: Config, kernel: str, vectors: bool, crowded: bool) -> bool:
    """Whether a config leaves registers for the addresses of a call.

    vectors: operands load several elements at a time, and not one by one, each from an address of its own.
    crowded: addresses take 64 bits, or the residual's are scattered, or operands pass through registers,
    or a shortcut has an accumulator of its own.
    """
    if kernel == "joint":
        return vectors or config.BLOCK_M <= 64
    threads = 32 * config.num_warps
    if not vectors and (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K > 32 * threads:
        return False
    return not crowded or config.BLOCK_M * config.BLOCK_N <= 64 * threads


def holds_shortcut(config: Config, device: Device) -> bool:
    """Whether a tile has room for a shortcut: a second accumulator, added to whole sums."""
    if device.capability in (100, 103) and config.BLOCK_N > 32:
        return False  # both accumulators come back from tensor memory at once, and spill
    return config.SPLIT_K == 1 and config.BLOCK_M * config.BLOCK_N <= 128 * 64


def holds_pool(config: Config) -> bool:
    """Whether a tile can pool its rows: of whole sums."""
    return config.SPLIT_K == 1


def config_for(call: ConvCall, flags: dict[str, object]) -> Config:
    """The call's own config, or the chosen one. flags: those of ``ConvCall.flags``."""
    config = call.config
    if config is None:
        device = current_device(call.x)
        size = call.x.element_size()
        channels = 0 if call.shortcut is None else call.shortcut.x.shape[1]
        addresses = addressing(call, flags)
        config = choose_config(
            call.shape, size, call.precision, device, *addresses, channels, call.pool is not None
        )  # fmt: skip
    sums = call.statistics and kernel_of(call.shape) != "taps"
    gates = call.prologue is not None and call.prologue.gate is not None and config.SPLIT_K > 1
    if config.maxnreg is None and (sums or gates or call.shortcut or call.pool or call.shuffles):
        return with_all_registers(config)
    return config


@functools.lru_cache(maxsize=256)
def with_all_registers(config: Config) -> Config:
    """The config without a bound on its registers: left to itself, ptxas spills what is needed beside the
    accumulator (sums, gates, a shortcut, a pool, a tile to shuffle with; in small tiles anything), to fit one
    more block."""
    return config.replace(maxnreg=255)


def addressing(call: ConvCall, flags: dict[str, object]) -> tuple[bool, bool]:
    """What ``suits`` asks of a call: (vectors, crowded)."""
    vectors = flags["VECTOR_X"] > 1 and flags["VECTOR_WEIGHT"] > 1
    scattered = call.residual is not None and not (flags["DENSE_RESIDUAL"] or call.shuffles)
    more = call.prologue is not None or call.shortcut is not None
    return vectors, flags["WIDE"] or scattered or more


@functools.lru_cache(maxsize=4096)
def choose_config(
    shape: ConvShape,
    element_size: int,
    precision: str,
    device: Device,
    vectors: bool = True,
    crowded: bool = False,
    shortcut_channels: int = 0,
    pooled: bool = False,
) -> Config:
    """The config with the least predicted time among those that suit the call.

    element_size: bytes per element of x. precision: "ieee" or "tf32", of fp32 products. vectors, crowded: see
    ``suits``. shortcut_channels: of the ``Shortcut``'s input, 0 where there is none. pooled: with a ``Pool``.
    """
    kernel = kernel_of(shape)
    candidates = table_configs(kernel, products_of(element_size, precision, device), device)
    candidates = [c for c in candidates if suits(c, kernel, vectors, crowded)]
    if shortcut_channels:
        candidates = [c for c in candidates if holds_shortcut(c, device)]
    if pooled:
        candidates = [c for c in candidates if holds_pool(c)]
    # Filters of several taps keep to 4 warps as long as nothing was measured: convolution loops in wider
    # blocks have been miscompiled (pytorch#173068), and no lane without a GPU runs the machine code itself.
    careful = [c for c in candidates if shape.taps == 1 or c.num_warps <= 4]
    return min(
        careful or candidates,
        key=lambda c: predicted_seconds(shape, c, element_size, precision, device, shortcut_channels),
    )


def predicted_seconds(
    shape: ConvShape,
    config: Config,
    element_size: int,
    precision: str,
    device: Device,
    shortcut_channels: int = 0,
) -> float:
    """``seconds_of_tiles`` for the tiles of a convolution, and for split-K's second pass."""
    BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K = (config[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    columns = shape.groups * math.ceil(shape.group_outputs / BLOCK_N)
    blocks = shape.taps * math.ceil(shape.group_channels / BLOCK_K)
    kernel = kernel_of(shape)
    if kernel == "joint":
        blocks = math.ceil(shape.taps * shape.C / BLOCK_K)
    elif kernel == "packed":
        columns = math.ceil(shape.groups / groups_per_tile(shape, config))
        blocks = shape.taps
    tiles = math.ceil(shape.M / BLOCK_M) * columns
    # Splitting is for grids that leave half the GPU idle; a share of fewer than 4 blocks fills no pipeline.
    if SPLIT_K > 1 and (2 * tiles > device.multiprocessors or SPLIT_K > blocks // 4):
        return math.inf
    blocks = math.ceil(blocks / SPLIT_K) + math.ceil(shortcut_channels / BLOCK_K)
    seconds = seconds_of_tiles(config, tiles * SPLIT_K, blocks, element_size, precision, device)
    if SPLIT_K > 1:
        seconds += _LAUNCH + 2 * 4 * SPLIT_K * shape.M * shape.K / (1e9 * device.dram_bandwidth)
    return seconds


@functools.lru_cache(maxsize=1024)
def shortcut_pays(
    shape: ConvShape, shortcut: ConvShape, element_size: int, precision: str, device: Device
) -> bool:
    """Whether a convolution and the 1×1 one that is added to it are predicted to take no longer in one
    launch than in two, of which the second reads what the first wrote."""

    def seconds(one: ConvShape, channels: int = 0) -> float:
        config = choose_config(one, element_size, precision, device, True, channels > 0, channels)
        return predicted_seconds(one, config, element_size, precision, device, channels)

    residual = element_size * shape.M * shape.K / (1e9 * device.dram_bandwidth)
    return seconds(shape, shortcut.C) <= seconds(shape) + seconds(shortcut) + _LAUNCH + residual


@functools.lru_cache(maxsize=1024)
def pool_pays(
    shape: ConvShape,
    pool: Pool,
    element_size: int,
    precision: str,
    device: Device,
    vectors: bool = True,
    crowded: bool = False,
) -> bool:
    """Whether a convolution that pools its result is predicted to take no longer than two launches, of which
    the second reads what the first wrote. vectors, crowded: see ``suits``."""

    def seconds(one: ConvShape, pooled: bool) -> float:
        config = choose_config(one, element_size, precision, device, vectors, crowded, pooled=pooled)
        return predicted_seconds(one, config, element_size, precision, device)

    read = element_size * shape.M * shape.K / (1e9 * device.dram_bandwidth)
    return seconds(pool.covered(shape), True) <= seconds(shape, False) + _LAUNCH + read


def seconds_of_tiles(
    config: Config, tiles: int, blocks: int, element_size: int, precision: str, device: Device
) -> float:
    """A roofline of the busiest multiprocessor, and what tails and latencies add to it.

    tiles: programs, of ``blocks`` steps of BLOCK_K each.
    """
    BLOCK_M, BLOCK_N, BLOCK_K = (config[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    shared = config.num_stages * (BLOCK_M + BLOCK_N) * BLOCK_K * element_size
    registers = min(255, 64 + BLOCK_M * BLOCK_N // (32 * config.num_warps))
    resident = max(1, device.blocks_resident(config.num_warps, shared, registers))
    tiles_each = math.ceil(tiles / device.multiprocessors)
    rounds = math.ceil(tiles_each / resident)

    products = products_of(element_size, precision, device)
    tflops = {"16-bit": device.tensor_tflops, "tf32": device.tensor_tflops / 2, "fma": device.fp32_tflops}[
        products
    ]
    multiply = 2 * BLOCK_M * BLOCK_N * BLOCK_K / (tflops * 1e12 / device.multiprocessors)
    if products == "fma":
        # Each operand is fetched from shared memory once per row or column of a thread's accumulators.
        multiply *= 1 + 2 / math.sqrt(BLOCK_M * BLOCK_N / (32 * config.num_warps))
    # Operands come from L2, which delivers about 2.5 times what DRAM does.
    bandwidth = 2.5e9 * device.dram_bandwidth / device.multiprocessors
    load = (BLOCK_M + BLOCK_N) * BLOCK_K * element_size / bandwidth
    store = 2 * BLOCK_M * BLOCK_N * element_size / bandwidth
    # A tile alone on its multiprocessor waits for its own loads; neighbours hide each other's.
    waiting = 1 + 1 / min(tiles_each, resident)
    # Every column block has its barriers and addresses, about 90 instructions a warp; every round of tiles
    # its prologue and epilogue.
    overhead = 1.6e-8 * config.num_warps
    return tiles_each * (blocks * (max(multiply, load) * waiting + overhead) + store) + rounds * 1.5e-6


def reduce_config(shape: ConvShape) -> Config:
    """The tile of split-K's second pass, which only moves memory."""
    # Left to itself, ptxas spills with a scattered residual on sm_120 to fit one more block.
    return Config(BLOCK_M=32, BLOCK_N=32 if shape.K <= 32 else 64, num_warps=4, num_stages=2, maxnreg=168)


def representative(
    name: str,
    run: Callable[[ConvCall], torch.Tensor],
    x: tuple[int, int, int, int],
    filters: tuple[int, int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    residual: bool = False,
    activation: str = "relu",
    dtype: torch.dtype = torch.float16,
    precision: str = "ieee",
    memory_format: torch.memory_format = torch.channels_last,
    residual_format: torch.memory_format = torch.channels_last,
    kernel: str | None = None,
    candidates: Callable[[Device], list[Config]] | None = None,
    statistics: bool = False,
    prologue: str | None = None,
    shortcut: tuple[int, int] | None = None,
    pool: Pool | None = None,
    passes: str | None = None,
) -> RepresentativeCall:
    """A call with BN on meta tensors, x [N, C, H, W] under filters (K, R, S), for ``representative_calls``.

    Its thunk refuses configs of another dtype's table, which no heuristic would pair with it. kernel: the one
    that ``run`` runs, if it is not ``kernel_of`` the shape; candidates: its configs, if they are in no table.
    statistics: a call of training instead, which writes those of y; prologue: the activation that is
    applied to BN of x, if any; shortcut: (channels, stride) of the convolution that is added, if any; pool:
    of the result, if any; passes: of what the result is shuffled with, if anything, whether it is a "slice"
    or "whole".
    """

    def thunk(config: Config | None = None) -> torch.Tensor:
        def tensor(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)

        K, R, S = filters
        image, weight = tensor(*x), tensor(K, x[1] // groups, R, S)
        vectors = (None, *(None if statistics else torch.empty(K, device="meta") for _ in range(4)))
        P, Q = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((x[2], R), (x[3], S)))
        added = tensor(x[0], K, P, Q).to(memory_format=residual_format) if residual else None
        pair = ((stride, stride), (padding, padding), (1, 1))
        epilogue = "none" if statistics else activation
        call = conv_call(image, weight, vectors, added, *pair, groups, 1e-5, epilogue, 0.01, config)
        before = None
        if prologue is not None:
            # Inference reads running statistics, training those of the batch.
            eps = None if statistics else 1e-5
            before = Prologue(*(torch.empty(x[1], device="meta") for _ in range(4)), prologue, eps=eps)
            if prologue == "gate":
                before = Prologue(gate=torch.empty(x[:2], device="meta"))
        added = None
        if shortcut is not None:
            C, step = shortcut
            filters_of_shortcut = torch.empty((K, C, 1, 1), dtype=dtype, device="meta")
            bn = (None, *(torch.empty(K, device="meta") for _ in range(4)))
            added = tensor(x[0], C, P * step, Q * step)
            added = Shortcut(added, filters_of_shortcut, *bn, stride=(step, step))
        call = dataclasses.replace(
            call, precision=precision, statistics=statistics, prologue=before, shortcut=added
        )
        if pool is not None:
            call = dataclasses.replace(call, shape=pool.covered(call.shape), pool=pool)
        if passes is not None:
            other = tensor(x[0], 2 * K if passes == "slice" else K, P, Q)[:, :K]
            call = dataclasses.replace(call, residual=other, shuffles=True)
        device = current_device(image)
        products = products_of(image.element_size(), precision, device)
        table = kernel or kernel_of(call.shape)
        flags = call.flags()
        if candidates is not None:
            fits = config is None or config in candidates(device)
        else:
            fits = config is None or (
                config in table_configs(table, products, device)
                and suits(config, table, *addressing(call, flags))
            )
        if not fits:
            raise UnsupportedConfig(f"{name}: {config} is never chosen for such a call")
        return run(call)

    return RepresentativeCall(name, thunk)
