"""Attention of a few queries to many keys: a step of generation that reads a cache of keys and values.

Forward only, as ``attention`` defines it, where the queries of one key head are at most 16: rows of a tile
are the pairs (head of the group, query), so that a cache is read once however many heads share it. The keys
are split among programs until the device is busy; each leaves o, the maximum and the sum of its share, and a
second pass merges them in order: the same bits every time, and the same for every split but in rounding.
(Flash-Decoding; Dao, Haziza, Massa and Sizov, 2023.)

What is decided does not depend on the number of keys but for the split, so a growing cache compiles and
checks nothing anew.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import activate
from fastnets.kernels.attention_calls import AttentionCall, check_config
from fastnets.kernels.attention_configs import decode_config, decode_configs
from fastnets.kernels.attention_problem import (
    KEPT,
    Options,
    Problem,
    empty_like_heads,
)
from fastnets.kernels.attention_tile import LOWEST, add_terms, bounds, load_rows
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["ROWS", "attention_decode", "configs", "representative_calls"]

ROWS = 16  # of a tile: what tensor cores take at least
# Splits that the second pass merges at most, and programs for each multiprocessor that splitting aims at.
SPLITS = 32
PROGRAMS = 2
MERGE = Config(BLOCK=32, BLOCK_SPLITS=SPLITS, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["heads", "M", "N", "left", "right", "bias_period", "mask_period", "keys_each"])
def attention_decode_kernel(
    q, k, v, o, parts, tops, totals, bias, mask, slopes,
    heads, M, N, sequences, left, right, scale, softcap, p, kept,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, bias_period, mask_b, mask_h, mask_m, mask_n, mask_period, slopes_b,
    keys_each,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A share of the keys of one key head. Grid: (batch · key heads, splits).

    Into o where parts is None (one split), else into parts [splits, B, M, H, D_V], tops and totals
    [splits, B, M, H], fp32.
    """
    kv_heads = heads // GROUP
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    r = tl.arange(0, BLOCK_ROWS)
    inside = r < GROUP * M
    row = tl.minimum(r, GROUP * M - 1)
    m = row % M
    head = kv_head * GROUP + row // M
    shift = N - M if BOTTOM_RIGHT else 0
    first, last = bounds(m, N, shift, left, right, HAS_LEFT, HAS_RIGHT)
    query = load_rows(q + batch * q_b * VEC, head * q_h + m * q_m, 1, q_d, D, BLOCK_D, VEC)
    k += (batch * k_b + kv_head * k_h) * VEC
    v += (batch * v_b + kv_head * v_h) * VEC
    bias_row = row
    if bias is not None:
        bias += batch % bias_period * bias_b
        bias_row = head * bias_h + m * bias_m
    mask_row = row
    if mask is not None:
        mask += batch % mask_period * mask_b
        mask_row = head * mask_h + m * mask_m
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_b + head)[:, None]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D_V], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    top = tl.zeros([BLOCK_ROWS], tl.float32) + LOWEST
    low = split * keys_each
    high = tl.minimum(low + keys_each, N)
    if HAS_LEFT:
        low = tl.maximum(low, tl.maximum(shift - left, 0) // BLOCK_N * BLOCK_N)
    if HAS_RIGHT:
        high = tl.minimum(high, M + shift + right)
    j = tl.arange(0, BLOCK_N)
    for start_n in tl.range(low, high, BLOCK_N):
        column = tl.minimum(j, N - 1 - start_n)
        n = start_n + j
        at = tl.full((), 0, tl.int64) + start_n
        key = load_rows(k + at * (k_n * VEC), column, k_n, k_d, D, BLOCK_D, VEC)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if SOFTCAP:
            s = activate(s * scale, "tanh", 0.0) * softcap
        else:
            s = s * scale
        bias_tile = bias
        mask_tile = mask
        if bias is not None:
            bias_tile = bias + at * bias_n
        if mask is not None:
            mask_tile = mask + at * mask_n
        s = add_terms(s, m[:, None], n[None, :], bias_row[:, None], column[None, :], shift,
                      bias_tile, 1, bias_n, None, 1, 1, slope)  # fmt: skip
        s = add_terms(s, m[:, None], n[None, :], mask_row[:, None], column[None, :], shift,
                      None, 1, 1, mask_tile, 1, mask_n, None)  # fmt: skip
        seen = n[None, :] <= last[:, None]
        if HAS_LEFT:
            seen = seen & (n[None, :] >= first[:, None])
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        weight = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weight, 1)
        value = load_rows(v + at * (v_n * VEC), column, v_n, v_d, D_V, BLOCK_D_V, VEC)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = new
    d = tl.arange(0, BLOCK_D_V)
    to = (batch * M + m) * heads + head
    keep = inside[:, None] & (d < D_V)[None, :]
    if parts is None:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(o + (to * D_V)[:, None] + d[None, :], acc.to(o.dtype.element_ty), mask=keep)
    else:
        batches = tl.num_programs(0) // kv_heads
        to += split.to(tl.int64) * batches * M * heads
        tl.store(parts + (to * D_V)[:, None] + d[None, :], acc, mask=keep)
        tl.store(tops + to, top, mask=inside)
        tl.store(totals + to, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def attention_merge_kernel(
    parts, tops, totals, o, rows, splits,
    D_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """o [rows, D_V] from the splits' shares. Grid: (rows, tiles of D_V)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    there = split < splits
    at = tl.where(there, split, 0).to(tl.int64) * rows + row
    top = tl.load(tops + at)
    total = tl.load(totals + at)
    share = tl.where(there, tl.exp2(top - tl.max(top, axis=0)), 0.0)
    whole = tl.sum(total * share, axis=0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(
        parts + ((at * D_V)[:, None] + d[None, :]), mask=there[:, None] & (d < D_V)[None, :], other=0.0
    )
    acc = tl.sum(part * share[:, None], axis=0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(o + row * D_V + d, acc.to(o.dtype.element_ty), mask=d < D_V)


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``."""
    return decode_configs(device)


class _Plan(NamedTuple):
    """What all calls of one kind have in common, whatever their number of keys.

    before, after: the numbers before and after N.
    """

    before: tuple
    after: tuple
    flags: dict
    config: Config
    programs: int
    wanted_splits: int


_plans: dict = {}


def attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """o of ``attention_forward``, for H / HK · M <= 16 and without dropout.

    splits: into how many parts the keys go, at most so many; chosen where it is None.
    """
    plan = _plan_of(q, k, v, bias, mask, slopes, options, config)
    B, H, M, _ = q.shape
    N, D_V = v.shape[2:]
    count = tiles(N, plan.config.BLOCK_N)
    splits = max(1, min(plan.wanted_splits if splits is None else splits, SPLITS, count))
    tiles_each = tiles(count, splits)
    splits = tiles(count, tiles_each)
    o = empty_like_heads(q, H, M, D_V)
    parts = tops = totals = None
    if splits > 1:
        parts = torch.empty((splits, B, M, H, D_V), dtype=torch.float32, device=q.device)
        tops, totals = torch.empty((2, splits, B, M, H), dtype=torch.float32, device=q.device).unbind(0)
    launch(
        attention_decode_kernel, (plan.programs, splits), q, k, v, o, parts, tops, totals, bias, mask,
        slopes, *plan.before, N, *plan.after, tiles_each * plan.config.BLOCK_N, config=plan.config,
        reads=(q, k, v, bias, mask), writes=(o,) if parts is None else (parts, tops, totals),
        flops=2 * B * H * M * N * (q.shape[3] + D_V), **plan.flags,
    )  # fmt: skip
    if splits > 1:
        launch(
            attention_merge_kernel, (B * M * H, tiles(D_V, MERGE.BLOCK)), parts, tops, totals, o,
            B * M * H, splits,
            config=MERGE, reads=(parts, tops, totals), writes=(o,), D_V=D_V,
        )  # fmt: skip
    return o


def _plan_of(q, k, v, bias, mask, slopes, options: Options, config: Config | None) -> _Plan:
    device = current_device(q)
    B, HK, N, D = k.shape
    key = (
        q.shape, q.stride(), B, HK, D, k.stride(), v.shape[0], v.shape[1], v.shape[2] == N, v.shape[3:],
        v.stride(), q.dtype, k.dtype, v.dtype, _of_scores(bias, N), _of_scores(mask, N),
        None if slopes is None else (slopes.shape, slopes.stride(), slopes.dtype), options, config,
        device.capability, device.multiprocessors,
        q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is not None:
        return plan
    problem = Problem(q, k, v, bias, mask, slopes, None, None, options, device)
    rows = problem.H // problem.HK * problem.M
    if rows > ROWS or options.dropout_p:
        raise ValueError(
            f"attention_decode: {rows} queries for a key head and dropout_p={options.dropout_p}; at most "
            f"{ROWS}, without dropout"
        )
    if config is None:
        config = decode_config(problem.dtype, problem.block_d)
    programs = problem.B * problem.HK
    if len(_plans) >= KEPT:
        _plans.clear()
    plan = _plans[key] = _Plan(
        problem.numbers[:2], problem.numbers[3:], problem.flags, config, programs,
        tiles(PROGRAMS * device.multiprocessors, programs),
    )  # fmt: skip
    return plan


def _of_scores(t: torch.Tensor | None, N: int) -> tuple | None:
    """What a plan depends on of a bias or mask: how its keys broadcast, but not how many there are."""
    if t is None:
        return None
    return t.shape[:3], t.dim(), t.shape[-1] == 1, t.shape[-1] == N, t.stride(), t.dtype


def _run(call: AttentionCall, config: Config | None = None):
    check_config(config, [decode_config(call.dtype, call.block_d)])
    q, k, v, options, extra = call.tensors()
    del extra["seed"], extra["cu"]
    return attention_decode(q, k, v, options, **extra, config=config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    table = {
        "Llama 70B, 4096 bf16": AttentionCall(bf16, D=128, B=1, H=64, group=8, N=4096, M=1),
        "two queries, causal fp16": AttentionCall(half, D=128, B=1, H=32, group=8, N=4096, M=2, right=0),
        "few keys bf16": AttentionCall(bf16, B=64, N=64, M=1),
        "64 fp32": AttentionCall(single, B=2, N=512, M=1),
        "128 fp32": AttentionCall(single, D=128, B=2, N=512, M=1),
        "256 fp16, window, softcap": AttentionCall(
            half, D=256, B=1, H=16, group=2, N=4096, M=1, left=1023, right=0, softcap=50.0
        ),
        "256 fp32": AttentionCall(single, D=256, B=2, N=512, M=1),
        "80 fp16, ALiBi": AttentionCall(half, D=80, B=2, N=512, M=1, alibi=True),
        "16 bf16": AttentionCall(bf16, D=16, B=2, N=512, M=1),
        "32 bf16, bias": AttentionCall(bf16, D=32, B=2, N=512, M=1, bias=(1, 12, 1, 512)),
    }
    return [RepresentativeCall(name, functools.partial(_run, case)) for name, case in table.items()]
