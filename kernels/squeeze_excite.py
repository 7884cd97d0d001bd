"""Squeeze-and-excite in two launches: the planes' means, then both tiny layers, the gate and the scaling.
Where the convolution behind it scales what it loads, the second launch makes gates alone.

    m = mean over pixels of x;   h = act(W₁ m + b₁);   g = gate(W₂ h + b₂);   y = x · g

x [N, C, H, W], channels-last or contiguous; W₁ [S, C], W₂ [C, S]. The second kernel gives each program a run
of pixels of one image: it computes h and g again, from weights in the cache, and reads no more of those than
of x where the run has as many pixels as there are squeezed channels. Hu, Shen and Sun,
"Squeeze-and-Excitation Networks", 2018. For the backward:

    Σ = sums over pixels of dy · x (``plane_mean`` of a product);   dx = dy · g + dm / (H · W)
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, check_activation
from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = ["MOST_SQUEEZED", "configs", "excite", "gates", "representative_calls", "scale_planes"]


@triton.jit
def _offset(pixel, c, units, pixel_units, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    """Offsets [pixels, channels] within a dense image."""
    if CHANNELS_LAST:
        return (pixel * units * VEC)[:, None] + c[None, :]
    else:
        return pixel[:, None] + (c * pixel_units * VEC)[None, :]


@triton.jit
def _clamped(index, inside, VEC: tl.constexpr):
    return tl.max_contiguous(tl.multiple_of(tl.where(inside, index, 0), VEC), VEC)


@triton.jit(do_not_specialize=["units", "pixel_units", "S", "chunks", "steps"])
def excite_kernel(
    x, y, mean, w1, b1, w2, b2, gate_out,
    # C or H·W, the one that is fast in memory in units of VEC; the other in elements.
    units, pixel_units, S, chunks, steps,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program scales ``steps`` tiles of pixels of one image.

    x and y None: there are only gates to be had, and the programs of an image share its channels.
    """
    C = units * (VEC if CHANNELS_LAST else 1)
    pixels = pixel_units * (1 if CHANNELS_LAST else VEC)
    image = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    s = tl.arange(0, BLOCK_S)
    squeezed = s < S
    s_at = tl.where(squeezed, s, 0)
    total = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < C
        k = tl.where(inside, k, 0)
        m = tl.load(mean + image * C + k, mask=inside, other=0.0).to(tl.float32)
        mask = squeezed[:, None] & inside[None, :]
        w = tl.load(w1 + (s_at * C)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += w * m[None, :]
    hidden = tl.sum(total, axis=1)
    if b1 is not None:
        hidden += tl.load(b1 + s_at, mask=squeezed, other=0.0).to(tl.float32)
    hidden = tl.where(squeezed, activate(hidden, ACTIVATION, 0.0), 0.0)

    start = image * 1
    if WIDE:
        start = start.to(tl.int64)
    if CHANNELS_LAST:
        start = start * pixel_units * units * VEC
    else:
        start = start * units * pixel_units * VEC
    begin = 0
    every = BLOCK_C
    if x is None:
        begin = chunk * BLOCK_C
        every = chunks * BLOCK_C
    for first in range(begin, C, every):
        c = first + tl.arange(0, BLOCK_C)
        inside = c < C
        c = _clamped(c, inside, VEC if CHANNELS_LAST else 1)
        mask = inside[:, None] & squeezed[None, :]
        w = tl.load(w2 + (c * S)[:, None] + s_at[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.sum(w * hidden[None, :], axis=1)
        if b2 is not None:
            gate += tl.load(b2 + c, mask=inside, other=0.0).to(tl.float32)
        gate = activate(gate, GATE, 0.0)
        if gate_out is not None:
            # Programs that scale one image would write the same: one of them does.
            writes = inside
            if x is not None:
                writes = inside & (chunk == 0)
            tl.store(gate_out + image * C + c, gate, mask=writes)
        if x is not None:
            for step in range(steps):
                pixel = (chunk * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
                valid = pixel < pixels
                pixel = _clamped(pixel, valid, 1 if CHANNELS_LAST else VEC)
                at = start + _offset(pixel, c, units, pixel_units, CHANNELS_LAST, VEC)
                tile = valid[:, None] & inside[None, :]
                value = tl.load(x + at, mask=tile, other=0.0).to(tl.float32) * gate[None, :]
                tl.store(y + at, value.to(y.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["units", "pixel_units"])
def scale_planes_kernel(
    x, y, scale, shift, units, pixel_units,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of pixels, tiles of channels, images, the first the fast ones."""
    C = units * (VEC if CHANNELS_LAST else 1)
    pixels = pixel_units * (1 if CHANNELS_LAST else VEC)
    p_tiles = tl.cdiv(pixels, BLOCK_P)
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    image = pid // (p_tiles * c_tiles)
    pixel = (pid % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (pid // p_tiles % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid, inside = pixel < pixels, c < C
    c = _clamped(c, inside, VEC if CHANNELS_LAST else 1)
    pixel = _clamped(pixel, valid, 1 if CHANNELS_LAST else VEC)
    factor = tl.load(scale + image * C + c, mask=inside, other=0.0).to(tl.float32)
    start = image * 1
    if WIDE:
        start = start.to(tl.int64)
    if CHANNELS_LAST:
        start = start * pixel_units * units * VEC
    else:
        start = start * units * pixel_units * VEC
    at = start + _offset(pixel, c, units, pixel_units, CHANNELS_LAST, VEC)
    mask = valid[:, None] & inside[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    if shift is not None:
        value += tl.load(shift + image * C + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


MOST_SQUEEZED = 256


def _config(block_s: int, block_k: int, block_c: int, block_p: int, num_warps: int) -> Config:
    return Config(
        BLOCK_S=block_s, BLOCK_K=block_k, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=num_warps, num_stages=1
    )  # fmt: skip


_CONFIGS = tuple(
    _config(*tile)
    for tile in (
        (16, 128, 64, 32, 4), (64, 32, 64, 32, 8), (256, 16, 32, 64, 8),
        (16, 128, 16, 128, 4), (64, 32, 16, 128, 8), (256, 16, 16, 128, 8),
    )
)  # fmt: skip
# Left to itself, ptxas spills on sm_90 to fit one more block.
_CONFIGS = tuple(c.replace(maxnreg=96) if (c.BLOCK_S, c.BLOCK_C) == (64, 16) else c for c in _CONFIGS)
_SCALING = (_config(0, 0, 64, 32, 4), _config(0, 0, 16, 128, 4))


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: channels-last and contiguous ones, for three sizes of
    the squeezed layer, and those of scaling alone."""
    return [*_CONFIGS, *_SCALING]


@functools.lru_cache(maxsize=4096)
def _plan(N, C, pixels, S, itemsize, channels_last, config, multiprocessors):
    """(config, grid, integer arguments, constexprs)."""
    fast = C if channels_last else pixels
    vec = vector_width(itemsize, fast)
    units, pixel_units = (C // vec, pixels) if channels_last else (C, pixels // vec)
    constexprs = {"CHANNELS_LAST": channels_last, "VEC": vec, "WIDE": N * C * pixels + 2**20 >= 2**31}
    if pixels == 0:
        # Gates alone: enough programs for the device, each at least a tile of channels.
        config = config or next((c for c in _CONFIGS[:3] if c.BLOCK_S >= S), None)
        if config not in _CONFIGS[:3] or config.BLOCK_S < S:
            raise UnsupportedConfig(f"{S} squeezed channels (at most {MOST_SQUEEZED}) and {config}")
        chunks = min(tiles(C, config.BLOCK_C), tiles(2 * max(multiprocessors, 1), N))
        return config, (N * chunks,), (units, 0, S, chunks, 0), constexprs
    if S == 0:
        config = config or _SCALING[not channels_last]
        if config not in _SCALING:
            raise UnsupportedConfig(f"{config} is not for scaling alone")
        grid = (N * tiles(pixels, config.BLOCK_P) * tiles(C, config.BLOCK_C),)
        options = Config(BLOCK_C=config.BLOCK_C, BLOCK_P=config.BLOCK_P, num_warps=4, num_stages=1)
        return options, grid, (units, pixel_units), constexprs
    of_layout = _CONFIGS[:3] if channels_last else _CONFIGS[3:]
    if config is None:
        config = next((c for c in of_layout if c.BLOCK_S >= S), None)
    if config not in of_layout or config.BLOCK_S < S:
        raise UnsupportedConfig(f"{S} squeezed channels (at most {MOST_SQUEEZED}) and {config}")
    # Enough programs for the device, but none with fewer pixels than what it computes again is worth.
    least = min(pixels, max(S, config.BLOCK_P))
    wanted = max(tiles(pixels, tiles(4 * max(multiprocessors, 1), N)), least)
    steps = tiles(wanted, config.BLOCK_P)
    chunks = tiles(pixels, steps * config.BLOCK_P)
    return config, (N * chunks,), (units, pixel_units, S, chunks, steps), constexprs


def _layout(function: str, x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether x is channels-last; ``ValueError`` where it is neither that nor contiguous."""
    channels_last = not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if x.dim() != 4 or not x.is_contiguous(memory_format=memory_format):
        raise ValueError(f"{function}: x {tuple(x.shape)} must be channels-last or contiguous [N, C, H, W]")
    if x.dtype not in DTYPES:
        raise TypeError(f"{function}: x is {x.dtype}, expected float32, float16 or bfloat16; convert it")
    return channels_last


def excite(
    x: torch.Tensor,
    mean: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    gate: str,
    *,
    keep: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, the gate [N, C] in fp32 where it is to be kept): ``x * gate(w2 act(w1 mean + b1) + b2)``.

    x: [N, C, H, W], fp32, fp16 or bf16, channels-last or contiguous, and so is y. mean: contiguous, N·C
    elements. w1 [S, C], w2 [C, S] contiguous, b1 [S], b2 [C] or None, any float dtype; S at most
    ``MOST_SQUEEZED``. Computed in fp32 and rounded once.
    """
    check_activation(activation)
    check_activation(gate)
    channels_last = _layout("excite", x)
    N, C, H, W = x.shape
    S = w1.shape[0]
    _check_weights("excite", w1, w2, C, S)
    y = torch.empty_like(x)
    kept = torch.empty((N, C), dtype=torch.float32, device=x.device) if keep else None
    if x.numel() == 0:
        return y, kept
    multiprocessors = current_device(x).multiprocessors
    config, grid, integers, constexprs = _plan(
        N, C, H * W, S, x.element_size(), channels_last, config, multiprocessors
    )
    launch(
        excite_kernel, grid, x, y, mean, w1, b1, w2, b2, kept, *integers, config=config,
        reads=(x, mean, w1, b1, w2, b2), writes=(y, kept), flops=4 * N * C * S,
        ACTIVATION=activation, GATE=gate, **constexprs,
    )  # fmt: skip
    return y, kept


def gates(
    mean: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    gate: str,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """``gate(w2 act(w1 mean + b1) + b2)`` [N, C] in fp32, of a contiguous mean [N, C]; otherwise as
    ``excite``."""
    check_activation(activation)
    check_activation(gate)
    N, C = mean.shape
    S = w1.shape[0]
    _check_weights("gates", w1, w2, C, S)
    y = torch.empty((N, C), dtype=torch.float32, device=mean.device)
    if y.numel() == 0:
        return y
    multiprocessors = current_device(mean).multiprocessors
    config, grid, integers, constexprs = _plan(
        N, C, 0, S, mean.element_size(), True, config, multiprocessors
    )  # fmt: skip
    launch(
        excite_kernel, grid, None, None, mean, w1, b1, w2, b2, y, *integers, config=config,
        reads=(mean, w1, b1, w2, b2), writes=(y,), flops=4 * N * C * S,
        ACTIVATION=activation, GATE=gate, **constexprs,
    )  # fmt: skip
    return y


def _check_weights(function: str, w1: torch.Tensor, w2: torch.Tensor, C: int, S: int) -> None:
    if w1.numel() != S * C or w2.numel() != S * C or not 0 < S <= MOST_SQUEEZED:
        raise ValueError(
            f"{function}: weights {tuple(w1.shape)} and {tuple(w2.shape)} for {C} channels, "
            f"expected [S, {C}] and [{C}, S] with S at most {MOST_SQUEEZED}"
        )


def scale_planes(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None, *,
    dtype: torch.dtype | None = None, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """``x * scale + shift`` by planes, in fp32 and rounded once to ``dtype`` (x's).

    x: [N, C, H, W], channels-last or contiguous, and so is the result; scale, shift: [N, C], contiguous.
    """
    channels_last = _layout("scale_planes", x)
    N, C, H, W = x.shape
    for name, plane in (("scale", scale), ("shift", shift)):
        if plane is not None and (tuple(plane.shape) != (N, C) or not plane.is_contiguous()):
            raise ValueError(f"scale_planes: {name} is {tuple(plane.shape)}, expected ({N}, {C}), contiguous")
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    itemsize = min(x.element_size(), y.element_size())
    config, grid, integers, constexprs = _plan(N, C, H * W, 0, itemsize, channels_last, config, 0)
    launch(
        scale_planes_kernel, grid, x, y, scale, shift, *integers, config=config,
        reads=(x, scale, shift), writes=(y,), **constexprs,
    )  # fmt: skip
    return y


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of EfficientNets and RegNets: see ``kernels``."""

    def call(shape, squeezed, dtype, last=True, acts=("silu", "sigmoid"), keep=False, alone=False):
        def thunk(config=None):
            memory_format = torch.channels_last if last else torch.contiguous_format
            x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
            N, C = shape[:2]
            if squeezed == 0:
                gate = torch.empty(N, C, device="meta")
                return scale_planes(x, gate, gate if keep else None, config=config)
            w1 = torch.empty(squeezed, C, dtype=dtype, device="meta")
            b1, b2 = (torch.empty(n, dtype=dtype, device="meta") for n in (squeezed, C))
            mean = torch.empty(N, C, dtype=dtype, device="meta")
            if alone:
                return gates(mean, w1, b1, w1.t(), b2, *acts, config=config)
            return excite(x, mean, w1, b1, w1.t(), b2, *acts, keep=keep, config=config)

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("EfficientNet, 32 channels", call((32, 32, 112, 112), 8, half)),
        ("EfficientNet, 672 channels, fp32", call((32, 672, 14, 14), 28, full, keep=True)),
        ("EfficientNet, 1152 channels, bf16", call((32, 1152, 7, 7), 48, bf16)),
        ("RegNet, 888 channels", call((32, 888, 7, 7), 222, half, acts=("relu", "sigmoid"))),
        ("MobileNetV3, contiguous fp32", call((8, 72, 28, 28), 24, full, False, ("relu", "hardsigmoid"))),
        ("contiguous, 222 squeezed", call((8, 888, 8, 8), 222, half, False, ("relu", "sigmoid"))),
        ("contiguous, 16 squeezed", call((8, 64, 56, 56), 16, bf16, False, keep=True)),
        ("gates alone, 48 squeezed", call((32, 1152, 1, 1), 48, half, alone=True)),
        ("gates alone, 222 squeezed, fp32", call((32, 888, 1, 1), 222, full, alone=True)),
        ("scaling, fp16", call((32, 672, 14, 14), 0, half, keep=True)),
        ("scaling, contiguous fp32", call((8, 72, 28, 28), 0, full, False)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
