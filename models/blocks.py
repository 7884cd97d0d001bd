"""What several architectures are built from: convolution units, squeeze-and-excite, initialisation, and the
check of the images at the entrance.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

__all__ = ["SqueezeExcite", "check_images", "conv_bn_act", "he_initialise", "round_channels"]


def conv_bn_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    act: type[nn.Module] | None = nn.ReLU,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, activation (None: none); keeps the resolution at stride 1."""
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding=(kernel_size - 1) // 2,
        groups=groups,
        bias=False,
    )
    activation = [] if act is None else [act(inplace=True)]
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum), *activation)


class SqueezeExcite(nn.Module):
    """Every channel times a gate in (0, 1) that the means of all channels decide (arXiv:1709.01507).

    squeezed: channels between the two 1×1 convolutions. Input and output (N, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        *,
        act: type[nn.Module] = nn.ReLU,
        gate: type[nn.Module] = nn.Sigmoid,
    ):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = act(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.act(self.fc1(self.avgpool(x)))
        return x * self.gate(self.fc2(scale))


def round_channels(channels: float, multiple: int = 8) -> int:
    """The nearest multiple, but never more than a tenth below: how scaled networks choose their widths."""
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


def he_initialise(model: nn.Module, *, linear_std: float = 0.01) -> None:
    """He initialisation by fan-out for convolutions (arXiv:1502.01852), which keeps the gradients' variance;
    a narrow normal for linear layers; zero biases; batch norms as PyTorch starts them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=linear_std)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def check_images(
    model: nn.Module, x: Tensor, *, least: int = 1, most: int | None = None, layer: str = ""
) -> None:
    """Raises ``ValueError`` unless ``x`` holds images that ``model`` can take.

    x: (N, C, H, W), with the channels of the model's first convolution and H and W from ``least`` to
    ``most``. layer: what needs that size, by its path in the model.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    _check(x, type(model).__name__, None if first is None else first.in_channels, least, most, layer)


@torch.fx.wrap  # a tracer takes the check as it stands
def _check(x: Tensor, model: str, channels: int | None, least: int, most: int | None, layer: str) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"{model} takes images (N, {channels}, H, W), got {x.dim()} dimensions {tuple(x.shape)}"
            + ("; x.unsqueeze(0) makes a batch of one" if x.dim() == 3 else "")
        )
    if channels is not None and x.size(1) != channels:
        raise ValueError(f"{model} takes images of {channels} channels, got {x.size(1)}: {tuple(x.shape)}")
    height, width = x.shape[2:]
    if min(height, width) < least or (most is not None and max(height, width) > most):
        size = "small" if min(height, width) < least else "large"
        wanted = f"at least {least}×{least}" if most is None else f"{least}×{least}"
        range_ = f" (up to {most}×{most} will do)" if most not in (None, least) else ""
        raise ValueError(
            f"{model}: images of {height}×{width} pixels are too {size} for {layer}: give images of "
            f"{wanted} pixels{range_}"
        )
