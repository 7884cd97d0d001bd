"""MobileNetV2: inverted residuals with linear bottlenecks.

M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018 (arXiv:1801.04381). A block
widens its input sixfold with a 1×1 convolution, filters each channel by itself (depthwise 3×3), and projects
back to a narrow tensor; the shortcut joins the narrow ends and no activation follows the projection, where
ReLU would lose information. 3,504,872 parameters and 0.30 GMAC for 224×224 images at width 1.

Input: (N, 3, H, W), any size from 1×1. Names and shapes in ``state_dict`` are torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images, conv_bn_act, he_initialise, round_channels
from fastnets.models.registry import register_model

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenet_v2"]

# One line for each run of blocks: expansion, channels, blocks, stride of the first (the paper's table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1×1 up, depthwise 3×3, 1×1 down without activation; added to the input where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        widen = [] if expansion == 1 else [conv_bn_act(in_channels, hidden, 1, act=nn.ReLU6)]
        self.conv = nn.Sequential(
            *widen,
            conv_bn_act(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, a 1×1 convolution to 1280 channels, global average pool, classifier.

    width_mult: scales every layer's channels (rounded to multiples of 8; the last layer never gets narrower).
    dropout: before the classifier, in training.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        in_channels: int = 3,
    ):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be above 0, got {width_mult}")
        channels = round_channels(32 * width_mult)
        last_channels = round_channels(1280 * max(1.0, width_mult))
        layers: list[nn.Module] = [conv_bn_act(in_channels, channels, 3, stride=2, act=nn.ReLU6)]
        for expansion, stage_channels, blocks, first_stride in STAGES:
            out_channels = round_channels(stage_channels * width_mult)
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        layers.append(conv_bn_act(channels, last_channels, 1, act=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_channels, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions (arXiv:1502.01852), a narrow normal for the classifier."""
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(x)


@register_model()
def mobilenet_v2(num_classes: int = 1000, **options) -> MobileNetV2:
    """MobileNetV2: 3,504,872 parameters and 0.30 GMAC at ``width_mult=1``."""
    return MobileNetV2(num_classes, **options)
