"""Residual networks: ResNet, ResNeXt and Wide ResNet.

============================  ============  ======  ===================================================
network                       parameters    year    what it brought
============================  ============  ======  ===================================================
resnet18, resnet34            11.7 M, 21.8  2015    the shortcut: a block learns what to *add* to its input,
resnet50, 101, 152            25.6 M - 60.2 2015    so depth stops hurting; 1×1 bottlenecks make it affordable
resnext50_32x4d, 101_32x8d    25.0 M, 88.8  2016    the 3×3 split into 32 groups ("cardinality")
wide_resnet50_2, 101_2        68.9 M, 126.9 2016    width in place of depth: the 3×3 has twice the channels
============================  ============  ======  ===================================================

K. He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385); S. Xie et al., "Aggregated
Residual Transformations" (arXiv:1611.05431); S. Zagoruyko and N. Komodakis, "Wide Residual Networks"
(arXiv:1605.07146).

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works, for the average pool is global. A stage
that halves the resolution does so in its first 3×3 convolution (the "v1.5" form; the paper strides the first
1×1). Names and shapes in ``state_dict`` are torchvision's. A call may leave out blocks (``skip``).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.dynamic_depth import blocks_to_skip, stochastic_depth, stochastic_depth_rates
from fastnets.models.registry import register_model

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut around them (ResNet-18 and 34).

    drop_branch: chance of leaving the convolutions out in training, as in the Bottleneck.
    """

    expansion = 1  # output channels = expansion × channels

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        drop_branch: float = 0.0,
    ):
        super().__init__()
        if groups != 1 or width_per_group != 64:
            raise ValueError(
                "BasicBlock has one group of the usual width; groups and wider ones are the Bottleneck's"
            )
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample
        self.drop_branch = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.drop_branch(self.bn2(self.conv2(x)))
        x += shortcut
        return self.relu(x)


class Bottleneck(nn.Module):
    """1×1 down, 3×3, 1×1 up, and the shortcut around them (ResNet-50 and deeper).

    groups, width_per_group: the 3×3 convolution has ``groups`` groups and, in a stage of ``channels``,
    ``channels · width_per_group / 64 · groups`` channels in all.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        drop_branch: float = 0.0,
    ):
        super().__init__()
        width = int(channels * width_per_group / 64) * groups
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_branch = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.drop_branch(self.bn3(self.conv3(x)))
        x += shortcut
        return self.relu(x)


class ResNet(nn.Module):
    """A stem that quarters the resolution, four stages of residual blocks, global average pool, classifier.

    depths: blocks in each of the four stages, of 64, 128, 256 and 512 channels (times the block's expansion).
    zero_init_residual: start each block as the identity (last BN weight 0), as large-batch training likes it.
    stochastic_depth: chance of leaving out the last block's branch in training; earlier ones less.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        stochastic_depth: float = 0.0,
    ):
        super().__init__()
        rates = iter(stochastic_depth_rates(stochastic_depth, sum(depths)))
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(index: int, in_channels: int) -> nn.Sequential:
            channels, stride = 64 << index, 1 if index == 0 else 2
            out_channels = channels * block.expansion
            downsample = None
            if stride != 1 or in_channels != out_channels:
                downsample = nn.Sequential(
                    conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
                )
            first = block(in_channels, channels, stride, downsample, groups, width_per_group, next(rates))
            rest = [
                block(out_channels, channels, 1, None, groups, width_per_group, next(rates))
                for _ in range(depths[index] - 1)
            ]
            return nn.Sequential(first, *rest)

        self.layer1 = stage(0, 64)
        self.layer2 = stage(1, 64 * block.expansion)
        self.layer3 = stage(2, 128 * block.expansion)
        self.layer4 = stage(3, 256 * block.expansion)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self.reset_parameters(zero_init_residual)

    def reset_parameters(self, zero_init_residual: bool = False) -> None:
        """He initialisation (arXiv:1502.01852) by fan-out, which keeps the gradients' variance."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                    nn.init.zeros_(last.weight)

    def stages(self, x: Tensor, skip: float | Collection[int] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps after each of the four stages, the largest first. skip: see ``forward``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        blocks = [block for stage in stages for block in stage]
        optional = [i for i, block in enumerate(blocks) if block.downsample is None]
        left_out = {blocks[i] for i in blocks_to_skip(skip, len(blocks), optional=optional)}
        maps = []
        for stage in stages:
            x = _without(stage, left_out, x) if left_out else stage(x)
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Tensor, skip: float | Collection[int] = ()) -> Tensor:
        """skip: blocks to leave out in this call, counted through all stages: indices, or a share of them."""
        check_images(self, x)
        x = self.stages(x, skip)[-1]
        x = self.avgpool(x).flatten(1)
        return self.fc(x)


def _without(stage: nn.Sequential, left_out: set[nn.Module], x: Tensor) -> Tensor:
    for block in stage:
        if block not in left_out:
            x = block(x)
    return x


@register_model()
def resnet18(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-18: 11,689,512 parameters, 1.8 GMAC."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


@register_model()
def resnet34(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-34: 21,797,672 parameters, 3.7 GMAC."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


@register_model()
def resnet50(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-50: 25,557,032 parameters, 4.1 GMAC."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


@register_model()
def resnet101(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-101: 44,549,160 parameters, 7.8 GMAC."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


@register_model()
def resnet152(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-152: 60,192,808 parameters, 11.5 GMAC."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


@register_model()
def resnext50_32x4d(num_classes: int = 1000, **options) -> ResNet:
    """ResNeXt-50, 32 groups of 4: 25,028,904 parameters, 4.2 GMAC."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **{"groups": 32, "width_per_group": 4, **options})


@register_model()
def resnext101_32x8d(num_classes: int = 1000, **options) -> ResNet:
    """ResNeXt-101, 32 groups of 8: 88,791,336 parameters, 16.4 GMAC."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **{"groups": 32, "width_per_group": 8, **options})


@register_model()
def wide_resnet50_2(num_classes: int = 1000, **options) -> ResNet:
    """Wide ResNet-50-2: 68,883,240 parameters, 11.4 GMAC."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **{"width_per_group": 128, **options})


@register_model()
def wide_resnet101_2(num_classes: int = 1000, **options) -> ResNet:
    """Wide ResNet-101-2: 126,886,696 parameters, 22.8 GMAC."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **{"width_per_group": 128, **options})
