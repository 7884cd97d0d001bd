"""Rotary position embedding of queries and keys, as one op that works in place, too.

    y₁ = x₁ · cos₁ − x₂ · sin₁;   y₂ = x₂ · cos₂ + x₁ · sin₂

over pairs of a head's dims: its halves (Llama, GPT-NeoX), or neighbours (``interleaved``: RoFormer, EVA-02).
2-D RoPE is the same with a table of H·W rows. The backward is the transposed rotation, and nothing but the
tables is saved. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import in_transform

# --- the implementations: of q [B, Hq, L, D], k [B, Hk, L, D] and tables [B or 1, L, R or R/2] --------------


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def _composition(
    x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool, inverse: bool
) -> Tensor:
    """The definition, in differentiable operations; in float32 at least and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide).unsqueeze(1) for t in (cos, sin))
    full = cos.shape[-1] == rotary
    (c1, c2), (s1, s2) = (_pairs(t, interleaved) if full else (t, t) for t in (cos, sin))
    one, two = _pairs(x[..., :rotary].to(wide), interleaved)
    if inverse:
        pair = one * c1 + two * s2, two * c2 - one * s1
    else:
        pair = one * c1 - two * s1, two * c2 + one * s2
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat([turned, x[..., rotary:]], -1)


def _like(x: Tensor) -> Tensor:
    """Memory for a result: as x, or contiguous where a head of x is no run of memory."""
    if x.stride(-1) == 1:
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _body(q, k, cos, sin, rotary, interleaved, inverse, backend):
    _validate(q, k, cos, sin, rotary)
    out = (_like(q), None if k is None else _like(k))
    if _choose(q, k, backend) == "triton":
        if rotary < q.shape[-1]:
            for x, y in zip((q, k), out):
                if x is not None:
                    y[..., rotary:] = x[..., rotary:]
        _launch(q, k, cos, sin, rotary, interleaved, inverse, out)
    else:
        for x, y in zip((q, k), out):
            if x is not None:
                y.copy_(_composition(x, cos, sin, rotary, interleaved, inverse))
    return out[0], q.new_empty(0) if k is None else out[1]


def _in_place_body(q, k, cos, sin, rotary, interleaved, inverse, backend):
    _validate(q, k, cos, sin, rotary)
    runs = all(x is None or x.stride(-1) == 1 for x in (q, k))
    if runs and _choose(q, k, backend) == "triton":
        _launch(q, k, cos, sin, rotary, interleaved, inverse, (q, k))
        return
    for x in (q, k):
        if x is not None:
            x.copy_(_composition(x, cos, sin, rotary, interleaved, inverse))


def _choose(q, k, backend) -> str:
    return dispatch.triton_or_reference(q, backend, k, refuses="does not rotate")


def _launch(q, k, cos, sin, rotary, interleaved, inverse, out) -> None:
    from fastnets.kernels.rope import rotate

    q, k, cos, sin = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    rotate(q, k, cos, sin, rotary, interleaved=interleaved, inverse=inverse, out=out)


def _validate(q, k, cos, sin, rotary) -> None:
    B, _, L, D = q.shape
    for name, x in (("q", q), ("k", k)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"apply_rope: {name} is {x.dtype}; convert it to a floating dtype first")
    if k is not None and (k.shape[0], *k.shape[2:]) != (B, L, D):
        raise ValueError(f"apply_rope: k is {tuple(k.shape)}, q {tuple(q.shape)}; only heads may differ")
    if k is not None and k.dtype != q.dtype:
        raise ValueError(f"apply_rope: k is {k.dtype}, q {q.dtype}; convert one of them")
    if rotary % 2 or not 0 < rotary <= D:
        raise ValueError(f"apply_rope: rotary_dim={rotary} must be even and at most the head dim, {D}")
    for name, table in (("cos", cos), ("sin", sin)):
        good = table.shape[0] in (1, B) and table.shape[1] == L and table.shape[2] in (rotary, rotary // 2)
        if not good or table.shape != cos.shape:
            raise ValueError(
                f"apply_rope: {name} is {tuple(table.shape)}, "
                f"expected [{B} or 1, {L}, {rotary} or {rotary // 2}]"
            )
        if table.device != q.device:
            raise ValueError(f"apply_rope: {name} is on {table.device}, q on {q.device}; move one of them")


def _fake(q, k, cos, sin, rotary, interleaved, inverse, backend):
    _validate(q, k, cos, sin, rotary)
    return _like(q), q.new_empty(0) if k is None else _like(k)


def _in_place_fake(q, k, cos, sin, rotary, interleaved, inverse, backend):
    _validate(q, k, cos, sin, rotary)


# --- the ops ------------------------------------------------------------------------------------------------

_REST = "Tensor cos, Tensor sin, int rotary, bool interleaved, bool inverse, str backend"
_infer = dispatch.register(f"rope_inference(Tensor q, Tensor? k, {_REST}) -> (Tensor, Tensor)", _body, _fake)
_in_place = dispatch.register(
    f"rope_(Tensor(a!) q, Tensor(b!)? k, {_REST}) -> ()", _in_place_body, _in_place_fake
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _infer(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, k, cos, sin, *ctx.options = inputs
        ctx.has_k = k is not None
        ctx.save_for_backward(cos, sin)
        if not ctx.has_k:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dq, dk):
        rotary, interleaved, inverse, backend = ctx.options
        dk = dk if ctx.has_k else None
        dq, dk = _infer(dq, dk, *ctx.saved_tensors, rotary, interleaved, not inverse, backend)
        return dq, dk if ctx.has_k else None, *[None] * 6


class _RopeInPlace(torch.autograd.Function):
    """Of one tensor: autograd allows no more views than one to be written to."""

    @staticmethod
    def forward(x, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            _in_place(x, None, *arguments)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, *ctx.options = inputs
        ctx.mark_dirty(inputs[0])
        ctx.save_for_backward(cos, sin)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dx):
        rotary, interleaved, inverse, backend = ctx.options
        dx, _ = _infer(dx, None, *ctx.saved_tensors, rotary, interleaved, not inverse, backend)
        return dx, *[None] * 6


def _autograd(q, k, *arguments):
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return _Rope.apply(q, k, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(q, k, *arguments)


_differentiable = dispatch.register(
    f"rope(Tensor q, Tensor? k, {_REST}) -> (Tensor, Tensor)", _body, _fake, autograd=_autograd
)

# --- the function -------------------------------------------------------------------------------------------


def _heads(name: str, x: Tensor, inplace: bool) -> Tensor:
    """[..., H, L, D] as [B, H, L, D], in place as a view."""
    if x.dim() == 4:
        return x
    if x.dim() < 3:
        raise ValueError(f"apply_rope: {name} is {tuple(x.shape)}, expected [..., heads, length, head_dim]")
    shape = (-1, *x.shape[-3:])
    return x.view(shape) if inplace else x.reshape(shape)


def _table(name: str, table: Tensor) -> Tensor:
    """[L, W], [B, L, W] or [B, 1, L, W] as [B or 1, L, W]."""
    if table.requires_grad:
        raise ValueError(f"apply_rope: {name} requires a gradient, which it does not get; detach it")
    if table.dim() == 4 and table.shape[1] == 1:
        return table.squeeze(1)
    if table.dim() == 2:
        return table.unsqueeze(0)
    if table.dim() != 3:
        raise ValueError(
            f"apply_rope: {name} is {tuple(table.shape)}, expected [L, W], [B, L, W] or [B, 1, L, W]"
        )
    return table


def apply_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    rotary_dim: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """q and k turned by the angles of their positions.

    Args:
        q, k: [..., heads, length, head_dim], any strides; k may have other heads, or be None.
        cos, sin: [length, W], or [batch, length, W] where sequences differ in their positions. W is how many
            dims are rotated, or half of that, where both of a pair have one angle. No gradient.
        interleaved: pairs are neighbours (2i, 2i + 1) rather than (i, i + W/2).
        inplace: write to q and k and return them. With gradients this is one launch for each, and subject to
            autograd's rules: no leaves, and no views that ``chunk`` or ``unbind`` made.
        rotary_dim: how many dims of a head are rotated, the first ones; by default W where W is the head dim
            or no half of it, else twice W. The others stay.

    Returns:
        (q, k), of their shapes and dtypes. Computed in float32 at least and rounded once.

    Raises:
        ValueError, TypeError: for what does not fit, naming the argument.
    """
    dispatch.validate_backend(backend)
    heads = _heads("q", q, inplace), None if k is None else _heads("k", k, inplace)
    cos, sin = _table("cos", cos), _table("sin", sin)
    if rotary_dim is None:
        width = cos.shape[-1]
        rotary_dim = 2 * width if 2 * width == q.shape[-1] else width
    options = (cos, sin, rotary_dim, interleaved, False)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in heads)
    if inplace:
        if grad:
            for x in heads:
                if x is not None:
                    _RopeInPlace.apply(x, *options, backend)
        else:
            _in_place(*heads, *options, backend)
        return q, k
    if in_transform() or dispatch.leaves_to_stock(q, backend):
        _validate(*heads, cos, sin, rotary_dim)
        turned = [None if x is None else _composition(x, *options) for x in heads]
    else:
        turned = (_differentiable if grad else _infer)(*heads, *options, backend)
    one, two = turned
    return one.view(q.shape) if one.dim() != q.dim() else one, (
        None if k is None else two.view(k.shape) if two.dim() != k.dim() else two
    )
