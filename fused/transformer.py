"""Layers of a Transformer: ``nn.TransformerEncoderLayer``, its decoder twin, and stacks of them.

    post-norm:  x = norm(x + attention(x));    x = norm(x + linear2(act(linear1(x))))
    pre-norm:   x = x + attention(norm(x));    x = x + linear2(act(linear1(norm(x))))

After Vaswani et al., 2017, and Xiong et al., 2020. Activations and residuals go into the epilogues of the
linear layers; where dropout stands between, the addition goes into the norm that follows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import transformer as stock

from fastnets.fused import dispatch
from fastnets.fused.activation import recognise, recognise_call
from fastnets.fused.batch_norm import has_hooks, in_transform
from fastnets.fused.capture import never_drops
from fastnets.fused.handing_down import call_then_add
from fastnets.fused.layer_norm import call_layer_norm
from fastnets.fused.linear import call_linear_act
from fastnets.fused.multihead_attention import MultiheadAttention, call_norm_then_add, share_state
from fastnets.fused.norm_linear import call_norm_linear

# --- parts of a layer ---------------------------------------------------------------------------------------


def _passes(dropout: nn.Module) -> bool:
    return (not dropout.training or never_drops(dropout)) and not has_hooks(dropout)


def _add_attention(mha, dropout, residual: Tensor, *inputs: Tensor, **options) -> Tensor:
    """``residual + dropout(mha(*inputs))``."""
    if _passes(dropout):
        return call_then_add(mha, residual, None, *inputs, need_weights=False, **options)
    return residual + dropout(mha(*inputs, need_weights=False, **options)[0])


def _activation_of(layer) -> tuple[nn.Module | None, tuple[str, float] | None]:
    """(its module, (name, slope) where it is one that fuses)."""
    activation = layer.activation
    if isinstance(activation, nn.Module):
        return activation, recognise(activation)
    known = recognise_call(activation, (), {})
    return None, None if known is None or known[0] == "none" else known


def _add_feed_forward(
    layer, dropout, residual: Tensor, x: Tensor, backend: str, norm=None, statistics: Tensor | None = None
) -> Tensor:
    """``residual + dropout(linear2(layer.dropout(act(linear1(norm(x))))))``."""
    act, known = _activation_of(layer)
    options = {"backend": backend, "statistics": statistics}
    if known is None:
        h = layer.activation(call_norm_linear(norm, layer.linear1, None, x, **options))
    else:
        h = call_norm_linear(norm, layer.linear1, act, x, None, *known, **options)
    h = h if _passes(layer.dropout) else layer.dropout(h)
    if _passes(dropout):
        return call_linear_act(layer.linear2, None, h, residual, backend=backend)
    return residual + dropout(call_linear_act(layer.linear2, None, h, backend=backend))


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are dense tensors without a subclass's or a transform's say."""
    plain = all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_nested) for t in tensors)
    return plain and not in_transform()


# --- whole layers -------------------------------------------------------------------------------------------


def run_encoder_layer(
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``nn.TransformerEncoderLayer.forward`` of ``layer``."""
    if not _is_plain(src, src_mask, src_key_padding_mask):
        return nn.TransformerEncoderLayer.forward(layer, src, src_mask, src_key_padding_mask, is_causal)

    def attend(residual: Tensor, x: Tensor) -> Tensor:
        return _add_attention(
            layer.self_attn, layer.dropout1, residual, x, x, x, attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask, is_causal=is_causal,
        )  # fmt: skip

    x = src
    if layer.norm_first:
        statistics = None
        if _passes(layer.dropout1):
            act, known = _activation_of(layer)
            reader = (layer.norm2, layer.linear1, act if known else None, known[0] if known else "none")
            x, statistics = call_norm_then_add(
                layer.norm1, layer.self_attn, x, None, x, backend, None, reader, need_weights=False,
                attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal,
            )  # fmt: skip
        else:
            x = attend(x, call_layer_norm(layer.norm1, x, backend=backend))
        return _add_feed_forward(layer, layer.dropout2, x, x, backend, layer.norm2, statistics)
    x = call_layer_norm(layer.norm1, attend(x, x), backend=backend)
    x = _add_feed_forward(layer, layer.dropout2, x, x, backend)
    return call_layer_norm(layer.norm2, x, backend=backend)


def run_decoder_layer(
    layer: nn.TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``nn.TransformerDecoderLayer.forward`` of ``layer``."""

    def attend_to_self(residual: Tensor, x: Tensor) -> Tensor:
        return _add_attention(
            layer.self_attn, layer.dropout1, residual, x, x, x, attn_mask=tgt_mask,
            key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal,
        )  # fmt: skip

    def attend_to_memory(residual: Tensor, x: Tensor) -> Tensor:
        return _add_attention(
            layer.multihead_attn, layer.dropout2, residual, x, memory, memory, attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal,
        )  # fmt: skip

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return call_layer_norm(module, x, backend=backend)

    x = tgt
    if layer.norm_first:
        x = attend_to_self(x, norm(layer.norm1, x))
        x = attend_to_memory(x, norm(layer.norm2, x))
        return _add_feed_forward(layer, layer.dropout3, x, norm(layer.norm3, x), backend)
    x = norm(layer.norm1, attend_to_self(x, x))
    x = norm(layer.norm2, attend_to_memory(x, x))
    return norm(layer.norm3, _add_feed_forward(layer, layer.dropout3, x, x, backend))


# --- stacks -------------------------------------------------------------------------------------------------


def run_encoder(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """``nn.TransformerEncoder.forward`` of ``encoder``.

    Where stock would leave the padding out by nested tensors, what stands at padded positions is 0 as there.
    """
    if not _is_plain(src, mask, src_key_padding_mask):
        return nn.TransformerEncoder.forward(encoder, src, mask, src_key_padding_mask, is_causal)
    kinds = (F._none_or_dtype(mask), "mask", src.dtype)
    padding = F._canonical_mask(src_key_padding_mask, "src_key_padding_mask", *kinds)
    mask = F._canonical_mask(mask, "mask", None, "", src.dtype, False)
    seq_len = stock._get_seq_len(src, encoder.layers[0].self_attn.batch_first)
    is_causal = stock._detect_is_causal_mask(mask, is_causal, seq_len)
    output = src
    for layer in encoder.layers:
        output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
    if padding is not None and mask is None and _leaves_out_padding(encoder, src, padding):
        output = output.masked_fill((padding != 0).unsqueeze(-1), 0.0)
    return output if encoder.norm is None else call_layer_norm(encoder.norm, output, backend=backend)


def _leaves_out_padding(encoder: nn.TransformerEncoder, src: Tensor, padding: Tensor) -> bool:
    """Whether stock would go through nested tensors, and so return zeros at padded positions."""
    first = encoder.layers[0]
    if (
        not torch.backends.mha.get_fastpath_enabled()
        or not getattr(encoder, "use_nested_tensor", False)
        or first.training
        or src.dim() != 3
        or torch.is_autocast_enabled(src.device.type)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters())))
    ):
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    if torch.compiler.is_compiling() or src.is_meta:
        return False
    return torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not())


def run_decoder(
    decoder: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``nn.TransformerDecoder.forward`` of ``decoder``."""
    seq_len = stock._get_seq_len(tgt, decoder.layers[0].self_attn.batch_first)
    tgt_is_causal = stock._detect_is_causal_mask(tgt_mask, tgt_is_causal, seq_len)
    output = tgt
    for layer in decoder.layers:
        output = layer(
            output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal,
        )  # fmt: skip
    return output if decoder.norm is None else call_layer_norm(decoder.norm, output, backend=backend)


# --- modules ------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """Base of the two layers below, before the stock class among the bases."""

    _attentions: tuple[str, ...]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str = "auto",
    ):
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip
        self._fuse(backend)

    def _fuse(self, backend: str) -> None:
        self.backend = dispatch.validate_backend(backend)
        for name in self._attentions:
            module = getattr(self, name)
            if type(module) is nn.MultiheadAttention:
                setattr(self, name, MultiheadAttention.from_stock(module, backend=backend))

    @classmethod
    def from_stock(cls, layer: nn.Module, *, backend: str = "auto") -> nn.Module:
        """The fused layer with the parameters and norms of a stock one, which it shares."""
        expected = cls.__mro__[2]
        if type(layer) is not expected:
            raise TypeError(
                f"{cls.__name__}.from_stock: got {type(layer).__name__}, expected nn.{expected.__name__}"
            )
        self = share_state(cls, layer)
        self._fuse(backend)
        return self


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` by fused ops: its arguments, parameters, masks and results.

    src [N, S, E] where ``batch_first``, else [S, N, E], or [S, E] -> the same. Nested tensors run stock's
    code.
    """

    _attentions = ("self_attn",)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return run_encoder_layer(self, src, src_mask, src_key_padding_mask, is_causal, self.backend)


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer`` by fused ops: its arguments, parameters, masks and results.

    tgt [N, T, E] and memory [N, S, E] where ``batch_first``, else [T, N, E] and [S, N, E] -> like tgt.
    """

    _attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        return run_decoder_layer(
            self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            tgt_is_causal, memory_is_causal, self.backend,
        )  # fmt: skip


class TransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` by fused ops: its arguments, parameters, masks and results.

    Stock encoder layers are taken over as fused ones. Nested tensors run stock's code; where stock would make
    them of a padding mask, padded positions of the result are 0 as there.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        backend: str = "auto",
    ):
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)
        self._fuse(backend)

    def _fuse(self, backend: str) -> None:
        self.backend = dispatch.validate_backend(backend)
        self.layers = nn.ModuleList(
            TransformerEncoderLayer.from_stock(layer, backend=backend)
            if type(layer) is nn.TransformerEncoderLayer
            else layer
            for layer in self.layers
        )

    @classmethod
    def from_stock(cls, encoder: nn.TransformerEncoder, *, backend: str = "auto") -> TransformerEncoder:
        """The fused encoder with the parameters of a stock one, which it shares."""
        if type(encoder) is not nn.TransformerEncoder:
            raise TypeError(
                f"{cls.__name__}.from_stock: got {type(encoder).__name__}, expected nn.TransformerEncoder"
            )
        self = share_state(cls, encoder)
        self._fuse(backend)
        return self

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        return run_encoder(self, src, mask, src_key_padding_mask, is_causal, self.backend)
