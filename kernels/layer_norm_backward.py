"""The gradients of layer norm and RMS norm: one read of dy and of x, one write of dx.

    x̂ = (x − mean) · rstd;   g = dy · weight
    dx = rstd · (g − Σ g / N − x̂ · Σ g·x̂ / N) + dsum             (RMS norm: mean and Σ g / N are 0)
    dweight = Σ_rows dy · x̂;   dbias = Σ_rows dy

x is what was normalised (the sum, where a residual was added before), dsum the gradient that comes in by the
sum. A few programs for each multiprocessor go through runs of rows and keep dweight and dbias in registers;
their partial sums are added in a second pass in a fixed order. Rows of more than 8192 columns are read twice
for dx, and once more, by columns, for dweight and dbias.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.channel_tiles import contiguous_vectors
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.layer_norm import check_rows
from fastnets.kernels.partial_sums import sum_rows
from fastnets.kernels.row_tiles import clamp_columns, row_start, strided_rows

__all__ = ["configs", "layer_norm_backward", "representative_calls"]


@triton.jit
def _normalized(x, mean, rstd, row, valid, x_at, mask):
    """(x̂, rstd) of a tile in fp32."""
    scale = tl.load(rstd + row, mask=valid, other=0.0)
    value = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    if mean is not None:
        value -= tl.load(mean + row, mask=valid, other=0.0)[:, None]
    return tl.where(mask, value * scale[:, None], 0.0), scale


@triton.jit(
    do_not_specialize=["rows", "units", "sizes", "dy_steps", "x_steps", "dtotal_steps", "steps"]
)  # fmt: skip
def layer_norm_backward_kernel(
    dy, x, dtotal, mean, rstd, weight, dx, partial,
    rows, units, sizes, dy_steps, x_steps, dtotal_steps, steps,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes ``steps`` tiles of whole rows. partial: [programs, gradients wanted, N]."""
    N = units * VEC
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    n = clamp_columns(n, inside, VEC)
    if weight is not None:
        scale = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(rows, BLOCK_ROWS))):
        row = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = row < rows
        row = tl.where(valid, row, 0)
        if WIDE:
            row = row.to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        x_at = row_start(row, sizes, x_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
        dy_at = row_start(row, sizes, dy_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
        gradient = tl.load(dy + dy_at, mask=mask, other=0.0).to(tl.float32)
        normalized, inverse = _normalized(x, mean, rstd, row, valid, x_at, mask)
        if WEIGHT_GRADIENT:
            weight_sum += gradient * normalized
        if BIAS_GRADIENT:
            bias_sum += gradient
        if dx is not None:
            if weight is not None:
                gradient *= scale
            product = tl.sum(gradient * normalized, axis=1) / N
            result = gradient - normalized * product[:, None]
            if mean is not None:
                result -= (tl.sum(gradient, axis=1) / N)[:, None]
            result *= inverse[:, None]
            if dtotal is not None:
                at = row_start(row, sizes, dtotal_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
                result += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
            to = (row * units * VEC)[:, None] + n[None, :]
            tl.store(dx + to, result.to(dx.dtype.element_ty), mask=mask)
    _store_partial(
        partial, weight_sum, bias_sum, tl.program_id(0), N, n, inside, WEIGHT_GRADIENT, BIAS_GRADIENT
    )


@triton.jit
def _store_partial(
    partial, weight_sum, bias_sum, program, N, n, inside,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Row ``program`` of the partial sums: dweight, then dbias, those that are wanted."""
    to = program.to(tl.int64) * N + n
    if WEIGHT_GRADIENT and BIAS_GRADIENT:
        to += program.to(tl.int64) * N
    if WEIGHT_GRADIENT:
        tl.store(partial + to, tl.sum(weight_sum, axis=0), mask=inside)
        to += N
    if BIAS_GRADIENT:
        tl.store(partial + to, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit(do_not_specialize=["units", "sizes", "dy_steps", "x_steps", "dtotal_steps"])
def wide_input_gradient_kernel(
    dy, x, dtotal, mean, rstd, weight, dx, units, sizes, dy_steps, x_steps, dtotal_steps,
    ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row (BLOCK_ROWS is 1), a tile of columns at a time, twice."""
    N = units * VEC
    row = tl.program_id(0) + tl.arange(0, BLOCK_ROWS)
    valid = row >= 0
    if WIDE:
        row = row.to(tl.int64)
    x_row = row_start(row, sizes, x_steps, ROW_DIMS, VEC)[:, None]
    dy_row = row_start(row, sizes, dy_steps, ROW_DIMS, VEC)[:, None]
    dtotal_row = row_start(row, sizes, dtotal_steps, ROW_DIMS, VEC)[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    for first in range(0, N, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < N
        n = clamp_columns(first + tl.arange(0, BLOCK_N), inside, VEC)
        mask = inside[None, :]
        gradient = tl.load(dy + (dy_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            gradient *= tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        normalized, _ = _normalized(x, mean, rstd, row, valid, x_row + n[None, :], mask)
        total += gradient
        product += gradient * normalized
    total_mean = (tl.sum(total, axis=1) / N)[:, None]
    product_mean = (tl.sum(product, axis=1) / N)[:, None]
    for first in range(0, N, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < N
        n = clamp_columns(first + tl.arange(0, BLOCK_N), inside, VEC)
        mask = inside[None, :]
        gradient = tl.load(dy + (dy_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            gradient *= tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        normalized, inverse = _normalized(x, mean, rstd, row, valid, x_row + n[None, :], mask)
        result = gradient - normalized * product_mean
        if mean is not None:
            result -= total_mean
        result *= inverse[:, None]
        if dtotal is not None:
            result += tl.load(dtotal + (dtotal_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        to = (row * units * VEC)[:, None] + n[None, :]
        tl.store(dx + to, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "units", "sizes", "dy_steps", "x_steps", "steps"])
def wide_weight_gradient_kernel(
    dy, x, mean, rstd, partial, rows, units, sizes, dy_steps, x_steps, steps,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the sums of ``steps`` tiles of rows. Grid (columns, runs of rows)."""
    N = units * VEC
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    n = clamp_columns(n, inside, VEC)
    weight_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    first = tl.program_id(1) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(rows, BLOCK_ROWS))):
        row = step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = row < rows
        row = tl.where(valid, row, 0)
        if WIDE:
            row = row.to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        dy_at = row_start(row, sizes, dy_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
        gradient = tl.load(dy + dy_at, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT_GRADIENT:
            x_at = row_start(row, sizes, x_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
            normalized, _ = _normalized(x, mean, rstd, row, valid, x_at, mask)
            weight_sum += gradient * normalized
        if BIAS_GRADIENT:
            bias_sum += gradient
    _store_partial(
        partial, weight_sum, bias_sum, tl.program_id(1), N, n, inside, WEIGHT_GRADIENT, BIAS_GRADIENT
    )


# (rows, columns, warps) of a tile: 8 to 16 elements a thread, of five values each.
_TILES = (
    (64, 16, 4), (32, 32, 4), (16, 64, 4), (8, 128, 4), (4, 256, 4), (2, 512, 4), (1, 1024, 4), (1, 2048, 4),
    (1, 4096, 8), (1, 8192, 16),
)  # fmt: skip
_STEP = (1, 4096, 8)  # of rows that do not fit
_COLUMNS = (16, 128, 4)  # of the sums over such rows
_WIDEST = 8192
_WARPS_PER_MULTIPROCESSOR = 16


def _config(tile: tuple[int, int, int]) -> Config:
    rows, columns, warps = tile
    return Config(BLOCK_ROWS=rows, BLOCK_N=columns, num_warps=warps, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [_config(tile) for tile in _TILES]


@functools.lru_cache(maxsize=4096)
def _pick(rows: int, columns: int, config: Config | None, multiprocessors: int) -> tuple[Config, int, int]:
    """(config, programs, tiles of rows for each)."""
    if columns > _WIDEST:
        picked = _config(_STEP)
        if config is not None and config != picked:
            raise UnsupportedConfig(f"rows of {columns} columns go in steps of {_STEP[1]}")
        return picked, rows, 1
    if config is None:
        config = _config(next(tile for tile in _TILES if tile[1] >= columns))
    elif not columns <= config.BLOCK_N < 2 * max(columns, 16):
        raise UnsupportedConfig(f"{config} is not for rows of {columns} columns")
    row_tiles = tiles(rows, config.BLOCK_ROWS)
    most = max(multiprocessors * _WARPS_PER_MULTIPROCESSOR // config.num_warps, 1)
    steps = tiles(row_tiles, most)
    return config, tiles(row_tiles, steps), steps


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    dims: int,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    dtotal: torch.Tensor | None = None,
    *,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dx, vector gradients [0 to 2, *row]); see the top of this file.

    dy, dtotal: of x's shape, fp32, fp16 or bf16, any strides, expanded ones too. mean: None for RMS norm.
    wanted: whether dx, dweight and dbias are. dx (None if not wanted) has x's dtype and is contiguous; the
    vector gradients are those of dweight and dbias that are wanted, in this order, in ``dtype`` (fp32).
    """
    check_rows("layer_norm_backward", x, dims, dy=dy, dtotal=dtotal, weight=weight)
    wants_x, wants_weight, wants_bias = wanted
    vectors = wants_weight + wants_bias
    row_shape = x.shape[x.dim() - dims :]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
    sums = torch.empty((vectors, *row_shape), dtype=dtype or torch.float32, device=x.device)
    of, (x, dy, dtotal) = strided_rows(dims, x, dy, dtotal)
    if x.numel() == 0:
        return dx, sums.zero_()
    multiprocessors = current_device(x).multiprocessors
    config, programs, steps = _pick(of.rows, of.columns, config, multiprocessors)
    (weight,) = contiguous_vectors(weight)
    x_steps, dy_steps, dtotal_steps = of.steps
    wants = {"WEIGHT_GRADIENT": wants_weight, "BIAS_GRADIENT": wants_bias}
    partial = None
    if of.columns <= _WIDEST:
        if vectors:
            partial = torch.empty((programs, vectors, of.columns), dtype=torch.float32, device=x.device)
        launch(
            layer_norm_backward_kernel,
            (programs,),
            dy, x, dtotal, mean, rstd, weight, dx, partial, of.rows, of.units, of.sizes, dy_steps, x_steps,
            dtotal_steps, steps,
            config=config,
            reads=(dy, x, dtotal, mean, rstd, weight),
            writes=(dx, partial) if wants_x else (partial,),
            **wants,
            **of.constexprs,
        )  # fmt: skip
    else:
        if wants_x:
            launch(
                wide_input_gradient_kernel,
                (programs,),
                dy, x, dtotal, mean, rstd, weight, dx, of.units, of.sizes, dy_steps, x_steps, dtotal_steps,
                config=config,
                reads=(dy, x, dtotal, mean, rstd, weight),
                writes=(dx,),
                **of.constexprs,
            )  # fmt: skip
        if vectors:
            by_column = _config(_COLUMNS)
            blocks, row_tiles = tiles(of.columns, by_column.BLOCK_N), tiles(of.rows, by_column.BLOCK_ROWS)
            steps = tiles(row_tiles, max(tiles(4 * multiprocessors, blocks), 1))
            programs = tiles(row_tiles, steps)
            partial = torch.empty((programs, vectors, of.columns), dtype=torch.float32, device=x.device)
            launch(
                wide_weight_gradient_kernel,
                (blocks, programs),
                dy, x, mean, rstd, partial, of.rows, of.units, of.sizes, dy_steps, x_steps, steps,
                config=by_column,
                reads=(dy, x, mean, rstd),
                writes=(partial,),
                **wants,
                **of.constexprs,
            )  # fmt: skip
    if vectors:
        sum_rows(partial, sums)
    return dx, sums


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the widths and kinds that networks have: see ``kernels``."""

    def call(
        rows, columns, dtype, *, add=False, affine=True, centred=True, wanted=(True, True, True), dy=None,
        transposed=False,
    ):  # fmt: skip
        def thunk(config=None):
            x = torch.empty(rows, columns, dtype=dtype, device="meta")
            if transposed:
                x = torch.empty(rows // 8, 8, columns, dtype=dtype, device="meta").transpose(0, 1)
            rstd = torch.empty(rows, device="meta")
            return layer_norm_backward(
                x if dy is None else x.to(dy), x, 1, rstd if centred else None, rstd,
                torch.empty(columns, device="meta") if affine else None, x if add else None, wanted=wanted,
                config=config,
            )  # fmt: skip

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    scale, nothing, vectors = (True, True, False), (True, False, False), (False, True, True)
    table = [
        ("16 columns", call(4096, 16, half)),
        ("odd columns, fp32", call(4096, 27, full, add=True)),
        ("48 columns, plain", call(4096, 48, half, affine=False, wanted=nothing)),
        ("96 columns, channels-last", call(32 * 56 * 56, 96, bf16)),
        ("192 columns, fp32", call(32 * 28 * 28, 192, full, add=True)),
        ("384 columns, add", call(32 * 197, 384, half, add=True)),
        ("768 columns, transposed", call(32 * 200, 768, bf16, transposed=True)),
        ("768 columns, dy in fp32, add", call(32 * 197, 768, bf16, dy=full, add=True)),
        ("1280 columns, fp32, add", call(4096, 1280, full, add=True)),
        ("1280 columns, vectors only", call(4096, 1280, half, wanted=vectors)),
        ("4096 columns, fp32, add", call(4096, 4096, full, add=True)),
        ("RMS, 4096 columns, add", call(4096, 4096, bf16, add=True, centred=False, wanted=scale)),
        ("8192 columns, fp32, add", call(4096, 8192, full, add=True)),
        ("RMS, 16384 columns", call(1024, 16384, bf16, centred=False, wanted=scale)),
        ("50000 columns, fp32, add", call(1024, 50000, full, add=True)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
