"""Attention, forward: softmax(scale · q kᵀ + bias) v in one pass over the keys, nothing of size M × N stored.

    s[m, n] = softcap(scale · q[m] · k[n]) + bias[m, n] − slope · |m + shift − n|,   −inf where masked
    o[m]    = Σ_n softmax_n(s[m])[n] · v[n],   lse[m] = log2 Σ_n 2^(s[m, n] · log2 e)

q [B, H, M, D]; k [B, H / GROUP, N, D]; v [B, H / GROUP, N, D_V]; o [B, H, M, D_V], written so that
o.transpose(1, 2) is contiguous. Any strides: q, k and v may be views of one packed projection. Softmax runs
online (Milakov and Gimelshein, 2018) in tiles (Dao et al., 2022; Dao, 2023), with fp32 maximum and sum, in
base 2. Of the tiles of keys those that every query of a tile sees in full are worked on without a mask; those
that none sees are not visited. Queries that see no key get 0, and an lse of −inf.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate
from fastnets.kernels.attention_calls import AttentionCall, attention_calls, check_config
from fastnets.kernels.attention_configs import forward_config, forward_configs, forward_configs_for
from fastnets.kernels.attention_problem import Options, Problem, attention_problem, empty_like_heads
from fastnets.kernels.attention_tile import (
    LOWEST,
    add_terms,
    bounds,
    keep_factor,
    load_rows,
    locate,
    spans,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["attention_forward", "configs", "representative_calls"]


@triton.jit
def _attend(
    low, high, q, k, v, acc, total, top,
    start_m, M, N, shift, left, right, scale, softcap, p, stream,
    k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The running (acc, total, top) of the queries after the keys from low to high, low a tile's first.

    total is kept in LANES parts, to which threads add what they hold themselves, and are added up at the end.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    m = start_m + i
    first, last = bounds(m, N, shift, left, right, HAS_LEFT, HAS_RIGHT)
    # The pointers move along: fewer instructions than to work them out in each step.
    wide = tl.full((), 0, tl.int64)
    k += (wide + low) * (k_n * VEC)
    v += (wide + low) * (v_n * VEC)
    for start_n in tl.range(low, high, BLOCK_N):
        row = j
        if MASKED:
            row = tl.minimum(j, N - 1 - start_n)
        n = start_n + j
        key = load_rows(k, row, k_n, k_d, D, BLOCK_D, VEC)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if not PLAIN:
            if SOFTCAP:
                s = activate(s * scale, "tanh", 0.0) * softcap
            else:
                s = s * scale
            at = wide + start_n
            bias_tile = bias
            mask_tile = mask
            if bias is not None:
                bias_tile = bias + at * bias_n
            if mask is not None:
                mask_tile = mask + at * mask_n
            inside = tl.minimum(i, M - 1 - start_m)
            s = add_terms(s, m[:, None], n[None, :], inside[:, None], row[None, :], shift,
                          bias_tile, bias_m, bias_n, mask_tile, mask_m, mask_n, slope)  # fmt: skip
        if MASKED:
            seen = n[None, :] <= last[:, None]
            if HAS_LEFT:
                seen = seen & (n[None, :] >= first[:, None])
            s = tl.where(seen, s, -float("inf"))
        if PLAIN:
            # One multiply-add for each score: the scale is positive, so the maximum can be taken before it.
            new = tl.maximum(top, tl.max(s, 1) * scale)
            weight = tl.exp2(s * scale - new[:, None])
        else:
            new = tl.maximum(top, tl.max(s, 1))
            weight = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        part = tl.sum(tl.reshape(weight, [BLOCK_M, BLOCK_N // LANES, LANES]), 1)
        total = total * shrink[:, None] + part
        acc = acc * shrink[:, None]
        if seed is not None:
            weight *= keep_factor(seed, stream, start_m, start_n, p, BLOCK_M, BLOCK_N)
        value = load_rows(v, row, v_n, v_d, D_V, BLOCK_D_V, VEC)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new
        k += (wide + BLOCK_N) * (k_n * VEC)
        v += (wide + BLOCK_N) * (v_n * VEC)
    return acc, total, top


@triton.jit(do_not_specialize=["heads", "M", "N", "sequences", "left", "right", "bias_period", "mask_period"])
def attention_kernel(
    q, k, v, o, lse, bias, mask, slopes, seed, cu_m, cu_n,
    heads, M, N, sequences, left, right, scale, softcap, p, kept,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, bias_period, mask_b, mask_h, mask_m, mask_n, mask_period, slopes_b,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, LANES: tl.constexpr, KEEP_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Grid: (tiles · heads · batch)."""
    queries = M  # of all packed sequences together
    tile, head, batch, M, N, first_m, first_n = locate(
        tl.program_id(0), M, heads, N, cu_m, cu_n, sequences, BLOCK_M, BLOCK_SEQUENCES
    )
    if cu_m is None and HAS_RIGHT:
        tile = (M + BLOCK_M - 1) // BLOCK_M - 1 - tile  # those with most keys first
    start_m = tile * BLOCK_M
    if cu_m is not None and start_m >= M:
        return
    shift = N - M if BOTTOM_RIGHT else 0
    row_of_head = batch.to(tl.int64)
    if cu_m is not None:
        row_of_head = row_of_head * 0
    in_batch = row_of_head
    at_m = (first_m + start_m).to(tl.int64)
    at_n = tl.zeros_like(at_m) + first_n
    kv_head = (head // GROUP).to(tl.int64)
    q += (in_batch * q_b + head.to(tl.int64) * q_h + at_m * q_m) * VEC
    k += (in_batch * k_b + kv_head * k_h + at_n * k_n) * VEC
    v += (in_batch * v_b + kv_head * v_h + at_n * v_n) * VEC
    if bias is not None:
        bias += (batch % bias_period).to(tl.int64) * bias_b + head.to(tl.int64) * bias_h + at_m * bias_m
    if mask is not None:
        mask += (batch % mask_period).to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + at_m * mask_m
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_b + head)
    i = tl.arange(0, BLOCK_M)
    inside = start_m + i < M
    query = load_rows(q, tl.minimum(i, M - 1 - start_m), q_m, q_d, D, BLOCK_D, VEC)
    if KEEP_Q:
        # What is added to a product's sums lies in registers as they do, and q then stays there; Triton reads
        # it from shared memory in each step otherwise. This product is zero.
        zero = tl.dot(tl.zeros([BLOCK_M, 16], query.dtype), tl.zeros([16, 16], query.dtype))
        query += tl.max(zero, 1)[:, None].to(query.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D_V], tl.float32)
    total = tl.zeros([BLOCK_M, LANES], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    low, full_low, full_high, high = 0, 0, N, N
    if HAS_LEFT:
        low = tl.maximum(start_m + shift - left, 0)
        full_low = tl.maximum(start_m + BLOCK_M - 1 + shift - left, 0)
    if HAS_RIGHT:
        full_high = tl.minimum(start_m + shift + right + 1, N)
        high = tl.minimum(tl.minimum(start_m + BLOCK_M, M) + shift + right, N)
    low, a, b = spans(low, full_low, full_high, high, BLOCK_N)
    stream = batch * heads + head
    if HAS_LEFT:
        acc, total, top = _attend(
            low, a, query, k, v, acc, total, top,
            start_m, M, N, shift, left, right, scale, softcap, p, stream,
            k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
            True, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M, BLOCK_N,
            PRECISION, LANES,
        )  # fmt: skip
    acc, total, top = _attend(
        a, b, query, k, v, acc, total, top,
        start_m, M, N, shift, left, right, scale, softcap, p, stream,
        k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
        False, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M, BLOCK_N,
        PRECISION, LANES,
    )  # fmt: skip
    acc, total, top = _attend(
        b, high, query, k, v, acc, total, top,
        start_m, M, N, shift, left, right, scale, softcap, p, stream,
        k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
        True, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M, BLOCK_N,
        PRECISION, LANES,
    )  # fmt: skip
    total = tl.sum(total, 1)
    some = total > 0.0
    share = 1.0 / tl.where(some, total, 1.0)
    if seed is not None:
        share *= kept
    acc = acc * share[:, None]
    d = tl.arange(0, BLOCK_D_V)
    width = heads * D_V
    o += (in_batch * queries + at_m) * width + head * D_V
    keep = inside[:, None] & (d < D_V)[None, :]
    tl.store(o + ((i * width)[:, None] + d[None, :]), acc.to(o.dtype.element_ty), mask=keep)
    if lse is not None:
        lse += (in_batch * heads + head) * queries + at_m
        tl.store(
            lse + i, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), -float("inf")), mask=inside
        )


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``."""
    return forward_configs(device)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    cu: tuple[torch.Tensor, torch.Tensor] | None = None,
    keep_lse: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(o, lse): see the top of this file, and ``attention_problem`` for the arguments.

    seed: int64 [1], read where dropout_p > 0. o has the dtype of q; lse is fp32 [B, H, M], in base 2, and
    None unless kept.
    """
    problem = attention_problem(q, k, v, bias, mask, slopes, seed, cu, options)
    grid, config, options_of_launch = _launch_of(problem, config)
    o = empty_like_heads(q, problem.H, problem.M, problem.D_V)
    lse = None
    if keep_lse:
        lse = torch.empty((problem.B, problem.H, problem.M), dtype=torch.float32, device=q.device)
    cu_m, cu_n = cu if cu is not None else (None, None)
    launch(
        attention_kernel, grid, q, k, v, o, lse, bias, mask, slopes, seed if options.dropout_p else None,
        cu_m, cu_n, *problem.numbers, config=config, reads=(q, k, v, bias, mask), writes=(o, lse),
        flops=problem.flops, **options_of_launch,
    )  # fmt: skip
    return o, lse


def _launch_of(problem: Problem, config: Config | None):
    """(grid, config, constexprs) of the forward kernel, kept with the problem."""
    known = problem.launches.get(("forward", config))
    if known is None:
        chosen = config or forward_config(
            problem.dtype, problem.block_d, problem.M, problem.device, problem.kind
        )
        if problem.sequences:
            count = problem.M // chosen.BLOCK_M + problem.sequences
        else:
            count = tiles(problem.M, chosen.BLOCK_M) * problem.B
        flags = problem.flags | {"LANES": _lanes(problem, chosen), "KEEP_Q": _keep_q(problem, chosen)}
        known = problem.launches[("forward", config)] = ((count * problem.H,), chosen, flags)
    return known


def _lanes(problem: Problem, config: Config) -> int:
    """In how many parts sums are kept: one for each column of a fragment where a warp has whole rows and
    registers to spare, else one."""
    if problem.dtype == torch.float32 or problem.block_d > 64:
        return 8 if _keep_q(problem, config) else 1
    capability = problem.device.capability
    whole_rows = capability == 90 or (capability < 90 and config.BLOCK_M <= 16 * config.num_warps)
    return 8 if whole_rows else 1


def _keep_q(problem: Problem, config: Config) -> bool:
    """Whether q stays in registers: at head dim 128 with 16 rows a warp, where to read it again in each step
    keeps shared memory busy longer than the tensor pipe, and where registers suffice."""
    flags = problem.flags
    return (
        problem.dtype != torch.float32
        and problem.device.capability < 90
        and (flags["PLAIN"], flags["VEC"], problem.dropout_p) == (True, 8, 0.0)
        and (flags["HAS_LEFT"] or not problem.sequences)
        and flags["BLOCK_D"] == flags["BLOCK_D_V"] == config.BLOCK_M == 16 * config.num_warps == 128
    )


def _run(call: AttentionCall, config: Config | None = None):
    check_config(config, forward_configs_for(call.dtype, call.block_d, current_device(), call.kind))
    q, k, v, options, extra = call.tensors()
    return attention_forward(q, k, v, options, **extra, keep_lse=call.keep_lse, config=config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""
    return [
        RepresentativeCall(name, functools.partial(_run, case)) for name, case in attention_calls().items()
    ]
