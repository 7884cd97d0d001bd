"""The Transformer: encoder, encoder-decoder, and a causal one for time series.

A. Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762). It brought sequence models made of
nothing but attention and perceptrons: every token sees every other in one step, so training runs over all
positions at once. The base size is 512 wide, 8 heads, 2048 in the perceptron, 6 layers.

============================  ==========  ===================================================================
network                       parameters  what it is
============================  ==========  ===================================================================
transformer_encoder           18,914,304  the encoder, normalised after each residual add (the paper's), ReLU
transformer_encoder_prenorm   18,915,328  normalised before each branch (arXiv:2002.04745) and last, GELU
transformer                   63,082,496  encoder, decoder, and the shared embedding of 37,000 tokens
time_series_transformer        9,612,551  12 causal layers of width 256, forecasting 7 series one step ahead
============================  ==========  ===================================================================

The layers are ``torch.nn``'s own, so names and shapes are those of ``torch.nn.TransformerEncoder`` and
``torch.nn.TransformerDecoder``.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.registry import register_model

__all__ = [
    "TimeSeriesTransformer",
    "Transformer",
    "time_series_transformer",
    "transformer",
    "transformer_encoder",
    "transformer_encoder_prenorm",
]

VOCABULARY = 37_000  # the paper's byte pairs for English and German
SERIES = 7


def encoder(
    *,
    width: int = 512,
    heads: int = 8,
    hidden: int = 2048,
    depth: int = 6,
    pre_norm: bool = False,
    activation: str = "relu",
    dropout: float = 0.1,
) -> nn.TransformerEncoder:
    """A stock encoder, (N, L, width) to the same, with Xavier initialisation.

    pre_norm: normalise each branch's input and the last output, in place of each sum. activation: "relu" or
    "gelu".
    """
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, dropout, activation, batch_first=True, norm_first=pre_norm
    )
    last = nn.LayerNorm(width) if pre_norm else None
    # Without nested tensors: what goes in padded comes out at the same length.
    stack = nn.TransformerEncoder(layer, depth, last, enable_nested_tensor=False)
    xavier_initialised(stack)
    return stack


def xavier_initialised(stack: nn.Module) -> None:
    """Xavier's uniform rule for every matrix, as ``nn.Transformer`` has it.

    The stock stacks copy one layer, so without this all layers would start with the same weights.
    """
    for parameter in stack.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def sinusoids(length: int, width: int) -> Tensor:
    """The paper's positions, (length, width): sines at even places and cosines at odd ones."""
    angles = torch.arange(length).unsqueeze(1) * torch.exp(
        torch.arange(0, width, 2) * (-math.log(10_000.0) / width)
    )
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


@torch.fx.wrap  # a tracer takes it as it stands
def causal_mask(x: Tensor) -> Tensor:
    """(L, L) for x of (N, L, ...): True where a position would look ahead."""
    length = x.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)


@torch.fx.wrap
def check_length(x: Tensor, longest: int, argument: str) -> None:
    """Raises ``ValueError`` where x, (N, L, ...), is longer than there are positions, or empty."""
    if x.dim() < 2 or not 1 <= x.shape[1] <= longest:
        raise ValueError(
            f"{argument}: got shape {list(x.shape)}; the network has positions for lengths 1 to {longest}: "
            "cut the sequences, or build it with max_length=..."
        )


class Transformer(nn.Module):
    """Encoder and decoder of the paper on one embedding, which also scores the next token.

    Input: source (N, S) and target (N, T), token ids; output (N, T, vocabulary) logits: at each place of the
    target, of the token after it. source_padding (N, S): True at places that hold no token.
    """

    def __init__(
        self,
        *,
        vocabulary: int = VOCABULARY,
        width: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        depth: int = 6,
        pre_norm: bool = False,
        activation: str = "relu",
        dropout: float = 0.1,
        max_length: int = 1024,
    ):
        super().__init__()
        shape = {"pre_norm": pre_norm, "activation": activation, "dropout": dropout}
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", sinusoids(max_length, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder(width=width, heads=heads, hidden=hidden, depth=depth, **shape)
        layer = nn.TransformerDecoderLayer(
            width, heads, hidden, dropout, activation, batch_first=True, norm_first=pre_norm
        )
        self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width) if pre_norm else None)
        self.scale = math.sqrt(width)
        self.max_length = max_length
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the layers; the shared embedding normal, so that scores start with unit variance."""
        xavier_initialised(self.encoder)
        xavier_initialised(self.decoder)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)

    def embed(self, tokens: Tensor, argument: str) -> Tensor:
        check_length(tokens, self.max_length, argument)
        positions = self.positions[: tokens.shape[1]]
        return self.dropout(self.embedding(tokens) * self.scale + positions)

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor | None = None) -> Tensor:
        memory = self.encoder(self.embed(source, "source"), src_key_padding_mask=source_padding)
        states = self.decoder(
            self.embed(target, "target"),
            memory,
            tgt_mask=causal_mask(target),
            memory_key_padding_mask=source_padding,
            tgt_is_causal=True,
        )
        return F.linear(states, self.embedding.weight)


class TimeSeriesTransformer(nn.Module):
    """A causal, pre-norm encoder over time steps that forecasts the next one at every place.

    series: how many numbers a time step has. Input (N, L, series), output the same shape: at each place, the
    forecast of the step after it, made from the steps up to it.
    """

    def __init__(
        self,
        *,
        series: int = SERIES,
        width: int = 256,
        heads: int = 8,
        hidden: int = 1024,
        depth: int = 12,
        dropout: float = 0.1,
        max_length: int = 512,
    ):
        super().__init__()
        self.max_length = max_length
        self.embedding = nn.Linear(series, width)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        self.dropout = nn.Dropout(dropout)
        shape = {"pre_norm": True, "activation": "gelu", "dropout": dropout}
        self.encoder = encoder(width=width, heads=heads, hidden=hidden, depth=depth, **shape)
        self.head = nn.Linear(width, series)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix, normal 0.02 for the learned positions."""
        xavier_initialised(self)
        nn.init.zeros_(self.embedding.bias)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_length(x, self.max_length, "x")
        states = self.dropout(self.embedding(x) + self.positions[: x.shape[1]])
        return self.head(self.encoder(states, mask=causal_mask(x), is_causal=True))


@register_model(input_size=(128, 512))
def transformer_encoder(**options) -> nn.TransformerEncoder:
    """The base encoder, post-norm and ReLU: 18,914,304 parameters."""
    return encoder(**options)


@register_model(input_size=(128, 512))
def transformer_encoder_prenorm(**options) -> nn.TransformerEncoder:
    """The base encoder, pre-norm and GELU: 18,915,328 parameters."""
    return encoder(**{"pre_norm": True, "activation": "gelu", **options})


@register_model(input_size=(64,), vocabulary=VOCABULARY, inputs=2)
def transformer(**options) -> Transformer:
    """The base encoder-decoder with its embedding: 63,082,496 parameters."""
    return Transformer(**options)


@register_model(input_size=(96, SERIES))
def time_series_transformer(**options) -> TimeSeriesTransformer:
    """The causal time-series Transformer: 9,612,551 parameters."""
    return TimeSeriesTransformer(**options)
