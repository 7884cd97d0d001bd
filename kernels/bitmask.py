"""One bit per element of a dense tensor, in its memory order: bit i % 8 of byte i // 8 is element i's.

What the backward of ReLU and of its like must know of an activation, at a sixteenth of its size in 16-bit
data. Kernels that work on tiles [inner, channels] (``channel_tiles``) write and read the bits of a tile here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastnets.kernels.launch import Config, launch, tiles

__all__ = ["bytes_of", "load_bits", "pack_positive", "store_bits"]


def bytes_of(x: torch.Tensor) -> int:
    """Bytes that hold one bit for each element of x."""
    return tiles(x.numel(), 8)


@triton.jit
def store_bits(bits, passing, offset, valid, CONTIGUOUS: tl.constexpr):
    """Stores a tile of booleans. offset: of each element in the dense tensor.

    CONTIGUOUS: "channel" or "inner", the dim of stride 1; its extent must be a multiple of 8, so that no byte
    belongs to two tiles.
    """
    ROWS: tl.constexpr = passing.shape[0]
    COLUMNS: tl.constexpr = passing.shape[1]
    place = tl.arange(0, 8)
    if CONTIGUOUS == "channel":
        SHAPE: tl.constexpr = (ROWS, COLUMNS // 8, 8)
        AXIS: tl.constexpr = 2
        weight = (1 << place)[None, None, :]
    else:
        SHAPE: tl.constexpr = (ROWS // 8, 8, COLUMNS)
        AXIS: tl.constexpr = 1
        weight = (1 << place)[None, :, None]
    byte = tl.sum(tl.reshape(passing.to(tl.int32), SHAPE) * weight, axis=AXIS)
    at = tl.min(tl.reshape(offset, SHAPE), axis=AXIS) // 8
    whole = tl.max(tl.reshape(valid.to(tl.int32), SHAPE), axis=AXIS) > 0
    tl.store(bits + at, byte.to(tl.uint8), mask=whole)


@triton.jit
def load_bits(bits, offset, valid):
    """The bits of a tile as booleans; False where it is not valid."""
    byte = tl.load(bits + offset // 8, mask=valid, other=0).to(tl.int32)
    return ((byte >> (offset % 8).to(tl.int32)) & 1) > 0


@triton.jit
def pack_positive_kernel(y, bits, numel, upper, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """Bit i says whether 0 < y[i] (and y[i] < upper where BOUNDED), or y[i] is NaN."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)
    element = byte[:, None] * 8 + place[None, :]
    value = tl.load(y + element, mask=element < numel, other=0.0).to(tl.float32)
    passing = ~(value <= 0.0)
    if BOUNDED:
        passing = passing & ~(value >= upper)
    packed = tl.sum(passing.to(tl.int32) * (1 << place)[None, :], axis=1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < numel)


def pack_positive(y: torch.Tensor, bits: torch.Tensor, upper: float | None) -> None:
    """Writes the bits of 0 < y < upper (NaN counts as inside), reading y once more.

    y: dense, in whatever order. For shapes whose rows do not fill bytes; the others' bits are written where y
    is.
    """
    config = Config(BLOCK=256, num_warps=4, num_stages=1)
    launch(
        pack_positive_kernel,
        (tiles(bits.numel(), 256),),
        y,
        bits,
        y.numel(),
        0.0 if upper is None else upper,
        config=config,
        reads=(y,),
        writes=(bits,),
        BOUNDED=upper is not None,
    )
