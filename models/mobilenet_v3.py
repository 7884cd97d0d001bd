"""MobileNetV3: searched blocks, squeeze-and-excite and a cheap Swish.

A. Howard et al., "Searching for MobileNetV3", 2019 (arXiv:1905.02244). MobileNetV2's inverted residuals, with
sizes from an architecture search, squeeze-and-excite between the depthwise convolution and the projection,
Hardswish (x · relu6(x + 3) / 6) in the deep half, and a head that pools before its widest layer.

==================  ===========  =========
network             parameters   GMAC
==================  ===========  =========
mobilenet_v3_large  5,483,032    0.22
mobilenet_v3_small  2,542,856    0.06
==================  ===========  =========

Input: (N, 3, H, W), designed for 224×224; any size from 1×1 works. Names and shapes in ``state_dict`` are
torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastnets.models.blocks import SqueezeExcite, check_images, conv_bn_act, he_initialise, round_channels
from fastnets.models.registry import register_model

__all__ = ["MobileNetV3", "mobilenet_v3_large", "mobilenet_v3_small"]

# One line for each block: filter size, channels inside, channels out, squeeze-and-excite, Hardswish, stride
# (the paper's tables 1 and 2).
LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
BATCH_NORM = {"eps": 0.001, "momentum": 0.01}


class InvertedResidual(nn.Module):
    """1×1 up, depthwise, squeeze-and-excite, 1×1 down; added to the input where the shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        squeezes: bool,
        act: type[nn.Module],
    ):
        super().__init__()
        layers: list[nn.Module] = []
        if hidden != in_channels:
            layers.append(conv_bn_act(in_channels, hidden, 1, act=act, **BATCH_NORM))
        layers.append(conv_bn_act(hidden, hidden, kernel_size, stride, hidden, act=act, **BATCH_NORM))
        if squeezes:
            layers.append(SqueezeExcite(hidden, round_channels(hidden // 4), gate=nn.Hardsigmoid))
        layers.append(conv_bn_act(hidden, out_channels, 1, act=None, **BATCH_NORM))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.has_shortcut else self.block(x)


class MobileNetV3(nn.Module):
    """Stem, inverted residuals, a 1×1 convolution, global average pool, two linear layers.

    blocks: ``LARGE`` or ``SMALL``. head: features between the two linear layers. width_mult: scales every
    layer's channels (rounded to multiples of 8).
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        blocks: tuple[tuple[int, int, int, bool, bool, int], ...],
        head: int,
        num_classes: int = 1000,
        *,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        in_channels: int = 3,
    ):
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be above 0, got {width_mult}")
        channels = round_channels(16 * width_mult)
        layers: list[nn.Module] = [
            conv_bn_act(in_channels, channels, 3, stride=2, act=nn.Hardswish, **BATCH_NORM)
        ]
        for kernel_size, hidden, out_channels, squeezes, hard_swish, stride in blocks:
            hidden, out_channels = (round_channels(c * width_mult) for c in (hidden, out_channels))
            act = nn.Hardswish if hard_swish else nn.ReLU
            layers.append(
                InvertedResidual(
                    channels, hidden, out_channels, kernel_size, stride, squeezes=squeezes, act=act
                )
            )
            channels = out_channels
        layers.append(conv_bn_act(channels, 6 * channels, 1, act=nn.Hardswish, **BATCH_NORM))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = round_channels(head * width_mult)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, head),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(head, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for the convolutions (arXiv:1502.01852), narrow normals for the classifier."""
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(x)


@register_model()
def mobilenet_v3_large(num_classes: int = 1000, **options) -> MobileNetV3:
    """MobileNetV3-Large: 5,483,032 parameters, 0.22 GMAC."""
    return MobileNetV3(LARGE, 1280, num_classes, **options)


@register_model()
def mobilenet_v3_small(num_classes: int = 1000, **options) -> MobileNetV3:
    """MobileNetV3-Small: 2,542,856 parameters, 0.06 GMAC."""
    return MobileNetV3(SMALL, 1024, num_classes, **options)
