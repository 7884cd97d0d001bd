"""AlexNet: the network that began it.

A. Krizhevsky, I. Sutskever and G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NIPS 2012. It brought ReLU in place of saturating activations, dropout, training on GPUs,
overlapping pooling and local response normalisation, and took the ImageNet error from 26 % to 15 %.

``AlexNet2012`` is the paper's, for 227×227 images: 60,965,224 parameters. Its second, fourth and fifth
convolutions have two groups, for each half of the network lived on a GPU of its own. ``AlexNet`` is the
slimmer single-column form ("One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997) that torchvision has, with torchvision's ``state_dict`` keys: 61,100,840 parameters, images
from 63×63.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.registry import register_model

__all__ = ["AlexNet", "AlexNet2012", "alexnet", "alexnet_2012"]


class AlexNet2012(nn.Module):
    """Five convolutions, three of them pooled, and three fully connected layers.

    Input (N, 3, 227, 227), for which the first layer gives the paper's 55×55; output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 1000, *, dropout: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4),
            nn.ReLU(inplace=True),
            _response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            _response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's: normal weights of 0.01; biases 1 where the paper wants the ReLU awake, else 0."""
        weighted = [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for module in weighted:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        _, conv2, _, conv4, conv5, fc6, fc7, _ = weighted
        for module in (conv2, conv4, conv5, fc6, fc7):
            nn.init.ones_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=227, most=258, layer="classifier.1")
        return self.classifier(self.features(x))


def _response_norm() -> nn.LocalResponseNorm:
    """x / (2 + 1e-4 · sum of squares over five channels)^0.75; PyTorch divides its alpha by the five."""
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


class AlexNet(nn.Module):
    """The single-column form: fewer channels, no groups, no response normalisation.

    Input (N, 3, H, W) from 63×63, designed for 224×224; output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 1000, *, dropout: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=63, layer="features.12")
        x = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(x)


@register_model()
def alexnet(num_classes: int = 1000, **options) -> AlexNet:
    """AlexNet in one column, torchvision's: 61,100,840 parameters, 0.71 GMAC."""
    return AlexNet(num_classes, **options)


@register_model(input_size=(3, 227, 227))
def alexnet_2012(num_classes: int = 1000, **options) -> AlexNet2012:
    """AlexNet of the paper: 60,965,224 parameters, 0.72 GMAC."""
    return AlexNet2012(num_classes, **options)
