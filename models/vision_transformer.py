"""Vision Transformers: ViT and DINOv2's form of it.

====================  =============  ======================================================================
network               parameters     shape (224×224 images)
====================  =============  ======================================================================
vit_ti_16              5,717,416     width 192, 12 blocks, 3 heads
vit_s_16              22,050,664     width 384, 12 blocks, 6 heads
vit_b_16, vit_b_32    86.6 M, 88.2   width 768, 12 blocks, 12 heads
vit_l_16              304,326,632    width 1024, 24 blocks, 16 heads
vit_h_14              632,045,800    width 1280, 32 blocks, 16 heads
dinov2_s_14            22,056,192    vit_s at patches of 14, 518×518 images, with layer scale, no classifier
====================  =============  ======================================================================

A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020 (arXiv:2010.11929). It brought the plain
Transformer to images: the image cut into patches, each patch a token, learned positions, a class token whose
last state is classified, and no convolution but the one that cuts. Ti and S are DeiT's sizes (H. Touvron et
al., arXiv:2012.12877). M. Oquab et al., "DINOv2", 2023 (arXiv:2304.07193) trained the same network without
labels, with a learned scale on every residual branch (layer scale, arXiv:2103.17239).

Names and shapes in ``state_dict`` are timm's; checkpoints with torchvision's names load too.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.checkpoint import KeyStyle
from fastnets.models.dynamic_depth import blocks_to_skip, stochastic_depth, stochastic_depth_rates
from fastnets.models.registry import register_model

__all__ = [
    "VisionTransformer",
    "dinov2_s_14",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_s_16",
    "vit_ti_16",
]


class PatchEmbedding(nn.Module):
    """The image as a row of patches, each mapped to ``width`` numbers: (N, C, H, W) to (N, L, width)."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, width: int):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of the patches' {patch_size}; the least is "
                f"{patch_size}"
            )
        self.image_size = image_size
        self.patches_a_side = image_size // patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.proj.in_channels, self.image_size)
        return self.proj(x).flatten(2).transpose(1, 2)


@torch.fx.wrap  # a tracer takes the check as it stands
def check_image(x: Tensor, channels: int, size: int) -> None:
    """Raises ``ValueError`` unless x is (N, channels, size, size): positions are learned for that size."""
    if tuple(x.shape[1:]) != (channels, size, size):
        raise ValueError(
            f"patch_embed.proj: got images of shape {list(x.shape)}, the network has positions for "
            f"(N, {channels}, {size}, {size}): resize the images, or build it with image_size=..."
        )


class PackedAttention(nn.Module):
    """Multi-head self-attention on a packed projection: (N, L, 3·width) to (N, L, width).

    Query, key and value are views into the projection; nothing is copied.
    """

    def __init__(self, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout

    def forward(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability else nn.Identity()


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, linear, under timm's names."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(width, hidden),
            act=nn.GELU(),
            drop1=_dropout(dropout),
            fc2=nn.Linear(hidden, width),
            drop2=_dropout(dropout),
        )
    )


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each normalised before and added to its input after.

    layer_scale: initial value of the trainable scale of both branches; None: no scale.
    Input and output (N, L, width).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_branch: float = 0.0,
    ):
        super().__init__()
        self.layer_scale = layer_scale
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        # A Sequential, so that a rewriter sees the last projection beside the residual add.
        self.attn = nn.Sequential(
            OrderedDict(
                qkv=nn.Linear(width, 3 * width),
                core=PackedAttention(heads, attention_dropout),
                proj=nn.Linear(width, width),
                proj_drop=_dropout(dropout),
            )
        )
        if layer_scale is not None:
            self.ls1 = nn.ParameterDict({"gamma": torch.empty(width)})
        self.drop_path1 = stochastic_depth(drop_branch)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = feed_forward(width, hidden, dropout)
        self.drop_path2 = stochastic_depth(drop_branch)
        if layer_scale is not None:
            self.ls2 = nn.ParameterDict({"gamma": torch.empty(width)})

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_scale is None:
            x = x + self.drop_path1(self.attn(self.norm1(x)))
            return x + self.drop_path2(self.mlp(self.norm2(x)))
        x = x + self.drop_path1(self.attn(self.norm1(x)) * self.ls1.gamma)
        return x + self.drop_path2(self.mlp(self.norm2(x)) * self.ls2.gamma)


def _torchvision_names() -> tuple[tuple[str, str], ...]:
    layer = "encoder.layers.encoder_layer_{}."
    return (
        ("class_token", "cls_token"),
        ("conv_proj.", "patch_embed.proj."),
        ("encoder.pos_embedding", "pos_embed"),
        (f"{layer}ln_1.", "blocks.{}.norm1."),
        (f"{layer}self_attention.in_proj_", "blocks.{}.attn.qkv."),
        (f"{layer}self_attention.out_proj.", "blocks.{}.attn.proj."),
        (f"{layer}ln_2.", "blocks.{}.norm2."),
        (f"{layer}mlp.0.", "blocks.{}.mlp.fc1."),
        (f"{layer}mlp.3.", "blocks.{}.mlp.fc2."),
        (f"{layer}mlp.linear_1.", "blocks.{}.mlp.fc1."),  # as torchvision's own files still have it
        (f"{layer}mlp.linear_2.", "blocks.{}.mlp.fc2."),
        ("encoder.ln.", "norm."),
        ("heads.head.", "head."),
    )


class VisionTransformer(nn.Module):
    """Patches, positions, ``depth`` blocks, and a classifier on the class token.

    width, heads: of every block; mlp_ratio: the perceptron's hidden width over ``width``. num_classes: 0
    leaves the classifier out, and the output is the class token (N, width). layer_scale: see :class:`Block`.
    stochastic_depth: chance of dropping the last block's branches in training; earlier ones less.
    Input (N, in_channels, image_size, image_size), output (N, num_classes) logits.
    """

    key_styles = (KeyStyle("torchvision", _torchvision_names()),)

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        in_channels: int = 3,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide into heads={heads}")
        self.patch_embed = PatchEmbedding(image_size, patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.patches_a_side**2, width))
        self.pos_drop = _dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    heads,
                    int(width * mlp_ratio),
                    layer_scale=layer_scale,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    drop_branch=rate,
                )
                for rate in stochastic_depth_rates(stochastic_depth, depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' code: Xavier for every matrix (query, key and value one by one), LeCun for the
        patches, normal 0.02 for the positions.

        Only the classifier differs: normal 0.02 (timm's), where the authors have zeros.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        patches = self.patch_embed.proj
        nn.init.trunc_normal_(patches.weight, std=math.sqrt(1 / patches.weight[0].numel()))
        nn.init.zeros_(patches.bias)
        nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for part in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.proj.bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
            if block.layer_scale is not None:
                nn.init.constant_(block.ls1.gamma, block.layer_scale)
                nn.init.constant_(block.ls2.gamma, block.layer_scale)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor, skip: float | Collection[int] = ()) -> Tensor:
        """The states of all tokens after the last norm, the class token first: (N, 1 + patches, width)."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.pos_drop(x + self.pos_embed)
        left_out = blocks_to_skip(skip, len(self.blocks))
        for index, block in enumerate(self.blocks):
            if index not in left_out:
                x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor, skip: float | Collection[int] = ()) -> Tensor:
        """skip: blocks to leave out in this call: indices, or a share of them, such as 0.5."""
        return self.head(self.forward_features(x, skip)[:, 0])


def _vit(num_classes: int, options: dict, **shape: object) -> VisionTransformer:
    return VisionTransformer(num_classes, **{**shape, **options})


@register_model()
def vit_ti_16(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-Ti/16: 5,717,416 parameters, 1.3 GMAC."""
    return _vit(num_classes, options, width=192, heads=3)


@register_model()
def vit_s_16(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-S/16: 22,050,664 parameters, 4.6 GMAC."""
    return _vit(num_classes, options, width=384, heads=6)


@register_model()
def vit_b_16(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-B/16: 86,567,656 parameters, 17.6 GMAC."""
    return _vit(num_classes, options)


@register_model()
def vit_b_32(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-B/32: 88,224,232 parameters, 4.4 GMAC."""
    return _vit(num_classes, options, patch_size=32)


@register_model()
def vit_l_16(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-L/16: 304,326,632 parameters, 61.6 GMAC."""
    return _vit(num_classes, options, width=1024, depth=24, heads=16)


@register_model()
def vit_h_14(num_classes: int = 1000, **options) -> VisionTransformer:
    """ViT-H/14: 632,045,800 parameters, 167.3 GMAC."""
    return _vit(num_classes, options, patch_size=14, width=1280, depth=32, heads=16)


@register_model(input_size=(3, 518, 518))
def dinov2_s_14(num_classes: int = 0, **options) -> VisionTransformer:
    """DINOv2 ViT-S/14: 22,056,192 parameters; the output is the class token, (N, 384)."""
    shape = {"patch_size": 14, "width": 384, "heads": 6, "image_size": 518, "layer_scale": 1e-5}
    return _vit(num_classes, options, **shape)
