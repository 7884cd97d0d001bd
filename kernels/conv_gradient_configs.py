"""Which tile the gradients of a convolution run with, and a weight's gradient in how many shares.

As in ``conv_configs``, a prediction from counts ranks the configs of a table when nothing was measured.
"""

from __future__ import annotations

import functools
import math

from fastnets.kernels.conv_configs import (
    PACKED_CHANNELS,
    products_of,
    seconds_of_tiles,
    suits,
    table_configs,
)
from fastnets.kernels.conv_configs import predicted_seconds as convolution_seconds
from fastnets.kernels.conv_shape import ConvShape, ceil_div
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config

__all__ = [
    "TABLE",
    "choose_input_gradient",
    "choose_weight_gradient",
    "groups_packed",
    "input_gradient_candidates",
    "mirrored",
    "table_of",
    "tiles_of",
    "weight_gradient_candidates",
]

# Of weight gradients, in ``conv_configs``.
TABLE = "weight gradient"

# Bytes that are moved are certain and predicted times are not: so much more of the latter may save bytes.
SLACK = 1.4


def mirrored(shape: ConvShape) -> ConvShape:
    """The convolution of dy at stride 1 that a class of pixels takes about as long as, times its classes."""
    steps = [stride // math.gcd(stride, dilation) for stride, dilation in zip(shape.stride, shape.dilation)]
    return ConvShape(
        shape.N, shape.K, shape.P, shape.Q, shape.C,
        ceil_div(shape.R, steps[0]), ceil_div(shape.S, steps[1]), shape.H, shape.W,
        (1, 1), (0, 0), (1, 1), shape.groups,
    )  # fmt: skip


def table_of(shape: ConvShape) -> str:
    """The table of configs that serves a shape: "taps", or "packed" for narrow groups."""
    narrow = max(shape.group_channels, shape.group_outputs) <= PACKED_CHANNELS
    return "packed" if shape.groups > 1 and narrow else "taps"


def input_gradient_candidates(
    shape: ConvShape, element_size: int, precision: str, device: Device, vectors: bool, crowded: bool
) -> list[Config]:
    """Configs that leave registers for a call's addresses; vectors, crowded: see ``conv_configs.suits``."""
    table = table_of(shape)
    products = products_of(element_size, precision, device)
    configs = [c for c in table_configs(table, products, device) if suits(c, table, vectors, crowded)]
    if table == "packed" and products == "fma" and not vectors:
        # Each element has an address of its own, beside operands that wait in registers.
        return [c for c in configs if c.BLOCK_M <= 32]
    return configs


@functools.lru_cache(maxsize=4096)
def choose_input_gradient(
    shape: ConvShape, element_size: int, precision: str, device: Device, vectors: bool, crowded: bool
) -> Config:
    """The config with the least predicted time: see ``conv_configs.choose_config``."""
    tried = input_gradient_candidates(shape, element_size, precision, device, vectors, crowded)
    tried = [c for c in tried if shape.taps == 1 or c.num_warps <= 4] or tried
    window = mirrored(shape)
    return min(tried, key=lambda c: convolution_seconds(window, c, element_size, precision, device))


def groups_packed(shape: ConvShape, config: Config) -> int:
    """How many groups share a tile: 1 unless they are narrow."""
    widest = max(shape.group_channels, shape.group_outputs)
    if shape.groups == 1 or widest > PACKED_CHANNELS:
        return 1
    fitting = min(config.BLOCK_M // shape.group_outputs, config.BLOCK_N // shape.group_channels)
    return max(1, min(fitting, shape.groups))


def tiles_of(shape: ConvShape, config: Config) -> tuple[int, int]:
    """(tiles of a bundle of groups, bundles)."""
    pack = groups_packed(shape, config)
    columns = shape.taps * pack * shape.group_channels
    tiles = ceil_div(pack * shape.group_outputs, config.BLOCK_M) * ceil_div(columns, config.BLOCK_N)
    return tiles, ceil_div(shape.groups, pack)


def workspace_bytes(shape: ConvShape, splits: int) -> int:
    """What the shares' partial sums move, written and read once."""
    return 2 * 4 * splits * shape.K * shape.group_channels * shape.taps if splits > 1 else 0


def possible_splits(shape: ConvShape, config: Config, element_size: int, device: Device) -> set[int]:
    """Into how many shares the pixels may be split.

    The workspace moves at most a tenth of what dy and x do, unless the tiles alone leave multiprocessors
    idle: then there may be up to two programs for each. A share of fewer than 4 blocks fills no pipeline.
    """
    tiles = math.prod(tiles_of(shape, config))
    blocks = ceil_div(shape.M, config.BLOCK_K)
    moved = element_size * shape.N * (shape.C * shape.H * shape.W + shape.K * shape.P * shape.Q)
    most = moved // (10 * workspace_bytes(shape, 2) // 2)
    if tiles < device.multiprocessors:
        most = max(most, 2 * device.multiprocessors // tiles)
    most = max(1, min(most, blocks // 4))
    eighths = (device.multiprocessors * eighth // (8 * tiles) for eighth in (2, 3, 4, 6, 8, 10, 12, 14, 16))
    shares = (ceil_div(blocks, splits) for splits in (1, most, *eighths) if 1 <= splits <= most)
    return {ceil_div(blocks, share) for share in shares}


def weight_gradient_seconds(
    shape: ConvShape, config: Config, splits: int, element_size: int, precision: str, device: Device
) -> float:
    """Of the kernel and, for several shares, of the second pass: what ``choose_weight_gradient`` ranks by."""
    tiles = math.prod(tiles_of(shape, config)) * splits
    blocks = ceil_div(ceil_div(shape.M, config.BLOCK_K), splits)
    seconds = seconds_of_tiles(config, tiles, blocks, element_size, precision, device)
    if splits > 1:
        seconds += 4e-6 + workspace_bytes(shape, splits) / (1e9 * device.dram_bandwidth)
    return seconds


def weight_gradient_candidates(
    element_size: int, precision: str, device: Device, vectors: bool, wide: bool, normalizes: bool
) -> list[Config]:
    """Configs that leave registers for what a call computes: see ``choose_weight_gradient``."""
    table = table_configs(TABLE, products_of(element_size, precision, device), device)
    table = [c for c in table if suits(c, TABLE, vectors, wide)]
    if not normalizes:
        return table
    # x passes through registers, beside the accumulator.
    return [c for c in table if (c.BLOCK_M + c.BLOCK_K) * c.BLOCK_N <= 96 * 32 * c.num_warps]


@functools.lru_cache(maxsize=4096)
def choose_weight_gradient(
    shape: ConvShape,
    element_size: int,
    precision: str,
    device: Device,
    vectors: bool = True,
    wide: bool = False,
    normalizes: bool = False,
    config: Config | None = None,
) -> tuple[Config, int]:
    """The config, if it is not given, and the number of shares.

    Of the pairs that are predicted to take at most SLACK times as long as the fastest, that with the smallest
    workspace. vectors: operands load several elements at a time, not one by one, each from its own address.
    wide: offsets take 64 bits. normalizes: there is a prologue.
    """
    tried = [config]
    if config is None:
        tried = weight_gradient_candidates(element_size, precision, device, vectors, wide, normalizes)
        # As in conv_configs.choose_config: 4 warps for filters of several taps until something is measured.
        tried = [c for c in tried if shape.taps == 1 or c.num_warps <= 4] or tried
    predicted = {
        (c, splits): weight_gradient_seconds(shape, c, splits, element_size, precision, device)
        for c in tried
        for splits in possible_splits(shape, c, element_size, device)
    }
    enough = SLACK * min(predicted.values())
    fast = {pair: seconds for pair, seconds in predicted.items() if seconds <= enough}
    return min(fast, key=lambda pair: (workspace_bytes(shape, pair[1]), fast[pair]))
