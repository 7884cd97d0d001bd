"""Swin Transformer: attention inside windows, which shift from layer to layer.

Z. Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021
(arXiv:2103.14030). It brought the convolutional networks' pyramid to the Transformer: 7×7 windows keep the
cost linear in the image, every second block shifts them by half so that neighbours meet, a learned bias for
each relative position stands in for absolute ones, and between stages 2×2 pixels are merged into one.

swin_t: 28,288,354 parameters, 4.5 GMAC. Input: (N, 3, H, W), designed for 224×224; any size from 4×4 works,
padded to whole windows. Names and shapes in ``state_dict`` are torchvision's.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.dynamic_depth import stochastic_depth, stochastic_depth_rates
from fastnets.models.registry import register_model

__all__ = ["SwinTransformer", "swin_t"]

PATCH = 4


def relative_positions(window: int) -> Tensor:
    """For each pair of places in a window, the row of the bias table: (window⁴,) int64."""
    place = torch.arange(window)
    rows, columns = (part.flatten() for part in torch.meshgrid(place, place, indexing="ij"))
    down = rows[:, None] - rows + window - 1
    right = columns[:, None] - columns + window - 1
    return (down * (2 * window - 1) + right).flatten()


@torch.fx.wrap  # a tracer takes these as they stand: how they pad and shift depends on the image
def windows_of(x: Tensor, window: int, shift: int) -> Tensor:
    """(N, H, W, C) cut into windows, (N · windows, window², C), padded and rolled back first."""
    down, right = _shifts(x, window, shift)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))
    if down or right:
        x = torch.roll(x, (-down, -right), (1, 2))
    cut = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))  # (N, rows, window, columns, window, C)
    return cut.transpose(2, 3).flatten(0, 2).flatten(1, 2)


@torch.fx.wrap
def image_of(windows: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    """``windows_of`` undone: (N · windows, window², C) to the shape of x."""
    _, height, width, _ = x.shape
    down, right = _shifts(x, window, shift)
    rows, columns = -(-height // window), -(-width // window)
    image = windows.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns))
    image = image.transpose(2, 3).flatten(1, 2).flatten(2, 3)
    if down or right:
        image = torch.roll(image, (down, right), (1, 2))
    return image[:, :height, :width]


@torch.fx.wrap
def position_bias(table: Tensor, index: Tensor, window: int) -> Tensor:
    """The table's rows as a bias of attention, (heads, window², window²)."""
    return table[index].unflatten(0, (window**2, window**2)).permute(2, 0, 1)


@torch.fx.wrap
def with_seams(bias: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    """The bias of each window of an image, (windows, heads, ...), where shifted ones hold parts that are no
    neighbours.

    Those pairs get -100, as in the paper's code. Without a shift all windows have the same
    bias, (1, heads, ...).
    """
    down, right = _shifts(x, window, shift)
    if not (down or right):
        return bias.unsqueeze(0)
    rows, columns = x.shape[1] + -x.shape[1] % window, x.shape[2] + -x.shape[2] % window
    # Which of up to three bands a row or column is in: before the last window, in it, and rolled around.
    row = torch.arange(rows, device=x.device)
    column = torch.arange(columns, device=x.device)
    row = (row >= rows - window).int() + (row >= rows - down).int() if down else (row >= rows - window).int()
    column = (
        (column >= columns - window).int() + (column >= columns - right).int()
        if right
        else (column >= columns - window).int()
    )
    region = (row[:, None] * 3 + column)[None, :, :, None]
    region = windows_of(region, window, 0).squeeze(2)
    seam = (region[:, :, None] != region[:, None, :]).to(bias.dtype) * -100.0
    return bias + seam.unsqueeze(1)


@torch.fx.wrap
def images_of(query: Tensor, bias: Tensor) -> int:
    """How often the windows' bias is to be repeated for a batch of images; once where it broadcasts."""
    return 1 if bias.shape[0] == 1 else query.shape[0] // bias.shape[0]


def _shifts(x: Tensor, window: int, shift: int) -> tuple[int, int]:
    """The shift along H and W of x, (N, H, W, C): none where one window covers it all."""
    return tuple(shift if size > window else 0 for size in x.shape[1:3])


class ShiftedWindowAttention(nn.Module):
    """Multi-head self-attention inside ``window`` × ``window`` pixels, after a cyclic shift: (N, H, W, C)."""

    def __init__(self, width: int, heads: int, window: int, shift: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.window, self.shift, self.dropout = heads, window, shift, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_positions(window))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(windows_of(x, self.window, self.shift))
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = position_bias(self.relative_position_bias_table, self.relative_position_index, self.window)
        bias = with_seams(bias, x, self.window, self.shift)
        if self.shift:
            bias = bias.repeat(images_of(query, bias), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return image_of(self.proj(mixed.transpose(1, 2).flatten(2)), x, self.window, self.shift)


class SwinBlock(nn.Module):
    """Window attention, then a two-layer perceptron, each normalised before and added after: (N, H, W, C)."""

    def __init__(
        self,
        width: int,
        heads: int,
        window: int,
        shift: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_branch: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = ShiftedWindowAttention(width, heads, window, shift, attention_dropout)
        self.drop_attention = stochastic_depth(drop_branch)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), drop, nn.Linear(hidden, width), drop)
        self.drop_mlp = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_attention(self.attn(self.norm1(x)))
        return x + self.drop_mlp(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2×2 pixels become one, of twice the channels: (N, H, W, C) to (N, ⌈H/2⌉, ⌈W/2⌉, 2C)."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(merged_pixels(x)))


@torch.fx.wrap
def merged_pixels(x: Tensor) -> Tensor:
    """(N, H, W, C) to (N, ⌈H/2⌉, ⌈W/2⌉, 4C): top left, bottom left, top right, bottom right."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    squares = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (N, H/2, 2, W/2, 2, C)
    return squares.permute(0, 1, 3, 4, 2, 5).flatten(3)


class ChannelsLast(nn.Module):
    """(N, C, H, W) to (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@torch.fx.wrap
def check_patches(x: Tensor, channels: int) -> None:
    """Raises ``ValueError`` unless x is (N, channels, H, W) with room for one patch."""
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < PATCH:
        raise ValueError(
            f"features.0.0: got images of shape {list(x.shape)}, wanted (N, {channels}, H, W) of at least "
            f"{PATCH}×{PATCH} pixels"
        )


class SwinTransformer(nn.Module):
    """Patches of 4×4, four stages of blocks with merging between them, global average pool, classifier.

    width: channels of the first stage, doubled at each merging; depths, heads: of each stage.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.2,
    ):
        super().__init__()
        if len(depths) != len(heads):
            raise ValueError(f"depths and heads are for the same stages, got {depths} and {heads}")
        stem = nn.Sequential(
            nn.Conv2d(in_channels, width, PATCH, stride=PATCH),
            ChannelsLast(),
            nn.LayerNorm(width, eps=1e-5),
        )
        layers: list[nn.Module] = [stem]
        rates = iter(stochastic_depth_rates(stochastic_depth, sum(depths)))
        for stage, (depth, stage_heads) in enumerate(zip(depths, heads)):
            if stage:
                layers.append(PatchMerging(width))
                width *= 2
            if width % stage_heads:
                raise ValueError(f"width={width} of stage {stage} does not divide into {stage_heads} heads")
            blocks = [
                SwinBlock(
                    width,
                    stage_heads,
                    window,
                    window // 2 if index % 2 else 0,
                    int(width * mlp_ratio),
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    drop_branch=next(rates),
                )
                for index in range(depth)
            ]
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' code: truncated normal 0.02 for every matrix and for the bias tables."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, ShiftedWindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_patches(x, self.features[0][0].in_channels)
        return self.head(self.norm(self.features(x)).mean((1, 2)))


@register_model()
def swin_t(num_classes: int = 1000, **options) -> SwinTransformer:
    """Swin-T: 28,288,354 parameters, 4.5 GMAC."""
    return SwinTransformer(num_classes, **options)
