"""Inception-v3: large filters taken apart.

C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015 (arXiv:1512.00567). It
factors filters (5×5 into two 3×3, 7×7 into 1×7 and 7×1), shrinks the resolution in two branches at once so
that nothing is squeezed through a bottleneck, and brought label smoothing. 23,834,568 parameters without the
auxiliary classifier, 5.7 GMAC.

Input: (N, 3, H, W), designed for 299×299; any size from 75×75 works. Names and shapes in ``state_dict`` are
torchvision's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.checkpoint import KeyStyle
from fastnets.models.googlenet import ConvUnit
from fastnets.models.registry import register_model

__all__ = ["InceptionOutputs", "InceptionV3", "inception_v3"]


class InceptionOutputs(NamedTuple):
    """What training returns with the auxiliary classifier: (N, num_classes) logits of the last one and of the
    one after Mixed_6e.
    """

    logits: Tensor
    aux_logits: Tensor


class InceptionA(nn.Module):
    """Grid of 35×35: 1×1; 5×5; two 3×3; average pool."""

    def __init__(self, in_channels: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvUnit(in_channels, 64, 1)
        self.branch5x5_1 = ConvUnit(in_channels, 48, 1)
        self.branch5x5_2 = ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvUnit(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvUnit(in_channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, branch5x5, branch3x3dbl, branch_pool), 1)


class InceptionB(nn.Module):
    """From 35×35 to 17×17: strided 3×3; 3×3 and strided 3×3; max pool."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = ConvUnit(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvUnit(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), branch3x3dbl, self.pool(x)), 1)


class InceptionC(nn.Module):
    """Grid of 17×17: 1×1; 1×7 and 7×1; both twice; average pool. width: channels inside the branches."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
        self.branch1x1 = ConvUnit(in_channels, 192, 1)
        self.branch7x7_1 = ConvUnit(in_channels, width, 1)
        self.branch7x7_2 = ConvUnit(width, width, (1, 7), **row)
        self.branch7x7_3 = ConvUnit(width, 192, (7, 1), **column)
        self.branch7x7dbl_1 = ConvUnit(in_channels, width, 1)
        self.branch7x7dbl_2 = ConvUnit(width, width, (7, 1), **column)
        self.branch7x7dbl_3 = ConvUnit(width, width, (1, 7), **row)
        self.branch7x7dbl_4 = ConvUnit(width, width, (7, 1), **column)
        self.branch7x7dbl_5 = ConvUnit(width, 192, (1, 7), **row)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvUnit(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, branch7x7, branch7x7dbl, branch_pool), 1)


class InceptionD(nn.Module):
    """From 17×17 to 8×8: strided 3×3; 1×7, 7×1 and strided 3×3; max pool."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = ConvUnit(in_channels, 192, 1)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvUnit(in_channels, 192, 1)
        self.branch7x7x3_2 = ConvUnit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvUnit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat((branch3x3, branch7x7x3, self.pool(x)), 1)


class InceptionE(nn.Module):
    """Grid of 8×8: branches that end in 1×3 and 3×1 side by side, for width where it is cheap."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch1x1 = ConvUnit(in_channels, 320, 1)
        self.branch3x3_1 = ConvUnit(in_channels, 384, 1)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvUnit(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = ConvUnit(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat((self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)), 1)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = torch.cat((self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)), 1)
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, branch3x3, branch3x3dbl, branch_pool), 1)


class AuxiliaryClassifier(nn.Module):
    """A small classifier on the 17×17 grid, used in training only."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.conv0 = ConvUnit(in_channels, 128, 1)
        self.conv1 = ConvUnit(128, 768, 5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(self.pool(x)))
        return self.fc(self.avgpool(x).flatten(1))


class InceptionV3(nn.Module):
    """Six layers of stem, eleven Inception blocks, global average pool, classifier.

    aux_logits: an auxiliary classifier, used in training only, which then returns ``InceptionOutputs`` and
    takes images of at least 299×299.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    # torchvision's checkpoint has the auxiliary classifier, which evaluation does not need.
    key_styles = (KeyStyle("torchvision", (("AuxLogits.", None),)),)

    def __init__(self, num_classes: int = 1000, *, aux_logits: bool = False, dropout: float = 0.5):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, width=128)
        self.Mixed_6c = InceptionC(768, width=160)
        self.Mixed_6d = InceptionC(768, width=160)
        self.Mixed_6e = InceptionC(768, width=192)
        self.AuxLogits = AuxiliaryClassifier(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchvision's: truncated normals of 0.1, narrower in the auxiliary classifier."""
        narrow = {} if self.AuxLogits is None else {self.AuxLogits.conv1.conv: 0.01, self.AuxLogits.fc: 0.001}
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=narrow.get(module, 0.1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        check_images(self, x, least=75, layer="Mixed_7a")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.maxpool2(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        aux = self.AuxLogits(x) if self.training and self.AuxLogits is not None else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = self.dropout(self.avgpool(x)).flatten(1)
        x = self.fc(x)
        return x if aux is None else InceptionOutputs(x, aux)


@register_model(input_size=(3, 299, 299))
def inception_v3(num_classes: int = 1000, **options) -> InceptionV3:
    """Inception-v3: 23,834,568 parameters (27,161,264 with ``aux_logits=True``), 5.7 GMAC."""
    return InceptionV3(num_classes, **options)
