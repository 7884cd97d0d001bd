"""EfficientNet-Lite: EfficientNet for hardware that multiplies integers.

R. Liu, "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow Blog, 2020. EfficientNet-B0
without what quantises badly or runs badly on phones: no squeeze-and-excite, ReLU6 for SiLU, stem and head
that do not scale. 4,652,008 parameters, 0.39 GMAC.

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
timm's ``tf_efficientnet_lite0``; padding is TensorFlow's, which depends on the image size.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.blocks import check_images, he_initialise
from fastnets.models.mobilenet_v1 import DepthwiseSeparable
from fastnets.models.registry import register_model

__all__ = ["EfficientNetLite", "efficientnet_lite0"]

# One line for each stage after the first: filter size, stride of the first block, channels, blocks.
STAGES = ((3, 2, 24, 2), (5, 2, 40, 2), (3, 2, 80, 3), (5, 1, 112, 3), (5, 2, 192, 4), (3, 1, 320, 1))
EPS = 0.001


@torch.fx.wrap  # how much it pads depends on the size: a tracer takes it as it stands
def pad_same(x: Tensor, kernel_size: int, step: int) -> Tensor:
    """Zeros around ``x`` [N, C, H, W], for a convolution of stride ``step`` to give ⌈H/step⌉ × ⌈W/step⌉.

    TensorFlow's "same": where an odd number of zeros is missing, the larger half goes to the end.
    """

    def missing(size: int) -> int:
        return max(0, (-(-size // step) - 1) * step + kernel_size - size)

    rows, columns = missing(x.size(2)), missing(x.size(3))
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class InvertedResidual(nn.Module):
    """1×1 up to six times the channels, depthwise, 1×1 down; added to the input where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        hidden = 6 * in_channels
        self.kernel_size = kernel_size
        self.halves = stride == 2
        padding = 0 if self.halves else kernel_size // 2
        self.conv_pw = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden, eps=EPS)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv_dw = nn.Conv2d(hidden, hidden, kernel_size, stride, padding, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden, eps=EPS)
        self.act2 = nn.ReLU6(inplace=True)
        self.conv_pwl = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=EPS)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        if self.halves:
            y = pad_same(y, self.kernel_size, 2)
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return y + x if self.has_shortcut else y


class EfficientNetLite(nn.Module):
    """Stem, seven stages, a 1×1 convolution, global average pool, classifier.

    dropout: before the classifier, in training.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 1000, *, dropout: float = 0.2):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, eps=EPS)
        self.act1 = nn.ReLU6(inplace=True)
        stages = [nn.Sequential(DepthwiseSeparable(32, 16, linear=True, eps=EPS))]
        channels = 16
        for kernel_size, first_stride, out_channels, depth in STAGES:
            blocks = []
            for block in range(depth):
                stride = first_stride if block == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel_size, stride))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280, eps=EPS)
        self.act2 = nn.ReLU6(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(1280, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions (arXiv:1502.01852), a narrow normal for the classifier."""
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.act1(self.bn1(self.conv_stem(pad_same(x, 3, 2))))
        x = self.act2(self.bn2(self.conv_head(self.blocks(x))))
        x = self.dropout(self.avgpool(x).flatten(1))
        return self.classifier(x)


@register_model()
def efficientnet_lite0(num_classes: int = 1000, **options) -> EfficientNetLite:
    """EfficientNet-Lite0: 4,652,008 parameters, 0.39 GMAC."""
    return EfficientNetLite(num_classes, **options)
