"""Gated activations, SwiGLU and GEGLU among them: y = act(gate) · up, in one pass, and their gradients.

    dgate = dy · up · act'(gate);   dup = dy · act(gate)

gate, up, dy [..., N] of any strides of rows: halves of one packed tensor [..., 2N] are read, and their
gradients written, where they lie. Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate, activation_backward, check_activation
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.layer_norm import check_rows
from fastnets.kernels.row_tiles import clamp_columns, row_start, row_tiles, strided_rows

__all__ = ["configs", "gated_act", "gated_act_backward", "representative_calls"]


@triton.jit
def _tile(rows, N, WIDE: tl.constexpr, VEC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, mask) of a program; blocks of columns are the fast ones."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, inside = row < rows, n < N
    row = tl.where(valid, row, 0)
    if WIDE:
        row = row.to(tl.int64)
    return row, clamp_columns(n, inside, VEC)[None, :], valid[:, None] & inside[None, :]


@triton.jit(do_not_specialize=["rows", "units", "sizes", "gate_steps", "up_steps", "y_steps"])
def gated_act_kernel(
    gate, up, y, rows, units, sizes, gate_steps, up_steps, y_steps,
    ACTIVATION: tl.constexpr, ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, n, mask = _tile(rows, units * VEC, WIDE, VEC, BLOCK_ROWS, BLOCK_N)
    g_at = row_start(row, sizes, gate_steps, ROW_DIMS, VEC)[:, None] + n
    u_at = row_start(row, sizes, up_steps, ROW_DIMS, VEC)[:, None] + n
    to = row_start(row, sizes, y_steps, ROW_DIMS, VEC)[:, None] + n
    g = tl.load(gate + g_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + u_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + to, (activate(g, ACTIVATION, 0.0) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "rows", "units", "sizes", "dy_steps", "gate_steps", "up_steps", "dgate_steps", "dup_steps",
    ]
)  # fmt: skip
def gated_act_backward_kernel(
    dy, gate, up, dgate, dup, rows, units, sizes, dy_steps, gate_steps, up_steps, dgate_steps, dup_steps,
    ACTIVATION: tl.constexpr, ROW_DIMS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, n, mask = _tile(rows, units * VEC, WIDE, VEC, BLOCK_ROWS, BLOCK_N)
    dy_at = row_start(row, sizes, dy_steps, ROW_DIMS, VEC)[:, None] + n
    g_at = row_start(row, sizes, gate_steps, ROW_DIMS, VEC)[:, None] + n
    u_at = row_start(row, sizes, up_steps, ROW_DIMS, VEC)[:, None] + n
    d = tl.load(dy + dy_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + g_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + u_at, mask=mask, other=0.0).to(tl.float32)
    to = row_start(row, sizes, dgate_steps, ROW_DIMS, VEC)[:, None] + n
    value = activation_backward(d * u, g, ACTIVATION, 0.0)
    tl.store(dgate + to, value.to(dgate.dtype.element_ty), mask=mask)
    to = row_start(row, sizes, dup_steps, ROW_DIMS, VEC)[:, None] + n
    tl.store(dup + to, (d * activate(g, ACTIVATION, 0.0)).to(dup.dtype.element_ty), mask=mask)


# (rows, columns) of a tile, 16 elements a thread: the least overhang is picked.
_TILES = ((1, 2048), (2, 1024), (8, 256), (32, 64))


def _config(rows: int, columns: int) -> Config:
    return Config(BLOCK_ROWS=rows, BLOCK_N=columns, num_warps=4, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernels are bound by memory."""
    return [_config(*tile) for tile in _TILES]


@functools.lru_cache(maxsize=4096)
def _pick(columns: int, config: Config | None) -> Config:
    if config is not None:
        if config.BLOCK_N > 64 and config.BLOCK_N >= 2 * columns:
            raise UnsupportedConfig(f"{config} is not for rows of {columns} columns")
        return config
    return _config(*min(_TILES, key=lambda tile: tiles(columns, tile[1]) * tile[1]))


def gated_act(
    gate: torch.Tensor, up: torch.Tensor, activation: str, *, config: Config | None = None
) -> torch.Tensor:
    """``act(gate) * up``, contiguous, in gate's dtype: computed in fp32 and rounded once.

    gate, up: [..., N], fp32, fp16 or bf16, of one shape and any strides.
    """
    check_activation(activation)
    check_rows("gated_act", gate, 1, up=up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        of, tensors = strided_rows(1, gate, up, y)
        _launch(gated_act_kernel, of, tensors, tensors[:2], tensors[2:], activation, config)
    return y


def gated_act_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Writes ``dgate`` and ``dup``: of gate's shape, rows of which are runs of memory."""
    check_activation(activation)
    check_rows("gated_act_backward", gate, 1, up=up, dy=dy, dgate=dgate, dup=dup)
    if not gate.numel():
        return
    of, tensors = strided_rows(1, dy, gate, up, dgate, dup)
    if tensors[3] is not dgate or tensors[4] is not dup:
        # What is written stays where it is: rows too strange to be merged are read from copies.
        dy, gate, up = (t.contiguous() for t in (dy, gate, up))
        strides = tuple(t.stride() for t in (dy, gate, up, dgate, dup))
        tensors = (dy, gate, up, dgate, dup)
        of = row_tiles(tuple(gate.shape), 1, strides, min(t.element_size() for t in tensors))
        if of is None:
            raise ValueError("gated_act_backward: dgate and dup must have rows that are runs of memory")
    _launch(gated_act_backward_kernel, of, tensors, tensors[:3], tensors[3:], activation, config)


def _launch(kernel, of, tensors, reads, writes, activation, config) -> None:
    config = _pick(of.columns, config)
    launch(
        kernel,
        (tiles(of.rows, config.BLOCK_ROWS) * tiles(of.columns, config.BLOCK_N),),
        *tensors, of.rows, of.units, of.sizes, *of.steps,
        config=config,
        reads=reads,
        writes=writes,
        ACTIVATION=activation,
        **of.constexprs,
    )  # fmt: skip


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""

    def call(rows, columns, dtype, activation, packed, backward):
        def thunk(config=None):
            if packed:
                both = torch.empty(rows, 2 * columns, dtype=dtype, device="meta")
                gate, up = both.chunk(2, -1)
                dgate, dup = torch.empty_like(both).chunk(2, -1)
            else:
                gate, up, dgate, dup = (
                    torch.empty(rows, columns, dtype=dtype, device="meta") for _ in range(4)
                )
            if not backward:
                return gated_act(gate, up, activation, config=config)
            dy = torch.empty(rows, columns, dtype=dtype, device="meta")
            return gated_act_backward(dy, gate, up, activation, dgate, dup, config=config)

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = []
    for backward in (False, True):
        kind = "backward" if backward else "forward"
        table += [
            (f"{kind}, SwiGLU, bf16, packed", call(8192, 5632, bf16, "silu", True, backward)),
            (f"{kind}, SwiGLU, 2730 columns", call(8192, 2730, half, "silu", False, backward)),
            (f"{kind}, GEGLU, fp32", call(6304, 2048, full, "gelu", False, backward)),
            (f"{kind}, GEGLU by tanh, 96 columns", call(6304, 96, half, "gelu_tanh", True, backward)),
        ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
