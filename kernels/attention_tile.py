"""What the attention kernels share: which rows a program works on, tiles of any strides, scores and dropout.

A score is s[m, n] = scale · q[m] · k[n], soft-capped, plus bias and ALiBi, and −inf where the query may not
see the key. Kernels keep it in base 2: what is added is multiplied by log2 e, the scale already is. Query m
stands at position m + shift of the keys (shift is 0, or N − M where the last ones are aligned) and sees the
keys from position − left to position + right.

Rows past the end are the last row again, not masked loads: a query's result is then never stored, and a key's
score is set to −inf.
"""

import triton
import triton.language as tl

from fastnets.kernels.activation import activate

__all__ = [
    "LOG2E",
    "LOWEST",
    "add_terms",
    "bounds",
    "keep_factor",
    "load_rows",
    "locate",
    "row_lse",
    "spans",
    "weights",
]

LOG2E = tl.constexpr(1.4426950408889634)
# A running maximum begins here, and finite masks (the lowest float of a dtype) end here in base 2: rows that
# see nothing but those still average evenly, rows that see nothing at all have no weight.
LOWEST = tl.constexpr(-3.0e38)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def locate(index, rows, heads, others, cu_rows, cu_others, sequences, BLOCK: tl.constexpr,
           BLOCK_SEQUENCES: tl.constexpr):  # fmt: skip
    """(tile, head, batch, rows, others, first row, first other) of program ``index``.

    Tiles of one head are neighbours, so that its keys stay in the L2 cache. Of packed sequences, those that
    end at cu_rows[1:], sequence i has the tiles from cu_rows[i] // BLOCK + i on: enough, and found without
    the host knowing a length. A tile past the end of its sequence has nothing to do.
    """
    if cu_rows is None:
        count = (rows + BLOCK - 1) // BLOCK
        tile = index % count
        head = (index // count) % heads
        batch = index // count // heads
        return tile, head, batch, rows, others, 0, 0
    else:
        count = rows // BLOCK + sequences
        tile = index % count
        head = index // count
        i = tl.arange(0, BLOCK_SEQUENCES)
        ends = tl.load(cu_rows + tl.minimum(i, sequences))
        batch = tl.sum(((i < sequences) & (ends // BLOCK + i <= tile)).to(tl.int32), axis=0) - 1
        first = tl.load(cu_rows + batch).to(tl.int32)
        first_other = tl.load(cu_others + batch).to(tl.int32)
        rows = tl.load(cu_rows + batch + 1).to(tl.int32) - first
        others = tl.load(cu_others + batch + 1).to(tl.int32) - first_other
        return tile - (first // BLOCK + batch), head, batch, rows, others, first, first_other


@triton.jit
def spans(low, full_low, full_high, high, STEP: tl.constexpr):
    """(a, b, c): steps from a to b and from c to ``high`` are in part invisible, those from b to c in none.

    low <= full_low and full_high <= high bound what some row of a tile sees, and what all of them do.
    """
    a = tl.maximum(low, 0) // STEP * STEP
    last = (tl.maximum(high, 0) + STEP - 1) // STEP * STEP
    b = (tl.maximum(full_low, a) + STEP - 1) // STEP * STEP
    b = tl.minimum(b, tl.maximum(last, a))
    c = tl.maximum(tl.maximum(full_high, 0) // STEP * STEP, b)
    return a, b, c


@triton.jit
def load_rows(x, row, row_step, d_step, D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr):
    """x[row, 0:BLOCK_D], zero past D; ``row_step`` in units of VEC, which divides D."""
    d = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        return tl.load(x + ((row * (row_step * VEC))[:, None] + (d * d_step)[None, :]))
    else:
        inside = d < D
        d = tl.max_contiguous(tl.multiple_of(tl.where(inside, d, 0), VEC), VEC)
        at = x + ((row * (row_step * VEC))[:, None] + (d * d_step)[None, :])
        return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def bounds(m, N, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The first and the last key that query m sees."""
    last = tl.zeros_like(m) + (N - 1)
    first = tl.zeros_like(m)
    if HAS_RIGHT:
        last = tl.minimum(last, m + (shift + right))
    if HAS_LEFT:
        first = m + (shift - left)
    return first, last


@triton.jit
def _additive(x, at):
    value = tl.load(x + at).to(tl.float32)
    if x.dtype.element_ty == tl.float16:
        return value * LOG2E
    else:
        return tl.where(value > -INFINITY, tl.maximum(value * LOG2E, LOWEST), value)


@triton.jit
def add_terms(s, m, n, i, j, shift, bias, bias_m, bias_n, mask, mask_m, mask_n, slope):
    """The scores s with bias, ALiBi and mask; each may be None.

    m, n: positions of queries and keys, i, j: how far into bias and mask, which stand at the tile's corner,
    each with a dim of 1 where the other has its rows. mask: bool, or a float that is added.
    """
    if bias is not None:
        s += _additive(bias, i * bias_m + j * bias_n)
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(m + shift - n).to(tl.float32)
    if mask is not None:
        if mask.dtype.element_ty.is_int():
            s = tl.where(tl.load(mask + (i * mask_m + j * mask_n)) != 0, s, -INFINITY)
        else:
            s += _additive(mask, i * mask_m + j * mask_n)
    return s


@triton.jit
def weights(
    s, m, n, i, j, lse, N, shift, left, right, scale, softcap, bias, bias_m, bias_n, mask, mask_m, mask_n,
    slope, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(p, tanh of the soft-capping) of raw products s, in either orientation: see ``add_terms``."""
    capped = s
    if PLAIN:
        s = s * scale - lse
    else:
        if SOFTCAP:
            capped = activate(s * scale, "tanh", 0.0)
            s = capped * softcap
        else:
            s = s * scale
        s = add_terms(s, m, n, i, j, shift, bias, bias_m, bias_n, mask, mask_m, mask_n, slope) - lse
    if MASKED:
        first, last = bounds(m, N, shift, left, right, HAS_LEFT, HAS_RIGHT)
        seen = n <= last
        if HAS_LEFT:
            seen = seen & (n >= first)
        s = tl.where(seen, s, -float("inf"))
    return tl.exp2(s), capped


@triton.jit
def row_lse(lse, i, rows, MASKED: tl.constexpr, BLIND: tl.constexpr):
    """lse of a tile's rows; infinite where the weights have to be zero."""
    value = tl.load(lse + tl.minimum(i, rows - 1))
    if BLIND:
        value = tl.where(value == -float("inf"), float("inf"), value)
    if MASKED:
        value = tl.where(i < rows, value, float("inf"))
    return value


@triton.jit
def keep_factor(seed, stream, start_m, start_n, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 where the weight [m, n] is kept, else 0, as a tile of BLOCK_M by BLOCK_N: see kernels.dropout.

    Philox's counter is (n // 4, m, stream, 0): four keys draw together.
    """
    c0 = (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    c1 = (start_m + tl.arange(0, BLOCK_M))[:, None]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed), zero + c0, zero + c1, zero + stream, zero)
    random = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BLOCK_M, BLOCK_N])
    uniform = (random >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(uniform >= p, 1.0, 0.0)
