"""MobileNet (v1): depthwise separable convolutions.

A. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017
(arXiv:1704.04861). A convolution is taken apart into one 3×3 filter per channel and a 1×1 convolution that
mixes the channels, an eighth of the operations for little accuracy. 4,231,976 parameters, 0.57 GMAC.

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
timm's ``mobilenetv1_100``.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images, he_initialise
from fastnets.models.registry import register_model

__all__ = ["DepthwiseSeparable", "MobileNetV1", "mobilenet_v1"]

# One line for each stage: channels, blocks, stride of the first.
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))


class DepthwiseSeparable(nn.Module):
    """Depthwise 3×3, BN, ReLU6; 1×1, BN and, unless ``linear``, ReLU6."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, linear: bool = False, eps: float = 1e-5
    ):
        super().__init__()
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels, eps=eps)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=eps)
        self.act2 = nn.Identity() if linear else nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_dw(x)))
        return self.act2(self.bn2(self.conv_pw(x)))


class MobileNetV1(nn.Module):
    """Stem, thirteen depthwise separable blocks, global average pool, classifier.

    dropout: before the classifier, in training.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 1000, *, dropout: float = 0.0, in_channels: int = 3):
        super().__init__()
        self.conv_stem = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU6(inplace=True)
        channels = 32
        stages = []
        for out_channels, depth, first_stride in STAGES:
            blocks = []
            for block in range(depth):
                blocks.append(DepthwiseSeparable(channels, out_channels, first_stride if block == 0 else 1))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions (arXiv:1502.01852), a narrow normal for the classifier."""
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.dropout(self.avgpool(x).flatten(1))
        return self.classifier(x)


@register_model()
def mobilenet_v1(num_classes: int = 1000, **options) -> MobileNetV1:
    """MobileNet v1 at full width: 4,231,976 parameters, 0.57 GMAC."""
    return MobileNetV1(num_classes, **options)
