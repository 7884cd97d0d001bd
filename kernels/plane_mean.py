"""Global average pooling: the mean over all pixels of each plane (n, c) of x [N, C, H, W], or of x · factor.

One program sums whole planes, a tile of [planes, pixels] at a time, so every value is read once and the
order of the sum is fixed. The fast axis of the tile is the one that is a run of memory.
"""

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["configs", "plane_mean", "representative_calls"]


@triton.jit(
    do_not_specialize=["images", "channel_units", "H", "W_units"],
    do_not_specialize_on_alignment=["x_n", "x_c", "x_h", "x_w"],
)
def plane_mean_kernel(
    x,
    # None, or of x's strides: the mean is of the product.
    factor,
    y,
    images,
    # C and W, the fast one of them in units of VEC.
    channel_units,
    H,
    W_units,
    # In units of VEC, but the one of the fast axis.
    x_n,
    x_c,
    x_h,
    x_w,
    PLANES_LAST: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PLANES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    channels = channel_units * (VEC if PLANES_LAST else 1)
    W = W_units * (1 if PLANES_LAST else VEC)
    planes = images * channels
    plane = tl.program_id(0) * BLOCK_PLANES + tl.arange(0, BLOCK_PLANES)
    mask = plane < planes
    n = plane // channels
    if WIDE:
        n = n.to(tl.int64)
    if PLANES_LAST:
        plane_offset = n * x_n * VEC + (plane % channels) * x_c
        h_step = x_h * VEC
        w_step = x_w * VEC
    else:
        plane_offset = (n * x_n + (plane % channels) * x_c) * VEC
        h_step = x_h * VEC
        w_step = x_w
    plane_offset = tl.where(mask, plane_offset, 0)
    if PLANES_LAST:
        # Clamping hid it from the compiler.
        plane_offset = tl.max_contiguous(tl.multiple_of(plane_offset, VEC), VEC)
    pixels = H * W
    total = tl.zeros([BLOCK_PLANES, BLOCK_PIXELS], tl.float32)
    for first in range(0, pixels, BLOCK_PIXELS):
        pixel = first + tl.arange(0, BLOCK_PIXELS)
        inside = pixel < pixels
        pixel = tl.where(inside, pixel, 0)
        h = pixel // W
        if WIDE:
            h = h.to(tl.int64)
        pixel_offset = h * h_step + (pixel % W) * w_step
        if not PLANES_LAST:
            pixel_offset = tl.max_contiguous(tl.multiple_of(pixel_offset, VEC), VEC)
        offset = plane_offset[:, None] + pixel_offset[None, :]
        value = tl.load(x + offset, mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if factor is not None:
            value *= tl.load(factor + offset, mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += value
    mean = tl.div_rn(tl.sum(total, axis=1), tl.zeros([BLOCK_PLANES], tl.float32) + pixels)
    tl.store(y + plane, mean.to(y.dtype.element_ty), mask=mask)


# (planes, pixels) of a tile: planes fast, pixels fast; the small ones where there are few planes.
_PLANES_FAST = ((64, 32), (16, 64))
_PIXELS_FAST = ((32, 64), (8, 256), (2, 512))


def _config(planes: int, pixels: int) -> Config:
    return Config(BLOCK_PLANES=planes, BLOCK_PIXELS=pixels, num_warps=4, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return [_config(*tile) for tile in (*_PLANES_FAST, *_PIXELS_FAST)]


def _pick(planes: int, pixels: int, channels_last: bool, multiprocessors: int) -> Config:
    if channels_last:
        wide, narrow = _PLANES_FAST
        return _config(*(wide if tiles(planes, wide[0]) >= 2 * multiprocessors else narrow))
    if pixels <= 64:
        return _config(*_PIXELS_FAST[0])
    few = tiles(planes, _PIXELS_FAST[1][0]) < 2 * multiprocessors
    return _config(*_PIXELS_FAST[2 if few else 1])


@functools.lru_cache(maxsize=4096)
def _plan(shape, strides, itemsize, channels_last, config, multiprocessors):
    """Grid, config, sizes with strides, and constexprs of a launch."""
    N, C, H, W = shape
    n, c, h, w = strides
    extent = sum((size - 1) * step for size, step in zip(shape, strides))
    if h == w * W or H == 1:
        H, W, h = 1, H * W, 0
    if channels_last:
        vec = vector_width(itemsize, C, n, h, w) if c == 1 else 1
        steps = (n // vec, c, h // vec, w // vec)
    else:
        vec = vector_width(itemsize, W, n, c, h) if w == 1 else 1
        steps = (n // vec, c // vec, h // vec, w)
    if config is None:
        config = _pick(N * C, H * W, channels_last, multiprocessors)
    constexprs = {"PLANES_LAST": channels_last, "VEC": vec, "WIDE": extent + 2**20 >= 2**31}
    units = (C // vec, H, W) if channels_last else (C, H, W // vec)
    return (tiles(N * C, config.BLOCK_PLANES),), config, (N, *units, *steps), constexprs


def plane_mean(
    x: torch.Tensor,
    *,
    channels_last: bool,
    factor: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The mean over the pixels of x [N, C, H, W], or of x * factor, as [N, C, 1, 1].

    x: fp32, fp16 or bf16, any strides, at least one pixel; factor: likewise, of x's shape and strides.
    channels_last: whether neighbouring channels, not pixels, are neighbours in memory. Summed in fp32 and
    rounded once to ``dtype``, by default x's.
    """
    N, C, H, W = x.shape
    if H * W == 0:
        raise ValueError(f"plane_mean: x {tuple(x.shape)} has no pixels")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((N, C, 1, 1), dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    multiprocessors = 0 if config is not None else current_device(x).multiprocessors
    if factor is not None and (factor.shape != x.shape or factor.stride() != x.stride()):
        raise ValueError(f"plane_mean: factor is {tuple(factor.shape)}, {factor.stride()}; x {x.stride()}")
    itemsize = x.element_size() if factor is None else min(x.element_size(), factor.element_size())
    grid, config, sizes, constexprs = _plan(
        tuple(x.shape), x.stride(), itemsize, channels_last, config, multiprocessors
    )
    launch(
        plane_mean_kernel, grid, x, factor, y, *sizes, config=config, reads=(x, factor), writes=(y,),
        **constexprs,
    )  # fmt: skip
    return y


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""

    def call(shape, dtype, channels_last, product=False):
        def thunk(config=None):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
            return plane_mean(x, channels_last=channels_last, factor=x if product else None, config=config)

        return thunk

    table = [
        ("bf16, 7x7, channels-last", call((32, 2048, 7, 7), torch.bfloat16, True)),
        ("fp32, 56x56, channels-last", call((1, 24, 56, 56), torch.float32, True)),
        ("bf16, 14x14, product, channels-last", call((32, 672, 14, 14), torch.bfloat16, True, True)),
        ("fp16, 7x7, contiguous", call((32, 2048, 7, 7), torch.float16, False)),
        ("fp32, 56x56, contiguous", call((8, 64, 56, 56), torch.float32, False)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
