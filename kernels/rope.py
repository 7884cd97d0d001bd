"""Rotary position embedding of queries and keys, in place or not, in one launch.

    y₁ = x₁ · cos₁ − x₂ · sin₁;   y₂ = x₂ · cos₂ + x₁ · sin₂

over pairs (x₁, x₂) of a head's first R dims: (x[d], x[d + R/2]), or, interleaved, (x[2d], x[2d + 1]); what is
behind R stays. q [B, Hq, L, D], k [B, Hk, L, D], of any strides; tables [B or 1, L, R], or [B or 1, L, R/2]
where both of a pair have the same angle. A table of two axes (2-D RoPE of images) is one of L = H·W rows. The
inverse, for the backward, is the transposed rotation. Su et al., "RoFormer", 2021.

A program keeps the tables of its positions in registers and goes through several heads.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastnets.kernels.conv_shape import vector_width
from fastnets.kernels.device import Device, current_device
from fastnets.kernels.launch import DTYPES, Config, RepresentativeCall, UnsupportedConfig, launch, tiles

__all__ = ["configs", "representative_calls", "rotate"]


@triton.jit
def _pairs(
    start,
    inside,
    d,
    R,
    INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HALF: tl.constexpr,
):
    """The two members of all pairs of rows that begin at ``start``, fp32 [BLOCK_L, HALF] each."""
    if INTERLEAVED:
        e = tl.arange(0, 2 * HALF)
        within = e < R
        e = tl.max_contiguous(tl.multiple_of(tl.where(within, e, 0), VEC), VEC)
        x = tl.load(start[:, None] + e[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        one, two = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_L, HALF, 2]))
    else:
        within = d < R // 2
        d = tl.max_contiguous(tl.multiple_of(tl.where(within, d, 0), VEC), VEC)
        mask = inside[:, None] & within[None, :]
        one = tl.load(start[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        two = tl.load(start[:, None] + R // 2 + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return one, two


@triton.jit
def _store_pairs(
    start, one, two, inside, d, R,
    INTERLEAVED: tl.constexpr, VEC: tl.constexpr, BLOCK_L: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        e = tl.arange(0, 2 * HALF)
        within = e < R
        e = tl.max_contiguous(tl.multiple_of(tl.where(within, e, 0), VEC), VEC)
        x = tl.reshape(tl.join(one, two), [BLOCK_L, 2 * HALF])
        tl.store(start[:, None] + e[None, :], x, mask=inside[:, None] & within[None, :])
    else:
        within = d < R // 2
        d = tl.max_contiguous(tl.multiple_of(tl.where(within, d, 0), VEC), VEC)
        mask = inside[:, None] & within[None, :]
        tl.store(start[:, None] + d[None, :], one, mask=mask)
        tl.store(start[:, None] + R // 2 + d[None, :], two, mask=mask)


@triton.jit
def _rotate_heads(
    x, y, b, position, inside, first, last, x_steps, y_steps, c1, c2, s1, s2, d, R,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, VEC: tl.constexpr,
    BLOCK_L: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    for h in range(first, last):
        source = x + (b * x_steps[0] + h * x_steps[1] + position * x_steps[2]) * VEC
        one, two = _pairs(source, inside, d, R, INTERLEAVED, VEC, BLOCK_L, HALF)
        if INVERSE:
            turned_one = one * c1 + two * s2
            turned_two = two * c2 - one * s1
        else:
            turned_one = one * c1 - two * s1
            turned_two = two * c2 + one * s2
        kind = y.dtype.element_ty
        target = y + (b * y_steps[0] + h * y_steps[1] + position * y_steps[2]) * VEC
        _store_pairs(
            target, turned_one.to(kind), turned_two.to(kind), inside, d, R, INTERLEAVED, VEC, BLOCK_L, HALF
        )


@triton.jit(
    do_not_specialize=[
        "q_heads", "k_heads", "q_groups", "groups", "group_heads", "L", "pair_units", "q_steps", "qy_steps",
        "k_steps", "ky_steps", "cos_steps", "sin_steps",
    ]
)  # fmt: skip
def rope_kernel(
    q, q_out, k, k_out, cos, sin,
    q_heads, k_heads, q_groups, groups, group_heads, L, pair_units,
    # Strides of (batch, head, position) in units of VEC; of the tables (batch, position).
    q_steps, qy_steps, k_steps, ky_steps, cos_steps, sin_steps,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, FULL_TABLE: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_L: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Grid: positions, then groups of heads (those of q, then those of k), then the batch."""
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    position = (pid % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    group = (pid // blocks) % groups
    b = pid // (blocks * groups)
    inside = position < L
    position = tl.where(inside, position, 0)
    if WIDE:
        position = position.to(tl.int64)
        b = b.to(tl.int64)
    R = 2 * pair_units * VEC
    d = tl.arange(0, HALF)
    cos_start = cos + b * cos_steps[0] + position * cos_steps[1]
    sin_start = sin + b * sin_steps[0] + position * sin_steps[1]
    if FULL_TABLE:
        c1, c2 = _pairs(cos_start, inside, d, R, INTERLEAVED, 1, BLOCK_L, HALF)
        s1, s2 = _pairs(sin_start, inside, d, R, INTERLEAVED, 1, BLOCK_L, HALF)
    else:
        within = d < R // 2
        at = tl.where(within, d, 0)[None, :]
        mask = inside[:, None] & within[None, :]
        c1 = tl.load(cos_start[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        s1 = tl.load(sin_start[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        c2 = c1
        s2 = s1
    if group < q_groups:
        first = group * group_heads
        last = tl.minimum(first + group_heads, q_heads)
        _rotate_heads(
            q, q_out, b, position, inside, first, last, q_steps, qy_steps, c1, c2, s1, s2, d, R, INVERSE,
            INTERLEAVED, VEC, BLOCK_L, HALF,
        )  # fmt: skip
    elif k is not None:
        first = (group - q_groups) * group_heads
        last = tl.minimum(first + group_heads, k_heads)
        _rotate_heads(
            k, k_out, b, position, inside, first, last, k_steps, ky_steps, c1, c2, s1, s2, d, R, INVERSE,
            INTERLEAVED, VEC, BLOCK_L, HALF,
        )  # fmt: skip


# (positions, pairs) of a tile: 8 pairs a thread.
_TILES = ((64, 16), (32, 32), (16, 64), (8, 128))
_HEADS_PER_PROGRAM = 8


def configs(device: Device) -> list[Config]:
    """Every config that may be picked on ``device``: the same everywhere, the kernel is bound by memory."""
    return [Config(BLOCK_L=block, HALF=half, num_warps=4, num_stages=1) for block, half in _TILES]


class _Plan:
    """Grid, config, integer arguments and constexprs of a launch."""

    __slots__ = ("config", "constexprs", "grid", "integers")


@functools.lru_cache(maxsize=4096)
def _plan(
    q_shape, k_heads, strides, table_strides, rotary, full, itemsize, config, multiprocessors, inverse,
    interleaved,
) -> _Plan:  # fmt: skip
    B, q_heads, L, D = q_shape
    half = rotary // 2
    if config is None:
        config = next((c for c in configs(None) if c.HALF >= half), None)
    if config is None or not half <= config.HALF < max(2 * half, 32):
        raise UnsupportedConfig(f"no tile for {rotary} rotated dims (at most {2 * _TILES[-1][1]})")
    vec = vector_width(itemsize, half, *(s for t in strides for s in t[:3]))
    blocks = tiles(L, config.BLOCK_L)
    # Several heads share the tables of a program, but not where that would leave multiprocessors idle.
    heads = q_heads + k_heads
    group = max(min(_HEADS_PER_PROGRAM, B * blocks * heads // (4 * max(multiprocessors, 1))), 1)
    q_groups = tiles(q_heads, group)
    groups = q_groups + tiles(k_heads, group)
    plan = _Plan()
    plan.grid = (B * blocks * groups,)
    plan.config = config
    steps = [tuple(s // vec for s in t[:3]) for t in strides]
    plan.integers = (q_heads, k_heads, q_groups, groups, group, L, half // vec, *steps, *table_strides)
    reach = max(sum((n - 1) * abs(s) for n, s in zip((B, heads, L, D), t)) for t in strides)
    plan.constexprs = {
        "INVERSE": inverse, "INTERLEAVED": interleaved, "FULL_TABLE": full, "VEC": vec,
        "WIDE": reach + 2**20 >= 2**31,
    }  # fmt: skip
    return plan


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary: int,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    out: tuple[torch.Tensor, torch.Tensor | None],
    config: Config | None = None,
) -> None:
    """Writes the rotated q and k to ``out``, which may be (q, k) themselves: see the top of this file.

    q [B, Hq, L, D], k [B, Hk, L, D] or None, fp32, fp16 or bf16, any strides but that a head's dims are a
    run; ``out`` likewise, of the same shapes. cos, sin: [B or 1, L, R or R/2], any float dtype, rows that are
    runs. rotary: R, even. Only the first R dims are written. inverse: by the transposed rotation.
    """
    _check(q, k, cos, sin, rotary, out)
    if q.numel() == 0:
        return
    strides = [t.stride() for t in (q, out[0])]
    strides += strides if k is None else [t.stride() for t in (k, out[1])]
    # A table for all of the batch has stride 0 there.
    table_strides = tuple((0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin))
    itemsize = min(t.element_size() for t in (q, k, *out) if t is not None)
    plan = _plan(
        tuple(q.shape), 0 if k is None else k.shape[1], tuple(strides), table_strides, rotary,
        cos.shape[2] == rotary, itemsize, config, current_device(q).multiprocessors, inverse, interleaved,
    )  # fmt: skip
    launch(
        rope_kernel, plan.grid, q, out[0], k, out[1], cos, sin, *plan.integers, config=plan.config,
        reads=(q, k, cos, sin), writes=out, **plan.constexprs,
    )  # fmt: skip


def _check(q, k, cos, sin, rotary, out) -> None:
    for name, tensor in (("q", q), ("k", k), ("out", out[0]), ("out", out[1])):
        if tensor is None:
            continue
        if tensor.dim() != 4 or tensor.stride(3) != 1:
            raise ValueError(
                f"rope: {name} is {tuple(tensor.shape)}, expected [B, H, L, D] with dims in a run"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"rope: {name} is {tensor.dtype}, expected float32, float16 or bfloat16")
    B, _, L, D = q.shape
    if rotary % 2 or not 0 < rotary <= D:
        raise ValueError(f"rope: {rotary} dims of {D} cannot be rotated in pairs")
    if k is not None and (k.shape[0], *k.shape[2:]) != (B, L, D):
        raise ValueError(f"rope: k is {tuple(k.shape)}, q {tuple(q.shape)}; only heads may differ")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.dim() == 3 and table.shape[0] in (1, B) and table.shape[1] == L
        if not good or table.shape[2] not in (rotary, rotary // 2) or table.stride(2) != 1:
            raise ValueError(
                f"rope: {name} is {tuple(table.shape)}, expected [{B} or 1, {L}, {rotary} or {rotary // 2}]"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"rope: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}")


def representative_calls() -> list[RepresentativeCall]:
    """Meta tensors of the kinds that networks have: see ``kernels``."""

    def call(
        heads, kv_heads, length, dim, dtype, *, rotary=None, full=True, interleaved=False, inverse=False
    ):
        def thunk(config=None):
            packed = torch.empty(4, length, heads + 2 * kv_heads, dim, dtype=dtype, device="meta")
            q = packed[:, :, :heads].transpose(1, 2)
            k = packed[:, :, heads : heads + kv_heads].transpose(1, 2)
            turned = rotary or dim
            table = torch.empty(1, length, turned if full else turned // 2, device="meta")
            options = {"interleaved": interleaved, "inverse": inverse, "config": config}
            return rotate(q, k, table, table, turned, out=(q, k), **options)

        return thunk

    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    table = [
        ("Llama, head dim 128", call(32, 8, 4096, 128, bf16)),
        ("Llama, inverse, half table", call(32, 8, 4096, 128, bf16, full=False, inverse=True)),
        ("EVA-02, head dim 64, interleaved", call(12, 12, 1024, 64, half, interleaved=True)),
        ("EVA-02, inverse, fp32", call(12, 12, 1024, 64, full, interleaved=True, inverse=True)),
        ("a quarter of 128 dims", call(16, 16, 2048, 128, half, rotary=32)),
        ("80 dims, fp32, interleaved", call(16, 16, 257, 80, full, interleaved=True, full=False)),
        ("256 dims", call(16, 1, 2048, 256, bf16)),
    ]
    return [RepresentativeCall(name, thunk) for name, thunk in table]
