"""What an attention call is, as its kernels take it: checked once for each kind of call, and kept.

Everything but the tensors themselves (sizes, strides, flags, scales) follows from shapes, strides, dtypes and
options: it is worked out once and looked up from then on, so that a launch costs the host microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastnets.kernels.device import Device, current_device

__all__ = [
    "UNBOUNDED",
    "Kind",
    "Options",
    "Problem",
    "attention_problem",
    "check_attention",
    "delta_steps",
    "empty_like_heads",
    "gradient_steps",
]

UNBOUNDED = -1
LOG2E = 1.4426950408889634
# Kinds of calls that are kept; past so many, all are forgotten.
KEPT = 4096


class Options(NamedTuple):
    """The scalars of a call.

    left, right: how many keys before and after a query's position it sees (``UNBOUNDED``: all; causal
    attention has right = 0). bottom_right: query m stands at key m + N − M, not m. softcap: 0 for none.
    """

    scale: float
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0


class Kind(NamedTuple):
    """What a call keeps in registers beside its tiles."""

    dropout: bool = False
    terms: bool = False  # a mask, bias, ALiBi or soft-capping
    grouped: bool = False  # several heads to a key head: one loop more around the backward's
    packed: bool = False


class Problem:
    """A checked kind of call.

    B, H, HK, M, N, D, D_V: sizes, of packed sequences M and N in all. numbers: the kernels' scalar arguments,
    in their order. flags: their constexprs. launches: what launchers keep.
    """

    __slots__ = (
        "B", "D", "D_V", "H", "HK", "M", "N", "block_d", "device", "dropout_p", "dtype", "flags", "flops",
        "kind", "launches", "numbers", "sequences", "shapes", "strides",
    )  # fmt: skip

    def __init__(self, q, k, v, bias, mask, slopes, seed, cu, options: Options, device: Device):
        check_attention(q, k, v, bias, mask, slopes, cu, options.softcap, options.dropout_p)
        _check_for_kernels(q, k, v, bias, mask, slopes)
        self.B, self.H, self.M, self.D = q.shape
        self.HK, self.N = k.shape[1:3]
        self.D_V = v.shape[3]
        self.device, self.dtype = device, q.dtype
        self.sequences = cu[0].numel() - 1 if cu is not None else 0
        self.launches: dict = {}
        self.shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        plain = options.scale > 0 and not options.softcap and bias is None and mask is None and slopes is None
        self.strides = tuple(tuple(t.stride()) for t in (q, k, v))
        vec = common_vector(q.element_size(), self.shapes, self.strides)
        numbers: list = [self.H, self.M, self.N, self.sequences, max(options.left, 0), max(options.right, 0)]
        if options.softcap:
            numbers += [options.scale / options.softcap, options.softcap * LOG2E]
        else:
            numbers += [options.scale * LOG2E, 0.0]
        self.dropout_p = p = options.dropout_p
        numbers += [p, 1.0 / (1.0 - p) if p < 1.0 else 0.0]
        for strides in self.strides:
            numbers += in_vectors(strides, vec)
        for t in (bias, mask):
            numbers += [0, 0, 0, 0, 1] if t is None else [*broadcast_strides(t), t.shape[0]]
        numbers.append(slopes.stride(0) if slopes is not None and slopes.shape[0] > 1 else 0)
        self.numbers = tuple(numbers)
        self.flags = {
            "GROUP": self.H // self.HK,
            "D": self.D,
            "D_V": self.D_V,
            "VEC": vec,
            "BLOCK_D": power_of_two(self.D),
            "BLOCK_D_V": power_of_two(self.D_V),
            "BLOCK_SEQUENCES": power_of_two(self.sequences + 1),
            "HAS_LEFT": options.left != UNBOUNDED,
            "HAS_RIGHT": options.right != UNBOUNDED,
            "BOTTOM_RIGHT": options.bottom_right,
            "PLAIN": plain,
            "SOFTCAP": options.softcap != 0.0,
            "PRECISION": dot_precision(q.dtype, device),
        }
        self.kind = Kind(p > 0, not plain, self.H > self.HK, self.sequences > 0)
        self.block_d = max(self.flags["BLOCK_D"], self.flags["BLOCK_D_V"])
        self.flops = 2 * self.B * self.H * self.M * self.N * (self.D + self.D_V)


def common_vector(element_size: int, shapes: Sequence, strides: Sequence) -> int:
    """How many neighbours one access may take in all the tensors of these shapes and strides."""
    from fastnets.kernels.conv_shape import vector_width

    if any(s[3] != 1 for s in strides):
        return 1
    steps = [s[i] for shape, s in zip(shapes, strides) for i in range(3) if shape[i] > 1]
    return vector_width(element_size, *(shape[3] for shape in shapes), *steps)


def in_vectors(strides: Sequence[int], vec: int) -> list[int]:
    """The strides of [batch, heads, length, head_dim] as kernels take them: all but the last by ``vec``."""
    return [step // vec for step in strides[:3]] + [strides[3]]


def gradient_steps(problem: Problem, do: torch.Tensor) -> tuple[tuple, dict]:
    """(numbers, flags) of the backward kernels: the problem's, and the strides of the output's gradient."""
    key = do.stride()
    known = problem.launches.get(key)
    if known is None:
        shapes, strides = (*problem.shapes, tuple(do.shape)), (*problem.strides, tuple(key))
        vec = common_vector(do.element_size(), shapes, strides)
        numbers = list(problem.numbers)
        for i, of_tensor in enumerate(problem.strides):
            numbers[10 + 4 * i : 14 + 4 * i] = in_vectors(of_tensor, vec)
        known = problem.launches[key] = (
            (*numbers, *in_vectors(key, vec)),
            {**problem.flags, "VEC": vec},
        )
    return known


def delta_steps(o: torch.Tensor, do: torch.Tensor) -> tuple[list[int], int]:
    """(strides of both, their unit)."""
    strides = o.stride(), do.stride()
    vec = common_vector(o.element_size(), (o.shape, do.shape), strides)
    return [*in_vectors(strides[0], vec), *in_vectors(strides[1], vec)], vec


def empty_like_heads(q: torch.Tensor, heads: int, length: int, width: int) -> torch.Tensor:
    """[batch, heads, length, width] of q's kind, lying in memory as [batch, length, heads, width]."""
    shape = (q.shape[0], heads, length, width)
    strides = (length * heads * width, width, heads * width, 1)
    return torch.empty_strided(shape, strides, dtype=q.dtype, device=q.device)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 16: what tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def broadcast_strides(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides that broadcast: 0 where the size is 1."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride()))


def dot_precision(dtype: torch.dtype, device: Device) -> str:
    """How fp32 products are made: TF32 where PyTorch's matrix products may, else to fp32's accuracy."""
    if dtype != torch.float32 or device.capability < 80:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


_known: dict = {}


def attention_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    seed: torch.Tensor | None,
    cu: tuple[torch.Tensor, torch.Tensor] | None,
    options: Options,
) -> Problem:
    """The problem of a call; raises ``ValueError`` or ``TypeError`` where the arguments do not fit.

    q [B, H, M, D], k [B, HK, N, D], v [B, HK, N, D_V] of one dtype, any strides. bias, mask: four dims that
    broadcast to [B, H, M, N], or whose first divides B and is then repeated. slopes [1 or B, H] fp32. cu: two
    int32 [sequences + 1], where packed queries and keys begin and end; B is 1 then.
    """
    device = current_device(q)
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        None if slopes is None else (slopes.shape, slopes.dtype),
        None if cu is None else (cu[0].shape, cu[1].shape, cu[0].dtype, cu[1].dtype),
        options, device.capability, device.multiprocessors,
        q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )  # fmt: skip
    problem = _known.get(key)
    if problem is None:
        if len(_known) >= KEPT:
            _known.clear()
        problem = _known[key] = Problem(q, k, v, bias, mask, slopes, seed, cu, options, device)
    return problem


def check_attention(q, k, v, bias, mask, slopes, cu, softcap: float = 0.0, dropout_p: float = 0.0) -> None:
    """Raises ``ValueError`` or ``TypeError`` where tensors of ``attention_problem`` do not fit each other."""
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dim() != 4:
            raise ValueError(
                f"attention: {name} has {t.dim()} dims, expected [batch, heads, length, head_dim]"
            )
        if t.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {t.dtype}, query {q.dtype}; convert one of them")
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, query on {q.device}; move one of them")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: key is {tuple(k.shape)}, query {tuple(q.shape)}: batch and head dim have to agree"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: value is {tuple(v.shape)}, key {tuple(k.shape)}: all but the head dim has to agree"
        )
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(
            f"attention: query has {q.shape[1]} heads, no multiple of the {k.shape[1]} of key and value"
        )
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for name, t in (("bias", bias), ("attn_mask", mask)):
        if t is None:
            continue
        boolean = t.dtype == torch.bool and name == "attn_mask"
        if not boolean and not t.is_floating_point():
            raise TypeError(
                f"attention: {name} is {t.dtype}, expected {q.dtype}" + " or bool" * (name != "bias")
            )
        fits = t.dim() == 4 and t.shape[0] > 0 and scores[0] % t.shape[0] == 0
        if not fits or any(n not in (1, full) for n, full in zip(t.shape[1:], scores[1:])):
            raise ValueError(f"attention: {name} is {tuple(t.shape)}, which does not broadcast to {scores}")
        if cu is not None:
            raise ValueError(f"attention: {name} cannot go with cu_seqlens; use window or alibi_slopes")
    if slopes is not None:
        batches = (1, q.shape[0] if cu is None else cu[0].numel() - 1)
        if slopes.dim() != 2 or slopes.shape[0] not in batches or slopes.shape[1] != q.shape[1]:
            raise ValueError(
                f"attention: alibi_slopes is {tuple(slopes.shape)}, expected [heads] or [batch, heads] for "
                f"{q.shape[1]} heads"
            )
    if cu is not None:
        if q.shape[0] != 1:
            raise ValueError(f"attention: with cu_seqlens the batch has to be 1, query is {tuple(q.shape)}")
        if any(t.dtype != torch.int32 or t.dim() != 1 or t.numel() < 2 for t in cu):
            raise ValueError("attention: cu_seqlens has to be int32 of [sequences + 1]")
        if cu[0].numel() != cu[1].numel():
            raise ValueError(
                "attention: cu_seqlens of queries and keys are for different numbers of sequences"
            )
    if softcap < 0:
        raise ValueError(f"attention: softcap={softcap} is negative")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p={dropout_p} is not between 0 and 1")


def _check_for_kernels(q, k, v, bias, mask, slopes) -> None:
    from fastnets.kernels.launch import DTYPES

    for name, t in (("query", q), ("bias", bias), ("attn_mask", mask)):
        if t is not None and t.dtype not in DTYPES and t.dtype != torch.bool:
            raise TypeError(f"attention: {name} is {t.dtype}, expected float32, float16 or bfloat16")
    for name, t in (("query", q), ("value", v)):
        if t.shape[3] > 256:
            raise ValueError(f"attention: {name} has head dim {t.shape[3]}, at most 256 is supported")
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.stride(1) != 1):
        raise ValueError(f"attention: alibi_slopes is {slopes.dtype}, expected contiguous float32")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"attention: nothing to do for query {tuple(q.shape)}, key {tuple(k.shape)}")
