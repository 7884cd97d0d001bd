"""Attention: ``F.scaled_dot_product_attention`` and what it lacks, forward and backward.

    s   = softcap · tanh(scale · q kᵀ / softcap) + bias − slope · |position(m) − n|,   −inf where masked
    out = dropout(softmax(s)) v,   lse = log Σ exp(s)

q [..., H, M, D], k [..., HK, N, D], v [..., HK, N, D_V]. Implementations: our kernels ("triton"), PyTorch's
``scaled_dot_product_attention`` ("library") and the composition that defines the op ("reference"). PyTorch's
function runs wherever it can express the call, on CUDA unless there is a mask or bias that its flash and
cuDNN kernels do not take; ours run those, and windows, soft-capping, ALiBi and packed sequences.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnets.fused import dispatch
from fastnets.fused.batch_norm import in_transform, is_inference, watched
from fastnets.fused.dropout import draw_seed, philox
from fastnets.kernels.attention_problem import UNBOUNDED, Options, check_attention  # no Triton in there
from fastnets.kernels.device import current_device

LOG2E = 1.4426950408889634

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? slopes, Tensor? seed, "
    "Tensor? cu_query, Tensor? cu_key"
)
_OPTIONS = "float scale, int left, int right, bool bottom_right, float softcap, float dropout_p"
_SCALARS = f"{_OPTIONS}, str backend"

# --- the reference ------------------------------------------------------------------------------------------


def _expand_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _positions(cu: Tensor | None, length: int, device) -> tuple[Tensor, Tensor]:
    """(sequence, place in it) of each row."""
    row = torch.arange(length, device=device)
    if cu is None:
        return torch.zeros_like(row), row
    sequence = torch.searchsorted(cu, row.to(cu.dtype), right=True) - 1
    return sequence, row - cu[sequence]


def _scores(q, k, bias, mask, slopes, cu_query, cu_key, options: Options) -> tuple[Tensor, Tensor | None]:
    """(s, tanh of the soft-capping or None) in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), _expand_heads(k, q.shape[1]).to(wide)
    s, capped = q @ k.transpose(-1, -2) * options.scale, None
    if options.softcap:
        capped = torch.tanh(s / options.softcap)
        s = options.softcap * capped
    batch = s.shape[0]
    if bias is not None:
        s = s + bias.to(wide).repeat(batch // bias.shape[0], 1, 1, 1)
    (query_of, m), (key_of, n) = (
        _positions(cu, length, q.device) for cu, length in ((cu_query, s.shape[2]), (cu_key, s.shape[3]))
    )
    if options.bottom_right:
        shift = s.shape[3] - s.shape[2]
        if cu_query is not None:
            shift = (cu_key.diff() - cu_query.diff())[query_of]
        m = m + shift
    if slopes is not None:
        slope = slopes.to(wide)
        slope = (
            slope[query_of].mT.unsqueeze(0)
            if slope.shape[0] > 1 and cu_query is not None
            else slope[..., None]
        )
        s = s - slope[..., None] * (m[:, None] - n).abs()
    seen = query_of[:, None] == key_of
    if options.right != UNBOUNDED:
        seen = seen & (n <= m[:, None] + options.right)
    if options.left != UNBOUNDED:
        seen = seen & (n >= m[:, None] - options.left)
    s = s.masked_fill(~seen, -math.inf)
    if mask is not None:
        mask = mask.repeat(batch // mask.shape[0], 1, 1, 1)
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(wide)
    return s, capped


def _kept(seed: Tensor, s: Tensor, p: float) -> Tensor:
    """What each weight is multiplied by: see ``kernels.attention_tile.keep_factor``."""
    B, H, M, N = s.shape
    stream, m, c = torch.meshgrid(
        *(torch.arange(n, device=s.device) for n in (B * H, M, -(-N // 4))), indexing="ij"
    )
    words = philox(seed, c.flatten(), m.flatten(), stream.flatten()).view(B, H, M, -1)[..., :N]
    uniform = (words >> 8).to(torch.float32) * 2.0**-24
    threshold = torch.tensor(p, dtype=torch.float32, device=s.device)
    return torch.where(uniform >= threshold, 0.0 if p == 1.0 else 1.0 / (1.0 - p), 0.0).to(s.dtype)


def _like_heads(t: Tensor) -> Tensor:
    """The same values, lying as [batch, length, heads, head_dim]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _reference(
    q, k, v, bias, mask, slopes, seed, cu_query, cu_key, options: Options
) -> tuple[Tensor, Tensor]:
    """(out, lse in base 2)."""
    s, _ = _scores(q, k, bias, mask, slopes, cu_query, cu_key, options)
    weight, lse = _softmax(s)
    if options.dropout_p:
        weight = weight * _kept(seed, s, options.dropout_p)
    out = weight @ _expand_heads(v, q.shape[1]).to(s.dtype)
    return _like_heads(out.to(q.dtype)), lse * LOG2E


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, lse); the weights of a query that sees no key are zero, as are its gradients."""
    blind = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(blind, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    return torch.exp(s - lse).masked_fill(blind, 0.0), lse.masked_fill(blind, -math.inf)[..., 0]


def _reference_backward(
    dout, dlse, q, k, v, lse, bias, mask, slopes, seed, cu_query, cu_key, options: Options, bias_gradient
):  # fmt: skip
    """(dq, dk, dv, dbias or None); dbias in the shape of bias."""
    s, capped = _scores(q, k, bias, mask, slopes, cu_query, cu_key, options)
    wide, heads, groups = s.dtype, q.shape[1], q.shape[1] // k.shape[1]
    dout, query = dout.to(wide), q.to(wide)
    key, value = (_expand_heads(t, heads).to(wide) for t in (k, v))
    weight, _ = _softmax(s)
    dweight = dout @ value.transpose(-1, -2)
    kept = weight
    if options.dropout_p:
        factor = _kept(seed, s, options.dropout_p)
        kept, dweight = weight * factor, dweight * factor
    dv = kept.transpose(-1, -2) @ dout
    delta = (dweight * weight).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - (dlse.to(wide) * LOG2E)[..., None]
    ds = weight * (dweight - delta)
    dbias = None
    if bias_gradient:
        dbias = ds.view(-1, bias.shape[0], *ds.shape[1:]).sum(0)
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    if capped is not None:
        ds = ds * (1 - capped * capped)
    ds = ds * options.scale
    dq, dk = ds @ key, ds.transpose(-1, -2) @ query
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) if groups > 1 else t for t in (dk, dv))
    return *(_like_heads(t.to(q.dtype)) for t in (dq, dk, dv)), dbias


# --- the ops ------------------------------------------------------------------------------------------------


def choose(query: Tensor, key: Tensor, value: Tensor, backend: str, backward: bool = False) -> str:
    """What runs inside the op: "triton" or "reference". See ``dispatch.triton_or_reference``."""
    limit = 128 if backward and query.dtype == torch.float32 else 256
    chosen = dispatch.triton_or_reference(query, backend, refuses="does not attend with")
    too_wide = max(query.shape[-1], value.shape[-1]) > limit
    if chosen == "triton" and too_wide and dispatch.requested(backend) == "triton":
        raise dispatch.UnsupportedByBackend(
            f"attention: head dim {max(query.shape[-1], value.shape[-1])} is not supported by the Triton "
            f"backend (at most {limit}{' in the backward of float32' * backward}); use backend='auto'"
        )
    if chosen == "triton" and current_device(query).capability < 80:
        if dispatch.requested(backend) == "triton":
            raise dispatch.UnsupportedByBackend(
                "attention: the Triton backend needs compute capability 8.0 or later; use backend='auto'"
            )
        return "reference"
    empty = 0 in query.shape or 0 in key.shape or 0 in value.shape
    return "reference" if too_wide or empty else chosen


@dispatch.replays(tensors=9)
def _body(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, *scalars):
    return _run(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, scalars, False)[0]


@dispatch.replays(tensors=9)
def _with_lse_body(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, *scalars):
    return _run(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, scalars, True)


def _run(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, scalars, keep_lse):
    options = Options(*scalars[:6])
    cu = None if cu_query is None else (cu_query, cu_key)
    if choose(q, k, v, scalars[6]) == "triton":
        from fastnets.kernels.attention import attention_forward as launch

        return launch(
            q, k, v, options, bias=bias, mask=mask, slopes=slopes, seed=seed, cu=cu, keep_lse=keep_lse
        )
    check_attention(q, k, v, bias, mask, slopes, cu, options.softcap, options.dropout_p)
    return _reference(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, options)


def _fake(q, k, v, bias, mask, slopes, seed, cu_query, cu_key, *scalars):
    cu = None if cu_query is None else (cu_query, cu_key)
    check_attention(q, k, v, bias, mask, slopes, cu, scalars[4], scalars[5])
    B, H, M, _ = q.shape
    return q.new_empty((B, M, H, v.shape[3])).transpose(1, 2)


def _decode_body(q, k, v, bias, mask, slopes, *scalars):
    *options, backend = scalars
    options = Options(*options)
    if choose(q, k, v, backend) == "triton":
        from fastnets.kernels.attention_decode import attention_decode as launch

        return launch(q, k, v, options, bias=bias, mask=mask, slopes=slopes)
    check_attention(q, k, v, bias, mask, slopes, None, options.softcap)
    return _reference(q, k, v, bias, mask, slopes, None, None, None, options)[0]


def _decode_fake(q, k, v, bias, mask, slopes, *scalars):
    check_attention(q, k, v, bias, mask, slopes, None, scalars[4])
    B, H, M, _ = q.shape
    return q.new_empty((B, M, H, v.shape[3])).transpose(1, 2)


def _with_lse_fake(q, *arguments):
    out = _fake(q, *arguments)
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@dispatch.replays(tensors=13)
def _backward_body(
    dout, dlse, q, k, v, out, lse, bias, mask, slopes, seed, cu_query, cu_key, *scalars
):  # fmt: skip
    *scalars, bias_gradient, backend = scalars
    options = Options(*scalars)
    if choose(q, k, v, backend, backward=True) == "triton":
        from fastnets.kernels.attention_backward import attention_backward as launch

        cu = None if cu_query is None else (cu_query, cu_key)
        dq, dk, dv, dbias = launch(
            dout, dlse, q, k, v, out, lse, options, bias=bias, mask=mask, slopes=slopes, seed=seed, cu=cu,
            bias_gradient=bias_gradient,
        )  # fmt: skip
        return dq, dk, dv, q.new_empty(0) if dbias is None else dbias
    dq, dk, dv, dbias = _reference_backward(
        dout, dlse, q, k, v, lse, bias, mask, slopes, seed, cu_query, cu_key, options, bias_gradient
    )
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


def _backward_fake(dout, dlse, q, k, v, out, lse, bias, *rest):
    dq, dk, dv = (
        t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in (q, k, v)
    )
    return (
        dq,
        dk,
        dv,
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if rest[-2] else q.new_empty(0),
    )


def _flops(q, k, v, *rest, out_shape=None, **named) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _backward_flops(dout, dlse, q, k, v, *rest, out_shape=None, **named) -> int:
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


def _autocast_of(op):
    """As PyTorch's: all in the lower precision but float64, where one of them is that."""

    def autocast(q, k, v, *rest):
        dtype = torch.get_autocast_dtype(q.device.type)
        if torch.float64 not in (q.dtype, k.dtype, v.dtype):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.amp.autocast(q.device.type, enabled=False):
            return op()(q, k, v, *rest)

    return autocast


_infer = dispatch.register(
    f"attention_inference({_TENSORS}, {_SCALARS}) -> Tensor",
    _body,
    _fake,
    autocast=_autocast_of(lambda: _infer),
    flops=_flops,
)
# A few queries, not differentiable: a step of generation. Its number of keys changes from call to call.
_decode = dispatch.register(
    "attention_decode(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? slopes, "
    "float scale, int left, int right, bool bottom_right, float softcap, str backend) -> Tensor",
    _decode_body,
    _decode_fake,
    autocast=_autocast_of(lambda: _decode),
    flops=_flops,
)
_backward = dispatch.register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor? bias, Tensor? mask, Tensor? slopes, Tensor? seed, Tensor? cu_query, Tensor? cu_key, "
    f"{_OPTIONS}, bool bias_gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
    flops=_backward_flops,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _differentiable(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scalars = inputs[9:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dout, dlse):
        *tensors, bias, mask, slopes, seed, cu_query, cu_key = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 16
        if dout is None:
            dout = torch.zeros_like(tensors[3])
        wanted = bias is not None and ctx.needs_input_grad[3]
        *options, backend = ctx.scalars
        dq, dk, dv, dbias = _backward(
            dout, dlse, *tensors, bias, mask, slopes, seed, cu_query, cu_key, *options, wanted, backend
        )
        return dq, dk, dv, dbias if wanted else None, *(None,) * 12


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*arguments):
    if _needs_grad(*arguments[:4]):
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _differentiable(*arguments)


_differentiable = dispatch.register(
    f"attention({_TENSORS}, {_SCALARS}) -> (Tensor, Tensor)",
    _with_lse_body,
    _with_lse_fake,
    autograd=_autograd,
    autocast=_autocast_of(lambda: _differentiable),
    flops=_flops,
)

# --- the function -------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    causal_alignment: str = "top_left",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention``, with more kinds of masks.

    query [..., H, M, D], key [..., HK, N, D], value [..., HK, N, D_V], of one floating dtype, any strides;
    D and D_V up to 256 in our kernels. Up to ``enable_gqa`` the arguments are PyTorch's. More:

    window: each query sees the keys at a distance of less than ``window`` from its position, or as a pair
        (before, after) so many of them; None there is no bound.
    bias: floating, broadcasts to [..., H, M, N], is added to the scores; differentiable, the sums over what
        was broadcast in fp32 and in a fixed order. Goes with a boolean ``attn_mask``.
    alibi_slopes: fp32 [H] or [batch, H] (Press et al., 2022): minus slope times distance. No gradient.
    softcap: scores become softcap * tanh(scores / softcap) before anything is added (Gemma 2).
    cu_seqlens: int32 [sequences + 1], or one for queries and one for keys: sequences packed along the length,
        the i-th from cu_seqlens[i] to cu_seqlens[i + 1]; query is [H, total, D] or [1, H, total, D].
    return_lse: also the natural logarithm of the sum of exponentials, fp32 [..., H, M]; differentiable.
    causal_alignment: "top_left", query m is at the position of key m, or "bottom_right", the last ones meet.

    Returns [..., H, M, D_V], lying in memory as [..., M, H, D_V] where our kernels ran: merging heads is then
    a view. Queries that see no key get 0 (lse −inf) and pass no gradient on. Differentiable once.
    """
    bare = not (dropout_p or return_lse or softcap) and bias is window is alibi_slopes is cu_seqlens is None
    if bare and query.__class__ is Tensor and is_inference() and query.dim() == 4 and query.shape[2] > 1:
        tensors = (query, key, value, attn_mask)
        options = (is_causal, scale, enable_gqa, causal_alignment, switches_of_sdpa(), backend)
        of = (query.shape, getattr(key, "shape", None))
        remembered = _memory.get(of)
        if remembered is not None and remembered.serves(tensors, options):
            return remembered.call(tensors)
        if all(t is None or t.__class__ in (Tensor, nn.Parameter) for t in tensors) and not (
            watched(query) or in_transform()
        ):
            call = _bare.recorded(*tensors, *options)
            if call is not None:
                _memory.keep(of, call, tensors, options)
                return call(tensors)
    return _attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, bias, alibi_slopes,
        softcap, cu_seqlens, return_lse, causal_alignment, backend,
    )  # fmt: skip


_memory = dispatch.Memory()


def switches_of_sdpa() -> tuple:
    """What PyTorch chooses among its own implementations by, besides the tensors."""
    c = torch._C
    return (
        c._get_flash_sdp_enabled(), c._get_mem_efficient_sdp_enabled(), c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(), *c._get_sdp_priority_order(), c._get_deterministic_algorithms(),
    )  # fmt: skip


@dispatch.replays(tensors=4)
def _bare(query, key, value, mask, is_causal, scale, enable_gqa, causal_alignment, _switches, backend):
    """SDPA's own arguments without dropout: repeated as a whole, also where PyTorch's function runs."""
    return _attention(
        query, key, value, mask, 0.0, is_causal, scale, enable_gqa, None, None, None, None, None, False,
        causal_alignment, backend,
    )  # fmt: skip


def _attention(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, bias, alibi_slopes,
    softcap, cu_seqlens, return_lse, causal_alignment, backend,
):  # fmt: skip
    _check_operands(query, key, value, enable_gqa)
    if is_causal and attn_mask is not None:
        raise RuntimeError("attention: attn_mask cannot be given with is_causal=True; make the mask causal")
    left, right = _bounds(window, is_causal)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"attention: causal_alignment={causal_alignment!r} is neither 'top_left' nor 'bottom_right'"
        )
    bottom_right = causal_alignment == "bottom_right" and query.shape[-2] != key.shape[-2]
    if cu_seqlens is not None:
        bottom_right = causal_alignment == "bottom_right"
    lacking = window is not None or alibi_slopes is not None or bool(softcap) or cu_seqlens is not None
    lacking = lacking or return_lse or (bottom_right and is_causal)
    lacking = lacking or (bias is not None and (is_causal or attn_mask is not None))
    additive = attn_mask if bias is None else bias
    few = not (dropout_p or return_lse or cu_seqlens is not None) and _has_few_queries(query, key)
    few = few and not _needs_grad(query, key, value, additive, attn_mask)
    if _chooses_library(query, key, value, additive, lacking, backend, few):
        if bias is not None and bias.dtype not in (torch.float32, query.dtype):
            additive = bias.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, additive, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-3]
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or key.shape[0] != lead[0]:
        query, key, value, lead = _with_one_batch(query, key, value)
    if query.shape[1] != key.shape[1] and not enable_gqa and key.shape[1] != 1:
        raise ValueError(
            f"attention: query has {query.shape[1]} heads, key {key.shape[1]}; fewer need enable_gqa=True"
        )
    if attn_mask is not None and attn_mask.is_floating_point():
        # The float mask of PyTorch has a gradient too, and there is one place for that.
        if bias is None:
            attn_mask, bias = None, attn_mask
        elif attn_mask.requires_grad:
            attn_mask, bias = None, attn_mask + bias
    scores = (*lead, query.shape[1], query.shape[2], key.shape[2])
    if attn_mask is not None:
        attn_mask = _with_four_dims("attn_mask", attn_mask, scores)
    if bias is not None:
        bias = _with_four_dims("bias", bias, scores)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()[None] if alibi_slopes.dim() == 1 else alibi_slopes.detach()
    cu_query, cu_key = _packed(cu_seqlens, query, key)
    arguments = (
        query, key, value, bias, attn_mask, alibi_slopes, draw_seed(query.device) if dropout_p else None,
        cu_query, cu_key, query.shape[3] ** -0.5 if scale is None else scale, left, right, bottom_right,
        softcap or 0.0, dropout_p, backend,
    )  # fmt: skip
    lse = None
    if in_transform():
        check_attention(
            *arguments[:6], None if cu_query is None else (cu_query, cu_key), softcap or 0.0, dropout_p
        )
        out, lse = _reference(*arguments[:9], Options(*arguments[9:15]))
    elif few:
        out = _decode(*arguments[:6], *arguments[9:14], backend)
    elif return_lse or _needs_grad(query, key, value, bias):
        out, lse = _differentiable(*arguments)
    else:
        out = _infer(*arguments)
    if len(lead) != 1:
        out, lse = (t if t is None else t.unflatten(0, lead) if lead else t[0] for t in (out, lse))
    return (out, lse / LOG2E) if return_lse else out


def _has_few_queries(query: Tensor, key: Tensor) -> bool:
    """Whether the queries that share a key head fit one tile: see ``kernels.attention_decode``."""
    if query.dim() < 3 or key.dim() < 3 or 0 in query.shape or 0 in key.shape:
        return False
    return query.shape[-3] * query.shape[-2] <= 16 * key.shape[-3]


# From so many keys on a few queries leave most of a device idle, unless the keys are split among programs.
_KEYS_TO_SPLIT = 256


def _chooses_library(query, key, value, additive, lacking: bool, backend: str, few: bool = False) -> bool:
    """Whether PyTorch's own function runs; ``lacking``: it has not got what this call asks for; ``few``: see
    ``_has_few_queries``."""
    wanted = dispatch.requested(
        dispatch.validate_backend(backend) if backend != dispatch.UNFOLDED else backend
    )
    if wanted == "library":
        if lacking:
            raise dispatch.UnsupportedByBackend(
                "attention: backend 'library' is F.scaled_dot_product_attention, which has no window, "
                "alibi_slopes, softcap, cu_seqlens, return_lse, bias beside another mask, nor "
                "causal_alignment; use backend='auto'"
            )
        return True
    if wanted != "auto" or lacking:
        return False
    device_type = dispatch.device_type_of(query)
    if device_type != "cuda":
        return True
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    splits = few and key.shape[-2] >= _KEYS_TO_SPLIT
    if (
        (additive is None and not splits)
        or dtype not in dispatch.OUR_DTYPES
        or max(query.shape[-1], value.shape[-1]) > 256
    ):
        # Measured on an H200 in bf16: 28.4 µs against our 29.3 for a ViT-B's 32 × 12 × 197 × 64, 184 against
        # 189 for 2 × 16 × 4096 × 64 causal, 260 against 304 with head dim 128.
        return True
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return True
    return current_device(query).capability < 80


def implementation_of(
    query: Tensor, key: Tensor, value: Tensor, backend: str = "auto", attn_mask: Tensor | None = None
) -> str:
    """What runs for a call with SDPA's arguments alone: "library", "triton" or "reference"."""
    if _chooses_library(query, key, value, attn_mask, False, backend):
        return "library"
    return choose(query, key, value, backend)


def _bounds(window, is_causal: bool) -> tuple[int, int]:
    """(left, right) of ``Options``."""
    left = right = UNBOUNDED
    if window is not None:
        if isinstance(window, int):
            if window <= 0:
                raise ValueError(f"attention: window={window}, expected at least 1 key")
            left = right = window - 1
        else:
            if len(window) != 2 or any(side is not None and side < 0 for side in window):
                raise ValueError(
                    f"attention: window={window}, expected two numbers of keys, 0 or more, or None"
                )
            left, right = (UNBOUNDED if side is None else side for side in window)
    return left, 0 if is_causal else right


def _with_one_batch(query, key, value):
    """(query, key, value, lead): four dims each, the leading ones broadcast and merged; lead as it was."""
    if query.dim() < 3 or key.dim() < 3 or value.dim() < 3:
        raise ValueError(
            f"attention: query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dims, "
            "expected [..., heads, length, head_dim]"
        )
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    parts = (t.expand(*lead, *t.shape[-3:]) for t in (query, key, value))
    return *(t.flatten(0, -4) if lead else t[None] for t in parts), lead


def _check_operands(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """What PyTorch's own attention takes without a word, or refuses in terms of the products inside."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"attention: {name} must be a tensor [..., heads, length, D], got {type(t).__name__}"
            )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError("attention: query, key and value are [..., heads, length, D], got "
                         f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}")  # fmt: skip
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"attention: key is {tuple(key.shape)}, query {tuple(query.shape)}: their head dims differ"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"attention: value is {tuple(value.shape)}, key {tuple(key.shape)}: give each key a value"
        )
    if not enable_gqa and query.dim() > 2 and key.dim() > 2:
        heads, kept = query.shape[-3], key.shape[-3]
        if heads != kept and 1 not in (heads, kept):
            raise ValueError(f"attention: query has {heads} heads, key {kept}; fewer need enable_gqa=True")


def _with_four_dims(name: str, t: Tensor, scores: tuple[int, ...]) -> Tensor:
    """[p, h, m, n] of what broadcasts to ``scores`` [..., H, M, N]; p repeats along the batch."""
    if t.dim() > len(scores) or any(n not in (1, full) for n, full in zip(t.shape[::-1], scores[::-1])):
        raise ValueError(
            f"attention: {name} is {tuple(t.shape)}, which does not broadcast to {tuple(scores)}"
        )
    if t.dim() == 4 and len(scores) == 4:
        return t
    lead = (1,) * (len(scores) - t.dim()) + tuple(t.shape[:-3])
    t = t.reshape((1,) * max(3 - t.dim(), 0) + tuple(t.shape[-3:])) if t.dim() <= 3 else t
    whole = 0  # leading dims that are all broadcast need not be there
    while whole < len(lead) and lead[whole] == 1:
        whole += 1
    if whole == len(lead):
        return t.reshape(1, *t.shape[-3:])
    t = t.reshape(*lead[whole:], *t.shape[-3:])
    return t.expand(*scores[whole:-3], *t.shape[-3:]).flatten(0, -4)


def _packed(cu_seqlens, query, key) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens of queries and of keys, checked; on CUDA by an assertion there, once for each tensor."""
    if cu_seqlens is None:
        return None, None
    # Two tensors in any case: launches on one that is two arguments are not repeated, see kernels.replay.
    pair = (cu_seqlens, cu_seqlens.detach()) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    for cu, length in zip(pair, (query.shape[2], key.shape[2])):
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 2:
            raise ValueError(
                f"attention: cu_seqlens is {tuple(cu.shape)} {cu.dtype}, expected int32 [sequences + 1]"
            )
        if cu.is_meta or torch.compiler.is_compiling():
            continue
        state = (cu._version, length)
        if getattr(cu, "_fastnets_ascends", None) == state:
            continue
        fits = (cu.diff() >= 0).all() & (cu[0] == 0) & (cu[-1] == length)
        if cu.is_cuda:
            torch._assert_async(fits, "attention: cu_seqlens does not ascend from 0 to the packed length")
        elif not fits:
            raise ValueError(f"attention: cu_seqlens does not ascend from 0 to the packed length, {length}")
        cu._fastnets_ascends = state
    return pair
