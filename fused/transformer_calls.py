"""Stock compositions under the names of fused ops that are being written beside this: to be replaced."""

from __future__ import annotations

import torch.nn.functional as F


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *,
    backend="auto", **options,
):  # fmt: skip
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
