"""MNASNet: an architecture that a search found with a phone's clock in its reward.

M. Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for Mobile", 2018 (arXiv:1807.11626). The
search chose filter size, expansion and depth of every stage by itself, and measured latency on the device
instead of counting operations; EfficientNet grew from it. This is the paper's B1 form, without
squeeze-and-excite: 4,383,312 parameters and 0.31 GMAC at width 1.

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images, conv_bn_act, he_initialise, round_channels
from fastnets.models.registry import register_model

__all__ = ["MNASNet", "mnasnet0_5", "mnasnet1_0"]

BN_MOMENTUM = 1 - 0.9997  # the paper's 0.9997 counts the other way round
# One line for each stage: expansion, channels, blocks, stride of the first, filter size.
STAGES = (
    (3, 24, 3, 2, 3),
    (3, 40, 3, 2, 5),
    (6, 80, 3, 2, 5),
    (6, 96, 2, 1, 3),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class InvertedResidual(nn.Module):
    """1×1 up, depthwise, 1×1 down without activation; added to the input where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.layers = nn.Sequential(
            *conv_bn_act(in_channels, hidden, 1, momentum=BN_MOMENTUM),
            *conv_bn_act(hidden, hidden, kernel_size, stride, groups=hidden, momentum=BN_MOMENTUM),
            *conv_bn_act(hidden, out_channels, 1, act=None, momentum=BN_MOMENTUM),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.has_shortcut else self.layers(x)


class MNASNet(nn.Module):
    """Stem, six stages of inverted residuals, a 1×1 convolution, global average pool, classifier.

    width_mult: scales every stage's channels (rounded to multiples of 8).
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 1000, *, width_mult: float = 1.0, dropout: float = 0.2):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be above 0, got {width_mult}")
        stem, channels = (round_channels(c * width_mult) for c in (32, 16))
        layers = [
            *conv_bn_act(3, stem, 3, stride=2, momentum=BN_MOMENTUM),
            *conv_bn_act(stem, stem, 3, groups=stem, momentum=BN_MOMENTUM),
            *conv_bn_act(stem, channels, 1, act=None, momentum=BN_MOMENTUM),
        ]
        for expansion, stage_channels, depth, first_stride, kernel_size in STAGES:
            out_channels = round_channels(stage_channels * width_mult)
            blocks = []
            for block in range(depth):
                stride = first_stride if block == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel_size, stride, expansion))
                channels = out_channels
            layers.append(nn.Sequential(*blocks))
        layers += conv_bn_act(channels, 1280, 1, momentum=BN_MOMENTUM)
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions, its uniform form by fan-out for the classifier."""
        he_initialise(self)
        nn.init.kaiming_uniform_(self.classifier[1].weight, mode="fan_out", nonlinearity="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.avgpool(self.layers(x)).flatten(1)
        return self.classifier(x)


@register_model()
def mnasnet0_5(num_classes: int = 1000, **options) -> MNASNet:
    """MNASNet-B1 at half width: 2,218,512 parameters, 0.10 GMAC."""
    return MNASNet(num_classes, **{"width_mult": 0.5, **options})


@register_model()
def mnasnet1_0(num_classes: int = 1000, **options) -> MNASNet:
    """MNASNet-B1: 4,383,312 parameters, 0.31 GMAC."""
    return MNASNet(num_classes, **options)
