"""What the pooling kernels share: their tile, where windows begin and end, and how a launch is planned."""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, tiles
from fastnets.kernels.pool_windows import Windows

__all__ = [
    "UNROLLED",
    "Plan",
    "check_pooled",
    "configs_of_tiles",
    "dense_offset",
    "empty_dense",
    "plan_launch",
    "tile_of",
    "window_begin",
    "window_end",
    "window_length",
]


# Loops of up to this many elements or windows are unrolled.
UNROLLED = 16


@triton.jit
def tile_of(
    pixels,
    images,
    channels,
    PLANES_LAST: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    SLOW: tl.constexpr,
    FAST: tl.constexpr,
):
    """This program's pixels and planes as the two axes of its tile: (pixel, n, c, pixel exists, plane
    exists). A plane that does not exist is (0, 0)."""
    BLOCK_PIXELS: tl.constexpr = SLOW if PLANES_LAST else FAST
    BLOCK_PLANES: tl.constexpr = FAST if PLANES_LAST else SLOW
    pixel_tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    pid = tl.program_id(0)
    # Neighbouring programs share an image, and with it the windows that overlap.
    pixel = (pid % pixel_tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    plane = (pid // pixel_tiles) * BLOCK_PLANES + tl.arange(0, BLOCK_PLANES)
    if WIDE:
        pixel = pixel.to(tl.int64)
        plane = plane.to(tl.int64)
    exists = plane < images * channels
    plane = tl.where(exists, plane, 0)
    n = plane // channels
    c = plane % channels
    if PLANES_LAST:
        # VEC divides the channels, so VEC neighbours are of one image and masked together. The compiler has
        # to be told: it does not see through the clamp.
        n = tl.max_constancy(n, VEC)[None, :]
        c = tl.max_contiguous(tl.multiple_of(c, VEC), VEC)[None, :]
        return pixel[:, None], n, c, (pixel < pixels)[:, None], exists[None, :]
    else:
        return pixel[None, :], n[:, None], c[:, None], (pixel < pixels)[None, :], exists[:, None]


@triton.jit
def dense_offset(pixel, n, c, pixels, channels, PLANES_LAST: tl.constexpr):
    """Where [n, c, pixel] lies in a dense tensor."""
    if PLANES_LAST:
        return (n * pixels + pixel) * channels + c
    else:
        return (n * channels + c) * pixels + pixel


@triton.jit
def window_begin(p, extent, count, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The first pixel of window p of ``count``; negative where it lies in the padding."""
    if ADAPTIVE:
        return p * extent // count
    else:
        return p * STRIDE - PADDING


@triton.jit
def window_end(p, begin, extent, count, length, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr):
    """One past the last pixel, padding included. For fixed windows without dilation, or adaptive ones."""
    if ADAPTIVE:
        return ((p + 1) * extent + count - 1) // count
    else:
        return tl.minimum(begin + length, extent + PADDING)


@triton.jit
def window_length(begin, end, extent, COUNT_PADDING: tl.constexpr):
    """How many pixels of a window count in its mean, along one dimension."""
    if COUNT_PADDING:
        return end - begin
    else:
        return tl.maximum(tl.minimum(end, extent) - tl.maximum(begin, 0), 1)


# The fast axis is a run of memory (64 channels of 16 bits fill a cache line), the slow one makes the tile up.
_FAST = (16, 32, 64, 128)
_ELEMENTS = (1024, 512)


def _config(elements: int, fast: int) -> Config:
    return Config(BLOCK_SLOW=elements // fast, BLOCK_FAST=fast, num_warps=4, num_stages=1)


def configs_of_tiles(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [_config(elements, fast) for elements in _ELEMENTS for fast in _FAST]


def _pick(fast: int, slow: int, planes_last: bool, multiprocessors: int) -> Config:
    columns = min(max(1 << (fast - 1).bit_length(), 16), 64 if planes_last else 128)
    blocks = tiles(fast, columns) * tiles(slow, 1024 // columns)
    return _config(1024 if blocks >= 4 * multiprocessors else 512, columns)


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides."""

    grid: tuple[int]
    config: Config
    # From ``images`` to the strides of what is read.
    sizes: tuple[int, ...]
    constexprs: dict


def plan_launch(
    written: torch.Tensor, read: torch.Tensor, windows: Windows, channels_last: bool, config: Config | None
) -> Plan:
    """The launch that writes the dense [N, C, ...] tensor ``written`` and reads ``read`` of any strides."""
    return _plan(
        *(tuple(written.shape), tuple(read.shape), read.stride(), windows, channels_last),
        *(written.element_size(), config, 0 if config is not None else current_device(read).multiprocessors),
    )


@functools.lru_cache(maxsize=4096)
def _plan(shape, read_shape, strides, windows, channels_last, itemsize, config, multiprocessors) -> Plan:
    N, C, pixels = shape[0], shape[1], shape[2] * shape[3]
    fast, slow = (C, N * pixels) if channels_last else (pixels, N * C)
    vec = vector_width(itemsize, fast)
    n, c, h, w = strides
    read_vec = min(vec, vector_width(itemsize, n, h, w)) if channels_last and c == 1 else 1
    if config is None:
        config = _pick(fast, slow, channels_last, multiprocessors)
    if channels_last:
        grid = tiles(pixels, config.BLOCK_SLOW) * tiles(N * C, config.BLOCK_FAST)
    else:
        grid = tiles(pixels, config.BLOCK_FAST) * tiles(N * C, config.BLOCK_SLOW)
    extent = max(
        *(math.prod(shape), math.prod(read_shape)),
        sum((size - 1) * step for size, step in zip(read_shape, strides)),
    )
    return Plan(
        grid=(grid,),
        config=config,
        sizes=(
            *(N, *((C // vec, pixels) if channels_last else (C, pixels // vec))),
            *(windows.H, windows.W, windows.P, windows.Q, windows.R, windows.S),
            *(n // read_vec, c, h // read_vec, w // read_vec),
        ),
        constexprs={
            "ADAPTIVE": windows.adaptive,
            "STRIDE_H": windows.stride[0],
            "STRIDE_W": windows.stride[1],
            "PADDING_H": windows.padding[0],
            "PADDING_W": windows.padding[1],
            "DILATION_H": windows.dilation[0],
            "DILATION_W": windows.dilation[1],
            "PLANES_LAST": channels_last,
            "VEC": vec,
            "READ_VEC": read_vec,
            # Tiles overhang, by less than a tile along each axis.
            "WIDE": extent + 2**20 >= 2**31,
        },
    )


def check_pooled(name: str, tensor: torch.Tensor, size: tuple[int, int]) -> None:
    """Raises where ``tensor`` is not [N, C, *size] of a dtype that the kernels take."""
    if tensor.dim() != 4 or tuple(tensor.shape[2:]) != size:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, the windows are for [N, C, {size[0]}, {size[1]}]"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16; convert it")


def empty_dense(like: torch.Tensor, size: tuple[int, int], channels_last: bool, dtype=None) -> torch.Tensor:
    """[N, C, *size] on the device of ``like``, channels-last or contiguous."""
    return torch.empty(
        (*like.shape[:2], *size),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
