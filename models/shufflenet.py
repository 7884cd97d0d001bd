"""ShuffleNet v2: built for the clock rather than for the FLOP count.

N. Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018
(arXiv:1807.11164). From measurements it took four rules (equal widths, few groups, few branches, few
elementwise operations) and a block that obeys them: half the channels pass by untouched, half are filtered,
and a shuffle interleaves the two halves for the next block. 2,278,604 parameters and 0.15 GMAC at width 1.

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
torchvision's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnets.models.blocks import check_images, conv_bn_act
from fastnets.models.registry import register_model

__all__ = ["ShuffleNetV2", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"]

DEPTHS = (4, 8, 4)  # blocks of stages 2, 3 and 4


def depthwise(channels: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return convolution, nn.BatchNorm2d(channels)


def pointwise(in_channels: int, out_channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    return (*conv_bn_act(in_channels, out_channels, 1),)


class ShuffleUnit(nn.Module):
    """Half of the channels through 1×1, depthwise 3×3, 1×1; the other half as it is; then a shuffle.

    With stride 2 both branches filter all channels, and the output has twice as many.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        half = out_channels // 2
        self.splits = stride == 1
        self.branch1 = nn.Sequential()
        if not self.splits:
            self.branch1 = nn.Sequential(*depthwise(in_channels, stride), *pointwise(in_channels, half))
        self.branch2 = nn.Sequential(
            *pointwise(half if self.splits else in_channels, half),
            *depthwise(half, stride),
            *pointwise(half, half),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passed, filtered = x.chunk(2, dim=1) if self.splits else (self.branch1(x), x)
        return self.shuffle(torch.cat((passed, self.branch2(filtered)), 1))


class ShuffleNetV2(nn.Module):
    """Stem, three stages of shuffle units, a 1×1 convolution, global average pool, classifier.

    channels: of the stem, the three stages and the last convolution.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    def __init__(self, channels: tuple[int, int, int, int, int], num_classes: int = 1000):
        super().__init__()
        stem, *stages, last = channels
        self.conv1 = conv_bn_act(3, stem, 3, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = stem
        for number, (out_channels, depth) in enumerate(zip(stages, DEPTHS), start=2):
            units = [ShuffleUnit(in_channels, out_channels, 2)]
            units += [ShuffleUnit(out_channels, out_channels, 1) for _ in range(depth - 1)]
            self.add_module(f"stage{number}", nn.Sequential(*units))
            in_channels = out_channels
        self.conv5 = conv_bn_act(in_channels, last, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.maxpool(self.conv1(x))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = self.avgpool(self.conv5(x)).flatten(1)
        return self.fc(x)


@register_model()
def shufflenet_v2_x0_5(num_classes: int = 1000, **options) -> ShuffleNetV2:
    """ShuffleNet v2 at half width: 1,366,792 parameters, 0.04 GMAC."""
    return ShuffleNetV2((24, 48, 96, 192, 1024), num_classes, **options)


@register_model()
def shufflenet_v2_x1_0(num_classes: int = 1000, **options) -> ShuffleNetV2:
    """ShuffleNet v2: 2,278,604 parameters, 0.15 GMAC."""
    return ShuffleNetV2((24, 116, 232, 464, 1024), num_classes, **options)
