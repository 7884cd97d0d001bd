"""Stock compositions under the names of fused ops that are being written beside this: to be replaced."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastnets.fused.activation import activation as activation_of


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    backend="auto", **options,
):  # fmt: skip
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _compose(y, act, activation, negative_slope, layer_scale, residual):
    y = activation_of(activation).forward(y, negative_slope) if act is None else act(y)
    y = y if layer_scale is None else y * layer_scale
    return y if residual is None else y + residual


def linear_act(
    x, weight, bias=None, *, activation="none", negative_slope=0.01, layer_scale=None, residual=None,
    backend="auto",
):  # fmt: skip
    y = F.linear(x, weight, bias)
    return _compose(y, None, activation, negative_slope, layer_scale, residual)


def call_linear_act(
    linear: nn.Linear, act, x, residual=None, activation="none", negative_slope=0.0, layer_scale=None,
    backend="auto",
) -> Tensor:  # fmt: skip
    return _compose(linear(x), act, activation, negative_slope, layer_scale, residual)
