"""Attention calls for the tests, sampled, and what stock PyTorch answers to them."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastnets.kernels.attention_problem import UNBOUNDED, Options

LENGTHS = (1, 7, 64, 197, 300)
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = ("none", "bool", "padding", "infinite", "float")
BIASES = ("none", "full", "heads", "batch", "keys", "queries")


@dataclass(frozen=True)
class Case:
    """B sequences, H heads of which ``group`` share keys, M queries, N keys."""

    D: int = 64
    M: int = 64
    N: int = 64
    dtype: torch.dtype = torch.float32
    B: int = 1
    H: int = 2
    group: int = 1
    D_V: int | None = None
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    bottom_right: bool = False
    softcap: float = 0.0
    mask: str = "none"
    bias: str = "none"
    alibi: bool = False
    scale: float | None = None
    magnitude: float = 1.0

    def but(self, **changes):
        return replace(self, **changes)

    @property
    def options(self) -> Options:
        scale = self.D**-0.5 if self.scale is None else self.scale
        return Options(scale, self.left, self.right, self.bottom_right, self.softcap)


@st.composite
def cases(draw, lengths=LENGTHS, head_dims=HEAD_DIMS):
    """A product of everything; where lengths are many, head dims are few, to stay quick."""
    M, N = draw(st.sampled_from(lengths)), draw(st.sampled_from(lengths))
    return Case(
        D=draw(st.sampled_from(head_dims)),
        M=M,
        N=N,
        dtype=draw(st.sampled_from(DTYPES)),
        B=draw(st.sampled_from((1, 2))),
        H=2,
        group=draw(st.sampled_from((1, 2))),
        D_V=draw(st.sampled_from((None, None, 48))),
        left=draw(st.sampled_from((UNBOUNDED, UNBOUNDED, 0, 37))),
        right=draw(st.sampled_from((UNBOUNDED, 0, 0, 21))),
        bottom_right=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 1.5))),
        mask=draw(st.sampled_from(MASKS)),
        bias=draw(st.sampled_from(BIASES)),
        alibi=draw(st.booleans()),
    )


@dataclass
class Tensors:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    slopes: torch.Tensor | None


def tensors_of(case: Case) -> Tensors:
    """Random tensors; q, k and v as views of one packed projection where they can be."""
    D_V = case.D_V or case.D
    HK = case.H // case.group
    if case.M == case.N and case.group == 1 and D_V == case.D:
        packed = torch.randn(case.B, case.M, 3, case.H, case.D) * case.magnitude
        q, k, v = packed.to(case.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = (torch.randn(case.B, case.M, case.H, case.D) * case.magnitude).to(case.dtype).transpose(1, 2)
        k = (torch.randn(case.B, HK, case.N, case.D) * case.magnitude).to(case.dtype)
        v = torch.randn(case.B, HK, case.N, D_V).to(case.dtype)
    dout = torch.randn(case.B, case.H, case.M, D_V).to(case.dtype)
    shape = (case.B, case.H, case.M, case.N)
    mask = None
    if case.mask == "bool":
        mask = torch.rand(case.B, 1, case.M, case.N) < 0.6
        mask[:, :, ::3] = False  # queries that see nothing
    elif case.mask == "padding":
        mask = torch.arange(case.N)[None, None, None] < case.N - torch.arange(case.B)[:, None, None, None] * 5
    elif case.mask == "infinite":
        mask = torch.randn(1, case.H, case.M, case.N).to(case.dtype)
        mask[torch.rand(mask.shape) < 0.3] = -math.inf
        mask[:, :, 1::4] = -math.inf
    elif case.mask == "float":
        mask = torch.randn(case.M, case.N)[None, None]
        mask[:, :, :, ::2] = torch.finfo(torch.float32).min
    broadcast = {"full": (), "heads": (0,), "batch": (1,), "keys": (0, 3), "queries": (0, 1, 2)}
    bias = None
    if case.bias != "none":
        bias = torch.randn([1 if i in broadcast[case.bias] else n for i, n in enumerate(shape)]).to(
            case.dtype
        )
    slopes = torch.tensor([[0.5, 0.0625]]).expand(1, 2)[:, : case.H].contiguous() if case.alibi else None
    return Tensors(q, k, v, dout, mask, bias, slopes)


def visible(case: Case) -> torch.Tensor:
    """[M, N]: whether the query may see the key, from the definition."""
    seen = torch.zeros(case.M, case.N, dtype=torch.bool)
    shift = case.N - case.M if case.bottom_right else 0
    for m in range(case.M):
        low = 0 if case.left == UNBOUNDED else max(0, m + shift - case.left)
        high = case.N if case.right == UNBOUNDED else max(0, min(case.N, m + shift + case.right + 1))
        seen[m, low:high] = True
    return seen


def stock(case: Case, t: Tensors, dtype: torch.dtype):
    """(out, dq, dk, dv, dbias) by PyTorch in ``dtype``: its own function, all terms in one dense mask."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (t.q, t.k, t.v)]
    bias = None if t.bias is None else t.bias.detach().to(dtype).requires_grad_()
    q, k, v = leaves
    wide = torch.promote_types(dtype, torch.float32)
    terms = torch.zeros(case.B, case.H, case.M, case.N, dtype=wide)
    if bias is not None:
        terms = terms + bias
    if t.slopes is not None:
        shift = case.N - case.M if case.bottom_right else 0
        distance = (torch.arange(case.M)[:, None] + shift - torch.arange(case.N)).abs()
        terms = terms - t.slopes.to(wide)[:, :, None, None] * distance
    terms = terms.masked_fill(~visible(case), -math.inf)
    if t.mask is not None:
        if t.mask.dtype == torch.bool:
            terms = terms.masked_fill(~t.mask, -math.inf)
        else:
            terms = terms + t.mask.to(wide)
    scale = case.options.scale
    if case.softcap:
        key, value = (x.repeat_interleave(case.group, 1) for x in (k, v))
        s = torch.tanh((q @ key.mT).to(wide) * scale / case.softcap) * case.softcap + terms
        blind = (s == -math.inf).all(-1, keepdim=True)
        weight = torch.softmax(s.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
        out = weight.to(dtype) @ value
    else:
        out = F.scaled_dot_product_attention(q, k, v, terms.to(dtype), scale=scale, enable_gqa=case.group > 1)
    wanted = leaves if bias is None else [*leaves, bias]
    gradients = list(torch.autograd.grad(out, wanted, t.dout.to(dtype)))
    return [out.detach(), *gradients, *([None] if bias is None else [])]
