"""Dropout and stochastic depth from a seed: nothing is kept for the backward but the seed.

    y[e] = x[e] · keep(e) / (1 − p) + residual[e],   keep(e) = u(e) ≥ p

u(e) are uniform numbers from Philox4x32-10 (Salmon et al., 2011), keyed by a 64-bit seed that lies in memory,
so that a captured CUDA graph draws anew each time it is replayed. Dropout numbers elements by their place in
the dense result, four to a counter; stochastic depth draws one number for each row (or one for all). The
backward is the same function of the gradient.

As in stock, what is dropped is multiplied by zero: NaN and infinities come through as NaN.
"""

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, launch, tiles

__all__ = ["configs", "dropout", "representative_calls"]


@triton.jit
def _factor(random, p, scale):
    """What an element is multiplied by: 24 random bits are a uniform number in [0, 1)."""
    uniform = (random >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(uniform >= p, scale, 0.0)


@triton.jit(do_not_specialize=["units"])
def dropout_kernel(
    x, y, residual, seed, units, p, scale, VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """VEC (at most 4) divides the elements, of which there are units · VEC."""
    # Counters are 32 bits: four elements each.
    counter = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed), counter)
    random = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BLOCK // 4, 4])
    if WIDE:
        counter = counter.to(tl.int64)
    element = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = element < units * VEC
    element = tl.max_contiguous(tl.multiple_of(tl.where(mask, element, 0), [1, VEC]), [1, VEC])
    value = tl.load(x + element, mask=mask, other=0.0).to(tl.float32) * _factor(random, p, scale)
    if residual is not None:
        value += tl.load(residual + element, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + element, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_units", "blocks"])
def row_dropout_kernel(
    x, y, residual, seed, row_units, blocks, p, scale, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row has row_units · VEC elements, and ``blocks`` programs."""
    pid = tl.program_id(0)
    row = pid // blocks
    random, _, _, _ = tl.randint4x(tl.load(seed), row)
    column = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < row_units * VEC
    column = tl.max_contiguous(tl.multiple_of(tl.where(mask, column, 0), VEC), VEC)
    if WIDE:
        row = row.to(tl.int64)
    element = row * row_units * VEC + column
    value = tl.load(x + element, mask=mask, other=0.0).to(tl.float32) * _factor(random, p, scale)
    if residual is not None:
        value += tl.load(residual + element, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + element, value.to(y.dtype.element_ty), mask=mask)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [Config(BLOCK=1024, num_warps=4, num_stages=1)]


def dropout(
    x: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    residual: torch.Tensor | None = None,
    *,
    rows: int = 0,
    strides: tuple[int, ...] | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """``x · keep / (1 − p) + residual``; see the top of this file.

    x: any shape, fp32, fp16 or bf16; residual: likewise, or None; any strides, but what does not lie as the
    result does is copied first. seed: [1] int64 on x's device. rows: 0 draws for each element, n draws for
    each of n equal parts of the result's memory (1: once for all of it). strides: those of the result, dense;
    by default as ``torch.empty_like`` chooses. The backward needs the same ``rows`` and ``strides``.
    """
    _check(x, seed, p, residual, rows)
    if strides is None:
        strides = torch.empty_like(x, device="meta").stride()
    y = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    elements = x.numel()
    if elements == 0:
        return y
    x, residual = (_laid_out(t, y) for t in (x, residual))
    config = config or configs(None)[0]
    options = {
        "config": config,
        "reads": (x, residual, seed),
        "writes": (y,),
        "WIDE": elements + 2**20 >= 2**31,
    }
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    if rows == 0:
        grid = (tiles(elements, config.BLOCK),)
        vec = min(vector_width(x.element_size(), elements), 4)
        launch(dropout_kernel, grid, x, y, residual, seed, elements // vec, p, scale, VEC=vec, **options)
    else:
        row_size = elements // rows
        blocks = tiles(row_size, config.BLOCK)
        vec = vector_width(x.element_size(), row_size)
        arguments = (x, y, residual, seed, row_size // vec, blocks, p, scale)
        launch(row_dropout_kernel, (rows * blocks,), *arguments, VEC=vec, **options)
    return y


def _laid_out(tensor: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor | None:
    """The tensor with the strides of y."""
    if tensor is None or tensor.stride() == y.stride():
        return tensor
    return torch.empty_like(y).copy_(tensor)


def _check(x, seed, p, residual, rows) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"dropout: x is {x.dtype}, expected float32, float16 or bfloat16; convert it")
    if x.numel() > 2**33:
        raise ValueError(f"dropout: x has {x.numel()} elements, at most 2^33 can be numbered; split it")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"dropout: seed is {tuple(seed.shape)} {seed.dtype}, expected one int64")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"dropout: residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}"
        )
    if rows and x.numel() % rows:
        raise ValueError(f"dropout: {x.numel()} elements are no {rows} equal rows")


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""

    def call(dtype, residual, rows=0):
        def thunk(config=None):
            x = torch.empty(32, 197, 768, dtype=dtype, device="meta")
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            return dropout(x, seed, 0.1, x if residual else None, rows=rows, config=config)

        return thunk

    table = [
        ("bf16", call(torch.bfloat16, False)),
        ("fp32, add", call(torch.float32, True)),
        ("rows, fp16, add", call(torch.float16, True, 32)),
        ("rows, fp32", call(torch.float32, False, 32)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
