"""Cross-entropy over class indices, with the distillation term, in one pass that leaves the gradient behind.

    ce[m] = (1 − s) · w[t] · (lse(x) − x[t]) + s / V · Σ_v w[v] · (lse(x) − x[v])          row m = (n, d)
    kl[m] = Σ_v q[v] · (log q[v] − log p[v]),   p = softmax(x / T), q = softmax(teacher / T)
    loss  = (1 − α) · Σ ce / Σ w[t] + α · T² · Σ kl / M                                    (reduction "mean")

x [N, V, d...], target t [N, d...], s the label smoothing; ignored targets have ce = 0 and count in no sum.
Without a teacher α is 0.

The softmax is taken online in base 2 (Milakov and Gimelshein, 2018): a row that fits a tile is read once, a
longer one a second time for the gradient. The gradient of the sum, scaled by the divisor of the mean, is
written by the forward; the backward multiplies it by the incoming gradient over that divisor. A first, small
kernel adds the targets' weights up and looks for targets out of range. Sums over programs are taken in a
second pass in a fixed order.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnets.kernels.cross_entropy_tile import (
    as_rows,
    check_logits,
    clamp_classes,
    classes_at_once,
    extent,
    pick,
    row_offset,
    steps,
)
from fastnets.kernels.cross_entropy_tile import configs_of_rows as configs
from fastnets.kernels.launch import Config, RepresentativeCall, launch, tiles

__all__ = ["CrossEntropy", "configs", "cross_entropy", "representative_calls"]


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Programs that share the sum of the targets' weights; every program of the main kernel adds their sums up.
_PARTS = 64
_BLOCK_TARGETS = 1024


@triton.jit(do_not_specialize=["M", "V", "ignore_index", "steps"])
def target_weight_kernel(
    target, weight, sums, outside, M, V, ignore_index, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """sums[i]: the weights of the targets of program i; outside[i]: how many of them are no class."""
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for step in range(steps):
        m = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        t = tl.load(target + m, mask=m < M, other=ignore_index)
        counts = (t != ignore_index) & (m < M)
        within = (t >= 0) & (t < V)
        if weight is None:
            w = tl.full([BLOCK], 1.0, tl.float32)
        else:
            w = tl.load(weight + tl.where(within, t, 0), mask=counts & within, other=0.0).to(tl.float32)
        total += tl.where(counts & within, w, 0.0)
        wrong += (counts & (within == 0)).to(tl.int32)
    tl.store(sums + pid, tl.sum(total, axis=0))
    tl.store(outside + pid, tl.sum(wrong, axis=0))


@triton.jit
def _shift(largest):
    """What is subtracted before exp: a row of −inf alone stays −inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _widen(largest, total, value, scale):
    """Online softmax: the running maximum and Σ exp(scale · (x − shift)), in base 2, after one more block."""
    new = tl.maximum(largest, tl.max(value, axis=1))
    # Nothing was summed before the first finite maximum (or NaN was, which stays).
    total *= tl.where(largest == float("-inf"), 1.0, tl.exp2((_shift(largest) - _shift(new)) * scale))
    return new, total + tl.sum(tl.exp2((value - _shift(new)[:, None]) * scale), axis=1)


@triton.jit
def _class_weight(weight, v, v_mask):
    """The weights of a block of classes, [1, BLOCK_V] or [1, 1]."""
    if weight is None:
        return tl.where(v_mask, 1.0, 0.0)[None, :]
    else:
        return tl.load(weight + v, mask=v_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish(
    x, y, v, mask, w, weight_sum, x_shift, log_total, log_total_T, y_shift, y_log_total, t, hard, soft,
    kl_factor, temperature, gradient, offset, smooth, kl, SMOOTHING: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """Adds one block of classes to the rows' sums, and writes their gradient."""
    z = x - x_shift[:, None]
    if SMOOTHING:
        smooth += tl.sum(tl.where(mask, w * (log_total[:, None] - z), 0.0), axis=1)
    if TEACHER:
        log_p = z / temperature - log_total_T[:, None]
        log_q = (y - y_shift[:, None]) / temperature - y_log_total[:, None]
        q = tl.exp2(log_q * LOG2_E)
        kl += tl.sum(tl.where(mask, q * (log_q - log_p), 0.0), axis=1)
    if gradient is not None:
        p = tl.exp2((z - log_total[:, None]) * LOG2_E)
        value = hard[:, None] * (p - tl.where(v[None, :] == t[:, None], 1.0, 0.0))
        if SMOOTHING:
            value += soft[:, None] * (p * weight_sum - w)
        if TEACHER:
            value += kl_factor * (tl.exp2(log_p * LOG2_E) - q)
        tl.store(gradient + offset, value.to(gradient.dtype.element_ty), mask=mask)
    return smooth, kl


@triton.jit(
    do_not_specialize=["M", "V_units", "ignore_index", "parts"],
    do_not_specialize_on_alignment=["x_n", "x_v", "x_d", "y_n", "y_v", "y_d", "g_n", "g_v", "g_d"],
)
def cross_entropy_kernel(
    x,
    # The teacher's logits, or None.
    teacher,
    target,
    weight,
    # From target_weight_kernel.
    sums,
    outside,
    # One value a row, or with REDUCTION one a program.
    loss,
    gradient,
    # What the gradient is to be divided by, and whether all targets are classes: one value each.
    divisor,
    valid,
    M,
    # V in units of VEC: so many classes are neighbours in all tensors.
    V_units,
    D,
    # Of classes in elements, the others in units of VEC.
    x_n,
    x_v,
    x_d,
    y_n,
    y_v,
    y_d,
    g_n,
    g_v,
    g_d,
    smoothing,
    alpha,
    temperature,
    ignore_index,
    parts,
    REDUCTION: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    TEACHER: tl.constexpr = teacher is not None
    V = V_units * VEC
    pid = tl.program_id(0)
    row = pid * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < M
    row = tl.where(row_mask, row, 0)
    v0 = tl.arange(0, BLOCK_V)
    n = row // D
    d = row % D
    if WIDE:
        n = n.to(tl.int64)
        d = d.to(tl.int64)
        v0 = v0.to(tl.int64)
    x_row = row_offset(n, d, x_n, x_d, VEC)
    y_row = x_row
    if TEACHER:
        y_row = row_offset(n, d, y_n, y_d, VEC)
    g_row = row_offset(n, d, g_n, g_d, VEC)

    part = tl.arange(0, PARTS)
    total_weight = tl.sum(tl.load(sums + part, mask=part < parts, other=0.0), axis=0)
    # The mean over no target at all is NaN, but its gradient zero: nothing may be divided by zero later.
    divide_by = 1.0
    if REDUCTION == "mean":
        divide_by = tl.where(total_weight == 0.0, 1.0, total_weight)
    if pid == 0:
        wrong = tl.sum(tl.load(outside + part, mask=part < parts, other=0), axis=0)
        tl.store(divisor, divide_by)
        tl.store(valid, wrong == 0)

    # The statistics of the rows: with a teacher also of x / T, and of the teacher's.
    log2_t = LOG2_E
    if TEACHER:
        log2_t = LOG2_E / temperature
    x_largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    x_total = tl.zeros([BLOCK_ROWS], tl.float32)
    x_total_T = tl.zeros([BLOCK_ROWS], tl.float32)
    y_largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    y_total = tl.zeros([BLOCK_ROWS], tl.float32)
    weight_sum = 0.0
    if ONE_BLOCK:
        v_mask = v0 < V
        mask = row_mask[:, None] & v_mask[None, :]
        inside = clamp_classes(v0, v_mask, VEC)
        x_block = tl.load(x + (x_row + (inside * x_v)[None, :]), mask=mask, other=float("-inf"))
        x_block = x_block.to(tl.float32)
        y_block = x_block
        w = _class_weight(weight, inside, v_mask)
        weight_sum = tl.sum(w)
        largest = x_largest
        x_largest, x_total = _widen(largest, x_total, x_block, LOG2_E)
        if TEACHER:
            _, x_total_T = _widen(largest, x_total_T, x_block, log2_t)
            y_block = tl.load(teacher + (y_row + (inside * y_v)[None, :]), mask=mask, other=float("-inf"))
            y_block = y_block.to(tl.float32)
            y_largest, y_total = _widen(y_largest, y_total, y_block, log2_t)
    else:
        for first in range(0, V, BLOCK_V):
            v = first + v0
            v_mask = v < V
            mask = row_mask[:, None] & v_mask[None, :]
            inside = clamp_classes(v, v_mask, VEC)
            x_block = tl.load(x + (x_row + (inside * x_v)[None, :]), mask=mask, other=float("-inf"))
            x_block = x_block.to(tl.float32)
            if SMOOTHING:
                weight_sum += tl.sum(_class_weight(weight, inside, v_mask))
            largest = x_largest
            x_largest, x_total = _widen(largest, x_total, x_block, LOG2_E)
            if TEACHER:
                _, x_total_T = _widen(largest, x_total_T, x_block, log2_t)
                y_block = tl.load(teacher + (y_row + (inside * y_v)[None, :]), mask=mask, other=float("-inf"))
                y_largest, y_total = _widen(y_largest, y_total, y_block.to(tl.float32), log2_t)
    x_shift = _shift(x_largest)
    y_shift = _shift(y_largest)
    log_total = tl.log2(x_total) * LN_2
    log_total_T = tl.log2(x_total_T) * LN_2
    y_log_total = tl.log2(y_total) * LN_2

    # The rows' targets. One that is no class reads class 0: what comes of it is reported, not used.
    t = tl.load(target + row, mask=row_mask, other=ignore_index)
    counts = row_mask & (t != ignore_index)
    t = tl.where(counts & (t >= 0) & (t < V), t, 0)
    if weight is None:
        w_target = tl.where(counts, 1.0, 0.0)
    else:
        w_target = tl.load(weight + t, mask=counts, other=0.0).to(tl.float32)
    x_target = tl.load(x + ((n * x_n + d * x_d) * VEC + t * x_v), mask=row_mask, other=0.0).to(tl.float32)

    hard = w_target * (1.0 - smoothing) * (1.0 - alpha)
    soft = tl.where(counts, smoothing / V * (1.0 - alpha), 0.0)
    kl_factor = alpha * temperature
    if REDUCTION == "mean":
        # No weight at all: as stock, NaN for the rows that count and zero for the ignored ones.
        no_weight = tl.zeros_like(hard) + total_weight == 0.0
        hard_gradient = tl.where(counts & no_weight, float("nan"), hard)
        kl_factor *= divide_by / M
    else:
        hard_gradient = hard
    smooth = tl.zeros([BLOCK_ROWS], tl.float32)
    kl = tl.zeros([BLOCK_ROWS], tl.float32)
    if ONE_BLOCK:
        smooth, kl = _finish(
            x_block, y_block, v0, mask, w, weight_sum, x_shift, log_total, log_total_T, y_shift, y_log_total,
            t, hard_gradient, soft, kl_factor, temperature, gradient, g_row + (inside * g_v)[None, :], smooth,
            kl, SMOOTHING, TEACHER,
        )  # fmt: skip
    elif SMOOTHING or TEACHER or gradient is not None:
        for first in range(0, V, BLOCK_V):
            v = first + v0
            v_mask = v < V
            mask = row_mask[:, None] & v_mask[None, :]
            inside = clamp_classes(v, v_mask, VEC)
            x_block = tl.load(x + (x_row + (inside * x_v)[None, :]), mask=mask, other=float("-inf"))
            x_block = x_block.to(tl.float32)
            y_block = x_block
            if TEACHER:
                y_block = tl.load(teacher + (y_row + (inside * y_v)[None, :]), mask=mask, other=float("-inf"))
                y_block = y_block.to(tl.float32)
            smooth, kl = _finish(
                x_block, y_block, v, mask, _class_weight(weight, inside, v_mask), weight_sum, x_shift,
                log_total, log_total_T, y_shift, y_log_total, t, hard_gradient, soft, kl_factor, temperature,
                gradient, g_row + (inside * g_v)[None, :], smooth, kl, SMOOTHING, TEACHER,
            )  # fmt: skip

    ce = tl.where(counts, hard * (log_total - (x_target - x_shift)), 0.0)
    if SMOOTHING:
        ce += tl.where(counts, soft * smooth, 0.0)
    kl *= alpha * temperature * temperature
    if REDUCTION == "none":
        if TEACHER:
            ce += kl
        tl.store(loss + row, ce.to(loss.dtype.element_ty), mask=row_mask)
    else:
        ce_total = tl.sum(ce, axis=0)
        kl_total = tl.sum(tl.where(row_mask, kl, 0.0), axis=0)
        if REDUCTION == "mean":
            ce_total = tl.div_rn(ce_total, total_weight)
            kl_total = tl.div_rn(kl_total, M * 1.0)
        if TEACHER:
            ce_total += kl_total
        tl.store(loss + pid, ce_total)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(values, total, count, BLOCK: tl.constexpr):
    """total[0] = Σ values, in one program and a fixed order."""
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        sums += tl.load(values + i, mask=i < count, other=0.0)
    tl.store(total, tl.sum(sums, axis=0).to(total.dtype.element_ty))


# --- launching ----------------------------------------------------------------------------------------------


class CrossEntropy(NamedTuple):
    """loss: a scalar, or [N, d...] with reduction "none". gradient: of the sum, like the logits, or None.
    divisor: [1] fp32, what the gradient is to be divided by. valid: [1] bool, whether every target is a
    class or ignored; where not, loss and gradient mean nothing."""

    loss: torch.Tensor
    gradient: torch.Tensor | None
    divisor: torch.Tensor
    valid: torch.Tensor


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    teacher: torch.Tensor | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    keep_gradient: bool = False,
    loss_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> CrossEntropy:
    """The loss at the top of this file; see ``CrossEntropy``.

    logits, teacher: [N, V, d...], fp32, fp16 or bf16 (each its own), any strides. target: [N, d...] int64.
    weight: [V] of any float dtype. loss_dtype: that of the logits unless given. Nothing is raised for a
    target out of range: ``valid`` tells. Raises ``ValueError`` and ``TypeError`` for what does not fit.
    """
    check_logits(logits, target, weight, reduction, teacher)
    x, V = as_rows(logits), logits.shape[1]
    N, _, D = x.shape
    M = N * D
    y = x if teacher is None else as_rows(teacher)
    target = target.contiguous()
    weight = None if weight is None else weight.contiguous()
    gradient = torch.empty_like(x) if keep_gradient else None
    loss_dtype = loss_dtype or logits.dtype
    if M == 0:
        empty = torch.full((), math.nan if reduction == "mean" else 0.0, dtype=loss_dtype, device=x.device)
        return CrossEntropy(
            empty.expand(target.shape) if reduction == "none" else empty,
            gradient if gradient is None else gradient.view(logits.shape),
            torch.ones(1, device=x.device),
            torch.ones(1, dtype=torch.bool, device=x.device),
        )

    parts = min(tiles(M, _BLOCK_TARGETS), _PARTS)
    sums = torch.empty(parts, dtype=torch.float32, device=x.device)
    outside = torch.empty(parts, dtype=torch.int32, device=x.device)
    launch(
        target_weight_kernel,
        (parts,),
        target,
        weight,
        sums,
        outside,
        M,
        V,
        ignore_index,
        tiles(tiles(M, _BLOCK_TARGETS), parts),
        config=Config(BLOCK=_BLOCK_TARGETS, num_warps=4, num_stages=1),
        reads=(target, weight),
        writes=(sums, outside),
    )
    config = config or pick(V, x.stride(1) == 1)
    if teacher is not None:
        # Left to itself, ptxas spills a few registers to fit one more block.
        config = config.replace(maxnreg=255)
    programs = tiles(M, config.BLOCK_ROWS)
    vec = classes_at_once(V, x, y, *(() if gradient is None else (gradient,)))
    per_row = reduction == "none"
    losses = torch.empty(
        M if per_row else programs, dtype=loss_dtype if per_row else torch.float32, device=x.device
    )
    divisor = torch.empty(1, dtype=torch.float32, device=x.device)
    valid = torch.empty(1, dtype=torch.bool, device=x.device)
    launch(
        cross_entropy_kernel,
        (programs,),
        x,
        teacher if teacher is None else y,
        target,
        weight,
        sums,
        outside,
        losses,
        gradient,
        divisor,
        valid,
        *(M, V // vec, D),
        *steps(x, vec),
        *steps(y, vec),
        *steps(x if gradient is None else gradient, vec),
        *(label_smoothing, alpha, temperature, ignore_index, parts),
        config=config,
        reads=(x, None if teacher is None else y, target, weight, sums, outside),
        writes=(losses, divisor, valid) if gradient is None else (gradient, losses, divisor, valid),
        REDUCTION=reduction,
        SMOOTHING=label_smoothing != 0.0,
        WIDE=extent(x, y) + 2**20 >= 2**31,
        PARTS=_PARTS,
        ONE_BLOCK=config.BLOCK_V >= V,
        VEC=vec,
    )
    if per_row:
        loss = losses.view(target.shape)
    else:
        loss = torch.empty((), dtype=loss_dtype, device=x.device)
        launch(
            sum_kernel,
            (1,),
            losses,
            loss,
            programs,
            config=Config(BLOCK=1024, num_warps=4, num_stages=1),
            reads=(losses,),
            writes=(loss,),
        )
    return CrossEntropy(loss, None if gradient is None else gradient.view(logits.shape), divisor, valid)


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors in the shapes that networks have: see ``kernels``."""

    def call(shape, dtype, weight=False, teacher=False, channels_last=False, **options):
        def thunk(config=None):
            x = torch.empty(shape, dtype=dtype, device="meta")
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
            target = torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
            given = torch.empty(shape[1], device="meta") if weight else None
            if teacher:
                options.update(teacher=x, alpha=0.7, temperature=4.0)
            cross_entropy(x, target, given, config=config, **options)

        return thunk

    bf16, half, full = torch.bfloat16, torch.float16, torch.float32
    keep = {"keep_gradient": True}
    table = [
        ("1000 classes, bf16", call((256, 1000), bf16, **keep)),
        ("1000 classes, fp32, smoothed", call((256, 1000), full, label_smoothing=0.1, **keep)),
        ("1000 classes, bf16, distilled", call((256, 1000), bf16, teacher=True, **keep)),
        ("10 classes, fp32, no gradient", call((128, 10), full)),
        ("32000 classes, bf16, smoothed", call((512, 32000), bf16, label_smoothing=0.1, **keep)),
        ("32000 classes, fp32, distilled", call((512, 32000), full, teacher=True, weight=True, **keep)),
        ("32000 classes, fp16, no gradient", call((512, 32000), half)),
        ("21 classes of pixels, fp16, weighted", call((8, 21, 64, 64), half, True, reduction="none", **keep)),
        (
            "21 classes, channels-last",
            call((8, 21, 64, 64), half, channels_last=True, reduction="sum", **keep),
        ),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
