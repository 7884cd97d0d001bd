"""ConvNeXt: a ResNet that took everything from the Transformers but attention.

Z. Liu et al., "A ConvNet for the 2020s", 2022 (arXiv:2201.03545). Step by step it gives a ResNet the Swin
Transformer's habits (patches for a stem, depthwise 7×7 in attention's place, an MLP of four times the width
with GELU, LayerNorm, few norms and activations, layer scale, stochastic depth) and ends up ahead of it.

===============  ============  ===============  =========================
network          parameters    blocks           channels
===============  ============  ===============  =========================
convnext_tiny    28,589,128    3, 3, 9, 3       96, 192, 384, 768
convnext_small   50,223,688    3, 3, 27, 3      96, 192, 384, 768
convnext_base    88,591,464    3, 3, 27, 3      128, 256, 512, 1024
convnext_large   197,767,336   3, 3, 27, 3      192, 384, 768, 1536
convnext_xlarge  350,196,968   3, 3, 27, 3      256, 512, 1024, 2048
===============  ============  ===============  =========================

Input: (N, 3, H, W), designed for 224×224; any size from 32×32 works. Names and shapes in ``state_dict`` are
torchvision's, those of ``convnext_xlarge``, which torchvision does not have, timm's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.blocks import check_images
from fastnets.models.dynamic_depth import stochastic_depth, stochastic_depth_rates
from fastnets.models.registry import register_model

__all__ = [
    "ConvNeXt",
    "ConvNeXtTimm",
    *("convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "convnext_xlarge"),
]

EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def _layers(channels: int) -> tuple[nn.Conv2d, nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]:
    """What a block runs, in order: depthwise 7×7, LayerNorm, 1×1 up (as a linear layer), GELU, 1×1 down."""
    return (
        nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
        nn.LayerNorm(channels, eps=EPS),
        nn.Linear(channels, 4 * channels),
        nn.GELU(),
        nn.Linear(4 * channels, channels),
    )


def _branch(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    convolution, norm, widen, act, narrow = layers
    x = convolution(x).permute(0, 2, 3, 1)
    return narrow(act(widen(norm(x)))).permute(0, 3, 1, 2)


def _initialise(model: nn.Module, layer_scale: float) -> None:
    """The paper's: truncated normals of 0.02, zero biases, small layer scales."""
    for name, parameter in model.named_parameters():
        if name.endswith(("layer_scale", "gamma")):
            nn.init.constant_(parameter, layer_scale)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


class Block(nn.Module):
    """x + layer scale · MLP(LayerNorm(depthwise 7×7(x))), with torchvision's names.

    drop_branch: chance of leaving the branch out in training.
    """

    def __init__(self, channels: int, drop_branch: float):
        super().__init__()
        names = ("0", "2", "3", "4", "5")  # of torchvision's Sequential, where permutations stand between
        self.block = nn.ModuleDict(zip(names, _layers(channels)))
        self.layer_scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.drop_branch = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layer_scale * _branch(x, self.block.values())
        return self.drop_branch(branch) + x


class ConvNeXt(nn.Module):
    """A stem of 4×4 patches, four stages of blocks with a halving of resolution between them, classifier.

    depths, channels: of the four stages. drop_branch: stochastic depth of the last block in training, less in
    earlier ones. layer_scale: what each block's scale starts at.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        channels: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        drop_branch: float = 0.0,
        layer_scale: float = 1e-6,
        in_channels: int = 3,
    ):
        super().__init__()
        rates = iter(stochastic_depth_rates(drop_branch, sum(depths)))
        stem = nn.Conv2d(in_channels, channels[0], 4, stride=4)
        layers = [nn.Sequential(stem, LayerNorm2d(channels[0], eps=EPS))]
        for i, (depth, width) in enumerate(zip(depths, channels)):
            if i > 0:
                narrower = channels[i - 1]
                halving = nn.Conv2d(narrower, width, 2, stride=2)
                layers.append(nn.Sequential(LayerNorm2d(narrower, eps=EPS), halving))
            layers.append(nn.Sequential(*(Block(width, next(rates)) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(channels[-1], eps=EPS), nn.Flatten(), nn.Linear(channels[-1], num_classes)
        )
        _initialise(self, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=32, layer="features.6.1")
        return self.classifier(self.avgpool(self.features(x)))


class TimmBlock(nn.Module):
    """:class:`Block` with timm's names."""

    def __init__(self, channels: int, drop_branch: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.conv_dw, self.norm, *mlp = _layers(channels)
        self.mlp = nn.ModuleDict(zip(("fc1", "act", "fc2"), mlp))
        self.drop_branch = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        branch = _branch(x, (self.conv_dw, self.norm, *self.mlp.values()))
        return self.drop_branch(branch * self.gamma[:, None, None]) + x


class ConvNeXtTimm(nn.Module):
    """:class:`ConvNeXt` with timm's names; the same arguments."""

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        channels: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        drop_branch: float = 0.0,
        layer_scale: float = 1e-6,
        in_channels: int = 3,
    ):
        super().__init__()
        rates = iter(stochastic_depth_rates(drop_branch, sum(depths)))
        stem = nn.Conv2d(in_channels, channels[0], 4, stride=4)
        self.stem = nn.Sequential(stem, LayerNorm2d(channels[0], eps=EPS))
        self.stages = nn.Sequential()
        for i, (depth, width) in enumerate(zip(depths, channels)):
            stage = nn.Sequential()
            if i > 0:
                narrower = channels[i - 1]
                halving = nn.Conv2d(narrower, width, 2, stride=2)
                stage.add_module("downsample", nn.Sequential(LayerNorm2d(narrower, eps=EPS), halving))
            stage.add_module("blocks", nn.Sequential(*(TimmBlock(width, next(rates)) for _ in range(depth))))
            self.stages.add_module(str(i), stage)
        self.head = nn.Sequential()
        self.head.add_module("global_pool", nn.AdaptiveAvgPool2d(1))
        self.head.add_module("norm", LayerNorm2d(channels[-1], eps=EPS))
        self.head.add_module("flatten", nn.Flatten())
        self.head.add_module("fc", nn.Linear(channels[-1], num_classes))
        _initialise(self, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=32, layer="stages.3.downsample.1")
        return self.head(self.stages(self.stem(x)))


@register_model()
def convnext_tiny(num_classes: int = 1000, **options) -> ConvNeXt:
    """ConvNeXt-T: 28,589,128 parameters, 4.5 GMAC."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes, **{"drop_branch": 0.1, **options})


@register_model()
def convnext_small(num_classes: int = 1000, **options) -> ConvNeXt:
    """ConvNeXt-S: 50,223,688 parameters, 8.7 GMAC."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), num_classes, **{"drop_branch": 0.4, **options})


@register_model()
def convnext_base(num_classes: int = 1000, **options) -> ConvNeXt:
    """ConvNeXt-B: 88,591,464 parameters, 15.4 GMAC."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), num_classes, **{"drop_branch": 0.5, **options})


@register_model()
def convnext_large(num_classes: int = 1000, **options) -> ConvNeXt:
    """ConvNeXt-L: 197,767,336 parameters, 34.4 GMAC."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), num_classes, **{"drop_branch": 0.5, **options})


@register_model()
def convnext_xlarge(num_classes: int = 1000, **options) -> ConvNeXtTimm:
    """ConvNeXt-XL, with timm's names: 350,196,968 parameters, 60.9 GMAC."""
    widths = (256, 512, 1024, 2048)
    return ConvNeXtTimm((3, 3, 27, 3), widths, num_classes, **{"drop_branch": 0.5, **options})
