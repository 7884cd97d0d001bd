"""Local response normalization as an op and a module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets import fused
from fastnets.fused.response_norm import call_local_response_norm, local_response_norm
from tests.accuracy import assert_close_to, assert_exact


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_gradient_formula(size, relu):
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        return local_response_norm(x, size, 0.5, 0.6, 2.0, relu=relu, backend="reference")

    assert torch.autograd.gradcheck(function, (x,))
    stock = F.local_response_norm(x.relu() if relu else x, size, 0.5, 0.6, 2.0)
    torch.testing.assert_close(function(x), stock)


@pytest.mark.lanes("interpreter", "gpu")
def test_triton_serves_the_module(lane):
    x, dy = (torch.randn(2, 12, 5, 5).to(memory_format=torch.channels_last) for _ in range(2))
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = x.detach().to(dtype).clone().requires_grad_()
        y = nn.LocalResponseNorm(5, 0.3, k=2.0)(leaf.relu())
        y.backward(dy.to(dtype))
        results.append((y.detach(), leaf.grad))
    leaf = lane.put(x).clone().requires_grad_()
    module = fused.LocalResponseNorm(5, 0.3, k=2.0, relu=True, backend="triton")
    with lane:
        y = module(leaf)
        y.backward(lane.put(dy))
    for reference, same, value, ratio in zip(*results, (y.detach(), leaf.grad), (2, 3)):
        assert_close_to(reference, same, value, ratio)


def test_ops_are_registered_as_pytorch_asks():
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    options = (5, 1e-2, 0.75, 1.0, True, "auto")
    ops = torch.ops.fastnets
    torch.library.opcheck(ops.local_response_norm.default, (x.clone().requires_grad_(), *options))
    torch.library.opcheck(ops.local_response_norm_inference.default, (x, *options))
    torch.library.opcheck(ops.local_response_norm_backward.default, (x, x, *options))


def test_stock_on_the_cpu_and_under_hooks():
    x, norm, seen = torch.randn(2, 6, 4, 4), nn.LocalResponseNorm(3, 0.1), []
    assert_exact(norm(x), local_response_norm(x, 3, 0.1))
    assert_exact(norm(x.relu()), fused.LocalResponseNorm.from_stock(norm, relu=True)(x))
    norm.register_forward_hook(lambda *_: seen.append(1))
    assert_exact(F.local_response_norm(x, 3, 0.1), call_local_response_norm(norm, x, "triton"))
    assert seen == [1]


def maps(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 96, 5, 5), (3, 6, 4, 4), (2, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
def test_channels_last_maps_on_the_cpu_are_as_accurate_as_stock(shape, size):
    x, norm = maps(*shape) * 3, nn.LocalResponseNorm(size, 0.3, k=2.0)
    with torch.no_grad():
        y = call_local_response_norm(norm, x)
        again = fused.LocalResponseNorm.from_stock(norm, relu=True)(x)
        stock = norm(x)
    assert y.stride() == x.stride()
    assert_close_to(norm(x.double()), stock, y)
    assert_close_to(norm(x.double().relu()), norm(x.relu()), again)
    if size > 1:
        assert not torch.equal(y, stock)  # by a way of its own


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, 1e30])
def test_channels_last_maps_spread_no_further_than_stocks(value):
    x, norm = maps(2, 12, 3, 3), nn.LocalResponseNorm(5, 0.3, k=0.0)
    x[0, 5] = value
    x[1, 3:8] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(call_local_response_norm(norm, x), norm(x), equal_nan=True)


def test_channels_last_maps_learn_as_stock():
    x, norm = maps(2, 6, 4, 4).requires_grad_(), nn.LocalResponseNorm(3, 0.1)
    assert_exact(norm(x), call_local_response_norm(norm, x))
    (ours,) = torch.autograd.grad(call_local_response_norm(norm, x).sum(), x)
    assert_exact(torch.autograd.grad(norm(x).sum(), x)[0], ours)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: local_response_norm(x[0, 0], 5, backend="reference"), ValueError, "3 to 5 dimensions"),
        (lambda x: local_response_norm(x, 0, backend="reference"), ValueError, "size=0"),
        (lambda x: local_response_norm(x.int(), 5, backend="reference"), TypeError, "floating"),
        (lambda x: fused.LocalResponseNorm.from_stock(nn.ReLU()), TypeError, "got ReLU"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 6, 4, 4))
