"""DenseNet: every layer sees all that came before it in its block.

G. Huang et al., "Densely Connected Convolutional Networks", 2016 (arXiv:1608.06993). Where ResNet adds,
DenseNet concatenates: a layer makes a few new channels (the growth rate) from all earlier ones, so features
are reused instead of learned again. BatchNorm and ReLU stand before each convolution, and transitions halve
channels and resolution between blocks.

=============  ============  ============  =============
network        parameters    growth rate   layers
=============  ============  ============  =============
densenet121    7,978,856     32            6, 12, 24, 16
densenet161    28,681,000    48            6, 12, 36, 24
densenet169    14,149,480    32            6, 12, 32, 32
densenet201    20,013,928    32            6, 12, 48, 32
=============  ============  ============  =============

Input: (N, 3, H, W), designed for 224×224; any size from 29×29 works. Names and shapes in ``state_dict`` are
torchvision's; its published checkpoints, which still say ``norm.1`` for ``norm1``, load too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.checkpoint import KeyStyle
from fastnets.models.registry import register_model

__all__ = ["DenseNet", "densenet121", "densenet161", "densenet169", "densenet201"]


class DenseLayer(nn.Module):
    """BN, ReLU, 1×1 to four times the growth rate; BN, ReLU, 3×3 to the new channels."""

    def __init__(self, in_channels: int, growth_rate: int, dropout: float):
        super().__init__()
        width = 4 * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(x)))
        x = self.conv2(self.relu2(self.norm2(x)))
        return self.dropout(x)


class DenseBlock(nn.Module):
    """Layers that each append their new channels to their input."""

    def __init__(self, layers: int, in_channels: int, growth_rate: int, dropout: float):
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, dropout)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat((x, layer(x)), 1)
        return x


def transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Half the channels by a 1×1 convolution, half the resolution by an average pool."""
    layers = nn.Sequential()
    layers.add_module("norm", nn.BatchNorm2d(in_channels))
    layers.add_module("relu", nn.ReLU(inplace=True))
    layers.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, bias=False))
    layers.add_module("pool", nn.AvgPool2d(2, stride=2))
    return layers


def _first_names() -> tuple[tuple[str, str], ...]:
    layer = "features.denseblock{}.denselayer{}."
    parts = ("norm", "1"), ("conv", "1"), ("norm", "2"), ("conv", "2")
    return tuple((f"{layer}{kind}.{i}.", f"{layer}{kind}{i}.") for kind, i in parts)


class DenseNet(nn.Module):
    """Stem, four dense blocks with transitions between them, BN and ReLU, global average pool, classifier.

    depths: layers in each block. stem_channels: of the first convolution. dropout: after each layer.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    key_styles = (KeyStyle("torchvision's first version", _first_names()),)

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        growth_rate: int = 32,
        stem_channels: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem_channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        channels = stem_channels
        for i, layers in enumerate(depths, start=1):
            block = DenseBlock(layers, channels, growth_rate, dropout)
            self.features.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            if i < len(depths):
                self.features.add_module(f"transition{i}", transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation (arXiv:1502.01852) for the convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=29, layer="features.transition3.pool")
        x = self.relu(self.features(x))
        x = self.avgpool(x).flatten(1)
        return self.classifier(x)


@register_model()
def densenet121(num_classes: int = 1000, **options) -> DenseNet:
    """DenseNet-121: 7,978,856 parameters, 2.8 GMAC."""
    return DenseNet((6, 12, 24, 16), num_classes, **options)


@register_model()
def densenet161(num_classes: int = 1000, **options) -> DenseNet:
    """DenseNet-161: 28,681,000 parameters, 7.7 GMAC."""
    return DenseNet((6, 12, 36, 24), num_classes, **{"growth_rate": 48, "stem_channels": 96, **options})


@register_model()
def densenet169(num_classes: int = 1000, **options) -> DenseNet:
    """DenseNet-169: 14,149,480 parameters, 3.4 GMAC."""
    return DenseNet((6, 12, 32, 32), num_classes, **options)


@register_model()
def densenet201(num_classes: int = 1000, **options) -> DenseNet:
    """DenseNet-201: 20,013,928 parameters, 4.3 GMAC."""
    return DenseNet((6, 12, 48, 32), num_classes, **options)
