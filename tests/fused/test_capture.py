"""What can be captured, what cannot and why, and that trying leaves the module as it was."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnets
from fastnets.fused.capture import CaptureError, capture
from tests.fused.networks import assert_same_answers, images, kinds, rewritten, settled


class _Forward(nn.Module):
    """A convolution, a batch norm, some state, and the given ``forward``."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.count = 0
        self.features = []
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def _no_grad(m, x):
    with torch.no_grad():
        return m.conv(x)


def _autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.conv(x)


def _control_flow(m, x):
    y = m.conv(x)
    return y if y.sum() > 0 else -y


def _counts(m, x):
    m.count += 1
    return m.conv(x)


def _remembers(m, x):
    m.features.append(x)
    return m.conv(x)


def _writes_buffer(m, x):
    m.shift = m.shift + 1
    return m.conv(x) + m.shift


def _python_random(m, x):
    return m.conv(x) * (2.0 if random.random() > 2 else 1.0)


def _intermediate_type(m, x):
    y = m.conv(x)
    return y[0] if isinstance(y, tuple) else y


class _Bag(dict):
    pass


REFUSED = {
    "control flow": (_control_flow, "control flow"),
    "no_grad inside": (_no_grad, "grad mode"),
    "autocast inside": (_autocast, "autocast"),
    "checkpoint": (lambda m, x: checkpoint(m.conv, x, use_reentrant=False), "checkpointing"),
    "autograd function": (lambda m, x: _Square.apply(m.conv(x)), "autograd function|type of an"),
    "counts calls": (_counts, "count"),
    "remembers inputs": (_remembers, "features"),
    "writes a buffer": (_writes_buffer, "buffer"),
    "python random": (_python_random, "random"),
    "torch random": (lambda m, x: m.conv(x) * torch.rand(1), "tensors of its own"),
    "makes a tensor": (lambda m, x: m.conv(x) + torch.ones(4, 1, 1), "tensors of its own"),
    "type of an intermediate": (_intermediate_type, "type of an intermediate"),
    "own dict class": (lambda m, x: _Bag(out=m.conv(x)), "_Bag"),
    "looks at strides": (lambda m, x: m.conv(x).as_strided((1,), (1,)), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_left_as_it_was(name):
    body, reason = REFUSED[name]
    model = settled(_Forward(body))
    before = dict(model.__dict__)
    if reason is not None:
        with pytest.raises(CaptureError, match=reason):
            capture(model, training=False, inline=None)
    assert dict(model.__dict__) == before
    assert (model.count, model.features) == (0, [])
    fast = fastnets.optimize(model)
    assert kinds(fast) == []
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(images(1, 3, 6, 6))
        torch.manual_seed(1)
        got = fast(images(1, 3, 6, 6))
    assert type(got) is type(expected)
    for e, g in zip(*(torch.utils._pytree.tree_leaves(r) for r in (expected, got))):
        torch.testing.assert_close(g, e)


def test_python_random_numbers_are_not_consumed():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    fastnets.optimize(_Forward(_python_random))
    assert random.random() == expected


def test_parameters_and_buffers_are_read_at_every_call():
    stock = settled(_Forward(lambda m, x: F.relu(m.bn(m.conv(x)) * m.gain + m.shift)))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+bn"]
    for model in (stock, fast):
        with torch.no_grad():
            model.gain.mul_(3)
            model.shift.add_(1)
    assert_same_answers(stock, fast, images(2, 3, 6, 6))


def test_children_of_a_refused_container_are_rewritten():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            y = self.body(x)
            return y if y.sum() > 0 else -y

    stock = settled(Net())
    fast = fastnets.optimize(stock)
    assert rewritten(fast) == ["", "body"]  # the root only gives results stock's layout
    assert kinds(fast) == ["conv+bn+relu"]
    assert_same_answers(stock, fast, images(2, 3, 6, 6))


class _Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, scale: float = 1.0, flat: bool = False):
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        if flat:
            y = y.view(-1)
        return F.relu(y) * scale


def test_arguments_with_defaults():
    stock = settled(_Options())
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+bn+relu"]
    x = images(2, 3, 6, 6)
    calls = [((x,), {}), ((x, x), {}), ((x,), {"residual": x, "scale": 2.0}), ((x,), {"flat": True})]
    calls += [((), {"x": x}), ((x, None), {"scale": 1.0, "flat": False})]
    with torch.no_grad():
        for args, kwargs in calls:
            torch.testing.assert_close(fast(*args, **kwargs), stock(*args, **kwargs), rtol=1e-4, atol=1e-5)
        with pytest.raises(TypeError):
            fast(x, x, 2.0)
        with pytest.raises(TypeError):
            fast()


class _TensorOrList(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, features):
        if isinstance(features, Tensor):
            features = [features]
        return F.relu(self.bn(self.conv(torch.cat(features, 1))))


def test_forward_that_asks_for_the_type_of_its_input():
    stock = settled(_TensorOrList())
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+bn+relu"]
    x = images(2, 6, 5, 5)
    with torch.no_grad():
        for features in (x, [x], [x[:, :2], x[:, 2:]], (x[:, :2], x[:, 2:])):
            torch.testing.assert_close(fast(features), stock(features), rtol=1e-4, atol=1e-5)


class _DependsOnTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.aux = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        y = F.dropout(y, 0.5, training=self.training)
        if self.training:
            return y, self.aux(y)
        return y


@pytest.mark.parametrize("training_at_optimize", [False, True])
def test_both_sides_of_self_training(training_at_optimize):
    stock = settled(_DependsOnTraining()).train(training_at_optimize)
    fast = fastnets.optimize(stock)
    x = images(2, 3, 6, 6)
    with torch.no_grad():
        for training in (False, True, False):
            stock.train(training)
            fast.train(training)
            torch.manual_seed(2)
            expected = stock(x)
            torch.manual_seed(2)
            got = fast(x)
            assert type(got) is type(expected)
            for e, g in zip(*(torch.utils._pytree.tree_leaves(r) for r in (expected, got))):
                torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_monte_carlo_dropout_keeps_dropping():
    """One dropout put into training mode in an evaluating network: not looked past."""
    stock = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+bn+relu"]
    for model in (stock, fast):
        model[2].train()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = stock(images(1, 3, 8, 8))
        torch.manual_seed(0)
        got = fast(images(1, 3, 8, 8))
    assert (expected == 0).sum() > 0.6 * expected.numel()
    assert torch.equal(got == 0, expected == 0) or (got == 0).sum() > 0.6 * got.numel()
