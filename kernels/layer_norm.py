"""Layer norm and RMS norm with the residual addition before or after, one read and one write.

    s = x + residual, rounded to the wider dtype of the two          (residual: added before)
    mean = Σ s / N;   var = Σ (s − mean)² / N;   rstd = 1 / sqrt(var + eps)
    y = (s − mean) · rstd · weight + bias + after                    (after: added after)

over rows of N columns; RMS norm is the same with mean 0. After Ba, Kiros and Hinton, 2016, and Zhang and
Sennrich, 2019.

Statistics are of the rounded sum, in fp32 and in two passes over registers: the deviations' own mean, which
rounding leaves, is taken off as well, so that rows with a mean of 10^6 deviations lose nothing. Narrow rows
go several to a program. Rows of more than 16384 columns are read twice: Welford's recurrence in each lane,
lanes merged by Chan's formula, then the result.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.channel_tiles import contiguous_vectors
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.row_tiles import clamp_columns, row_start, strided_rows

__all__ = ["check_rows", "configs", "is_wide", "layer_norm", "pick_config", "representative_calls"]


@triton.jit
def _summand(x, residual, total, x_at, residual_at, to, mask, STORE: tl.constexpr):
    """A tile of what is normalised, in fp32; a sum is rounded as it is stored."""
    value = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        if STORE:
            tl.store(total + to, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _finish(normalized, weight, bias, after, y, n, inside, after_at, to, mask):
    """The affine map, the second addition and the store of a tile."""
    if weight is not None:
        normalized *= tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        normalized += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if after is not None:
        normalized += tl.load(after + after_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + to, normalized.to(y.dtype.element_ty), mask=mask)


@triton.jit
def inverse_deviation(squares, N, eps):
    return tl.div_rn(
        1.0 + tl.zeros_like(squares), tl.sqrt_rn(tl.div_rn(squares, tl.zeros_like(squares) + N) + eps)
    )


@triton.jit(
    do_not_specialize=["rows", "units", "sizes", "x_steps", "residual_steps", "after_steps"]
)  # fmt: skip
def layer_norm_kernel(
    x, residual, after, weight, bias, y, total, mean, rstd,
    rows, units, eps,
    # See ``row_tiles``.
    sizes, x_steps, residual_steps, after_steps,
    CENTRED: tl.constexpr, ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program normalises BLOCK_ROWS rows, each whole in registers."""
    N = units * VEC
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    mask = valid[:, None] & inside[None, :]
    read = tl.where(valid, row, 0)
    if WIDE:
        read = read.to(tl.int64)
    n = clamp_columns(n, inside, VEC)
    to = (read * units * VEC)[:, None] + n[None, :]
    x_at = row_start(read, sizes, x_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
    residual_at = row_start(read, sizes, residual_steps, ROW_DIMS, VEC)[:, None] + n[None, :]
    after_at = row_start(read, sizes, after_steps, ROW_DIMS, VEC)[:, None] + n[None, :]

    value = _summand(x, residual, total, x_at, residual_at, to, mask, True)
    if CENTRED:
        count = tl.zeros([BLOCK_ROWS], tl.float32) + N
        center = tl.div_rn(tl.sum(value, axis=1), count)
        value = tl.where(mask, value - center[:, None], 0.0)
        rest = tl.div_rn(tl.sum(value, axis=1), count)
        value = tl.where(mask, value - rest[:, None], 0.0)
        if mean is not None:
            tl.store(mean + read, center + rest, mask=valid)
    scale = inverse_deviation(tl.sum(value * value, axis=1), N, eps)
    if rstd is not None:
        tl.store(rstd + read, scale, mask=valid)
    _finish(value * scale[:, None], weight, bias, after, y, n, inside, after_at, to, mask)


@triton.jit(
    do_not_specialize=["rows", "units", "sizes", "x_steps", "residual_steps", "after_steps"]
)  # fmt: skip
def wide_layer_norm_kernel(
    x, residual, after, weight, bias, y, total, mean, rstd,
    rows, units, eps, sizes, x_steps, residual_steps, after_steps,
    CENTRED: tl.constexpr, ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program normalises one row (BLOCK_ROWS is 1) of more than BLOCK_N columns, a tile at a time."""
    N = units * VEC
    row = tl.program_id(0) + tl.arange(0, BLOCK_ROWS)
    if WIDE:
        row = row.to(tl.int64)
    x_row = row_start(row, sizes, x_steps, ROW_DIMS, VEC)[:, None]
    residual_row = row_start(row, sizes, residual_steps, ROW_DIMS, VEC)[:, None]
    after_row = row_start(row, sizes, after_steps, ROW_DIMS, VEC)[:, None]
    to_row = (row * units * VEC)[:, None]
    lane = tl.arange(0, BLOCK_N)

    center = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    seen = 0.0
    for first in range(0, N, BLOCK_N):
        inside = first + lane < N
        mask = inside[None, :]
        n = clamp_columns(first + lane, inside, VEC)[None, :]
        value = _summand(x, residual, total, x_row + n, residual_row + n, to_row + n, mask, True)
        if CENTRED:
            seen += 1.0
            deviation = tl.where(mask, value - center, 0.0)
            center += deviation / seen
            squares += deviation * (value - center)
        else:
            squares += value * value
    # How many columns each lane has seen.
    counts = tl.cdiv(N - lane, BLOCK_N).to(tl.float32)[None, :]
    sum_of_squares = tl.sum(squares, axis=1)
    base = tl.zeros([BLOCK_ROWS], tl.float32)
    rest = base
    if CENTRED:
        base = tl.div_rn(tl.sum(center * counts, axis=1), base + N)
        center -= base[:, None]
        rest = tl.div_rn(tl.sum(center * counts, axis=1), rest + N)
        center -= rest[:, None]
        sum_of_squares += tl.sum(center * center * counts, axis=1)
        if mean is not None:
            tl.store(mean + row, base + rest)
    scale = inverse_deviation(sum_of_squares, N, eps)
    if rstd is not None:
        tl.store(rstd + row, scale)
    for first in range(0, N, BLOCK_N):
        inside = first + lane < N
        n = clamp_columns(first + lane, inside, VEC)
        mask = inside[None, :]
        at = n[None, :]
        value = _summand(x, residual, total, x_row + at, residual_row + at, to_row + at, mask, False)
        value = ((value - base[:, None]) - rest[:, None]) * scale[:, None]
        _finish(value, weight, bias, after, y, n, inside, after_row + at, to_row + at, mask)


# (rows, columns, warps) of a tile: 16 elements a thread, 32 in the widest rows; and fewer rows where they
# would not fill the device. The last is the step of rows that do not fit.
_TILES = (
    (128, 16, 4), (64, 32, 4), (32, 64, 4), (16, 128, 4), (8, 256, 4), (4, 512, 4), (2, 1024, 4),
    (1, 2048, 4), (1, 4096, 8), (1, 8192, 16), (1, 16384, 16),
)  # fmt: skip
_FEW_ROWS = tuple((1, columns, 1) for columns in (128, 256, 512)) + ((1, 1024, 2),)
_STEP = (1, 8192, 16)
_WIDEST = 16384


def _config(tile: tuple[int, int, int]) -> Config:
    rows, columns, warps = tile
    return Config(BLOCK_ROWS=rows, BLOCK_N=columns, num_warps=warps, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [_config(tile) for tile in (*_TILES, *_FEW_ROWS)]


def is_wide(columns: int) -> bool:
    """Whether rows are too wide to be held whole."""
    return columns > _WIDEST


@functools.lru_cache(maxsize=4096)
def pick_config(rows: int, columns: int, config: Config | None, multiprocessors: int) -> Config:
    """The config for so many rows, ``config`` if it suits; ``UnsupportedConfig`` where it does not."""
    if is_wide(columns):
        picked = _config(_STEP)
        if config is not None and config != picked:
            raise UnsupportedConfig(f"rows of {columns} columns go in steps of {_STEP[1]}")
        return picked
    if config is not None:
        if not columns <= config.BLOCK_N < 2 * max(columns, 16):
            raise UnsupportedConfig(f"{config} is not for rows of {columns} columns")
        return config
    tile = next(tile for tile in _TILES if tile[1] >= columns)
    if tiles(rows, tile[0]) < 2 * multiprocessors:
        tile = next((few for few in _FEW_ROWS if few[1] == tile[1]), tile)
    return _config(tile)


def layer_norm(
    x: torch.Tensor,
    dims: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    *,
    eps: float,
    centred: bool = True,
    dtype: torch.dtype | None = None,
    keep: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(y, sum, mean, rstd); see the top of this file.

    x, residual, after: fp32, fp16 or bf16, of one shape (the latter two may be None); the last ``dims`` dims
    are a row. All of any strides; only columns that are no run of memory are copied first. weight, bias: of
    the shape of a row and any float dtype. centred: False is RMS norm. dtype: of y; by default that of
    ``(x + residual) + after``. keep: whether mean (None for RMS norm) and rstd, fp32 [rows], are returned.
    sum is x + residual, None without one. y and sum are contiguous, as stock's are.
    """
    check_rows("layer_norm", x, dims, weight=weight, bias=bias, residual=residual, after=after)
    total, kind = None, x.dtype
    if residual is not None:
        kind = torch.promote_types(kind, residual.dtype)
        total = torch.empty(x.shape, dtype=kind, device=x.device)
    if dtype is None:
        dtype = kind if after is None else torch.promote_types(kind, after.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    of, (x, residual, after) = strided_rows(dims, x, residual, after)
    mean = rstd = None
    if keep:
        rstd = torch.empty(of.rows, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if centred else None
    if x.numel() == 0:
        return y, total, *(None if t is None else t.zero_() for t in (mean, rstd))
    multiprocessors = 0 if config is not None else current_device(x).multiprocessors
    config = pick_config(of.rows, of.columns, config, multiprocessors)
    weight, bias = contiguous_vectors(weight, bias)
    launch(
        wide_layer_norm_kernel if is_wide(of.columns) else layer_norm_kernel,
        (tiles(of.rows, config.BLOCK_ROWS),),
        x, residual, after, weight, bias, y, total, mean, rstd, of.rows, of.units, eps, of.sizes, *of.steps,
        config=config,
        reads=(x, residual, after, weight, bias),
        writes=(y, total, mean, rstd),
        CENTRED=centred,
        **of.constexprs,
    )  # fmt: skip
    return y, total, mean, rstd


def check_rows(function: str, x: torch.Tensor, dims: int, **others: torch.Tensor | None) -> None:
    """Raises ``ValueError`` or ``TypeError`` where vectors of a row or tensors like x do not fit x."""
    if not 1 <= dims <= x.dim():
        raise ValueError(f"{function}: a row cannot be the last {dims} of {x.dim()} dims")
    for name, tensor in (("x", x), *others.items()):
        if tensor is None:
            continue
        if name not in ("weight", "bias") and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{function}: {name} is {tensor.dtype}, expected float32, float16 or bfloat16; convert it"
            )
        expected = x.shape[-dims:] if name in ("weight", "bias") else x.shape
        if tensor.shape != expected:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}, as x"
            )


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the widths and kinds that networks have: see ``kernels``."""

    def call(
        rows, columns, dtype, *, add=False, after=False, affine=True, centred=True, keep=True, out=None,
        transposed=False,
    ):  # fmt: skip
        def thunk(config=None):
            x = torch.empty(rows, columns, dtype=dtype, device="meta")
            if transposed:
                x = torch.empty(rows // 8, 8, columns, dtype=dtype, device="meta").transpose(0, 1)
            vector = torch.empty(columns, device="meta") if affine else None
            return layer_norm(
                x, 1, vector, vector if centred else None, x if add else None, x if after else None,
                eps=1e-5, centred=centred, keep=keep, dtype=out, config=config,
            )  # fmt: skip

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("16 columns", call(4096, 16, half)),
        ("odd columns, fp32", call(4096, 27, full, add=True)),
        ("48 columns, plain", call(4096, 48, half, affine=False, keep=False)),
        ("96 columns, channels-last", call(32 * 56 * 56, 96, bf16)),
        ("192 columns, fp32", call(32 * 28 * 28, 192, full)),
        ("384 columns, add", call(32 * 197, 384, half, add=True)),
        ("768 columns, transposed, add", call(32 * 200, 768, bf16, add=True, transposed=True)),
        ("768 columns, bf16 to fp32, add after", call(32 * 197, 768, bf16, after=True, out=full)),
        ("1280 columns, fp32", call(4096, 1280, full, add=True)),
        ("RMS, 4096 columns, add", call(4096, 4096, bf16, add=True, centred=False)),
        ("RMS, 8192 columns", call(4096, 8192, full, centred=False, add=True)),
        ("16384 columns, fp32, add", call(1024, 16384, full, add=True)),
        ("50000 columns, fp32, add", call(1024, 50000, full, add=True)),
        ("RMS, 65536 columns", call(1024, 65536, bf16, centred=False)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
