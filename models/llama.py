"""A Llama-style decoder: what language models have settled on.

H. Touvron et al., "Llama 2", 2023 (arXiv:2307.09288). It brought together what the decoders before it had
each shown: RMSNorm before every branch (arXiv:1910.07467), rotary positions (arXiv:2104.09864), a gated
perceptron (SwiGLU, arXiv:2002.05202), and eight query heads to one of keys and values (arXiv:2305.13245),
which makes the cache of generation eight times smaller. No layer has a bias.

The shape rules are the 70B's: heads of 128, 8 query heads for each key head, 3.5 × width in the perceptron.
``LlamaDecoder(width=8192, depth=80)`` is that network, 68,976,648,192 parameters; llama_small is
1024 × 8: 172,508,160. Names and shapes in ``state_dict`` are Hugging Face's; Meta's own checkpoints load too.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.checkpoint import KeyStyle
from fastnets.models.registry import register_model
from fastnets.models.rotary import angles_to_tables, inverse_frequencies, rotate_halves
from fastnets.models.transformer import check_length

__all__ = ["KeyValueCache", "LlamaDecoder", "llama_small"]

VOCABULARY = 32_000
HEAD_DIM = 128
QUERIES_FOR_A_KEY = 8

torch.fx.wrap("check_length")  # here, too, a tracer takes it as it stands


class KeyValueCache:
    """The keys and values of the tokens so far, for a batch of sequences of one length.

    layers: for each layer its keys and values, (N, key heads, max_length, head_dim) each; length: how many
    places are filled.
    """

    def __init__(self, decoder: LlamaDecoder, batch_size: int, max_length: int | None = None):
        self.max_length = decoder.max_length if max_length is None else max_length
        if not 1 <= self.max_length <= decoder.max_length:
            raise ValueError(
                f"max_length={max_length}: the network has positions for 1 to {decoder.max_length} tokens"
            )
        shape = (batch_size, decoder.key_heads, self.max_length, decoder.head_dim)
        like = decoder.lm_head.weight
        self.layers = [
            (like.new_empty(shape), like.new_empty(shape)) for _ in range(len(decoder.model["layers"]))
        ]
        self.length = 0


class CausalAttention(nn.Module):
    """Attention of each token to itself and those before it: query (N, heads, L, head_dim), key and value
    (N, key heads, L, head_dim) to (N, heads, L, head_dim).

    cache: the keys and values of the tokens before these, and how many of their places are filled. The new
    ones are written behind them.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        filled: int = 0,
    ) -> Tensor:
        if cache is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        length = query.shape[2]
        for stored, new in zip(cache, (key, value)):
            stored[:, :, filled : filled + length] = new
        key, value = (stored[:, :, : filled + length] for stored in cache)
        mask = None
        if length > 1 and filled:  # the last query sees all keys, so this is not SDPA's own causality
            mask = torch.ones(length, filled + length, dtype=torch.bool, device=query.device).tril(filled)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=length > 1 and not filled, enable_gqa=True
        )


class LlamaLayer(nn.Module):
    """Causal attention, then a gated perceptron, each normalised before and added to its input after.

    Input (N, L, width); cos, sin (L, head_dim); cache and filled as :class:`CausalAttention` takes them.
    """

    def __init__(self, width: int, heads: int, key_heads: int, head_dim: int, hidden: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        # Only names: everything is computed in one forward, where a rewriter sees it whole.
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, heads * head_dim, bias=False),
                "k_proj": nn.Linear(width, key_heads * head_dim, bias=False),
                "v_proj": nn.Linear(width, key_heads * head_dim, bias=False),
                "o_proj": nn.Linear(heads * head_dim, width, bias=False),
                "core": CausalAttention(),  # apart, so that a cache leaves the rest as it is
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, hidden, bias=False),
                "up_proj": nn.Linear(width, hidden, bias=False),
                "down_proj": nn.Linear(hidden, width, bias=False),
                "act_fn": nn.SiLU(),
            }
        )
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None, filled: int
    ) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        states = self.input_layernorm(x)
        query, key, value = (
            attention[name](states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        mixed = attention["core"](query, key, value, cache, filled)
        x = x + attention["o_proj"](mixed.transpose(1, 2).flatten(2))
        states = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](mlp["act_fn"](mlp["gate_proj"](states)) * mlp["up_proj"](states))


def _meta_names() -> tuple[tuple[str, str | None], ...]:
    layer = "layers.{}."
    ours = f"model.{layer}"
    return (
        ("rope.freqs", None),
        ("tok_embeddings.", "model.embed_tokens."),
        (f"{layer}attention.wq.", f"{ours}self_attn.q_proj."),
        (f"{layer}attention.wk.", f"{ours}self_attn.k_proj."),
        (f"{layer}attention.wv.", f"{ours}self_attn.v_proj."),
        (f"{layer}attention.wo.", f"{ours}self_attn.o_proj."),
        (f"{layer}feed_forward.w1.", f"{ours}mlp.gate_proj."),
        (f"{layer}feed_forward.w2.", f"{ours}mlp.down_proj."),
        (f"{layer}feed_forward.w3.", f"{ours}mlp.up_proj."),
        (f"{layer}attention_norm.", f"{ours}input_layernorm."),
        (f"{layer}ffn_norm.", f"{ours}post_attention_layernorm."),
        ("norm.", "model.norm."),
        ("output.", "lm_head."),
    )


def _halves_from_neighbours(decoder: LlamaDecoder, key: str, value: Tensor) -> Tensor:
    """Meta's rows of query and key put where Hugging Face has them: there neighbours turn together, here
    the halves of a head.
    """
    if not key.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    pairs = value.unflatten(0, (-1, decoder.head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


class LlamaDecoder(nn.Module):
    """Embedding, ``depth`` layers, the last norm, and the scores of the next token.

    heads, key_heads, hidden: of every layer; by the 70B's rules where not given. theta: RoPE's temperature
    (Llama 3 has 500,000). Input: tokens (N, L), ids; output (N, L, vocabulary) logits: at each place, of the
    token after it.
    """

    key_styles = (
        KeyStyle(
            "Hugging Face, with frequencies",
            (("model.layers.{}.self_attn.rotary_emb.inv_freq", None), ("model.rotary_emb.inv_freq", None)),
        ),
        KeyStyle("Meta", _meta_names(), convert=_halves_from_neighbours),
    )

    def __init__(
        self,
        *,
        vocabulary: int = VOCABULARY,
        width: int = 1024,
        depth: int = 8,
        heads: int | None = None,
        key_heads: int | None = None,
        head_dim: int = HEAD_DIM,
        hidden: int | None = None,
        max_length: int = 4096,
        theta: float = 10_000.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        heads = width // head_dim if heads is None else heads
        if heads * head_dim != width:
            raise ValueError(f"width={width} is not heads={heads} of head_dim={head_dim}")
        key_heads = max(1, heads // QUERIES_FOR_A_KEY) if key_heads is None else key_heads
        if heads % key_heads:
            raise ValueError(f"heads={heads} does not divide into groups for key_heads={key_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: RoPE turns pairs")
        hidden = width * 7 // 2 if hidden is None else hidden
        self.head_dim, self.key_heads, self.max_length = head_dim, key_heads, max_length
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, width),
                "layers": nn.ModuleList(
                    LlamaLayer(width, heads, key_heads, head_dim, hidden, eps) for _ in range(depth)
                ),
                "norm": nn.RMSNorm(width, eps=eps),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        angles = torch.arange(max_length).unsqueeze(1) * inverse_frequencies(head_dim // 2, theta)
        cos, sin = angles_to_tables(angles, interleaved=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal 0.02 for every matrix."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """cache: the tokens before these; these are added to it."""
        return self.lm_head(self.states(tokens, cache))

    def states(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What the scores are made of, (N, L, width)."""
        if cache is None:
            check_length(tokens, self.max_length, "tokens")
            filled, layers = 0, [None] * len(self.model["layers"])
        else:
            check_length(tokens, cache.max_length - cache.length, "tokens, with those in the cache before")
            filled, layers = cache.length, cache.layers
        length = tokens.shape[1]
        cos, sin = self.cos[filled : filled + length], self.sin[filled : filled + length]
        x = self.model["embed_tokens"](tokens)
        for layer, stored in zip(self.model["layers"], layers):
            x = layer(x, cos, sin, stored, filled)
        if cache is not None:
            cache.length += length
        return self.model["norm"](x)

    @torch.no_grad()
    def generate(self, tokens: Tensor, steps: int, *, end: int | None = None) -> Tensor:
        """The tokens (N, L) followed by ``steps`` more, each the likeliest: (N, L + steps).

        end: the token after which a text is over; it is then repeated, and once all texts of the batch are
        over the rest is not computed.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}: a text does not get shorter")
        check_length(tokens, self.max_length - steps, f"tokens, with room for {steps} more")
        cache = KeyValueCache(self, tokens.shape[0], tokens.shape[1] + steps)
        text, new = [tokens], tokens
        over = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
        for step in range(steps):
            best = self.lm_head(self.states(new, cache)[:, -1:]).argmax(2)
            if end is not None:
                best = best.masked_fill(over, end)
                over = over | (best == end)
            new = best
            text.append(new)
            if end is not None and over.all():
                text.append(new.expand(-1, steps - step - 1))
                break
        return torch.cat(text, 1)


@register_model(input_size=(128,), vocabulary=VOCABULARY)
def llama_small(**options) -> LlamaDecoder:
    """The decoder at 1024 × 8, by the 70B's shape rules: 172,508,160 parameters."""
    return LlamaDecoder(**options)
