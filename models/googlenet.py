"""GoogLeNet: many filter sizes side by side.

C. Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842). An Inception block looks at its
input through 1×1, 3×3 and 5×5 filters and a max pool at once and concatenates what they see; 1×1 convolutions
before the large filters keep that affordable: 22 layers with a ninth of AlexNet's weights.

``googlenet_2014`` is the paper's: biases and two response normalisations, no BatchNorm; 6,998,552 parameters.
``googlenet`` is torchvision's, with BatchNorm and with 3×3 filters where the paper has 5×5, and with
torchvision's ``state_dict`` keys: 6,624,904 parameters.

Input: (N, 3, H, W), designed for 224×224; any size from 15×15 (torchvision's) or 31×31 (the paper's) works.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.checkpoint import KeyStyle
from fastnets.models.registry import register_model

__all__ = ["ConvUnit", "GoogLeNet", "GoogLeNetOutputs", "googlenet", "googlenet_2014"]

# One line for each block: 1×1; 3×3 after its reduction; 5×5 after its reduction; projection of the pool.
BLOCKS = {
    "inception3a": (64, (96, 128), (16, 32), 32),
    "inception3b": (128, (128, 192), (32, 96), 64),
    "inception4a": (192, (96, 208), (16, 48), 64),
    "inception4b": (160, (112, 224), (24, 64), 64),
    "inception4c": (128, (128, 256), (24, 64), 64),
    "inception4d": (112, (144, 288), (32, 64), 64),
    "inception4e": (256, (160, 320), (32, 128), 128),
    "inception5a": (256, (160, 320), (32, 128), 128),
    "inception5b": (384, (192, 384), (48, 128), 128),
}


class GoogLeNetOutputs(NamedTuple):
    """What training returns with auxiliary classifiers: (N, num_classes) logits of the last, of the one after
    inception4d and of the one after inception4a; the paper adds the losses of the latter two, times 0.3.
    """

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class ConvUnit(nn.Module):
    """Convolution, BatchNorm (or a bias in its place) and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        *,
        batch_norm: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001) if batch_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches over the same input, concatenated: 1×1; 3×3; 5×5 (torchvision: 3×3); max pool."""

    def __init__(
        self,
        in_channels: int,
        narrow: int,
        middle: tuple[int, int],
        wide: tuple[int, int],
        pooled: int,
        *,
        batch_norm: bool,
    ):
        super().__init__()
        largest = 3 if batch_norm else 5
        options = {"batch_norm": batch_norm}
        self.branch1 = ConvUnit(in_channels, narrow, 1, **options)
        self.branch2 = nn.Sequential(
            ConvUnit(in_channels, middle[0], 1, **options), ConvUnit(*middle, 3, padding=1, **options)
        )
        self.branch3 = nn.Sequential(
            ConvUnit(in_channels, wide[0], 1, **options),
            ConvUnit(*wide, largest, padding=largest // 2, **options),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), ConvUnit(in_channels, pooled, 1, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


class AuxiliaryClassifier(nn.Module):
    """A small classifier on an inner layer, which brings gradients to the depth of the network."""

    def __init__(self, in_channels: int, num_classes: int, *, batch_norm: bool):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4) if batch_norm else nn.AvgPool2d(5, stride=3)
        self.conv = ConvUnit(in_channels, 128, 1, batch_norm=batch_norm)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        x = self.dropout(self.relu(self.fc1(x)))
        return self.fc2(x)


class GoogLeNet(nn.Module):
    """Stem, nine Inception blocks, global average pool, classifier.

    batch_norm: torchvision's form; False: the paper's. aux_logits: two auxiliary classifiers, used in
    training only, which then returns ``GoogLeNetOutputs``; the paper's fit images of 224×224.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    # torchvision's checkpoint has the auxiliary classifiers, which evaluation does not need.
    key_styles = (KeyStyle("torchvision", (("aux1.", None), ("aux2.", None))),)

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        batch_norm: bool = True,
        aux_logits: bool = False,
        dropout: float = 0.2,
    ):
        super().__init__()

        def response_norm() -> nn.Module:
            return nn.Identity() if batch_norm else nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)

        def pool(size: int = 3) -> nn.MaxPool2d:
            return nn.MaxPool2d(size, stride=2, ceil_mode=True)

        options = {"batch_norm": batch_norm}
        self.least_size, self.tightest = (15, "maxpool3") if batch_norm else (31, "maxpool4")
        self.conv1 = ConvUnit(3, 64, 7, stride=2, padding=3, **options)
        self.maxpool1 = pool()
        self.norm1 = response_norm()
        self.conv2 = ConvUnit(64, 64, 1, **options)
        self.conv3 = ConvUnit(64, 192, 3, padding=1, **options)
        self.norm2 = response_norm()
        self.maxpool2 = pool()
        channels = 192
        for name, (narrow, middle, wide, pooled) in BLOCKS.items():
            if name in ("inception4a", "inception5a"):
                number = int(name[9]) - 1
                self.add_module(f"maxpool{number}", pool(2 if batch_norm and number == 4 else 3))
            self.add_module(name, Inception(channels, narrow, middle, wide, pooled, **options))
            channels = narrow + middle[1] + wide[1] + pooled
        self.aux1 = AuxiliaryClassifier(512, num_classes, **options) if aux_logits else None
        self.aux2 = AuxiliaryClassifier(528, num_classes, **options) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchvision's narrow normal; without BatchNorm Xavier's (AISTATS 2010), and biases of 0.2 in the
        convolutions, as Caffe trained it.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                if self.norm1.__class__ is nn.Identity:
                    nn.init.trunc_normal_(module.weight, std=0.01)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 0.2 if isinstance(module, nn.Conv2d) else 0.0)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        check_images(self, x, least=self.least_size, layer=self.tightest)
        x = self.norm1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        x = self.dropout(self.avgpool(x).flatten(1))
        x = self.fc(x)
        return x if aux1 is None else GoogLeNetOutputs(x, aux2, aux1)


@register_model()
def googlenet(num_classes: int = 1000, **options) -> GoogLeNet:
    """GoogLeNet with BatchNorm, torchvision's: 6,624,904 parameters, 1.5 GMAC."""
    return GoogLeNet(num_classes, **options)


@register_model()
def googlenet_2014(num_classes: int = 1000, **options) -> GoogLeNet:
    """GoogLeNet of the paper: 6,998,552 parameters, 1.6 GMAC."""
    return GoogLeNet(num_classes, **{"batch_norm": False, "dropout": 0.4, **options})
