"""BN and activation as the prologue of a 1×1 convolution: the op, and the call of rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.preactivation import bn_act_conv_bn_act
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled
from tests.kernels.conv_cases import in_layout

NAMES = ("x_mean", "x_var", "x_bn_weight", "x_bn_bias")
OUTER = ("running_mean", "running_var", "bn_weight", "bn_bias")


def arguments(C=40, K=24, *, outer=True, residual=False, dtype=torch.float32, stride=1, layout="last"):
    x = in_layout(torch.randn(2, C, 6, 5), layout)
    tensors = {"x": x, **{name: torch.randn(C) for name in NAMES}, "weight": torch.randn(K, C, 1, 1) / C**0.5}
    tensors["x_var"] = torch.rand(C) + 0.5
    if outer:
        tensors |= {name: torch.randn(K) for name in OUTER}
        tensors["running_var"] = torch.rand(K) + 0.5
    if residual:
        tensors["residual"] = torch.randn(2, K, -(-6 // stride), -(-5 // stride))
    return {name: t.to(dtype) for name, t in tensors.items()}


def stock(tensors, x_activation="relu", activation="relu", stride=1, eps=1e-5, dtype=None):
    t = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    y = F.batch_norm(t["x"], *(t[name] for name in NAMES), eps=eps)
    y = F.conv2d(ACTIVATIONS[x_activation].forward(y, 0.01), t["weight"], None, stride)
    if "running_mean" in t:
        y = F.batch_norm(y, *(t[name] for name in OUTER), eps=eps)
    y = y + t["residual"] if "residual" in t else y
    return ACTIVATIONS[activation].forward(y, 0.01)


@pytest.mark.parametrize(
    "options, activations, dtype",
    [
        ({}, ("relu", "relu"), torch.float32),
        ({"outer": False, "residual": True, "layout": "sliced"}, ("silu", "none"), torch.float32),
        ({"C": 64, "stride": 2}, ("relu", "relu"), torch.float16),
        ({"residual": True}, ("relu6", "relu"), torch.bfloat16),
    ],
)
def test_as_accurate_as_stock(lane, options, activations, dtype):
    stride = options.get("stride", 1)
    tensors = arguments(**options, dtype=dtype)
    given = {name: lane.put(t) for name, t in tensors.items()}
    with lane, torch.no_grad():
        y = bn_act_conv_bn_act(
            **given, x_activation=activations[0], activation=activations[1], stride=(stride, stride),
            backend="triton",
        )  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = stock(tensors, *activations, stride, dtype=torch.float64)
    assert_close_to(exact, stock(tensors, *activations, stride), y.cpu())


def test_exact_on_integers(lane):
    C, K = 32, 16
    x, weight = integers(2, C, 4, 3), integers(K, C, 1, 1)
    x_mean, x_bn_bias = integers(C), integers(C)
    x_var = torch.full((C,), 0.25)  # 1/sqrt(0.25 + 0) = 2
    vectors = {"x_mean": x_mean, "x_var": x_var, "x_bn_weight": torch.ones(C), "x_bn_bias": x_bn_bias}
    given = {name: lane.put(t) for name, t in {"x": x, **vectors, "weight": weight}.items()}
    with lane, torch.no_grad():
        y = bn_act_conv_bn_act(**given, x_eps=0.0, backend="triton")
    v = ((x - x_mean.view(-1, 1, 1)) * 2 + x_bn_bias.view(-1, 1, 1)).relu()
    assert_exact(F.conv2d(v, weight), y.cpu())


@pytest.mark.parametrize("name", ["bn_act_conv_bn_act", "bn_act_conv_bn_act_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    t = arguments(C=5, K=3)
    if name == "bn_act_conv_bn_act":
        t["x"].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    tensors = (t["x"], t["weight"], None, *(t[n] for n in OUTER), None, *(t[n] for n in NAMES))
    torch.library.opcheck(op, (*tensors, 1e-5, "relu", 0.01, (1, 1), 1e-5, "relu", 0.01, "auto"))


def test_gradient_is_that_of_the_parts():
    tensors = arguments(C=4, K=3, dtype=torch.float64)
    statistics = ("x_mean", "x_var", "running_mean", "running_var")
    leaves = {name: t.clone().requires_grad_(name not in statistics) for name, t in tensors.items()}
    assert torch.autograd.gradcheck(
        lambda *t: bn_act_conv_bn_act(**dict(zip(leaves, t)), x_activation="silu"),
        list(leaves.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.randn(24, 40, 3, 3)}, "3×3, only 1×1 is served"),
        ({"x_mean": torch.randn(7)}, r"x_mean has shape \(7,\)"),
        ({"running_var": torch.randn(7)}, r"running_var has shape \(7,\)"),
        ({"x_activation": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        bn_act_conv_bn_act(**{**arguments(), **change})


class Preactivated(nn.Module):
    """The layer of DenseNet."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv1(self.relu(self.norm1(x)))
        return self.conv2(self.relu(self.norm2(x)))


def test_a_network_runs_and_reports_it():
    stock = settled(Preactivated())
    fast = fastnets.optimize(stock)
    assert "call_preactivated_conv" in graphs(fast)
    assert kinds(fast) == ["bn+relu+conv+bn+relu", "conv"]
    assert_same_answers(stock, fast, images(2, 16, 6, 5))
    stock.train(), fast.train()
    losses = []
    for model in (stock, fast):
        loss = model(images(2, 16, 6, 5)).square().mean()
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(stock.norm1.weight.grad, fast.norm1.weight.grad)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_a_network_runs_it_by_triton(lane):
    stock = settled(Preactivated())
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(2, 16, 6, 5)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_hooks_are_honoured_and_passes_saved():
    stock = settled(Preactivated()).to("meta")
    fast = fastnets.optimize(stock)
    x = torch.empty(32, 16, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.backend("triton"):
        counted = count(fast, x)
        assert set(counted.by_op) == {"triton.conv_kernel"}
        assert counted.launches == 2
        assert list(counted.by_layer) == ["conv1", "conv2"]
        seen = []
        fast.norm1.register_forward_hook(lambda *a: seen.append(1))
        assert count(fast, x).launches > 2
    assert seen
