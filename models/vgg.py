"""VGG: nothing but 3×3 convolutions, deep.

K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014
(arXiv:1409.1556). Two 3×3 convolutions see what one 5×5 sees, with fewer weights and one more ReLU: so the
filters got small and the network deep, 11 to 19 layers, in one uniform pattern. The ``_bn`` forms put
BatchNorm after each convolution, which the paper did not yet have.

Input: (N, 3, H, W), designed for 224×224; any size from 32×32 works, for the features are pooled to 7×7.
Names and shapes in ``state_dict`` are torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.registry import register_model

__all__ = [
    "VGG",
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
]

CHANNELS = (64, 128, 256, 512, 512)  # of the five stages, each followed by a 2×2 max pool


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, then three fully connected layers.

    depths: convolutions in each stage. batch_norm: whether BatchNorm follows each of them.
    Input (N, 3, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 1000,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for channels, depth in zip(CHANNELS, depths):
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions (arXiv:1502.01852), a narrow normal for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=32, layer=f"features.{len(self.features) - 1}")
        x = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(x)


@register_model()
def vgg11(num_classes: int = 1000, **options) -> VGG:
    """VGG-11 (the paper's A): 132,863,336 parameters, 7.6 GMAC."""
    return VGG((1, 1, 2, 2, 2), num_classes, **options)


@register_model()
def vgg13(num_classes: int = 1000, **options) -> VGG:
    """VGG-13 (B): 133,047,848 parameters, 11.3 GMAC."""
    return VGG((2, 2, 2, 2, 2), num_classes, **options)


@register_model()
def vgg16(num_classes: int = 1000, **options) -> VGG:
    """VGG-16 (D): 138,357,544 parameters, 15.5 GMAC."""
    return VGG((2, 2, 3, 3, 3), num_classes, **options)


@register_model()
def vgg19(num_classes: int = 1000, **options) -> VGG:
    """VGG-19 (E): 143,667,240 parameters, 19.6 GMAC."""
    return VGG((2, 2, 4, 4, 4), num_classes, **options)


@register_model()
def vgg11_bn(num_classes: int = 1000, **options) -> VGG:
    """VGG-11 with BatchNorm: 132,868,840 parameters."""
    return vgg11(num_classes, **{"batch_norm": True, **options})


@register_model()
def vgg13_bn(num_classes: int = 1000, **options) -> VGG:
    """VGG-13 with BatchNorm: 133,053,736 parameters."""
    return vgg13(num_classes, **{"batch_norm": True, **options})


@register_model()
def vgg16_bn(num_classes: int = 1000, **options) -> VGG:
    """VGG-16 with BatchNorm: 138,365,992 parameters."""
    return vgg16(num_classes, **{"batch_norm": True, **options})


@register_model()
def vgg19_bn(num_classes: int = 1000, **options) -> VGG:
    """VGG-19 with BatchNorm: 143,678,248 parameters."""
    return vgg19(num_classes, **{"batch_norm": True, **options})
