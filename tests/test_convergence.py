"""Fifty steps from one seed: stock and fused networks learn alike, judged by a float64 run.

The learning rates are small. A network with ReLUs and batch norms multiplies rounding errors at every step,
and at larger rates stock in float32 is itself as far from float64 as two seeds are from each other; nothing
could be told from such a run.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnets
from fastnets.models import create_model
from tests.accuracy import assert_close_to

STEPS, CLASSES = 50, 10
WAYS = [("auto", "auto"), ("reference", "auto"), ("reference", "less")]


def batches(N: int, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten random pictures under noise, which can be told apart."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(CLASSES, *shape, generator=generator)
    for _ in range(STEPS):
        targets = torch.randint(CLASSES, (N,), generator=generator)
        yield pictures[targets] + torch.randn(N, *shape, generator=generator), targets


def train(model: nn.Module, N: int, shape: tuple[int, ...], lr: float, last: bool = False) -> Tensor:
    """The losses of 50 steps of SGD with momentum; ``last``: images channels-last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    dtype = next(model.parameters()).dtype
    losses = []
    for x, targets in batches(N, shape):
        x = x.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def learned(model: nn.Module, start: nn.Module) -> Tensor:
    """How far every parameter has gone."""
    pairs = zip(model.parameters(), start.parameters())
    return torch.cat([(p.detach() - s.detach().to(p.dtype)).flatten() for p, s in pairs])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


CASES = [
    pytest.param("lenet5", 32, (1, 28, 28), 0.1, id="lenet5"),
    pytest.param("lenet5_relu", 32, (1, 28, 28), 0.002, id="lenet5_relu"),
    pytest.param("resnet18", 16, (3, 32, 32), 3e-6, id="resnet18", marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", 16, (3, 32, 32), 1e-7, id="mobilenet_v2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, N, shape, lr", CASES)
def test_stock_and_fused_learn_alike(name, N, shape, lr):
    torch.manual_seed(0)
    start = without_dropout(create_model(name, num_classes=CLASSES))
    exact, stock = copy.deepcopy(start).double(), copy.deepcopy(start)
    exact_losses, stock_losses = (train(model, N, shape, lr) for model in (exact, stock))
    # oneDNN rounds differently in channels-last, the layout that fused networks work in.
    last = copy.deepcopy(start).to(memory_format=torch.channels_last)
    train(last, N, shape, lr, last=True)
    reference = learned(exact, start)
    judged = max((learned(model, start) for model in (stock, last)), key=lambda p: (p - reference).norm())
    for backend, save in WAYS:
        fast = fastnets.optimize(start, backend=backend, save=save)
        losses = train(fast, N, shape, lr)
        assert ((losses - stock_losses) / stock_losses).abs().max() <= 1e-3, (backend, save)
        assert_close_to(reference, judged, learned(fast, start), ratio=3)
        assert float(losses[-10:].mean()) == pytest.approx(float(exact_losses[-10:].mean()), rel=1e-3)


def test_lenet_learns():
    """The pictures can be told apart, and the losses above are those of networks that do."""
    torch.manual_seed(0)
    losses = train(fastnets.optimize(create_model("lenet5_relu").train()), 32, (1, 28, 28), 0.002)
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()
