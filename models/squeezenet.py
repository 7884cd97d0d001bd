"""SqueezeNet: AlexNet's accuracy in a fiftieth of its weights.

F. Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016
(arXiv:1602.07360). A Fire block squeezes its input to a few channels with 1×1 filters and expands them with
1×1 and 3×3 ones side by side; the classifier is a convolution and a global average pool. 1,248,424 parameters
for ``squeezenet1_0``; ``squeezenet1_1`` (1,235,496) pools earlier and needs 2.4 times fewer operations.

Input: (N, 3, H, W), designed for 224×224; any size from 21×21 (1.0) or 17×17 (1.1) works. Names and shapes in
``state_dict`` are torchvision's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.registry import register_model

__all__ = ["Fire", "SqueezeNet", "squeezenet1_0", "squeezenet1_1"]

# (squeezed, expanded by each kind of filter) of the eight Fire blocks.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """1×1 down to ``squeezed`` channels, then 1×1 and 3×3 up to ``expanded`` each, concatenated."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        narrow = self.expand1x1_activation(self.expand1x1(x))
        wide = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat((narrow, wide), 1)


class SqueezeNet(nn.Module):
    """A strided convolution, eight Fire blocks with three max pools, a 1×1 convolution to the classes.

    stem: (channels, kernel size) of the first convolution. pools_before: the Fire blocks (from 0) that a max
    pool stands before. least_size: of the images.
    Input (N, 3, H, W), output (N, num_classes) logits, none of them negative.
    """

    def __init__(
        self,
        stem: tuple[int, int],
        pools_before: tuple[int, int, int],
        least_size: int,
        num_classes: int = 1000,
        *,
        dropout: float = 0.5,
    ):
        super().__init__()
        channels, kernel_size = stem
        layers: list[nn.Module] = [nn.Conv2d(3, channels, kernel_size, stride=2), nn.ReLU(inplace=True)]
        for i, (squeezed, expanded) in enumerate(FIRES):
            if i in pools_before:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
                self.last_pool = f"features.{len(layers) - 1}"
            layers.append(Fire(channels, squeezed, expanded))
            channels = 2 * expanded
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(channels, num_classes, 1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.least_size = least_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation (arXiv:1502.01852), and a narrow normal for the last convolution."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier[1].weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=self.least_size, layer=self.last_pool)
        return self.classifier(self.features(x)).flatten(1)


@register_model()
def squeezenet1_0(num_classes: int = 1000, **options) -> SqueezeNet:
    """SqueezeNet 1.0: 1,248,424 parameters, 0.82 GMAC."""
    return SqueezeNet((96, 7), (0, 3, 7), 21, num_classes, **options)


@register_model()
def squeezenet1_1(num_classes: int = 1000, **options) -> SqueezeNet:
    """SqueezeNet 1.1: 1,235,496 parameters, 0.35 GMAC."""
    return SqueezeNet((64, 3), (0, 2, 4), 17, num_classes, **options)
