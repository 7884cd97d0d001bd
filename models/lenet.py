"""LeNet-5: the network that read cheques.

Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proc. IEEE 86(11), 1998. It brought the plan that everything here still follows: convolutions with shared
weights, pooling between them, channels growing while resolution shrinks, fully connected layers last, all of
it trained by gradient descent.

``LeNet5`` is the form that is taught today, for 28×28 images: 61,706 parameters with sigmoid and average
pooling, or with ReLU and max pooling. ``LeNet5Original`` is the paper's, for 32×32 images: exactly 60,000
trainable parameters, with the sparse connections of C3, trainable subsampling, scaled tanh and an output
layer of fixed codes.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnets.models.blocks import check_images
from fastnets.models.registry import register_model

__all__ = ["LeNet5", "LeNet5Original", "lenet5", "lenet5_1998", "lenet5_relu"]

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
POOLS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class LeNet5(nn.Module):
    """The teaching form: two 5×5 convolutions, each pooled 2×2, and three fully connected layers.

    activation: "sigmoid", "tanh" or "relu"; pool: "average" or "max".
    Input (N, 1, 28, 28), output (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 10, *, activation: str = "sigmoid", pool: str = "average"):
        super().__init__()
        act = _choice("activation", activation, ACTIVATIONS)
        pooling = _choice("pool", pool, POOLS)
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.act1 = act()
        self.pool1 = pooling(2, stride=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.act2 = act()
        self.pool2 = pooling(2, stride=2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.act3 = act()
        self.fc2 = nn.Linear(120, 84)
        self.act4 = act()
        self.fc3 = nn.Linear(84, num_classes)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for ReLU (arXiv:1502.01852), Xavier's for the saturating ones (AISTATS 2010)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if self.activation == "relu":
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=28, most=31, layer="fc1")
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        x = self.flatten(x)
        x = self.act3(self.fc1(x))
        x = self.act4(self.fc2(x))
        return self.fc3(x)


class ScaledTanh(nn.Module):
    """1.7159 · tanh(2x/3), the paper's: passes through (1, 1) and (-1, -1), where it bends the most."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """The sum of each 2×2 window, times a trainable weight per channel, plus a trainable bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        window_sums = F.avg_pool2d(x, 2, divisor_override=1)
        return window_sums * self.weight[:, None, None] + self.bias[:, None, None]


# Which of the six maps of S2 each of the sixteen maps of C3 sees (the paper's table I): different maps are
# forced to find different features, and the layer has 1,516 weights in place of 2,416.
C3_SEES = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)


class SparseConv2d(nn.Module):
    """A convolution in which each output map sees only some input maps.

    sees: for each output map, the input maps it sees. ``weight`` holds one kernel per connection, so the
    absent ones are neither stored nor trained.
    """

    def __init__(self, in_channels: int, sees: tuple[tuple[int, ...], ...], kernel_size: int):
        super().__init__()
        connections = [(k, c) for k, inputs in enumerate(sees) for c in inputs]
        self.dense_shape = (len(sees), in_channels, kernel_size, kernel_size)
        self.fan_in = [len(inputs) * kernel_size**2 for inputs in sees]
        self.weight = nn.Parameter(torch.empty(len(connections), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(sees)))
        outputs, inputs = zip(*connections)
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)
        self.register_buffer("inputs", torch.tensor(inputs), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dense = self.weight.new_zeros(self.dense_shape)
        dense = dense.index_put((self.outputs, self.inputs), self.weight)
        return F.conv2d(x, dense, self.bias)


# The output layer's codes: each digit drawn on a 7×12 grid, so that look-alikes have near codes.
DIGITS = """
 .#####. ...#... .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
 ##...## ..##... ##...## ##...## ...###. ##..... .##.... ##...## ##...## ##...##
 ##...## .###... .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
 ##...## ...#... .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
 ##...## ...#... ....##. .....## ##..##. ######. ##.###. ....##. .##.##. ##...##
 ##...## ...#... ...##.. ..####. ##..##. .....## ###..## ...##.. ..###.. .######
 ##...## ...#... ..##... .....## ####### .....## ##...## ...##.. .##.##. ..##.##
 ##...## ...#... .##.... .....## ....##. .....## ##...## ..##... ##...## .....##
 ##...## ...#... ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
 ##...## ...#... ##..... ##...## ....##. ##...## ##...## ..##... ##...## ....##.
 .#####. .#####. ####### .#####. ....##. .#####. .#####. ..##... .#####. .####..
 ....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


def digit_codes() -> list[list[float]]:
    """Ten codes of 84 numbers, +1 where the drawing is inked and -1 elsewhere."""
    rows = [line.split() for line in DIGITS.strip().splitlines()]
    return [[1.0 if cell == "#" else -1.0 for row in rows for cell in row[digit]] for digit in range(10)]


class CodeDistance(nn.Module):
    """Minus the squared distance of the features to each class's fixed code (the paper's RBF units).

    The paper minimises the distance; with the sign turned the largest output wins, as everywhere else, and
    cross-entropy on it is the paper's discriminative criterion. Codes for more than ten classes are random
    ±1.
    """

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        codes = digit_codes()
        draw = random.Random(1998)
        while len(codes) < num_classes:
            codes.append([draw.choice((-1.0, 1.0)) for _ in range(features)])
        self.register_buffer("codes", torch.tensor(codes[:num_classes]))

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - self.codes).square().sum(2)


class LeNet5Original(nn.Module):
    """The network of the 1998 paper, layer names and all: C1 S2 C3 S4 C5 F6 and the output codes.

    60,000 trainable parameters: C1 156, S2 12, C3 1,516, S4 32, C5 48,120, F6 10,164.
    Input (N, 1, 32, 32) with the background at -0.1 and the ink at 1.175, output (N, num_classes), largest
    wins.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 5)
        self.s2 = Subsampling(6)
        self.c3 = SparseConv2d(6, C3_SEES, 5)
        self.s4 = Subsampling(16)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.flatten = nn.Flatten()
        self.f6 = nn.Linear(120, 84)
        self.output = CodeDistance(84, num_classes)
        self.squash = ScaledTanh()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within ±2.4 / fan-in, the paper's rule, which keeps the tanh in its linear range."""
        for module in self.modules():
            if isinstance(module, SparseConv2d):
                kernels = module.weight.split([fan_in // 25 for fan_in in module.fan_in])
                for kernel, bias, fan_in in zip(kernels, module.bias, module.fan_in):
                    kernel.uniform_(-2.4 / fan_in, 2.4 / fan_in)
                    bias.uniform_(-2.4 / fan_in, 2.4 / fan_in)
            elif isinstance(module, nn.Conv2d | nn.Linear | Subsampling):
                fan_in = 4 if isinstance(module, Subsampling) else math.prod(module.weight.shape[1:])
                module.weight.uniform_(-2.4 / fan_in, 2.4 / fan_in)
                module.bias.uniform_(-2.4 / fan_in, 2.4 / fan_in)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, least=32, most=35, layer="f6")
        x = self.squash(self.c1(x))
        x = self.squash(self.s2(x))
        x = self.squash(self.c3(x))
        x = self.squash(self.s4(x))
        x = self.squash(self.c5(x))
        x = self.squash(self.f6(self.flatten(x)))
        return self.output(x)


@register_model(input_size=(1, 28, 28))
def lenet5(num_classes: int = 10, **options) -> LeNet5:
    """LeNet-5 as taught: 28×28, sigmoid and average pooling by default; 61,706 parameters."""
    return LeNet5(num_classes, **options)


@register_model(input_size=(1, 28, 28))
def lenet5_relu(num_classes: int = 10, **options) -> LeNet5:
    """LeNet-5 in modern dress: 28×28, ReLU and max pooling; 61,706 parameters."""
    return LeNet5(num_classes, **{"activation": "relu", "pool": "max", **options})


@register_model(input_size=(1, 32, 32))
def lenet5_1998(num_classes: int = 10, **options) -> LeNet5Original:
    """LeNet-5 of the paper: 32×32; 60,000 parameters."""
    return LeNet5Original(num_classes, **options)


def _choice(argument: str, given: str, allowed: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if given not in allowed:
        raise ValueError(f"LeNet-5: {argument} must be one of {', '.join(allowed)}, got {given!r}")
    return allowed[given]
