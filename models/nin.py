"""Network in Network: a small network in place of each linear filter, and no fully connected layer at all.

M. Lin, Q. Chen and S. Yan, "Network In Network", 2013 (arXiv:1312.4400). It brought the 1×1 convolution:
after each spatial convolution two of them mix the channels at every pixel ("mlpconv"). It also brought the
global average pool: the last maps are one per class, and their means are the logits.

``nin`` is the ImageNet form that its authors published for Caffe: 7,595,176 parameters. ``nin_teaching`` is
the form of textbooks, whose last block has as many channels as there are classes throughout: 7,439,608.
Input: (N, 3, H, W), designed for 224×224; any size from 39×39 works.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import check_images
from fastnets.models.registry import register_model

__all__ = ["NetworkInNetwork", "nin", "nin_teaching"]


def mlpconv(
    in_channels: int, channels: tuple[int, int, int], kernel_size: int, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """A spatial convolution and two 1×1 ones, each with its ReLU; ``channels``: the outputs of the three."""
    first, second, third = channels
    return [
        nn.Conv2d(in_channels, first, kernel_size, stride, padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(second, third, 1),
        nn.ReLU(inplace=True),
    ]


class NetworkInNetwork(nn.Module):
    """Four mlpconv blocks with overlapping max pools between them, then the global average pool.

    dropout: before the last block. last_width: channels inside the last block (None: as many as classes).
    Input (N, 3, H, W), output (N, num_classes) logits, none of them negative.
    """

    def __init__(self, num_classes: int = 1000, *, last_width: int | None = 1024, dropout: float = 0.5):
        super().__init__()
        width = num_classes if last_width is None else last_width
        self.features = nn.Sequential(
            *mlpconv(3, (96, 96, 96), 11, stride=4),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            *mlpconv(96, (256, 256, 256), 5, padding=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            *mlpconv(256, (384, 384, 384), 3, padding=1),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(dropout),
            *mlpconv(384, (width, width, num_classes), 3, padding=1),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation (arXiv:1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=39, layer="features.20")
        return self.avgpool(self.features(x)).flatten(1)


@register_model()
def nin(num_classes: int = 1000, **options) -> NetworkInNetwork:
    """Network in Network for ImageNet: 7,595,176 parameters, 1.1 GMAC."""
    return NetworkInNetwork(num_classes, **options)


@register_model()
def nin_teaching(num_classes: int = 1000, **options) -> NetworkInNetwork:
    """Network in Network as taught: 7,439,608 parameters."""
    return NetworkInNetwork(num_classes, **{"last_width": None, **options})
