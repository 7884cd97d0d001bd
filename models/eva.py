"""EVA-02: a ViT with the language models' parts.

Y. Fang et al., "EVA-02: A Visual Representation for Neon Genesis", 2023 (arXiv:2303.11331). It brought what
language models had found since ViT back to images: queries and keys rotated by the patch's row and column,
a gated perceptron (SwiGLU), and one more norm inside it, which kept training stable (sub-LN).

eva02_b_14: 86,527,720 parameters, 23.2 GMAC: width 768, 12 blocks, 12 heads, patches of 14, 224×224 images.
Names and shapes in ``state_dict`` are those of timm's ``eva02_base_patch14_*``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.dynamic_depth import blocks_to_skip, stochastic_depth, stochastic_depth_rates
from fastnets.models.registry import register_model
from fastnets.models.rotary import angles_to_tables, inverse_frequencies, rotate_neighbours
from fastnets.models.vision_transformer import PatchEmbedding

__all__ = ["Eva02", "eva02_b_14"]

GRID = 16  # the patches a side that coordinates are scaled to, whatever the image's size
TEMPERATURE = 10_000.0


def rotation_tables(patches_a_side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (1 + patches, head_dim): half of the pairs turn with the row, half with the column.

    The class token, first, has no place and is not turned.
    """
    bands = inverse_frequencies(head_dim // 4, TEMPERATURE)
    place = torch.arange(patches_a_side, dtype=torch.float32) / patches_a_side * GRID
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    angles = torch.stack([rows, columns], 2).unsqueeze(3) * bands  # (rows, columns, 2, head_dim / 4)
    patches = angles.flatten(2).flatten(0, 1)
    return angles_to_tables(F.pad(patches, (0, 0, 1, 0)), interleaved=True)


class EvaBlock(nn.Module):
    """Attention on rotated queries and keys, then a gated perceptron with a norm before its last layer.

    Each branch is normalised before and added to its input after. Input and output (N, L, width); cos and
    sin (L, head_dim).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_branch: float = 0.0,
    ):
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        # Only names: everything is computed in one forward, where a rewriter sees it whole.
        self.attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, width, bias=False),
                "v_proj": nn.Linear(width, width),
                "proj": nn.Linear(width, width),
                "proj_drop": nn.Dropout(dropout),
            }
        )
        self.drop_path1 = stochastic_depth(drop_branch)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "fc1_g": nn.Linear(width, hidden),
                "fc1_x": nn.Linear(width, hidden),
                "act": nn.SiLU(),
                "drop1": nn.Dropout(dropout),
                "norm": nn.LayerNorm(hidden, eps=1e-6),
                "fc2": nn.Linear(hidden, width),
                "drop2": nn.Dropout(dropout),
            }
        )
        self.drop_path2 = stochastic_depth(drop_branch)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attn, mlp = self.attn, self.mlp
        states = self.norm1(x)
        query, key, value = (
            attn[name](states).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = F.scaled_dot_product_attention(
            rotate_neighbours(query, cos, sin),
            rotate_neighbours(key, cos, sin),
            value,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        x = x + self.drop_path1(attn["proj_drop"](attn["proj"](mixed.transpose(1, 2).flatten(2))))
        states = self.norm2(x)
        hidden = mlp["drop1"](mlp["act"](mlp["fc1_g"](states)) * mlp["fc1_x"](states))
        return x + self.drop_path2(mlp["drop2"](mlp["fc2"](mlp["norm"](hidden))))


class Eva02(nn.Module):
    """Patches, learned positions, ``depth`` blocks, the mean of the patches' states normed and classified.

    width, heads: of every block; hidden: of its perceptron. num_classes: 0 leaves the classifier out, and
    the output is (N, width). stochastic_depth: chance of dropping the last block's branches in training;
    earlier ones less. Input (N, in_channels, image_size, image_size), output (N, num_classes) logits.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        patch_size: int = 14,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 2048,
        image_size: int = 224,
        in_channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(
                f"width={width} does not divide into heads={heads} of a multiple of 4: two axes of pairs turn"
            )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        patch_embed = PatchEmbedding(image_size, patch_size, in_channels, width)
        a_side = patch_embed.patches_a_side
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + a_side**2, width))
        self.patch_embed = patch_embed
        cos, sin = rotation_tables(a_side, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList(
            EvaBlock(
                width,
                heads,
                hidden,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_branch=rate,
            )
            for rate in stochastic_depth_rates(stochastic_depth, depth)
        )
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' code: truncated normal 0.02, the last layer of a branch less by √(2 · depth)."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        with torch.no_grad():
            for place, block in enumerate(self.blocks, 1):
                block.attn["proj"].weight.div_(math.sqrt(2 * place))
                block.mlp["fc2"].weight.div_(math.sqrt(2 * place))
            if isinstance(self.head, nn.Linear):
                self.head.weight.mul_(0.001)

    def forward_features(self, x: Tensor, skip: float | Collection[int] = ()) -> Tensor:
        """The states of all tokens after the last block, the class token first: (N, 1 + patches, width)."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        left_out = blocks_to_skip(skip, len(self.blocks))
        for index, block in enumerate(self.blocks):
            if index not in left_out:
                x = block(x, self.cos, self.sin)
        return x

    def forward(self, x: Tensor, skip: float | Collection[int] = ()) -> Tensor:
        """skip: blocks to leave out in this call: indices, or a share of them, such as 0.5."""
        return self.head(self.fc_norm(self.forward_features(x, skip)[:, 1:].mean(1)))


@register_model()
def eva02_b_14(num_classes: int = 1000, **options) -> Eva02:
    """EVA-02-B/14: 86,527,720 parameters, 23.2 GMAC."""
    return Eva02(num_classes, **options)
