"""BERT's encoder, in the size of MiniLM-L6, which turns sentences into vectors.

J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018 (arXiv:1810.04805). It brought
one encoder, trained on unlabelled text to fill in masked words, that serves every task of language. W. Wang
et al., "MiniLM", 2020 (arXiv:2002.10957) distilled it to six layers of 384, and N. Reimers and I. Gurevych,
"Sentence-BERT", 2019 (arXiv:1908.10084) made the mean of its states a sentence's embedding.

22,713,216 parameters: 6 layers, 12 heads, 1,536 in the perceptron, 30,522 tokens. Input: token ids (N, L),
L up to 512. Names and shapes in ``state_dict`` are Hugging Face's; the weights of ``all-MiniLM-L6-v2`` load.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.checkpoint import KeyStyle
from fastnets.models.registry import register_model
from fastnets.models.transformer import check_length

__all__ = ["BertEncoder", "minilm_l6"]

VOCABULARY = 30_522

torch.fx.wrap("check_length")  # here, too, a tracer takes it as it stands


class BertEmbeddings(nn.Module):
    """Words, positions and token types, summed and normalised: (N, L) ids to (N, L, width)."""

    def __init__(self, vocabulary: int, width: int, max_length: int, types: int, dropout: float):
        super().__init__()
        self.max_length = max_length
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_length, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, types: Tensor | None) -> Tensor:
        check_length(tokens, self.max_length, "tokens")
        words = self.word_embeddings(tokens)
        kinds = embedded_types(self.token_type_embeddings.weight, types)
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        return self.dropout(self.LayerNorm(words + kinds + positions))


@torch.fx.wrap  # a tracer takes the choice as it stands
def embedded_types(table: Tensor, types: Tensor | None) -> Tensor:
    """The rows of a table of token types; its first, for all tokens, where no types are given."""
    return table[0] if types is None else F.embedding(types, table)


class BertLayer(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and normalised after.

    Input (N, L, width), and a mask that broadcasts to (N, heads, L, L), True where a key is seen, or None.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.drop = dropout
        # Only names: everything is computed in one forward, where a rewriter sees it whole.
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({n: nn.Linear(width, width) for n in ("query", "key", "value")}),
                "output": _joint(width, width, dropout),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden), "act": nn.GELU()})
        self.output = _joint(hidden, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        project, joint = self.attention["self"], self.attention["output"]
        query, key, value = (
            project[name](x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        dropout = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).flatten(2)
        x = joint["LayerNorm"](joint["dropout"](joint["dense"](mixed)) + x)
        hidden = self.intermediate["act"](self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dropout"](self.output["dense"](hidden)) + x)


def _joint(inputs: int, width: int, dropout: float) -> nn.ModuleDict:
    """What stands at the end of a branch: its projection, dropout, and the norm after the sum."""
    return nn.ModuleDict(
        {
            "dense": nn.Linear(inputs, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            "dropout": nn.Dropout(dropout),
        }
    )


class BertEncoder(nn.Module):
    """Embeddings and ``depth`` layers; ``pooler`` holds the classifier's dense layer of the checkpoints.

    Input: tokens (N, L), ids; mask (N, L), 0 at padding, or None; types (N, L) or None.
    Output (N, L, width).
    """

    key_styles = (
        KeyStyle("sentence-transformers", (("embeddings.position_ids", None),)),
        KeyStyle("Hugging Face", (("bert.embeddings.position_ids", None), ("cls.", None), ("bert.", ""))),
    )

    def __init__(
        self,
        *,
        vocabulary: int = VOCABULARY,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        max_length: int = 512,
        types: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide into heads={heads}")
        self.embeddings = BertEmbeddings(vocabulary, width, max_length, types, dropout)
        layers = nn.ModuleList(BertLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width), "act": nn.Tanh()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal 0.02 for every matrix, as the authors' code; the padding token stays zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.embeddings.word_embeddings.weight[0])

    def forward(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        x = self.embeddings(tokens, types)
        visible = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self.encoder["layer"]:
            x = layer(x, visible)
        return x

    def pooled(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """What BERT classifies: tanh of a dense layer on the first token's state, (N, width)."""
        first = self(tokens, mask, types)[:, 0]
        return self.pooler["act"](self.pooler["dense"](first))

    def sentence_embedding(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """One unit vector for each sentence: the mean of its tokens' states, normalised, (N, width)."""
        states = self(tokens, mask)
        weight = torch.ones_like(states[..., :1]) if mask is None else mask.unsqueeze(2).to(states.dtype)
        return F.normalize((states * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


@register_model(input_size=(128,), vocabulary=VOCABULARY)
def minilm_l6(**options) -> BertEncoder:
    """MiniLM-L6, BERT's encoder at 384 × 6: 22,713,216 parameters."""
    return BertEncoder(**options)
