"""Multi-head attention: ``nn.MultiheadAttention`` on fused projections and attention.

    q, k, v = split(x · in_projᵀ + b);   y = softmax(q·kᵀ / √d + mask) · v · out_projᵀ + b

After Vaswani et al., 2017. One matrix product makes q, k and v where they come from one tensor; attention
reads them where they lie, as strided views, and what follows the output projection (a layer scale, the
residual) is added in its epilogue. Stock's own module transposes batch-first inputs and copies q, k and v.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import dispatch
from fastnets.fused.attention import attention
from fastnets.fused.batch_norm import has_hooks, in_transform
from fastnets.fused.handing_down import call_then_add, ends_in_linear, finish
from fastnets.fused.layer_norm import call_layer_norm
from fastnets.fused.linear import call_linear
from fastnets.fused.norm_linear import asks_for_statistics, call_norm_linear_function


def attend(
    mha: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` of ``mha``: its arguments, its (output, weights)."""
    return _attend(
        mha, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
        backend,
    )[:2]  # fmt: skip


def attend_then_add(
    mha: nn.MultiheadAttention,
    residual: Tensor | None,
    scale: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``attend(...)[0] · scale + residual``, added in the output projection's epilogue."""
    return _attend(
        mha, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
        backend, residual, scale,
    )[0]  # fmt: skip


def call_norm_then_add(
    norm: nn.Module | None,
    mha: nn.MultiheadAttention,
    residual: Tensor | None,
    scale: Tensor | None,
    x: Tensor,
    backend: str,
    statistics: Tensor | None = None,
    reader: tuple | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(``call_then_add`` of ``mha`` with ``norm(x)`` as query, key and value; statistics of the result's rows
    or None): the norm at the head of the projection where ``norm_linear`` serves that.

    reader: the norm, linear layer, activation module and activation that read the result, if any.
    """
    if not ends_in_linear(mha) or has_hooks(mha) or _has_any_global_hook():
        x = x if norm is None else call_layer_norm(norm, x, None, backend)
        options = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
        options |= {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
        return call_then_add(mha, residual, scale, x, x, x, **options), None
    y, _, found = _attend(
        mha, x, x, x, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, backend,
        residual, scale, norm, statistics, reader,
    )  # fmt: skip
    return y, found


def _attend(
    mha, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
    backend, residual=None, scale=None, norm=None, statistics=None, reader=None,
):  # fmt: skip
    """(output, weights, statistics of the output's rows): the latter two or None."""
    served = not _stock_serves(mha, query, key, value, key_padding_mask, attn_mask, is_causal)
    if norm is not None and not (served and mha._qkv_same_embed_dim):
        query = key = value = call_layer_norm(norm, query, None, backend)
        norm = None
    if not served:
        y, weights = nn.MultiheadAttention.forward(
            mha, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return finish(y, residual, scale), weights, None
    batched = query.dim() == 3
    batch_first = mha.batch_first or not batched
    if not batched:
        same_key, same_value = key is query, value is key
        query = query.unsqueeze(0)
        key = query if same_key else key.unsqueeze(0)
        value = key if same_value else value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if norm is None:
        q, k, v = _project(mha, query, key, value, backend)
    else:
        packed = (norm, query, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = call_norm_linear_function(*packed, backend=backend, statistics=statistics)[0].chunk(3, -1)
    length = 1 if batch_first else 0  # its dimension
    if mha.bias_k is not None:
        k, v = (_append(t, b, length) for t, b in ((k, mha.bias_k), (v, mha.bias_v)))
    q, k, v = (_heads(t, mha.num_heads, batch_first) for t in (q, k, v))  # [N, H, L or S, D]
    if mha.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros((*t.shape[:2], 1, t.shape[3]))], 2) for t in (k, v))
    if is_causal and key_padding_mask is None and not need_weights:
        mask = None
    else:
        is_causal = False
        mask = _mask(key_padding_mask, attn_mask, q, k.shape[2], need_weights)
    dropout = mha.dropout if mha.training else 0.0
    if need_weights:
        y, weights = _attention_with_weights(q, k, v, mask, dropout)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y, weights = attention(q, k, v, mask, dropout, is_causal, backend=backend), None
    out = mha.out_proj
    if residual is not None and not batched:
        residual = residual.unsqueeze(0)
    # A dropout that follows draws its noise in the order of memory, and on the CPU that noise is stock's.
    swaps = batch_first and mha.training and y.device.type == "cpu"
    if swaps and residual is not None:
        residual = residual.transpose(0, 1)
    y = y.transpose(1, 2) if batch_first and not swaps else y.permute(2, 0, 1, 3)
    y = y.reshape(*y.shape[:2], mha.embed_dim)
    keep = reader is not None and not swaps and asks_for_statistics(reader, y, residual, backend)
    y, found = call_norm_linear_function(
        None, y, out.weight, out.bias, residual, scale, backend, keep=keep
    )  # fmt: skip
    y = y.transpose(0, 1) if swaps else y
    if not batched:
        return y.squeeze(0), None if weights is None else weights.squeeze(0), found
    return y, weights, found


def _stock_serves(mha, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
    """Whether the stock forward is to run: for tensors that are not plain ones, and for arguments that it has
    an error for."""
    inputs = (query, key, value)
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    if not all(type(t) in (Tensor, nn.Parameter) for t in (*inputs, *masks)) or in_transform():
        return True
    if query.is_nested or query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        return True
    if (mha.bias_k is None) != (mha.bias_v is None) or (is_causal and attn_mask is None):
        return True
    weight = mha.in_proj_weight if mha._qkv_same_embed_dim else mha.q_proj_weight
    if weight is None or any(
        type(t) not in (Tensor, nn.Parameter) or t.dtype != query.dtype for t in (weight, mha.out_proj.weight)
    ):
        return True
    if key.shape[:-1] != value.shape[:-1] or any(t.dtype != query.dtype for t in (key, value)):
        return True
    sizes = (mha.embed_dim, mha.kdim, mha.vdim)
    if any(t.shape[-1] != size for t, size in zip(inputs, sizes)):
        return True
    batched = query.dim() == 3
    batch = 0 if mha.batch_first else 1
    N = query.shape[batch] if batched else 1
    L, S = (t.shape[1 - batch if batched else 0] for t in (query, key))
    if batched and key.shape[batch] != N:
        return True
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != ((N, S) if batched else (S,)):
        return True
    allowed = ((L, S), (N * mha.num_heads, L, S))
    if attn_mask is not None and tuple(attn_mask.shape) not in allowed:
        return True
    return any(mask.dtype != torch.bool and not mask.is_floating_point() for mask in masks)


def _project(mha, query, key, value, backend) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the size ``embed_dim``, before they are split into heads."""
    E, bias = mha.embed_dim, mha.in_proj_bias
    if not mha._qkv_same_embed_dim:
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        inputs = zip((query, key, value), weights, biases)
        return tuple(call_linear(x, weight, b, backend=backend) for x, weight, b in inputs)
    weight = mha.in_proj_weight
    if query is key and key is value:
        return call_linear(query, weight, bias, backend=backend).chunk(3, -1)

    def part(x: Tensor, first: int, last: int) -> Tensor:
        b = None if bias is None else bias[first * E : last * E]
        return call_linear(x, weight[first * E : last * E], b, backend=backend)

    q = part(query, 0, 1)
    if key is value:
        return q, *part(key, 1, 3).chunk(2, -1)
    return q, part(key, 1, 2), part(value, 2, 3)


def _append(x: Tensor, vector: Tensor, length: int) -> Tensor:
    """x with one more position, ``vector`` [1, 1, E], in every sequence."""
    one = vector.expand(x.shape[0], 1, -1) if length == 1 else vector.expand(1, x.shape[1], -1)
    return torch.cat([x, one.to(x.dtype)], length)


def _heads(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    x = x.unflatten(-1, (heads, x.shape[-1] // heads))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _mask(key_padding_mask, attn_mask, q, keys: int, additive: bool) -> Tensor | None:
    """One mask for attention from stock's two, broadcastable to [N, H, L, S].

    Boolean where both are (True: attend, where stock's say True for what is left out), else to be added.
    """
    N, H = q.shape[:2]
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, H)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    added = keys - masks[0].shape[-1]  # by bias_k and add_zero_attn
    if added:
        masks = [F.pad(mask, (0, added)) for mask in masks]
    if all(mask.dtype == torch.bool for mask in masks):
        blocked = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return _to_additive(blocked, q.dtype) if additive else ~blocked
    masks = [_to_additive(m, q.dtype) if m.dtype == torch.bool else m.to(q.dtype) for m in masks]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _to_additive(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, float("-inf"))


def _attention_with_weights(q, k, v, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention that writes its weights [N, H, L, S] out, as stock computes them."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


def share_state(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """An instance of ``cls`` with the parameters, children and settings of ``module``, and none of its
    hooks."""
    self = cls.__new__(cls)
    nn.Module.__init__(self)
    fresh = {name for name in vars(self) if "hook" in name}
    for name, value in vars(module).items():
        if name not in fresh:
            self.__dict__[name] = copy.copy(value) if type(value) in (dict, set) else value
    return self


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` by fused ops: its arguments, parameters, masks and results.

    query [N, L, E] where ``batch_first``, else [L, N, E], or [L, E]; returns (output like query, weights
    [N, L, S] or None). Nested tensors and functorch transforms run stock's code. Dropout draws what stock
    draws where PyTorch's own attention runs (the CPU), from a Philox seed elsewhere.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype,
        )  # fmt: skip
        self.backend = dispatch.validate_backend(backend)

    @classmethod
    def from_stock(cls, module: nn.MultiheadAttention, *, backend: str = "auto") -> MultiheadAttention:
        """The fused module with the parameters of a stock one, which it shares."""
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(
                f"{cls.__name__}.from_stock: got {type(module).__name__}, expected nn.MultiheadAttention"
            )
        self = share_state(cls, module)
        self.backend = dispatch.validate_backend(backend)
        return self

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return attend(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal, self.backend,
        )  # fmt: skip

    def _fastnets_then_add(
        self, residual: Tensor | None, scale: Tensor | None, *arguments, **options
    ) -> Tensor:
        """See ``fused.handing_down``."""
        return attend_then_add(self, residual, scale, *arguments, **options, backend=self.backend)
