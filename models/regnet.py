"""RegNet: a space of networks instead of one.

I. Radosavovic et al., "Designing Network Design Spaces", 2020 (arXiv:2003.13678). The good networks of a
large space turned out to share one rule: widths that grow linearly with depth, rounded to a few stages. Four
numbers then describe a network. Its block is ResNet's bottleneck without the bottleneck, with grouped 3×3
convolutions; the Y form adds squeeze-and-excite.

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
torchvision's.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from fastnets.models.blocks import SqueezeExcite, check_images, conv_bn_act, he_initialise
from fastnets.models.registry import register_model

__all__ = ["RegNet", "regnet_x_400mf", "regnet_y_400mf"]

STEM = 32


def stages_of(
    depth: int, first_width: int, slope: float, step: float, group_width: int
) -> list[tuple[int, int, int]]:
    """(width, blocks, width of a group) of each stage.

    Block i wants first_width + slope · i channels; it gets the nearest first_width · step^k, rounded to a
    multiple of 8, and runs of equal blocks are the stages. Widths are then rounded to whole groups.
    """
    wanted = (first_width + slope * i for i in range(depth))
    powers = (round(math.log(width / first_width) / math.log(step)) for width in wanted)
    widths = [round(first_width * step**power / 8) * 8 for power in powers]
    stages = []
    for width, blocks in itertools.groupby(widths):
        group = min(group_width, width)
        whole = max(group, int(width + group / 2) // group * group)
        stages.append((whole if whole >= 0.9 * width else whole + group, len(list(blocks)), group))
    return stages


class RegNetBlock(nn.Module):
    """1×1, grouped 3×3, squeeze-and-excite in the Y form, 1×1, and the shortcut around them."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, group_width: int, squeeze: float | None
    ):
        super().__init__()
        self.proj = None
        if stride != 1 or in_channels != out_channels:
            self.proj = conv_bn_act(in_channels, out_channels, 1, stride, act=None)
        self.f = nn.Sequential()
        self.f.add_module("a", conv_bn_act(in_channels, out_channels, 1))
        self.f.add_module(
            "b", conv_bn_act(out_channels, out_channels, 3, stride, groups=out_channels // group_width)
        )
        if squeeze is not None:
            self.f.add_module("se", SqueezeExcite(out_channels, round(squeeze * in_channels)))
        self.f.add_module("c", conv_bn_act(out_channels, out_channels, 1, act=None))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class RegNet(nn.Module):
    """Stem, stages of residual blocks, global average pool, classifier.

    depth, first_width, slope, step, group_width: see ``stages_of``. squeeze: channels inside
    squeeze-and-excite over the block's input channels; None for the X form.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        depth: int,
        first_width: int,
        slope: float,
        step: float,
        group_width: int,
        num_classes: int = 1000,
        *,
        squeeze: float | None = None,
    ):
        super().__init__()
        self.stem = conv_bn_act(3, STEM, 3, stride=2)
        self.trunk_output = nn.Sequential()
        channels = STEM
        stages = stages_of(depth, first_width, slope, step, group_width)
        for number, (width, blocks, group) in enumerate(stages, start=1):
            stage = nn.Sequential()
            for i in range(blocks):
                block = RegNetBlock(channels, width, 2 if i == 0 else 1, group, squeeze)
                stage.add_module(f"block{number}-{i}", block)
                channels = width
            self.trunk_output.add_module(f"block{number}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions, by all the filters of a layer; a narrow normal last."""
        he_initialise(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.trunk_output(self.stem(x))
        x = self.avgpool(x).flatten(1)
        return self.fc(x)


@register_model()
def regnet_x_400mf(num_classes: int = 1000, **options) -> RegNet:
    """RegNetX-400MF: 5,495,976 parameters, 0.41 GMAC."""
    return RegNet(22, 24, 24.48, 2.54, 16, num_classes, **options)


@register_model()
def regnet_y_400mf(num_classes: int = 1000, **options) -> RegNet:
    """RegNetY-400MF, with squeeze-and-excite: 4,344,144 parameters, 0.40 GMAC."""
    return RegNet(16, 48, 27.89, 2.09, 8, num_classes, **{"squeeze": 0.25, **options})
