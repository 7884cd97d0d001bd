"""Attention, backward: the weights are computed again from lse; deterministic, no atomics.

    p[m, n] = 2^(s[m, n] − lse[m]),   delta[m] = Σ_d dout[m, d] · out[m, d] − dlse[m]
    dv[n] = Σ_m p · dout[m],   ds = p · (dout[m] · v[n] − delta[m]),   dbias = ds
    dq[m] = scale · Σ_n ds · k[n],   dk[n] = scale · Σ_m ds · q[m]

After a pass for delta one launch has two kinds of programs: one for each tile of keys, that goes through the
queries of all heads of its group and sums dk and dv, and one for each tile of queries, that goes through the
keys and sums dq. Those of one head are neighbours and share what they read. What each leaves out is as in
``attention``, of which see s and the shapes. A bias has a kernel of its own, which adds up ds over all that
the bias was broadcast to, in a fixed order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.attention_bias import attention_bias_gradient
from fastnets.kernels.attention_calls import AttentionCall, attention_calls, check_config
from fastnets.kernels.attention_configs import backward_config, backward_configs, backward_configs_for
from fastnets.kernels.attention_problem import (
    Options,
    Problem,
    attention_problem,
    delta_steps,
    empty_like_heads,
    gradient_steps,
)
from fastnets.kernels.attention_tile import (
    LOG2E,
    keep_factor,
    load_rows,
    locate,
    row_lse,
    spans,
    weights,
)
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["attention_backward", "configs", "representative_calls"]


@triton.jit(do_not_specialize=["heads", "M"])
def attention_delta_kernel(
    o, do, dlse, delta, heads, M, o_b, o_h, o_m, o_d, do_b, do_h, do_m, do_d,
    D_V: tl.constexpr, VEC: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [B, H, M] fp32. Grid: (tiles · heads · batch)."""
    count = (M + BLOCK - 1) // BLOCK
    index = tl.program_id(0) // count
    start = (tl.program_id(0) % count) * BLOCK
    at = start.to(tl.int64)
    head = (index % heads).to(tl.int64)
    batch = (index // heads).to(tl.int64)
    i = tl.arange(0, BLOCK)
    row = tl.minimum(i, M - 1 - start)
    out = load_rows(o + (batch * o_b + head * o_h + at * o_m) * VEC, row, o_m, o_d, D_V, BLOCK_D_V, VEC)
    dout = load_rows(
        do + (batch * do_b + head * do_h + at * do_m) * VEC, row, do_m, do_d, D_V, BLOCK_D_V, VEC
    )
    total = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    first = index.to(tl.int64) * M + at
    if dlse is not None:
        total -= tl.load(dlse + first + row) * LOG2E
    tl.store(delta + first + i, total, mask=start + i < M)


@triton.jit
def _over_queries(
    low, high, q, do, lse, delta, key, value, dk, dv,
    start_n, M, N, shift, left, right, scale, softcap, p, kept, stream,
    q_m, q_d, do_m, do_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
    MASKED: tl.constexpr, BLIND: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_N: tl.constexpr, STEP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of a tile of keys after the queries from low to high; tiles are [keys, queries]."""
    i = tl.arange(0, STEP_M)
    j = tl.arange(0, BLOCK_N)
    n = start_n + j
    # The pointers move along: fewer instructions than to work them out in each step.
    wide = tl.full((), 0, tl.int64)
    q += (wide + low) * (q_m * VEC)
    do += (wide + low) * (do_m * VEC)
    lse += low
    delta += low
    for start_m in tl.range(low, high, STEP_M):
        row = i
        if MASKED:
            row = tl.minimum(i, M - 1 - start_m)
        m = start_m + i
        query = load_rows(q, row, q_m, q_d, D, BLOCK_D, VEC)
        if MASKED:
            of_row = row_lse(lse, i, M - start_m, True, BLIND)
        else:
            of_row = row_lse(lse, i, STEP_M, False, BLIND)
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        at = wide + start_m
        bias_tile = bias
        mask_tile = mask
        if bias is not None:
            bias_tile = bias + at * bias_m
        if mask is not None:
            mask_tile = mask + at * mask_m
        inside = tl.minimum(j, N - 1 - start_n)
        weight, capped = weights(
            s, m[None, :], n[:, None], row[None, :], inside[:, None], of_row[None, :], N, shift, left,
            right, scale, softcap, bias_tile, bias_m, bias_n, mask_tile, mask_m, mask_n, slope,
            MASKED, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP,
        )  # fmt: skip
        dout = load_rows(do, row, do_m, do_d, D_V, BLOCK_D_V, VEC)
        change = tl.load(delta + row)
        dweight = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
        if seed is not None:
            keep = tl.trans(keep_factor(seed, stream, start_m, start_n, p, STEP_M, BLOCK_N))
            dweight *= keep * kept
            dv = tl.dot((weight * keep).to(dout.dtype), dout, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = weight * (dweight - change[None, :])
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
        q += (wide + STEP_M) * (q_m * VEC)
        do += (wide + STEP_M) * (do_m * VEC)
        lse += STEP_M
        delta += STEP_M
    return dk, dv


@triton.jit
def _over_keys(
    low, high, k, v, query, dout, of_row, change, dq,
    start_m, M, N, shift, left, right, scale, softcap, p, kept, stream,
    k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_M: tl.constexpr, STEP_N: tl.constexpr,
    PRECISION: tl.constexpr, FROM_DELTA: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries after the keys from low to high; tiles are [queries, keys].

    FROM_DELTA: products of dout and v begin at -delta, which saves a subtraction for each score where sums
    are registers that a product may begin with.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, STEP_N)
    m = start_m + i
    wide = tl.full((), 0, tl.int64)
    k += (wide + low) * (k_n * VEC)
    v += (wide + low) * (v_n * VEC)
    for start_n in tl.range(low, high, STEP_N):
        row = j
        if MASKED:
            row = tl.minimum(j, N - 1 - start_n)
        n = start_n + j
        key = load_rows(k, row, k_n, k_d, D, BLOCK_D, VEC)
        value = load_rows(v, row, v_n, v_d, D_V, BLOCK_D_V, VEC)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        at = wide + start_n
        bias_tile = bias
        mask_tile = mask
        if bias is not None:
            bias_tile = bias + at * bias_n
        if mask is not None:
            mask_tile = mask + at * mask_n
        inside = tl.minimum(i, M - 1 - start_m)
        weight, capped = weights(
            s, m[:, None], n[None, :], inside[:, None], row[None, :], of_row[:, None], N, shift, left,
            right, scale, softcap, bias_tile, bias_m, bias_n, mask_tile, mask_m, mask_n, slope,
            MASKED, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP,
        )  # fmt: skip
        if FROM_DELTA and seed is None:
            less = tl.zeros([BLOCK_M, STEP_N], tl.float32) - change[:, None]
            ds = weight * tl.dot(dout, tl.trans(value), less, input_precision=PRECISION)
        else:
            dweight = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
            if seed is not None:
                dweight *= keep_factor(seed, stream, start_m, start_n, p, BLOCK_M, STEP_N) * kept
            ds = weight * (dweight - change[:, None])
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
        k += (wide + STEP_N) * (k_n * VEC)
        v += (wide + STEP_N) * (v_n * VEC)
    return dq


@triton.jit
def _store_rows(x, row_step, value, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    keep = (i < rows)[:, None] & (d < D)[None, :]
    tl.store(x + ((i * row_step)[:, None] + d[None, :]), value.to(x.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["heads", "M", "N", "sequences", "left", "right", "bias_period", "mask_period"])
def attention_backward_kernel(
    q, k, v, do, lse, delta, dq, dk, dv, bias, mask, slopes, seed, cu_m, cu_n,
    heads, M, N, sequences, left, right, scale, softcap, p, kept,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, bias_period, mask_b, mask_h, mask_m, mask_n, mask_period, slopes_b,
    do_b, do_h, do_m, do_d, gradient_scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP_M: tl.constexpr, STEP_N: tl.constexpr, FROM_DELTA: tl.constexpr,
):  # fmt: skip
    """Grid: (batch · key heads · (tiles of keys + GROUP · tiles of queries))."""
    BLIND: tl.constexpr = not PLAIN or HAS_LEFT or BOTTOM_RIGHT
    queries = M  # of all packed sequences together
    keys = N
    if cu_m is None:
        tiles_m = (M + BLOCK_M - 1) // BLOCK_M
        tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    else:
        tiles_m = M // BLOCK_M + sequences
        tiles_n = N // BLOCK_N + sequences
    each = tiles_n + GROUP * tiles_m
    index = tl.program_id(0) // each
    turn = tl.program_id(0) % each
    if turn < tiles_n:
        tile, kv_head, batch, N, M, first_n, first_m = locate(
            index * tiles_n + turn, N, heads // GROUP, M, cu_n, cu_m, sequences, BLOCK_N, BLOCK_SEQUENCES
        )
        start_n = tile * BLOCK_N
        if start_n < N:
            shift = N - M if BOTTOM_RIGHT else 0
            in_batch = batch.to(tl.int64)
            if cu_m is not None:
                in_batch = in_batch * 0
            at_m = tl.full((), 0, tl.int64) + first_m
            at_n = tl.full((), 0, tl.int64) + first_n + start_n
            wide_head = kv_head.to(tl.int64)
            j = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - start_n)
            k += (in_batch * k_b + wide_head * k_h + at_n * k_n) * VEC
            v += (in_batch * v_b + wide_head * v_h + at_n * v_n) * VEC
            key = load_rows(k, j, k_n, k_d, D, BLOCK_D, VEC)
            value = load_rows(v, j, v_n, v_d, D_V, BLOCK_D_V, VEC)
            key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            value_sum = tl.zeros([BLOCK_N, BLOCK_D_V], tl.float32)
            low, full_low, full_high, high = 0, 0, M, M
            if HAS_RIGHT:
                low = tl.maximum(start_n - shift - right, 0)
                full_low = tl.maximum(start_n + BLOCK_N - 1 - shift - right, 0)
            if HAS_LEFT:
                full_high = tl.minimum(start_n + left - shift + 1, M)
                high = tl.minimum(tl.minimum(start_n + BLOCK_N, N) + left - shift, M)
            low, a, b = spans(low, full_low, full_high, high, STEP_M)
            for g in range(GROUP):
                head = kv_head * GROUP + g
                wide = head.to(tl.int64)
                q_head = q + (in_batch * q_b + wide * q_h + at_m * q_m) * VEC
                do_head = do + (in_batch * do_b + wide * do_h + at_m * do_m) * VEC
                lse_head = lse + (in_batch * heads + wide) * queries + at_m
                delta_head = delta + (in_batch * heads + wide) * queries + at_m
                bias_head = bias
                mask_head = mask
                slope = None
                if bias is not None:
                    bias_head = bias + (
                        (batch % bias_period).to(tl.int64) * bias_b + wide * bias_h + at_n * bias_n
                    )
                if mask is not None:
                    mask_head = mask + (
                        (batch % mask_period).to(tl.int64) * mask_b + wide * mask_h + at_n * mask_n
                    )
                if slopes is not None:
                    slope = tl.load(slopes + batch * slopes_b + head)
                stream = batch * heads + head
                if HAS_RIGHT:
                    key_sum, value_sum = _over_queries(
                        low, a, q_head, do_head, lse_head, delta_head, key, value, key_sum, value_sum,
                        start_n, M, N, shift, left, right, scale, softcap, p, kept, stream,
                        q_m, q_d, do_m, do_d, bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                        seed, True, BLIND, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D,
                        BLOCK_D_V, BLOCK_N, STEP_M, PRECISION,
                    )  # fmt: skip
                key_sum, value_sum = _over_queries(
                    a, b, q_head, do_head, lse_head, delta_head, key, value, key_sum, value_sum,
                    start_n, M, N, shift, left, right, scale, softcap, p, kept, stream,
                    q_m, q_d, do_m, do_d, bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope, seed,
                    False, BLIND, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V,
                    BLOCK_N, STEP_M, PRECISION,
                )  # fmt: skip
                key_sum, value_sum = _over_queries(
                    b, high, q_head, do_head, lse_head, delta_head, key, value, key_sum, value_sum,
                    start_n, M, N, shift, left, right, scale, softcap, p, kept, stream,
                    q_m, q_d, do_m, do_d, bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope, seed,
                    True, BLIND, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V,
                    BLOCK_N, STEP_M, PRECISION,
                )  # fmt: skip
            if seed is not None:
                value_sum *= kept
            kv_heads = heads // GROUP
            to = (in_batch * keys + at_n) * kv_heads + wide_head
            _store_rows(dk + to * D, kv_heads * D, key_sum * gradient_scale, N - start_n, D, BLOCK_D, BLOCK_N)
            _store_rows(dv + to * D_V, kv_heads * D_V, value_sum, N - start_n, D_V, BLOCK_D_V, BLOCK_N)
    else:
        turn -= tiles_n
        tile, head, batch, M, N, first_m, first_n = locate(
            (index * GROUP + turn // tiles_m) * tiles_m + turn % tiles_m,
            M, heads, N, cu_m, cu_n, sequences, BLOCK_M, BLOCK_SEQUENCES,
        )  # fmt: skip
        if cu_m is None and HAS_RIGHT:
            tile = tiles_m - 1 - tile  # those with most keys first
        start_m = tile * BLOCK_M
        if start_m < M:
            shift = N - M if BOTTOM_RIGHT else 0
            in_batch = batch.to(tl.int64)
            if cu_m is not None:
                in_batch = in_batch * 0
            at_m = tl.full((), 0, tl.int64) + first_m + start_m
            at_n = tl.full((), 0, tl.int64) + first_n
            wide = head.to(tl.int64)
            kv_head = (head // GROUP).to(tl.int64)
            q += (in_batch * q_b + wide * q_h + at_m * q_m) * VEC
            do += (in_batch * do_b + wide * do_h + at_m * do_m) * VEC
            k += (in_batch * k_b + kv_head * k_h + at_n * k_n) * VEC
            v += (in_batch * v_b + kv_head * v_h + at_n * v_n) * VEC
            of_head = (in_batch * heads + wide) * queries + at_m
            if bias is not None:
                bias += (batch % bias_period).to(tl.int64) * bias_b + wide * bias_h + at_m * bias_m
            if mask is not None:
                mask += (batch % mask_period).to(tl.int64) * mask_b + wide * mask_h + at_m * mask_m
            slope = None
            if slopes is not None:
                slope = tl.load(slopes + batch * slopes_b + head)
            i = tl.arange(0, BLOCK_M)
            row = tl.minimum(i, M - 1 - start_m)
            query = load_rows(q, row, q_m, q_d, D, BLOCK_D, VEC)
            dout = load_rows(do, row, do_m, do_d, D_V, BLOCK_D_V, VEC)
            of_row = row_lse(lse + of_head, i, M - start_m, False, BLIND)
            change = tl.load(delta + of_head + row)
            total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            low, full_low, full_high, high = 0, 0, N, N
            if HAS_LEFT:
                low = tl.maximum(start_m + shift - left, 0)
                full_low = tl.maximum(start_m + BLOCK_M - 1 + shift - left, 0)
            if HAS_RIGHT:
                full_high = tl.minimum(start_m + shift + right + 1, N)
                high = tl.minimum(tl.minimum(start_m + BLOCK_M, M) + shift + right, N)
            low, a, b = spans(low, full_low, full_high, high, STEP_N)
            stream = batch * heads + head
            if HAS_LEFT:
                total = _over_keys(
                    low, a, k, v, query, dout, of_row, change, total,
                    start_m, M, N, shift, left, right, scale, softcap, p, kept, stream,
                    k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
                    True, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M,
                    STEP_N, PRECISION, FROM_DELTA,
                )  # fmt: skip
            total = _over_keys(
                a, b, k, v, query, dout, of_row, change, total,
                start_m, M, N, shift, left, right, scale, softcap, p, kept, stream,
                k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
                False, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M, STEP_N,
                PRECISION, FROM_DELTA,
            )  # fmt: skip
            total = _over_keys(
                b, high, k, v, query, dout, of_row, change, total,
                start_m, M, N, shift, left, right, scale, softcap, p, kept, stream,
                k_n, k_d, v_n, v_d, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed,
                True, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP, D, D_V, VEC, BLOCK_D, BLOCK_D_V, BLOCK_M, STEP_N,
                PRECISION, FROM_DELTA,
            )  # fmt: skip
            to = ((in_batch * queries + at_m) * heads + wide) * D
            _store_rows(dq + to, heads * D, total * gradient_scale, M - start_m, D, BLOCK_D, BLOCK_M)


DELTA = Config(BLOCK=64, num_warps=4, num_stages=1)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``."""
    return backward_configs(device)


def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    cu: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias_gradient: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dbias) of ``attention_forward``'s result and arguments.

    do: like o, any strides; dlse: the gradient of lse (which is in base 2), or None. dq, dk and dv lie as
    [batch, length, heads, head_dim]. dbias: None unless asked for.
    """
    problem = attention_problem(q, k, v, bias, mask, slopes, seed, cu, options)
    if do.stride(3) != 1:
        do = do.contiguous()
    plan = problem.launches.get(("backward", o.stride(), do.stride(), config))
    if plan is None:
        plan = problem.launches["backward", o.stride(), do.stride(), config] = _plan(problem, o, do, config)
    H, M, N, D, D_V = problem.H, problem.M, problem.N, problem.D, problem.D_V
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel, plan.delta_grid, o, do, dlse, delta, H, M, *plan.delta_numbers,
        config=DELTA, reads=(o, do, dlse), writes=(delta,), **plan.delta_flags,
    )  # fmt: skip
    dq = empty_like_heads(q, H, M, D)
    dk = empty_like_heads(q, problem.HK, N, D)
    dv = empty_like_heads(q, problem.HK, N, D_V)
    cu_m, cu_n = cu if cu is not None else (None, None)
    launch(
        attention_backward_kernel, plan.grid, q, k, v, do, lse, delta, dq, dk, dv, bias, mask, slopes,
        seed if options.dropout_p else None, cu_m, cu_n, *plan.numbers, options.scale,
        config=plan.config, reads=(q, k, v, do, lse, delta, bias, mask), writes=(dq, dk, dv),
        flops=plan.flops, **plan.flags,
    )  # fmt: skip
    dbias = None
    if bias_gradient:
        dbias = attention_bias_gradient(
            q, k, v, do, lse, delta, options, bias=bias, mask=mask, slopes=slopes, seed=seed
        )
    return dq, dk, dv, dbias


class _Plan(NamedTuple):
    """What the launches of one kind of call have in common."""

    delta_grid: tuple[int]
    delta_numbers: tuple
    delta_flags: dict
    grid: tuple[int]
    numbers: tuple
    flags: dict
    config: Config
    flops: int


def _plan(problem: Problem, o: torch.Tensor, do: torch.Tensor, config: Config | None) -> _Plan:
    numbers, flags = gradient_steps(problem, do)
    steps, vec = delta_steps(o, do)
    B, H, HK, M, N = problem.B, problem.H, problem.HK, problem.M, problem.N
    if config is None:
        config = backward_config(problem.dtype, problem.block_d, problem.device, problem.kind)
    if problem.sequences:
        count_m, count_n = (
            rows // block + problem.sequences for rows, block in ((M, config.BLOCK_M), (N, config.BLOCK_N))
        )
    else:
        count_m, count_n = tiles(M, config.BLOCK_M), tiles(N, config.BLOCK_N)
    # wgmma and tcgen05 have sums that would be written first; at head dim 256 it saves nothing.
    in_registers = problem.device.capability // 10 in (8, 12)
    from_delta = in_registers and problem.dtype != torch.float32 and problem.block_d <= 128
    flags = flags | {"FROM_DELTA": from_delta}
    return _Plan(
        (tiles(M, DELTA.BLOCK) * H * B,), tuple(steps),
        {"D_V": problem.D_V, "VEC": vec, "BLOCK_D_V": flags["BLOCK_D_V"]},
        (B * HK * (count_n + H // HK * count_m),), numbers, flags, config,
        2 * B * H * M * N * (3 * problem.D + 2 * problem.D_V),
    )  # fmt: skip


def _run(call: AttentionCall, config: Config | None = None):
    suited = backward_configs_for(call.dtype, call.block_d, current_device(), call.kind)
    check_config(config, suited)
    q, k, v, options, extra = call.tensors()
    o, lse = call.result()
    return attention_backward(o, None, q, k, v, o, lse, options, **extra, config=config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""
    return [
        RepresentativeCall(name, functools.partial(_run, case)) for name, case in attention_calls().items()
    ]
