"""Linear layer and its whole epilogue: one matrix product, one rounding, one write.

    y = residual + layer_scale · act(x @ weightᵀ + bias)

x [M, K], weight [N, K], bias and layer_scale [N], residual and y [M, N]; every term but the product may be
left out. On request z = x @ weightᵀ + bias is stored too, which the gradient asks for. The same product
makes both gradients of a linear layer (``linear_backward``), since operands may lie either way round: then
the epilogue is ``product · act'(u)`` of the layer before, with that layer's bias gradient as column sums.

``linear_kernel`` is the tiled product. Where M is small it is the weights that take the time: tiles of 16
rows, and SPLIT_K programs for the columns of one, so that every multiprocessor streams a share of them.
``linear_stream_kernel`` is for up to four rows: weights go from memory to registers and are used there.
``linear_finish_kernel`` adds split-K's partial sums, always in one order, and applies the epilogue; of a
vendor's product it makes the same y in one pass.

A 1×1 convolution is the same product. It keeps its own kernel (``conv``): its epilogue normalises and adds
*before* the activation where this one scales and adds after, and its launcher describes windows, which a
linear layer called two hundred times in a forward need not pay for. Tiles, their order and the prediction
that chooses among them are shared (``conv_tile``, ``conv_configs``). Programs are not persistent and loads do
not go through tensor maps: no measurement has yet said that they should.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import check_activation
from fastnets.kernels.conv_configs import with_all_registers
from fastnets.kernels.conv_shape import INT32_ELEMENTS, vector_width
from fastnets.kernels.conv_tile import aligned, tile_of_program
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import (
    DTYPES,
    Config,
    RepresentativeCall,
    UnsupportedConfig,
    launch,
    tiles,
)
from fastnets.kernels.linear_configs import (
    STREAMED_ROWS,
    check_pairing,
    choose_config,
    choose_stream_config,
    configs,
    finish_config,
    fp32_products,
    product_precision,
    streams,
    suits,
)
from fastnets.kernels.linear_tile import finish_tile, operand_rows
from fastnets.kernels.row_statistics import (
    Norm,
    check_norm,
    normalise_tile,
    scale_of_rows,
    width_of_parts,
)

__all__ = [
    "choose_config",
    "configs",
    "finish_linear",
    "linear_act",
    "matrix_product",
    "representative_calls",
]


@triton.jit(do_not_specialize=["M", "N", "K", "x_pitch", "weight_pitch", "residual_pitch", "residual_rows"])
def linear_kernel(
    x, weight, y, bias, layer_scale, residual, z, u, sums, norm_weight, norm_bias, statistics, y_statistics,
    M, N, K, x_pitch, weight_pitch, residual_pitch, residual_rows, negative_slope, norm_eps,
    X_BY_ROWS: tl.constexpr, WEIGHT_BY_ROWS: tl.constexpr, VECTOR_X: tl.constexpr,
    VECTOR_WEIGHT: tl.constexpr, VECTOR_Y: tl.constexpr, VECTOR_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, HALVES: tl.constexpr, NORM_WIDTH: tl.constexpr = 0, CENTRED: tl.constexpr = True,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of y, from one share of K: grid (tiles, SPLIT_K).

    With SPLIT_K > 1, y is the fp32 workspace [SPLIT_K, M, N] of partial sums. *_BY_ROWS: the operand lies row
    by row, its rows a pitch apart; else column by column (x of a weight's gradient). VECTOR_*: elements of an
    aligned access along the run. EVEN_K: BLOCK_K divides K. WIDE: offsets need 64 bits. NORM_WIDTH: columns
    of a part of ``statistics``, with which x, by rows, is normalised; 0: it is not. The rest: see
    ``finish_tile``.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    RUN_X: tl.constexpr = VECTOR_X if X_BY_ROWS else 1
    RUN_WEIGHT: tl.constexpr = VECTOR_WEIGHT if WEIGHT_BY_ROWS else 1
    N = aligned(N, VECTOR_Y, tl.int32)
    K = aligned(K, RUN_X if RUN_X > RUN_WEIGHT else RUN_WEIGHT, tl.int32)
    x_pitch = aligned(x_pitch, VECTOR_X, INDEX)
    weight_pitch = aligned(weight_pitch, VECTOR_WEIGHT, INDEX)
    residual_pitch = aligned(residual_pitch, VECTOR_RESIDUAL, INDEX)
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    tile_m = tile_m.to(INDEX)
    m = operand_rows(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M, VECTOR_X // RUN_X)
    n = operand_rows(tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX), N, VECTOR_WEIGHT // RUN_WEIGHT)

    first = 0
    last = tl.cdiv(K, BLOCK_K)
    if SPLIT_K > 1:
        share = tl.cdiv(last, SPLIT_K)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, last)
    lanes = tl.arange(0, BLOCK_K).to(INDEX)
    k = first.to(INDEX) * BLOCK_K if SPLIT_K > 1 else tl.zeros((), INDEX)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NORM_WIDTH > 0:
        mean, scale = scale_of_rows(statistics, m, K, norm_eps, NORM_WIDTH, CENTRED)
    for _ in range(first, last):
        # Lanes past K read zeros; their addresses are drawn back into the tensor, since an asynchronous copy
        # may touch even what its mask excludes.
        columns = lanes
        start = k
        if not EVEN_K:
            present = k + lanes < K
            columns = tl.where(present, k + lanes, lanes % RUN_X)
            start = tl.zeros((), INDEX)
        if X_BY_ROWS:
            a_pointers = (x + start) + (m[:, None] * x_pitch + columns[None, :])
        else:
            a_pointers = (x + start * x_pitch) + (m[:, None] + columns[None, :] * x_pitch)
        if not EVEN_K:
            columns = tl.where(present, k + lanes, lanes % RUN_WEIGHT)
        if WEIGHT_BY_ROWS:
            b_pointers = (weight + start) + (n[None, :] * weight_pitch + columns[:, None])
        else:
            b_pointers = (weight + start * weight_pitch) + (n[None, :] + columns[:, None] * weight_pitch)
        if EVEN_K:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            a = tl.load(a_pointers, mask=present[None, :], other=0.0)
            b = tl.load(b_pointers, mask=present[:, None], other=0.0)
        if NORM_WIDTH > 0:
            at = k + lanes if EVEN_K else columns
            here = at if EVEN_K else present
            a = normalise_tile(
                a, mean, scale, norm_weight, norm_bias, at, here, EVEN_K, weight.dtype.element_ty
            )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        k += BLOCK_K

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if SPLIT_K > 1:
        # Partial sums go to the workspace as they are; linear_finish_kernel finishes them.
        y += tl.program_id(1).to(INDEX) * M * N
        finish_tile(
            acc, m, m < M, tile_n * BLOCK_N, N, y, (None, None, None, 0, 1), (None, None), negative_slope,
            None, tile_m, None, "none", INDEX, False,
        )  # fmt: skip
    else:
        terms = (bias, layer_scale, residual, residual_pitch, residual_rows)
        finish_tile(
            acc, m, m < M, tile_n * BLOCK_N, N, y, terms, (z, u), negative_slope, sums, tile_m,
            y_statistics, ACTIVATION, INDEX, HALVES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "K", "x_pitch", "weight_pitch", "residual_pitch", "residual_rows"])
def linear_stream_kernel(
    x, weight, y, bias, layer_scale, residual, z, M, N, K, x_pitch, weight_pitch,
    residual_pitch, residual_rows, negative_slope,
    VECTOR_X: tl.constexpr, VECTOR_WEIGHT: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y for all of its M <= ROWS <= 4 rows: grid (column tiles,). See ``linear_kernel``.

    Every weight is read once, straight into registers, and multiplied there: there is no operand to share.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    x_pitch = aligned(x_pitch, VECTOR_X, INDEX)
    weight_pitch = aligned(weight_pitch, VECTOR_WEIGHT, INDEX)
    K = aligned(K, VECTOR_X if VECTOR_X > VECTOR_WEIGHT else VECTOR_WEIGHT, tl.int32)
    first_n = tl.program_id(0) * BLOCK_N
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N).to(INDEX), N - 1)
    lanes = tl.arange(0, BLOCK_K)
    row_1 = tl.minimum(1, M - 1) * x_pitch
    row_2 = tl.minimum(2, M - 1) * x_pitch
    row_3 = tl.minimum(3, M - 1) * x_pitch
    acc_0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_1 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_2 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_3 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            present = tl.full((BLOCK_K,), True, tl.int1)
            columns = k + lanes
        else:
            present = k + lanes < K
            columns = tl.where(present, k + lanes, lanes % VECTOR_WEIGHT)
            columns = tl.max_contiguous(tl.multiple_of(columns, VECTOR_WEIGHT), VECTOR_WEIGHT)
        w_pointers = weight + (n[:, None] * weight_pitch + columns[None, :])
        w = tl.load(w_pointers, mask=present[None, :], other=0.0).to(tl.float32)
        acc_0 += w * tl.load(x + columns, mask=present, other=0.0).to(tl.float32)[None, :]
        if ROWS > 1:
            acc_1 += w * tl.load(x + row_1 + columns, mask=present, other=0.0).to(tl.float32)[None, :]
        if ROWS > 2:
            acc_2 += w * tl.load(x + row_2 + columns, mask=present, other=0.0).to(tl.float32)[None, :]
            acc_3 += w * tl.load(x + row_3 + columns, mask=present, other=0.0).to(tl.float32)[None, :]
    terms = (bias, layer_scale, residual, residual_pitch, residual_rows)
    m = tl.arange(0, 1)
    for row in tl.static_range(ROWS):
        acc = acc_0 if row == 0 else acc_1 if row == 1 else acc_2 if row == 2 else acc_3
        finish_tile(
            tl.sum(acc, 1)[None, :], m + row, m + row < M, first_n, N, y, terms, (z, None), negative_slope,
            None, 0, None, ACTIVATION, INDEX, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "residual_pitch", "residual_rows"])
def linear_finish_kernel(
    partial, y, bias, layer_scale, residual, z, u, sums, y_statistics, M, N, residual_pitch, residual_rows,
    negative_slope,
    VECTOR_Y: tl.constexpr, VECTOR_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [M, N] = epilogue(Σ partial [SPLIT_K, M, N]): grid (row tiles, column tiles). See ``finish_tile``."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    N = aligned(N, VECTOR_Y, tl.int32)
    residual_pitch = aligned(residual_pitch, VECTOR_RESIDUAL, INDEX)
    tile_m = tl.program_id(0).to(INDEX)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    offsets = (m * N)[:, None] + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial + offsets + share * (M.to(INDEX) * N), mask=inside, other=0.0).to(tl.float32)
    terms = (bias, layer_scale, residual, residual_pitch, residual_rows)
    finish_tile(
        acc, m, m < M, first_n, N, y, terms, (z, u), negative_slope, sums, tile_m, y_statistics, ACTIVATION,
        INDEX, False,
    )  # fmt: skip


# --- launching ----------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How calls of one shape, layout and dtype launch: decided once."""

    kernel: object
    config: Config
    grid: tuple[int, ...]
    flags: dict[str, object]
    finishing: Config | None
    finishing_grid: tuple[int, ...]
    finishing_flags: dict[str, object]

    @property
    def parts(self) -> int:
        """Columns of y that its epilogue finishes at a time."""
        if self.finishing is not None:
            return self.finishing.BLOCK_N
        return self.config.BLOCK_N // 2 if self.config.HALVES else self.config.BLOCK_N


_NO_NORM = (0, True)


@functools.lru_cache(maxsize=8192)
def _plan(
    M: int, N: int, K: int, element_size: int, x: tuple[bool, int], weight: tuple[bool, int],
    residual: tuple[int, int], activation: str, precision: str, gradient: bool, keeps: bool,
    device: Device, config: Config | None, norm: tuple[int, bool] = _NO_NORM, emits: bool = False,
) -> _Plan:  # fmt: skip
    """x, weight: (by rows, pitch). residual: (pitch, rows), 0 where there is none. gradient: of
    ``matrix_product``. keeps: z is stored, too. norm: (columns of a part of the statistics, centred), 0 where
    x is taken as it is. emits: the statistics of y are stored, too."""
    width = 16 // element_size
    flags = {
        "VECTOR_X": vector_width(element_size, x[1], K if x[0] else M),
        "VECTOR_WEIGHT": vector_width(element_size, weight[1], K if weight[0] else N),
        "WIDE": max(M * N, tiles(M, 256) * 256 * max(x[1], residual[0]), K * max(x[1], weight[1]),
                    N * max(weight[1], 1)) > INT32_ELEMENTS,
        "ACTIVATION": activation,
    }  # fmt: skip
    epilogue = {
        "VECTOR_Y": vector_width(element_size, N),
        "VECTOR_RESIDUAL": vector_width(2, residual[0]) if residual[0] else width,
    }
    by_rows = x[0] and weight[0]
    tiled = gradient or norm[0] or emits
    if config is None and by_rows and not tiled and streams(M, element_size, precision, device):
        config = choose_stream_config(N, element_size, device)
    if config is not None and "BLOCK_M" not in config.meta:
        if M > STREAMED_ROWS or not by_rows or tiled:
            raise UnsupportedConfig(
                f"{config} streams at most {STREAMED_ROWS} rows that lie by rows, got {M}, and no statistics"
            )
        flags["EVEN_K"] = K % config.BLOCK_K == 0
        flags["ROWS"] = 1 if M == 1 else 2 if M == 2 else 4
        return _Plan(linear_stream_kernel, config, (tiles(N, config.BLOCK_N),), flags, None, (), {})
    vectors = flags["VECTOR_X"] > 1 and flags["VECTOR_WEIGHT"] > 1
    crowded = flags["WIDE"] or gradient or keeps
    if config is None:
        config = choose_config(M, N, K, element_size, precision, device, vectors, crowded)
    elif not suits(config, vectors, crowded):
        raise UnsupportedConfig(f"{config} leaves too few registers for this call's addresses")
    if config.maxnreg is None and (config.BLOCK_M == 16 or (norm[0] and element_size == 4)):
        config = with_all_registers(config)
    flags |= {
        **epilogue, "X_BY_ROWS": x[0], "WEIGHT_BY_ROWS": weight[0],
        "EVEN_K": K % config.BLOCK_K == 0, "PRECISION": precision, "NORM_WIDTH": norm[0], "CENTRED": norm[1],
    }  # fmt: skip
    grid = (tiles(M, config.BLOCK_M) * tiles(N, config.BLOCK_N), config.SPLIT_K)
    if config.SPLIT_K == 1:
        return _Plan(linear_kernel, config, grid, flags, None, (), {})
    flags["WIDE"] = flags["WIDE"] or config.SPLIT_K * M * N > INT32_ELEMENTS
    finishing, finishing_grid, finishing_flags = _finishing(
        M, N, element_size, residual, activation, config.SPLIT_K
    )
    return _Plan(linear_kernel, config, grid, flags, finishing, finishing_grid, finishing_flags)


@functools.lru_cache(maxsize=8192)
def _finishing(
    M: int, N: int, element_size: int, residual: tuple[int, int], activation: str, shares: int,
    config: Config | None = None,
) -> tuple[Config, tuple[int, int], dict[str, object]]:  # fmt: skip
    config = config or finish_config(N)
    flags = {
        "VECTOR_Y": vector_width(element_size, N),
        "VECTOR_RESIDUAL": vector_width(2, residual[0]) if residual[0] else 16 // element_size,
        "WIDE": max(shares * M * N, M * residual[0]) > INT32_ELEMENTS,
        "ACTIVATION": activation,
        "SPLIT_K": shares,
    }
    return config, (tiles(M, config.BLOCK_M), tiles(N, config.BLOCK_N)), flags


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    keep_pre_activation: bool = False,
    norm: Norm | None = None,
    keep_statistics: bool = False,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """residual + layer_scale · act(x @ weightᵀ + bias) -> y [..., N]; (y, z) with ``keep_pre_activation``,
    (y, statistics) with ``keep_statistics``.

    x [..., K] and weight [N, K] share a dtype (fp32, fp16, bf16); residual, [..., N], may have another, and
    fewer rows than x, which then repeat (a position embedding). Any strides; what lies neither in rows nor in
    columns is copied first. bias and layer_scale are [N], of any floating dtype. y and z = x @ weightᵀ + bias
    are contiguous, z of x's dtype and y of ``dtype``, x's by default. All after the products is fp32, rounded
    once. norm: x is normalised, and rounded as a norm rounds, while it is loaded.
    statistics: of the rows of y, see ``row_statistics``. config: one of ``configs``, or None.

    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit each other.
    """
    K = x.shape[-1]
    N = weight.shape[0]
    M = x.numel() // K if K else math.prod(x.shape[:-1])
    shape = (*x.shape[:-1], N)
    _check(x, weight, bias, layer_scale, residual, activation, M)
    if (norm is not None or keep_statistics) and (keep_pre_activation or not x.numel()):
        raise ValueError("statistics of rows go with no pre-activation, and x must not be empty")
    x, x_layout = _operand(x, M, K)
    if norm is not None and not x_layout[0]:
        x, x_layout = x.contiguous(), (True, K)
    weight, weight_layout = _operand(weight, N, K)
    residual, residual_layout = _added(residual, N)
    y = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    z = torch.empty(shape, dtype=x.dtype, device=x.device) if keep_pre_activation else None
    width, statistics = _NO_NORM, None
    if norm is not None:
        norm = check_norm(norm, x)
        width = width_of_parts(K, norm.statistics.shape[1]), norm.centred
    if M and N:
        plan = _plan(
            M, N, K, x.element_size(), x_layout, weight_layout, residual_layout, activation,
            product_precision(x), False, keep_pre_activation, current_device(x), config, width,
            keep_statistics,
        )  # fmt: skip
        if keep_statistics:
            parts = tiles(N, plan.parts)
            statistics = torch.empty((M, parts, 2), dtype=torch.float32, device=x.device)
        _run(
            plan, x, weight, y, bias, layer_scale, residual, z, None, None, norm, statistics, M, N, K,
            x_layout[1], weight_layout[1], *residual_layout, negative_slope,
        )  # fmt: skip
    if keep_statistics:
        return y, statistics
    return (y, z) if keep_pre_activation else y


def matrix_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    pre_activation: torch.Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    column_sums: bool = False,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x @ weightᵀ) · act'(pre_activation) -> (y [M, N], Σ over row tiles of its columns or None).

    x [M, K] and weight [N, K] of one dtype, lying by rows or by columns: with operands transposed this is
    either gradient of a linear layer. pre_activation: contiguous [M, N] of x's dtype, what the layer before
    activated; its gradient comes out, and with ``column_sums`` the fp32 partial sums [T, N] of its bias's
    gradient, before rounding. dtype: that of y, x's by default.
    """
    (M, K), N = x.shape, weight.shape[0]
    _check(x, weight, None, None, None, activation, M)
    if pre_activation is not None and (
        pre_activation.numel() != M * N
        or not pre_activation.is_contiguous()
        or pre_activation.dtype != x.dtype
    ):
        raise ValueError(
            f"matrix_product: pre_activation is {list(pre_activation.shape)} {pre_activation.dtype}, "
            f"expected contiguous [{M}, {N}] {x.dtype}"
        )
    x, x_layout = _operand(x, M, K)
    weight, weight_layout = _operand(weight, N, K)
    y = torch.empty((M, N), dtype=dtype or x.dtype, device=x.device)
    sums = None
    if M and N:
        gradient = pre_activation is not None or column_sums
        plan = _plan(
            M, N, K, x.element_size(), x_layout, weight_layout, (0, 1), activation, product_precision(x),
            gradient, False, current_device(x), config,
        )  # fmt: skip
        if column_sums:
            rows = tiles(M, (plan.finishing or plan.config).BLOCK_M)
            sums = torch.empty((rows, N), dtype=torch.float32, device=x.device)
        _run(
            plan, x, weight, y, None, None, None, None, pre_activation, sums, None, None, M, N, K,
            x_layout[1], weight_layout[1], 0, 1, negative_slope,
        )  # fmt: skip
    elif column_sums:
        sums = torch.zeros((1, N), dtype=torch.float32, device=x.device)
    return y, sums


def finish_linear(
    product: torch.Tensor,
    bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """residual + layer_scale · act(product + bias) of a contiguous product [..., N], in one pass.

    in_place: the result overwrites the product, and ``dtype`` is that of it. Else see ``linear_act``.
    """
    N = product.shape[-1]
    M = product.numel() // N if N else 0
    if product.dtype not in DTYPES or not product.is_contiguous():
        raise ValueError(
            f"finish_linear: the product is {product.dtype}, contiguous fp32, fp16 or bf16 wanted"
        )
    _check_terms(bias, layer_scale, residual, activation, M, N, product)
    residual, layout = _added(residual, N)
    y = product if in_place else torch.empty_like(product, dtype=dtype)
    if M:
        plan = _finishing(M, N, product.element_size(), layout, activation, 1, config)
        _finish(
            plan, product, y, bias, layer_scale, residual, None, None, None, None, M, N, *layout,
            negative_slope,
        )  # fmt: skip
    return y


def _run(
    plan, x, weight, y, bias, layer_scale, residual, z, u, sums, norm, y_statistics, M, N, K, x_pitch,
    weight_pitch, *rest,
):  # fmt: skip
    flops = 2 * M * N * K
    if plan.kernel is linear_stream_kernel:
        launch(
            linear_stream_kernel, plan.grid, x, weight, y, bias, layer_scale, residual, z, M, N, K,
            x_pitch, weight_pitch, *rest, config=plan.config, flops=flops,
            reads=(x, weight, bias, layer_scale, residual), writes=(y, z), **plan.flags,
        )  # fmt: skip
        return
    of_norm, eps = (None, None, None), 0.0
    if norm is not None:
        of_norm, eps = (norm.weight, norm.bias, norm.statistics), norm.eps
    if plan.finishing is None:
        launch(
            linear_kernel, plan.grid, x, weight, y, bias, layer_scale, residual, z, u, sums, *of_norm,
            y_statistics, M, N, K, x_pitch, weight_pitch, *rest, eps, config=plan.config, flops=flops,
            reads=(x, weight, bias, layer_scale, residual, u, *of_norm), writes=(y, z, sums, y_statistics),
            **plan.flags,
        )  # fmt: skip
        return
    partial = torch.empty((plan.config.SPLIT_K, M, N), dtype=torch.float32, device=x.device)
    launch(
        linear_kernel, plan.grid, x, weight, partial, None, None, None, None, None, None, *of_norm, None, M,
        N, K, x_pitch, weight_pitch, *rest, eps, config=plan.config, flops=flops,
        reads=(x, weight, *of_norm), writes=(partial,), **plan.flags,
    )  # fmt: skip
    finishing = (plan.finishing, plan.finishing_grid, plan.finishing_flags)
    _finish(finishing, partial, y, bias, layer_scale, residual, z, u, sums, y_statistics, M, N, *rest)


def _finish(plan, partial, y, bias, layer_scale, residual, z, u, sums, y_statistics, *sizes) -> None:
    config, grid, flags = plan
    launch(
        linear_finish_kernel, grid, partial, y, bias, layer_scale, residual, z, u, sums, y_statistics, *sizes,
        config=config, reads=(partial, bias, layer_scale, residual, u), writes=(y, z, sums, y_statistics),
        **flags,
    )  # fmt: skip


def _operand(tensor: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, tuple[bool, int]]:
    """The tensor as a matrix, and (whether it lies by rows, the distance between its runs); a copy where it
    lies in neither."""
    if tensor.is_contiguous():
        return tensor, (True, columns)
    if tensor.dim() != 2:
        tensor = tensor.reshape(rows, columns)
    of_row, of_column = tensor.stride()
    if of_column == 1 or columns == 1:
        return tensor, (True, of_row if rows > 1 else columns)
    if of_row == 1 or rows == 1:
        return tensor, (False, of_column)
    return tensor.contiguous(), (True, columns)


def _added(residual: torch.Tensor | None, N: int) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """The residual as a matrix that lies by rows, and (the distance between them, their number)."""
    if residual is None:
        return None, (0, 1)
    if residual.is_contiguous():
        return residual, (N, max(residual.numel() // max(N, 1), 1))
    residual = residual.reshape(-1, N)
    if residual.stride(1) != 1 and N > 1:
        residual = residual.contiguous()
    return residual, (residual.stride(0) if residual.shape[0] > 1 else N, max(residual.shape[0], 1))


def _check(x, weight, bias, layer_scale, residual, activation, M) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}, expected [..., K] and [N, K]"
        )
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}: one of fp32, fp16 and bf16 for both")
    _check_terms(bias, layer_scale, residual, activation, M, weight.shape[0], x)


def _check_terms(bias, layer_scale, residual, activation, M, N, x) -> None:
    check_activation(activation)
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{N}]")
    if layer_scale is not None and layer_scale.shape != (N,):
        raise ValueError(f"layer_scale has shape {list(layer_scale.shape)}, expected [{N}]")
    if residual is None:
        return
    rows = residual.numel() // N if N else 0
    if residual.dtype not in DTYPES or residual.shape[-1] != N or (M and (rows == 0 or M % rows)):
        raise ValueError(
            f"residual is {list(residual.shape)} {residual.dtype}, expected [..., {N}] of "
            f"{M} rows, or of a divisor of that"
        )


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors that reach every branch of this file's kernels: see ``kernels``."""
    half, bfloat, full = torch.float16, torch.bfloat16, torch.float32

    def layer(
        name, M, K, N, dtype=half, kernel="tile", residual=0, scale=False, precision="ieee", parts=0,
        **options,
    ):  # fmt: skip
        def thunk(config: Config | None = None):
            with fp32_products(precision):
                check_pairing(config, dtype, kernel)
                x, weight, added = (
                    torch.empty(size, dtype=dtype, device="meta") for size in ((M, K), (N, K), (residual, N))
                )
                vectors = [torch.empty(N, dtype=dtype, device="meta") for _ in range(2)]
                if parts:
                    statistics = torch.empty((M, parts, 2), device="meta")
                    affine = [torch.empty(K, dtype=dtype, device="meta") for _ in range(2)]
                    options["norm"] = Norm(*affine, 1e-6, statistics=statistics)
                return linear_act(
                    x, weight, vectors[0], vectors[1] if scale else None, added if residual else None,
                    config=config, **options,
                )  # fmt: skip

        return RepresentativeCall(name, thunk)

    def product(name, M, K, N, by_rows, dtype=half, **options):
        def thunk(config: Config | None = None):
            check_pairing(config, dtype, "tile")
            x, weight = (
                torch.empty(size if rows else size[::-1], dtype=dtype, device="meta")
                for size, rows in zip(((M, K), (N, K)), by_rows)
            )
            x, weight = (t if rows else t.t() for t, rows in zip((x, weight), by_rows))
            u = torch.empty((M, N), dtype=dtype, device="meta") if options else None
            return matrix_product(x, weight, pre_activation=u, config=config, **options)

        return RepresentativeCall(name, thunk)

    def epilogue(name, dtype, **options):
        def thunk(config: Config | None = None):
            check_pairing(config, dtype, "finish")
            x = torch.empty((1576, 3072), dtype=dtype, device="meta")
            scale = torch.empty(3072, device="meta")
            return finish_linear(x, None, scale, x, activation="gelu", config=config, **options)

        return RepresentativeCall(name, thunk)

    whole, kept = {"residual": 1576, "scale": True}, {"keep_pre_activation": True}
    return [
        layer("GELU", 1576, 768, 3072, activation="gelu"),
        layer("GELU, z kept, bf16", 1576, 768, 3072, bfloat, activation="gelu", **kept),
        layer("GELU, fp32", 1576, 768, 3072, full, activation="gelu"),
        layer("GELU, TF32", 1576, 768, 3072, full, precision="tf32", activation="gelu"),
        layer("layer scale, residual", 1576, 3072, 768, **whole),
        layer("layer scale, residual, bf16, z kept", 1576, 3072, 768, bfloat, **whole, **kept),
        layer("layer scale, residual, fp32", 1576, 3072, 768, full, **whole),
        layer("repeated residual, SiLU", 1576, 588, 768, residual=197, activation="silu"),
        layer("odd K and N", 300, 147, 83, residual=300, activation="gelu_tanh"),
        layer("odd K and N, fp32", 300, 147, 83, full, activation="tanh"),
        layer("past 2^31 elements", 1 << 20, 768, 3072, activation="gelu"),
        layer("normalised, GELU", 1576, 768, 3072, parts=6, activation="gelu"),
        layer("normalised, bf16", 1576, 768, 2304, bfloat, parts=1),
        layer("normalised, fp32", 1576, 768, 2304, full, parts=6),
        layer("normalised, TF32", 1576, 768, 3072, full, parts=6, precision="tf32", activation="gelu"),
        layer("normalised, odd K and N", 300, 147, 83, residual=300, parts=2, keep_statistics=True),
        layer("normalised, past 2^31 elements", 1 << 20, 768, 3072, parts=6, activation="gelu"),
        layer("statistics of y", 1576, 3072, 768, residual=1576, keep_statistics=True),
        layer("statistics of y, bf16", 1576, 768, 768, bfloat, residual=1576, keep_statistics=True),
        layer("statistics of y, fp32", 1576, 3072, 768, full, residual=1576, keep_statistics=True),
        layer("statistics of y, TF32", 1576, 3072, 768, full, residual=1576, precision="tf32",
              keep_statistics=True),
        layer("classifier of 8", 8, 9216, 4096, activation="relu"),
        layer("classifier of 32, TF32", 32, 9216, 4096, full, precision="tf32", activation="relu"),
        layer("one row", 1, 9216, 4096, kernel="stream", activation="relu"),
        layer("one row, fp32", 1, 9216, 4096, full, "stream", residual=1, activation="gelu"),
        layer("four rows, odd K, fp32", 4, 1023, 1000, full, "stream", activation="sigmoid"),
        product("gradient of x", 1576, 3072, 768, (True, False)),
        product("gradient of x, act'", 1576, 768, 3072, (True, False), activation="gelu", column_sums=True),
        product("gradient of x, act', fp32", 512, 768, 3072, (True, False), full, activation="gelu",
                column_sums=True),
        product("gradient of weight", 768, 1576, 3072, (False, False)),
        product("gradient of weight, odd sizes, bf16", 83, 300, 147, (False, False), bfloat),
        epilogue("epilogue of a vendor's product", half),
        epilogue("epilogue in place, fp32", full, in_place=True),
    ]  # fmt: skip
