"""A local response norm that pools its own result, as an op and in rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.fused.response_norm_pool import local_response_norm_max_pool
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact
from tests.fused.networks import graphs, kinds

POOL = {"kernel_size": (3, 3), "stride": (2, 2)}


class Stem(nn.Module):
    def __init__(self, **pooling):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5, alpha=0.1, k=2.0)
        self.pool = nn.MaxPool2d(3, 2, **pooling)

    def forward(self, x):
        return self.pool(self.norm(self.conv(x).relu()))


def test_ops_are_registered_as_pytorch_asks():
    x = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    options = (5, 1e-2, 0.75, 1.0, True, (3, 3), (2, 2), (0, 0), (1, 1), False, "auto")
    ops = torch.ops.fastnets
    torch.library.opcheck(ops.local_response_norm_max_pool.default, (x.clone().requires_grad_(), *options))
    torch.library.opcheck(ops.local_response_norm_max_pool_inference.default, (x, *options))


def test_gradient_is_that_of_the_parts():
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)

    def function(x):
        return local_response_norm_max_pool(x, 3, 0.5, 0.6, 2.0, **POOL, relu=True, backend="reference")

    assert torch.autograd.gradcheck(function, (x,))
    stock = F.max_pool2d(F.local_response_norm(x.relu(), 3, 0.5, 0.6, 2.0), 3, 2)
    torch.testing.assert_close(function(x), stock, check_stride=False)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("pooling", [{}, {"padding": 1, "ceil_mode": True}])
def test_one_launch_serves_both(lane, pooling):
    stock = Stem(**pooling).eval()
    x = torch.randn(2, 3, 8, 7).to(memory_format=torch.channels_last)
    fast = fastnets.optimize(copy.deepcopy(stock), backend="triton").to(lane.device)
    assert kinds(fast) == ["conv+relu", "response norm+pool"]
    seen = []
    with lane, torch.no_grad(), observe_launches(seen.append):
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())
    assert len(seen) == 2
    assert seen[1].name == "response_norm_pool_kernel"


def test_cpu_hooks_gradients_and_contiguous_images():
    stock = Stem().eval()
    fast, x = fastnets.optimize(stock), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))
    grads = []
    for model in (stock, fast):
        model(x).square().sum().backward()
        grads.append(model.conv.weight.grad)
    torch.testing.assert_close(*grads)
    contiguous = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        expected = F.max_pool2d(F.local_response_norm(contiguous, 3), 3, 2)
        assert_exact(expected, local_response_norm_max_pool(contiguous, 3, **POOL, backend="reference"))
    seen = []
    fast.pool.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fast(x)
    assert seen == [1]
    meta = copy.deepcopy(fast).to("meta")
    with dispatch.assume_device_type("cuda"):
        ops = count(meta, torch.empty(4, 3, 9, 9, device="meta")).by_op
    assert "triton.response_norm_kernel" in ops


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(4, 2), nn.AvgPool2d(3, 2), nn.MaxPool2d(3, return_indices=True)]
)
def test_other_poolings_stay_apart(pool):
    fast = fastnets.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), pool).eval())
    assert "call_response_norm_pool" not in graphs(fast)


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (torch.randn(6, 5, 5), {}, ValueError, r"must be \[N, C, H, W\], got 3"),
        (torch.randn(1, 6, 2, 2), {}, ValueError, "does not fit 2 pixels"),
        (torch.randn(1, 6, 5, 5).int(), {}, TypeError, "floating"),
        (torch.randn(1, 6, 5, 5), {"backend": "tritn"}, ValueError, "did you mean 'triton'"),
    ],
)
def test_wrong_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=message):
        local_response_norm_max_pool(x, 5, **POOL, **options)
