"""Feature pyramids: maps of several resolutions, each with the meaning of the deepest.

T.-Y. Lin et al., "Feature Pyramid Networks for Object Detection", 2016 (arXiv:1612.03144). A detector wants
large maps for small objects, but only the small maps of a classifier know what they see. The pyramid goes
back up: the deepest map is enlarged and added to a 1×1 convolution of the map above, at each level, and a
3×3 convolution smooths the sums. 26.9 M parameters over a ResNet-50.

Input: (N, 3, H, W), designed for images of some 800×1333; any size from 1×1 works. Names and shapes in
``state_dict`` are those of torchvision's ``resnet_fpn_backbone`` with batch norms that train; checkpoints of
its default form with frozen ones load too.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.blocks import check_images
from fastnets.models.checkpoint import KeyStyle
from fastnets.models.registry import register_model
from fastnets.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["FeaturePyramid", "ResNetFPN", "resnet18_fpn", "resnet50_fpn", "resnet101_fpn"]


class ResNetMaps(ResNet):
    """A ResNet without its classifier: (N, 3, H, W) to the maps of its four stages, the largest first.

    ``load_weights`` takes a classifier's checkpoint for it.
    """

    key_styles = (KeyStyle("a classifier", (("fc.", None),)),)

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, int, int, int]):
        super().__init__(block, depths)
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.stages(x)


class FeaturePyramid(nn.Module):
    """From four maps of several widths, the largest first, to four of ``channels`` and one of half the last's
    resolution.
    """

    def __init__(self, in_channels: tuple[int, int, int, int], channels: int):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        self.pool = nn.MaxPool2d(1, stride=2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform with the variance 1 / fan-in, for no ReLU follows."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, ...]:
        maps = (c2, c3, c4, c5)
        laterals = [inner(x) for inner, x in zip(self.inner_blocks, maps)]
        top = laterals[-1]
        summed = [top]
        for x, lateral in zip(maps[-2::-1], laterals[-2::-1]):
            # The size is asked of x, not of its convolution: only the sum reads that one, and can join it.
            top = lateral + F.interpolate(top, size=x.shape[-2:], mode="nearest")
            summed.insert(0, top)
        outputs = [smooth(x) for smooth, x in zip(self.layer_blocks, summed)]
        return (*outputs, self.pool(outputs[-1]))


class ResNetFPN(nn.Module):
    """A ResNet with a feature pyramid on its four stages, as a detector's backbone.

    channels: of every map that comes out. trainable_layers: how many of the ResNet's five parts (stem and
    stages, from the end) learn; the others' parameters have ``requires_grad=False``.
    Input (N, 3, H, W); output a dict of (N, channels, h, w) maps "0" to "3", of 1/4, 1/8, 1/16 and 1/32 of
    the resolution, and "pool" of 1/64.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        channels: int = 256,
        trainable_layers: int = 5,
    ):
        super().__init__()
        if not 0 <= trainable_layers <= 5:
            raise ValueError(f"trainable_layers must be from 0 to 5, got {trainable_layers}")
        self.body = ResNetMaps(block, depths)
        self.fpn = FeaturePyramid(tuple((64 << i) * block.expansion for i in range(4)), channels)
        self.out_channels = channels
        parts = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
        for names in parts[: 5 - trainable_layers]:
            for name in names:
                self.body.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        check_images(self, x)
        c2, c3, c4, c5 = self.body(x)
        p2, p3, p4, p5, pooled = self.fpn(c2, c3, c4, c5)
        return {"0": p2, "1": p3, "2": p4, "3": p5, "pool": pooled}


@register_model()
def resnet18_fpn(**options) -> ResNetFPN:
    """ResNet-18 with a feature pyramid: 13,783,616 parameters."""
    return ResNetFPN(BasicBlock, (2, 2, 2, 2), **options)


@register_model()
def resnet50_fpn(**options) -> ResNetFPN:
    """ResNet-50 with a feature pyramid: 26,852,416 parameters."""
    return ResNetFPN(Bottleneck, (3, 4, 6, 3), **options)


@register_model()
def resnet101_fpn(**options) -> ResNetFPN:
    """ResNet-101 with a feature pyramid: 45,844,544 parameters."""
    return ResNetFPN(Bottleneck, (3, 4, 23, 3), **options)
