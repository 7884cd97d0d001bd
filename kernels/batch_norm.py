"""The one-pass epilogue: batch norm from running statistics, residual add and activation.

    y = act((x + bias - mean) * rsqrt(var + eps) * weight + bn_bias + residual)

over channel 1 of a tensor of 2 to 5 dims, one read of x (and of the residual) and one write, for any
strides. It follows a convolution that ran elsewhere, or stands alone (pre-activation networks).

How strides are served: the output is dense, so its dims, sorted by stride, are nested loops over memory.
Neighbouring dims that are one run in every tensor are merged; the innermost of what is left are the columns
of a 2-D tile, the others (at most four) its rows. Channels-last becomes [N*H*W rows, C columns] and
contiguous becomes [N*C rows, H*W columns]; sliced, transposed and expanded tensors keep more row dims. The
channel is one of those dims.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, check_activation
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["bn_add_act", "configs", "representative_calls"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _row_offset(i0, i1, i2, i3, s0, s1, s2, s3, ROW_DIMS: tl.constexpr):
    offset = i0 * s0
    if ROW_DIMS > 1:
        offset += i1 * s1
    if ROW_DIMS > 2:
        offset += i2 * s2
    if ROW_DIMS > 3:
        offset += i3 * s3
    return offset


@triton.jit(
    do_not_specialize=["rows_total", "col_units", "n0", "n1", "n2"],
    do_not_specialize_on_alignment=["x0", "x1", "x2", "x3", "x_col", "r0", "r1", "r2", "r3", "r_col"],
)
def bn_add_act_kernel(
    x,
    y,
    residual,
    bias,
    mean,
    var,
    weight,
    bn_bias,
    rows_total,
    col_units,
    # Sizes of the row dims from the inside out; the outermost needs none.
    n0,
    n1,
    n2,
    # Strides of the row dims, in units of the tensor's VEC, and of the columns, in elements.
    x0,
    x1,
    x2,
    x3,
    x_col,
    r0,
    r1,
    r2,
    r3,
    r_col,
    eps,
    negative_slope,
    ACTIVATION: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    # Which dim is the channel: 0 to 3 a row dim, 4 the columns, -1 none (C == 1).
    CHANNEL: tl.constexpr,
    # Elements per access: VEC divides the columns, X_VEC and R_VEC the row strides as well.
    VEC: tl.constexpr,
    X_VEC: tl.constexpr,
    R_VEC: tl.constexpr,
    # The tensor has the strides of y.
    X_DENSE: tl.constexpr,
    R_DENSE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    cols_total = col_units * VEC
    col_tiles = tl.cdiv(cols_total, BLOCK_COLS)
    row_tile = pid // col_tiles
    cols = (pid % col_tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if WIDE_OFFSETS:
        rows = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        wide_cols = cols.to(tl.int64)
    else:
        rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        wide_cols = cols
    row_mask = rows < rows_total
    mask = row_mask[:, None] & (cols < cols_total)[None, :]

    i0 = rows
    i1 = rows
    i2 = rows
    i3 = rows
    if ROW_DIMS > 1:
        i0 = rows % n0
        i1 = rows // n0
    if ROW_DIMS > 2:
        i2 = i1 // n1
        i1 = i1 % n1
    if ROW_DIMS > 3:
        i3 = i2 // n2
        i2 = i2 % n2

    y_offset = (rows * col_units * VEC)[:, None] + wide_cols[None, :]
    if X_DENSE:
        x_offset = y_offset
    else:
        x_row = _row_offset(i0, i1, i2, i3, x0, x1, x2, x3, ROW_DIMS) * X_VEC
        x_offset = x_row[:, None] + (wide_cols * x_col)[None, :]
    value = tl.load(x + x_offset, mask=mask, other=0.0).to(tl.float32)

    # The channel's scale and shift: a row or a column of the tile.
    if CHANNEL == 4:
        c = cols[None, :]
        c_mask = (cols < cols_total)[None, :]
    else:
        if CHANNEL == 0:
            i = i0
        elif CHANNEL == 1:
            i = i1
        elif CHANNEL == 2:
            i = i2
        elif CHANNEL == 3:
            i = i3
        else:
            i = rows * 0
        c = i[:, None]
        c_mask = row_mask[:, None]
    if bias is not None:
        value += tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
    if mean is not None:
        value -= tl.load(mean + c, mask=c_mask, other=0.0).to(tl.float32)
    if var is not None:
        scale = tl.rsqrt(tl.load(var + c, mask=c_mask, other=1.0).to(tl.float32) + eps)
        if weight is not None:
            scale *= tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
        value *= scale
    elif weight is not None:
        value *= tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
    if bn_bias is not None:
        value += tl.load(bn_bias + c, mask=c_mask, other=0.0).to(tl.float32)

    if residual is not None:
        if R_DENSE:
            r_offset = y_offset
        else:
            r_row = _row_offset(i0, i1, i2, i3, r0, r1, r2, r3, ROW_DIMS) * R_VEC
            r_offset = r_row[:, None] + (wide_cols * r_col)[None, :]
        value += tl.load(residual + r_offset, mask=mask, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION, negative_slope)
    tl.store(y + y_offset, value.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Plan:
    """All of a launch that follows from shapes and strides; kept, as finding it costs more than launching."""

    grid: tuple[int]
    config: Config
    # The kernel's arguments from rows_total to r_col.
    sizes_and_strides: tuple[int, ...]
    constexprs: dict


@functools.lru_cache(maxsize=4096)
def _plan(shape, y_strides, x_strides, r_strides, itemsize, config, multiprocessors) -> Plan:
    """How the dims of one call become a tile: see the module's docstring."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -y_strides[d])
    # Merged dims, from the outside in: [size, x stride, residual stride, is the channel].
    dims: list[list] = []
    for d in order:
        size, x, r, channel = shape[d], x_strides[d], r_strides[d], d == 1
        if dims and not channel and not dims[-1][3] and dims[-1][1] == x * size and dims[-1][2] == r * size:
            dims[-1] = [dims[-1][0] * size, x, r, False]
        else:
            dims.append([size, x, r, channel])
    if not dims:
        dims = [[1, 1, 1, False]]
    *rows, (cols, x_col, r_col, column_is_channel) = dims
    rows = rows[::-1] or [[1, 0, 0, False]]
    channel = 4 if column_is_channel else next((i for i, row in enumerate(rows) if row[3]), -1)

    vec = _power_of_two_divisor(16 // itemsize, cols)
    dense = {}
    units = {}
    for index, col, strides in ((1, x_col, x_strides), (2, r_col, r_strides)):
        dense[index] = all(strides[d] == y_strides[d] for d in order)
        row_strides = [row[index] for row in rows]
        units[index] = _power_of_two_divisor(vec, *row_strides) if col == 1 and not dense[index] else 1
    extent = max(
        sum((size - 1) * abs(stride) for size, stride in zip(shape, strides))
        for strides in (y_strides, x_strides, r_strides)
    )

    def strides_of(index, col):
        if dense[index]:
            return (0,) * 5
        row_strides = [row[index] // units[index] for row in rows]
        return (*row_strides, *[0] * (4 - len(rows)), col)

    sizes = [row[0] for row in rows]
    rows_total = math.prod(sizes)
    if config is None:
        config = _pick(rows_total, cols, column_is_channel or x_col != 1 or r_col != 1, multiprocessors)
    if config.maxnreg is None and not (dense[1] and dense[2]):
        # Left to itself, ptxas spills strided offsets on sm_100 and sm_120 to fit one more block.
        config = config.replace(maxnreg=255)
    return Plan(
        grid=(tiles(rows_total, config.BLOCK_ROWS) * tiles(cols, config.BLOCK_COLS),),
        config=config,
        sizes_and_strides=(
            *(rows_total, cols // vec),
            *(sizes + [1, 1, 1])[:3],
            *strides_of(1, x_col),
            *strides_of(2, r_col),
        ),
        constexprs={
            "ROW_DIMS": len(rows),
            "CHANNEL": channel,
            "VEC": vec,
            "X_VEC": units[1],
            "R_VEC": units[2],
            "X_DENSE": dense[1],
            "R_DENSE": dense[2],
            # Tiles overhang, by less than a tile.
            "WIDE_OFFSETS": extent + 16384 >= 2**31,
        },
    )


def _power_of_two_divisor(limit: int, *values: int) -> int:
    """The largest power of two up to ``limit`` (itself one) that divides all values."""
    while any(v % limit for v in values):
        limit //= 2
    return limit


# A row of the tile is a run of memory: 64 channels fill a cache line and keep the channel vectors' loads
# few; a plane of pixels is longer. 4096 elements are 32 a thread, four 16-byte loads in flight of 16-bit
# data.
_COLUMNS = (16, 32, 64, 128, 256)
_ELEMENTS = (4096, 1024)


def _config(elements: int, columns: int) -> Config:
    return Config(BLOCK_ROWS=elements // columns, BLOCK_COLS=columns, num_warps=4, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return [_config(elements, columns) for elements in _ELEMENTS for columns in _COLUMNS]


def _pick(rows: int, cols: int, narrow: bool, multiprocessors: int) -> Config:
    columns = min(max(1 << (cols - 1).bit_length(), 16), 64 if narrow else 256)
    blocks = tiles(rows, 4096 // columns) * tiles(cols, columns)
    # Smaller tiles where large ones would leave multiprocessors with less than four.
    return _config(4096 if blocks >= 4 * multiprocessors else 1024, columns)


def bn_add_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    config: Config | None = None,
) -> torch.Tensor:
    """``act((x + bias - mean) * rsqrt(var + eps) * bn_weight + bn_bias + residual)`` in one pass.

    x: [N, C, ...] of 2 to 5 dims, fp32, fp16 or bf16, any strides. residual: like x in shape and dtype, any
    strides. The vectors are [C], of any float dtype; any of them may be None. Computed in fp32 and rounded
    once. The result is dense, in the memory format of x. Raises ``ValueError`` and ``TypeError`` for what
    does not fit.
    """
    check_activation(activation)
    _check(x, residual, bias, running_mean, running_var, bn_weight, bn_bias)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    y_strides = y.stride()
    plan = _plan(
        tuple(x.shape),
        y_strides,
        x.stride(),
        y_strides if residual is None else residual.stride(),
        x.element_size(),
        config,
        0 if config is not None else current_device(x).multiprocessors,
    )
    vectors = [
        v if v is None or v.is_contiguous() else v.contiguous()
        for v in (bias, running_mean, running_var, bn_weight, bn_bias)
    ]
    launch(
        bn_add_act_kernel,
        plan.grid,
        x,
        y,
        residual,
        *vectors,
        *plan.sizes_and_strides,
        eps,
        negative_slope,
        config=plan.config,
        reads=(x, residual, *vectors),
        writes=(y,),
        ACTIVATION=activation,
        **plan.constexprs,
    )
    return y


_VECTOR_NAMES = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")


def _check(x, residual, *vectors) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"bn_add_act: x has {x.dim()} dims, expected 2 to 5 ([N, C, ...])")
    if x.dtype not in DTYPES:
        raise TypeError(f"bn_add_act: x is {x.dtype}, expected float32, float16 or bfloat16; convert it")
    channels = x.shape[1:2]
    for name, vector in zip(_VECTOR_NAMES, vectors):
        if vector is not None and vector.shape != channels:
            raise ValueError(
                f"bn_add_act: {name} has shape {tuple(vector.shape)}, expected {tuple(channels)}, as x"
            )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"bn_add_act: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"bn_add_act: residual is {residual.dtype}, x is {x.dtype}; convert one")


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the layouts and dtypes that networks have: see ``kernels``."""

    def call(
        shape, dtype, memory_format=torch.contiguous_format, residual=True, activation="relu", slope=None
    ):
        def thunk(config=None):
            def tensor(*s):
                return torch.empty(*s, dtype=dtype, device="meta")

            x = tensor(*shape).to(memory_format=memory_format)
            r = None
            if residual == "transposed":
                r = tensor(*shape)
            elif residual == "sliced":
                r = tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
            elif residual:
                r = torch.empty_like(x)
            vectors = [torch.empty(shape[1], dtype=torch.float32, device="meta") for _ in range(4)]
            return bn_add_act(x, None, *vectors, r, activation=activation, config=config)

        return thunk

    last = torch.channels_last
    half, full = torch.float16, torch.float32
    table = [
        ("channels-last fp16, add, relu", call((32, 64, 56, 56), half, last)),
        ("channels-last bf16, silu", call((32, 144, 28, 28), torch.bfloat16, last, False, "silu")),
        ("channels-last fp32, add, relu", call((32, 256, 14, 14), full, last)),
        ("channels-last fp16, odd C, gelu", call((8, 27, 14, 14), half, last, False, "gelu")),
        ("contiguous fp16, add, relu", call((32, 64, 56, 56), half)),
        (
            "contiguous fp32, 7x7, hardswish",
            call((32, 512, 7, 7), full, residual=False, activation="hardswish"),
        ),
        ("channels-last fp16, contiguous residual", call((32, 64, 28, 28), half, last, "transposed")),
        ("contiguous fp16, sliced residual", call((8, 64, 28, 28), half, residual="sliced")),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
