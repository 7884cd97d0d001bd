"""The gradient of attention's bias: ds of ``attention_backward``, summed over all the bias was broadcast to.

    dbias[b, h, m, n] = Σ ds[b + i · period, h', m', n']   over i and over every index where bias has size 1

bias [period, H or 1, M or 1, N or 1]. A program owns a tile of dbias and computes ds again for each tile of
scores that goes into it; where tiles are few, the sum is split among programs and a second pass adds their
parts in order. Deterministic, and nothing of size batch × M × N is stored.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.attention_calls import AttentionCall, attention_calls, check_config
from fastnets.kernels.attention_configs import bias_config, bias_configs
from fastnets.kernels.attention_problem import Options, attention_problem, gradient_steps
from fastnets.kernels.attention_tile import keep_factor, load_rows, row_lse, weights
from fastnets.kernels.device import Device
from fastnets.kernels.launch import Config, RepresentativeCall, UnsupportedConfig, launch, tiles
from fastnets.kernels.partial_sums import sum_rows

__all__ = ["attention_bias_gradient", "configs", "representative_calls"]


@triton.jit
def _products(
    a, row, a_row, a_d, b, column, b_row, b_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[row] · b[column], fp32 [BLOCK_M, BLOCK_N], of at most STEP_D columns of D at a time."""
    if BLOCK_D <= STEP_D:
        left = load_rows(a, row, a_row, a_d, D, BLOCK_D, VEC)
        right = load_rows(b, column, b_row, b_d, D, BLOCK_D, VEC)
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        d = tl.arange(0, STEP_D)
        for start in tl.range(0, D, STEP_D):
            inside = start + d < D
            of = tl.max_contiguous(tl.multiple_of(tl.where(inside, start + d, 0), VEC), VEC)
            left = tl.load(
                a + ((row * (a_row * VEC))[:, None] + (of * a_d)[None, :]), mask=inside[None, :], other=0.0
            )
            right = tl.load(
                b + ((column * (b_row * VEC))[:, None] + (of * b_d)[None, :]), mask=inside[None, :], other=0.0
            )
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
        return total


@triton.jit(do_not_specialize=["heads", "M", "N", "sequences", "left", "right", "bias_period", "mask_period",
                               "batch_count", "terms", "terms_each"])  # fmt: skip
def attention_bias_gradient_kernel(
    q, k, v, do, lse, delta, dbias, bias, mask, slopes, seed,
    heads, M, N, sequences, left, right, scale, softcap, p, kept,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    bias_b, bias_h, bias_m, bias_n, bias_period, mask_b, mask_h, mask_m, mask_n, mask_period, slopes_b,
    do_b, do_h, do_m, do_d, batch_count, terms, terms_each,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, VEC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, OVER_H: tl.constexpr, OVER_M: tl.constexpr,
    OVER_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP_D: tl.constexpr,
):  # fmt: skip
    """dbias [splits, period, H, M, N], 1 for what is summed over. Grid: (tiles · heads · period · splits)."""
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    own_m = 1 if OVER_M else tiles_m
    own_n = 1 if OVER_N else tiles_n
    own_h = 1 if OVER_H else heads
    index = tl.program_id(0)
    own_tile_n = index % own_n
    own_tile_m = (index // own_n) % own_m
    own_head = (index // (own_n * own_m)) % own_h
    rest = index // (own_n * own_m * own_h)
    own_batch = rest % bias_period
    split = rest // bias_period
    shift = N - M if BOTTOM_RIGHT else 0
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((split + 1) * terms_each, terms)
    for term in range(split * terms_each, last):
        tile_n, tile_m, head, turn = own_tile_n, own_tile_m, own_head, term
        if OVER_N:
            tile_n = turn % tiles_n
            turn = turn // tiles_n
        if OVER_M:
            tile_m = turn % tiles_m
            turn = turn // tiles_m
        if OVER_H:
            head = turn % heads
            turn = turn // heads
        batch = own_batch + turn * bias_period
        start_m = tile_m * BLOCK_M
        start_n = tile_n * BLOCK_N
        at_m = tl.full((), 0, tl.int64) + start_m
        at_n = tl.full((), 0, tl.int64) + start_n
        in_batch = tl.full((), 0, tl.int64) + batch
        wide = tl.full((), 0, tl.int64) + head
        kv_head = wide // GROUP
        row = tl.minimum(i, M - 1 - start_m)
        column = tl.minimum(j, N - 1 - start_n)
        of_head = (in_batch * heads + wide) * M + at_m
        of_row = row_lse(lse + of_head, i, M - start_m, True, True)
        change = tl.load(delta + of_head + row)
        bias_tile = bias + (
            (own_batch * bias_b + tl.zeros_like(at_m)) + wide * bias_h + at_m * bias_m + at_n * bias_n
        )
        mask_tile = mask
        if mask is not None:
            mask_tile = mask + (
                in_batch % mask_period * mask_b + wide * mask_h + at_m * mask_m + at_n * mask_n
            )
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + batch * slopes_b + head)
        s = _products(
            q + (in_batch * q_b + wide * q_h + at_m * q_m) * VEC, row, q_m, q_d,
            k + (in_batch * k_b + kv_head * k_h + at_n * k_n) * VEC, column, k_n, k_d,
            D, BLOCK_D, STEP_D, VEC, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        weight, _ = weights(
            s, (start_m + i)[:, None], (start_n + j)[None, :], row[:, None], column[None, :], of_row[:, None],
            N, shift, left, right, scale, softcap, bias_tile, bias_m, bias_n, mask_tile, mask_m, mask_n,
            slope, True, HAS_LEFT, HAS_RIGHT, PLAIN, SOFTCAP,
        )  # fmt: skip
        dweight = _products(
            do + (in_batch * do_b + wide * do_h + at_m * do_m) * VEC, row, do_m, do_d,
            v + (in_batch * v_b + kv_head * v_h + at_n * v_n) * VEC, column, v_n, v_d,
            D_V, BLOCK_D_V, STEP_D, VEC, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        if seed is not None:
            stream = batch * heads + head
            dweight *= keep_factor(seed, stream, start_m, start_n, p, BLOCK_M, BLOCK_N) * kept
        total += weight * (dweight - change[:, None])
    rows = 1 if OVER_M else M
    columns = 1 if OVER_N else N
    m = own_tile_m * BLOCK_M + i
    n = own_tile_n * BLOCK_N + j
    first = ((split * bias_period + own_batch) * own_h + own_head).to(tl.int64) * rows
    if OVER_M and OVER_N:
        tl.store(dbias + first, tl.sum(tl.sum(total, axis=1), axis=0).to(dbias.dtype.element_ty))
    elif OVER_M:
        at = dbias + first * columns + n
        tl.store(at, tl.sum(total, axis=0).to(dbias.dtype.element_ty), mask=n < N)
    elif OVER_N:
        tl.store(dbias + first + m, tl.sum(total, axis=1).to(dbias.dtype.element_ty), mask=m < M)
    else:
        at = dbias + ((first + m)[:, None] * columns + n[None, :])
        tl.store(at, total.to(dbias.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``."""
    return bias_configs(device)


def attention_bias_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    options: Options,
    *,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """dbias, contiguous, in the shape and dtype of bias; lse, delta: see ``attention_backward``."""
    problem = attention_problem(q, k, v, bias, mask, slopes, seed, None, options)
    if config is None:
        config = bias_config(problem.dtype, problem.block_d, problem.device)
    over_h, over_m, over_n = (bias.shape[i] == 1 for i in (1, 2, 3))
    tiles_m, tiles_n = tiles(problem.M, config.BLOCK_M), tiles(problem.N, config.BLOCK_N)
    programs = bias.shape[0] * (1 if over_h else problem.H) * (1 if over_m else tiles_m)
    programs *= 1 if over_n else tiles_n
    terms = problem.B // bias.shape[0] * (problem.H if over_h else 1)
    terms *= (tiles_m if over_m else 1) * (tiles_n if over_n else 1)
    splits = max(1, min(terms, 4 * problem.device.multiprocessors // programs))
    terms_each = tiles(terms, splits)
    splits = tiles(terms, terms_each)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    parts = dbias
    if splits > 1:
        parts = torch.empty((splits, *bias.shape), dtype=torch.float32, device=bias.device)
    numbers, flags = gradient_steps(problem, do)
    launch(
        attention_bias_gradient_kernel, (programs * splits,), q, k, v, do, lse, delta, parts, bias, mask,
        slopes, seed if options.dropout_p else None, *numbers, problem.B, terms, terms_each, config=config,
        reads=(q, k, v, do, lse, delta, bias, mask), writes=(parts,), flops=problem.flops, **flags,
        OVER_H=over_h, OVER_M=over_m, OVER_N=over_n,
    )  # fmt: skip
    return sum_rows(parts, dbias) if splits > 1 else dbias


def _run(call: AttentionCall, config: Config | None = None):
    if call.bias is None:
        raise UnsupportedConfig("there is no bias")
    check_config(config, [bias_config(call.dtype, call.block_d, None)])
    q, k, v, options, extra = call.tensors()
    o, lse = call.result()
    extra.pop("cu")
    return attention_bias_gradient(q, k, v, o, lse, lse, options, **extra, config=config)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""
    return [
        RepresentativeCall(name, functools.partial(_run, case)) for name, case in attention_calls().items()
    ]
