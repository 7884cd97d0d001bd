"""EfficientNet: depth, width and resolution grown together.

M. Tan and Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019
(arXiv:1905.11946): a searched network of inverted residuals with squeeze-and-excite and SiLU (B0), and one
rule that scales all its dimensions at once (B1 to B7). "EfficientNetV2: Smaller Models and Faster Training",
2021 (arXiv:2104.00298): a search with training time in its reward put full 3×3 convolutions in place of 1×1
and depthwise ones where resolution is high. Both train with stochastic depth (arXiv:1603.09382).

====================  ===========  ========  ======
network               parameters   image     GMAC
====================  ===========  ========  ======
efficientnet_b0       5,288,548    224×224   0.39
efficientnet_b1       7,794,184    240×240   0.69
efficientnet_b2       9,109,994    288×288   1.1
efficientnet_b3       12,233,232   300×300   1.8
efficientnet_b4       19,341,616   380×380   4.4
efficientnet_b5       30,389,784   456×456   10.3
efficientnet_b6       43,040,704   528×528   19.1
efficientnet_b7       66,347,960   600×600   37.7
efficientnet_v2_s     21,458,488   384×384   8.4
====================  ===========  ========  ======

Input: (N, 3, H, W); any size from 1×1 works. Names and shapes in ``state_dict`` are torchvision's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastnets.models.blocks import SqueezeExcite, check_images, conv_bn_act, he_initialise, round_channels
from fastnets.models.dynamic_depth import stochastic_depth
from fastnets.models.registry import register_model

__all__ = [
    "EfficientNet",
    *(f"efficientnet_b{i}" for i in range(8)),
    "efficientnet_v2_s",
]


@dataclass(frozen=True)
class Stage:
    """Blocks of one shape. fused: one full convolution in place of the 1×1 and the depthwise one."""

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    depth: int
    fused: bool = False


B0 = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
V2_S = (
    Stage(1, 3, 1, 24, 2, fused=True),
    Stage(4, 3, 2, 48, 4, fused=True),
    Stage(4, 3, 2, 64, 4, fused=True),
    Stage(4, 3, 2, 128, 6),
    Stage(6, 3, 1, 160, 9),
    Stage(6, 3, 2, 256, 15),
)


class MBConv(nn.Module):
    """An inverted residual: wider by ``stage.expansion`` inside, added to its input where shapes allow it.

    1×1 up, depthwise, squeeze-and-excite to a quarter of the input's channels, 1×1 down; or, ``fused``, a
    full convolution up and 1×1 down. drop_branch: chance of leaving the branch out in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        stage: Stage,
        drop_branch: float,
        **norm: float,
    ):
        super().__init__()
        hidden, kernel_size = round_channels(in_channels * stage.expansion), stage.kernel_size
        swish = {"act": nn.SiLU, **norm}
        if stage.fused and hidden == in_channels:
            layers = [conv_bn_act(in_channels, out_channels, kernel_size, stride, **swish)]
        elif stage.fused:
            layers = [conv_bn_act(in_channels, hidden, kernel_size, stride, **swish)]
            layers.append(conv_bn_act(hidden, out_channels, 1, act=None, **norm))
        else:
            layers = [conv_bn_act(in_channels, hidden, 1, **swish)] if hidden != in_channels else []
            layers.append(conv_bn_act(hidden, hidden, kernel_size, stride, groups=hidden, **swish))
            layers.append(SqueezeExcite(hidden, max(1, in_channels // 4), act=nn.SiLU))
            layers.append(conv_bn_act(hidden, out_channels, 1, act=None, **norm))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop_branch = stochastic_depth(drop_branch)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.block(x)
        return self.drop_branch(branch) + x if self.has_shortcut else branch


class EfficientNet(nn.Module):
    """Stem, stages of inverted residuals, a 1×1 convolution, global average pool, classifier.

    stages: ``B0`` or ``V2_S``. width_mult, depth_mult: scale every stage's channels (rounded to multiples of
    8) and its blocks (rounded up). last_channels: of the last convolution; None for four times the last
    stage's. drop_branch: stochastic depth of the last block in training, less in earlier ones. norm: eps and
    momentum of the batch norms.
    Input (N, in_channels, H, W), output (N, num_classes) logits.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        num_classes: int = 1000,
        *,
        stem: int = 32,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        last_channels: int | None = None,
        dropout: float = 0.2,
        drop_branch: float = 0.2,
        norm: dict[str, float] | None = None,
        in_channels: int = 3,
    ):
        super().__init__()
        if width_mult <= 0 or depth_mult <= 0:
            raise ValueError(f"width_mult and depth_mult must be above 0, got {width_mult} and {depth_mult}")
        norm = norm or {}
        channels = round_channels(stem * width_mult)
        layers = [conv_bn_act(in_channels, channels, 3, stride=2, act=nn.SiLU, **norm)]
        depths = [math.ceil(stage.depth * depth_mult) for stage in stages]
        index = 0
        for stage, depth in zip(stages, depths):
            out_channels = round_channels(stage.channels * width_mult)
            blocks = []
            for block in range(depth):
                stride = stage.stride if block == 0 else 1
                rate = drop_branch * index / sum(depths)
                blocks.append(MBConv(channels, out_channels, stride, stage, rate, **norm))
                channels = out_channels
                index += 1
            layers.append(nn.Sequential(*blocks))
        last_channels = last_channels or 4 * channels
        layers.append(conv_bn_act(channels, last_channels, 1, act=nn.SiLU, **norm))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_channels, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation (arXiv:1502.01852); the classifier uniform within 1 / √classes."""
        he_initialise(self)
        classifier = self.classifier[1]
        bound = 1 / math.sqrt(classifier.out_features)
        nn.init.uniform_(classifier.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        x = self.avgpool(self.features(x)).flatten(1)
        return self.classifier(x)


def _scaled(
    num_classes: int, options: dict, width_mult: float, depth_mult: float, dropout: float, **more: object
) -> EfficientNet:
    shape = {"width_mult": width_mult, "depth_mult": depth_mult, "dropout": dropout, **more}
    return EfficientNet(B0, num_classes, **{**shape, **options})


SLOW_NORM = {"eps": 0.001, "momentum": 0.01}  # of the three largest


@register_model()
def efficientnet_b0(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B0: 5,288,548 parameters, 0.39 GMAC."""
    return _scaled(num_classes, options, 1.0, 1.0, 0.2)


@register_model(input_size=(3, 240, 240))
def efficientnet_b1(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B1: 7,794,184 parameters, 0.69 GMAC."""
    return _scaled(num_classes, options, 1.0, 1.1, 0.2)


@register_model(input_size=(3, 288, 288))
def efficientnet_b2(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B2: 9,109,994 parameters, 1.1 GMAC."""
    return _scaled(num_classes, options, 1.1, 1.2, 0.3)


@register_model(input_size=(3, 300, 300))
def efficientnet_b3(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B3: 12,233,232 parameters, 1.8 GMAC."""
    return _scaled(num_classes, options, 1.2, 1.4, 0.3)


@register_model(input_size=(3, 380, 380))
def efficientnet_b4(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B4: 19,341,616 parameters, 4.4 GMAC."""
    return _scaled(num_classes, options, 1.4, 1.8, 0.4)


@register_model(input_size=(3, 456, 456))
def efficientnet_b5(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B5: 30,389,784 parameters, 10.3 GMAC."""
    return _scaled(num_classes, options, 1.6, 2.2, 0.4, norm=SLOW_NORM)


@register_model(input_size=(3, 528, 528))
def efficientnet_b6(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B6: 43,040,704 parameters, 19.1 GMAC."""
    return _scaled(num_classes, options, 1.8, 2.6, 0.5, norm=SLOW_NORM)


@register_model(input_size=(3, 600, 600))
def efficientnet_b7(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNet-B7: 66,347,960 parameters, 37.7 GMAC."""
    return _scaled(num_classes, options, 2.0, 3.1, 0.5, norm=SLOW_NORM)


@register_model(input_size=(3, 384, 384))
def efficientnet_v2_s(num_classes: int = 1000, **options) -> EfficientNet:
    """EfficientNetV2-S: 21,458,488 parameters, 8.4 GMAC."""
    shape = {"stem": 24, "last_channels": 1280, "norm": {"eps": 0.001}}
    return EfficientNet(V2_S, num_classes, **{**shape, **options})
