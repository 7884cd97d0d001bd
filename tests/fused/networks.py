"""Small networks that the tests of the rewriting share, and what they look at."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnets
from fastnets.fused.swap import Rewritten
from fastnets.fused.variants import variants_in_force
from tests.accuracy import assert_close_to


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode, with batch norm statistics and weights as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kinds(model: nn.Module) -> list[str]:
    """The kinds of all fused calls, sorted, as ``explain`` reports them."""
    return sorted(row.kind for row in fastnets.explain(model).rows if row.fused)


def rewritten(model: nn.Module) -> list[str]:
    """Paths of the containers that have a generated class."""
    return [name for name, module in model.named_modules() if isinstance(module, Rewritten)]


def graphs(model: nn.Module) -> str:
    """The source of all graphs that would run in evaluation mode."""
    return "\n".join(
        v.source for m in model.modules() if isinstance(m, Rewritten) for v in variants_in_force(m)
    )


def assert_same_answers(stock: nn.Module, fast: nn.Module, *inputs: object, ratio: float = 2.0) -> None:
    """Outputs within the error ratio of stock's, of the same shape, dtype and strides; inputs left alike."""
    exact = fastnets.restore(copy.deepcopy(stock)).double()
    ours_in, stock_in, exact_in = (copy.deepcopy(inputs) for _ in range(3))
    exact_in = tuple(torch.utils._pytree.tree_map(lambda x: x.double(), exact_in))
    with torch.no_grad():
        results = (exact(*exact_in), stock(*stock_in), fast(*ours_in))
    leaves = [torch.utils._pytree.tree_leaves(result) for result in results]
    assert len(leaves[1]) == len(leaves[2])
    for e, s, f in zip(*leaves):
        if s.is_floating_point():
            assert_close_to(e, s, f, ratio)
        else:
            assert torch.equal(f, s)
        assert _layout(f) == _layout(s), f"strides {f.stride()}, stock has {s.stride()}"
    for s, f in zip(*map(torch.utils._pytree.tree_leaves, (stock_in, ours_in))):
        assert torch.allclose(s, f, atol=1e-5), "the input was written to in another way than stock does"


def _layout(x: Tensor) -> list[int]:
    """The strides that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1] if x.numel() else []


class Residual(nn.Module):
    """Two convolutions around one in-place ReLU, and a shortcut that may be a Sequential."""

    def __init__(self, channels: int = 8, shortcut: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


class Classifier(nn.Module):
    """A stem, two residual blocks, a pool and a linear layer; ``view`` where stock code likes to flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Residual(), Residual(shortcut=True))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.layer1(self.stem(x)))
        return self.fc(x.view(x.size(0), -1))


class Composed(nn.Module):
    """``step(self, x)`` over a convolution, two batch norms and activations: one network per pattern."""

    def __init__(self, step, pair: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.silu = nn.SiLU()
        self.leaky = nn.LeakyReLU(0.2)
        self.gelu = nn.GELU(approximate="tanh")
        self.identity = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        if pair:
            self.pair = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


# pattern -> what each fused call must hold
PATTERNS = {
    "conv bn": (lambda m, x: m.bn(m.conv(x)), ["conv+bn"]),
    "conv bn relu": (lambda m, x: m.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "conv relu": (lambda m, x: m.relu(m.conv(x)), ["conv+relu"]),
    "conv alone": (lambda m, x: m.conv(x), ["conv"]),
    "F.relu": (lambda m, x: F.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "F.relu in place": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), ["conv+bn+relu"]),
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "x.relu()": (lambda m, x: m.bn(m.conv(x)).relu(), ["conv+bn+relu"]),
    "x.relu_()": (lambda m, x: m.bn(m.conv(x)).relu_(), ["conv+bn+relu"]),
    "F.silu": (lambda m, x: F.silu(m.bn(m.conv(x))), ["conv+bn+silu"]),
    "F.hardswish": (lambda m, x: F.hardswish(m.bn(m.conv(x))), ["conv+bn+hardswish"]),
    "F.hardtanh(0, 6)": (lambda m, x: F.hardtanh(m.bn(m.conv(x)), 0.0, 6.0), ["conv+bn+relu6"]),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.bn(m.conv(x)), 0.3), ["conv+bn+leaky_relu"]),
    "F.gelu(tanh)": (lambda m, x: F.gelu(m.bn(m.conv(x)), approximate="tanh"), ["conv+bn+gelu_tanh"]),
    "F.gelu": (lambda m, x: F.gelu(m.bn(m.conv(x))), ["conv+bn+gelu"]),
    "F.elu has no fused form": (lambda m, x: F.elu(m.bn(m.conv(x))), ["conv+bn"]),
    "modules": (lambda m, x: m.gelu(m.bn2(m.conv2(m.leaky(m.bn(m.conv(x)))))),
                ["conv+bn+gelu_tanh", "conv+bn+leaky_relu"]),
    "+ then relu": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), ["conv+bn+add+relu"]),
    "x + then relu": (lambda m, x: m.relu(x + m.bn(m.conv(x))), ["conv+bn+add+relu"]),
    "torch.add": (lambda m, x: F.relu(torch.add(m.bn(m.conv(x)), x)), ["conv+bn+add+relu"]),
    "torch.add alpha=1": (lambda m, x: F.relu(torch.add(x, m.bn(m.conv(x)), alpha=1)), ["conv+bn+add+relu"]),
    "torch.add alpha=2": (lambda m, x: F.relu(torch.add(m.bn(m.conv(x)), x, alpha=2)), ["conv+bn"]),
    "Tensor.add": (lambda m, x: m.bn(m.conv(x)).add(x).relu(), ["conv+bn+add+relu"]),
    "Tensor.add_": (lambda m, x: m.bn(m.conv(x)).add_(x).relu(), ["conv+bn+add+relu"]),
    "scalar add": (lambda m, x: m.relu(m.bn(m.conv(x)) + 1.0), ["conv+bn"]),
    "relu then add": (lambda m, x: m.relu(m.bn(m.conv(x))) + x, ["conv+bn+relu"]),
    "add without relu": (lambda m, x: m.conv(x) + x, ["conv+add"]),
    "itself twice": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), ["conv+bn"]),
    "two branches": (lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))),
                     ["conv+bn", "conv+bn+add+relu"]),
    "two readers of conv": (lambda m, x: (lambda y: m.bn(y).relu() * y)(m.conv(x)), ["bn+relu", "conv"]),
    "two readers of bn": (lambda m, x: (lambda y: y.relu() * y)(m.bn(m.conv(x))), ["conv+bn"]),
    "bn add relu": (lambda m, x: m.relu(m.bn(x) + x), ["bn+add+relu"]),
    "bn relu conv": (lambda m, x: m.conv(m.silu(m.bn(x))), ["bn+silu", "conv"]),
    "bn alone": (lambda m, x: F.max_pool2d(m.bn(F.max_pool2d(m.conv(x), 2)), 2), ["conv"]),
    "identity between": (lambda m, x: m.relu(m.identity(m.bn(m.identity(m.conv(x))))), ["conv+bn+relu"]),
    "dropout between": (lambda m, x: m.relu(m.dropout(m.bn(m.conv(x))) + x), ["conv+bn+add+relu"]),
    "shared": (lambda m, x: m.bn(m.conv(m.relu(m.bn(m.conv(x))))), ["conv+bn+relu"]),
    "sequential before add": (lambda m, x: m.pair(x) + x, ["conv+bn+add"]),
    "two sequentials": (lambda m, x: m.relu(m.pair(m.pair(x)) + m.conv(x)), ["conv+add+relu", "conv+bn"]),
}  # fmt: skip
