"""A depthwise convolution that normalises its own result, as an op and in rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import compare
from fastnets.fused import depthwise_layer_norm, dispatch
from fastnets.kernels.launch import observe_launches
from fastnets.models import create_model
from fastnets.models.convnext import Block
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, images, kinds


def operands(C=6, dtype=torch.float32):
    t = {"x": torch.randn(2, C, 5, 4), "weight": torch.randn(C, 1, 3, 3)}
    t |= {name: torch.randn(C) for name in ("bias", "norm_weight", "norm_bias")}
    return {name: tensor.to(dtype) for name, tensor in t.items()}


def stock(x, weight, bias, norm_weight, norm_bias):
    z = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    return F.layer_norm(z.permute(0, 2, 3, 1), z.shape[1:2], norm_weight, norm_bias, 1e-6)


def block(channels=16):
    module = Block(channels, 0.0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("name", ["depthwise_layer_norm", "depthwise_layer_norm_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    t = operands()
    if name == "depthwise_layer_norm":
        t["x"].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    torch.library.opcheck(op, (*t.values(), (1, 1), (1, 1), (1, 1), 1e-6, "auto"))


def test_gradient_is_that_of_the_parts():
    leaves = {name: t.requires_grad_() for name, t in operands(4, torch.float64).items()}
    function = lambda *t: depthwise_layer_norm(*t, padding=(1, 1), backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)
    torch.testing.assert_close(function(*leaves.values()), stock(**leaves), check_stride=False)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_reference_is_stock(multiplier):
    t = operands()
    t = {name: v if name == "x" else v.repeat(multiplier, *[1] * (v.dim() - 1)) for name, v in t.items()}
    with torch.no_grad():
        torch.testing.assert_close(depthwise_layer_norm(**t, padding=(1, 1)), stock(**t), check_stride=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.randn(6, 2, 3, 3)}, r"a depthwise filter is \[C, 1, R, S\]"),
        ({"norm_bias": torch.randn(4)}, r"norm_bias has shape \(4,\), expected \(6,\)"),
        ({"x": torch.randn(2, 6, 2, 2)}, "smaller than the filter"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        depthwise_layer_norm(**{**operands(), **change})


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
def test_a_block_of_convnext_is_three_launches(lane):
    stock, x, seen = block(), images(2, 16, 6, 5), []
    fast = fastnets.optimize(copy.deepcopy(stock), backend="triton").to(lane.device)
    assert kinds(fast) == ["conv+layer_norm", "linear+gelu", "linear+scale+add"]
    x = x.to(memory_format=torch.channels_last)
    with lane, torch.no_grad(), observe_launches(seen.append):
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())
    assert seen[0].name == "depthwise_norm_kernel"
    assert len(seen) == 3


def test_cpu_gradients_and_hooks():
    stock, x = block(), images(2, 16, 6, 5)
    fast = fastnets.optimize(stock)
    assert_same_answers(stock, fast, x)
    grads = []
    for model in (stock, fast):
        model(x).square().sum().backward()
        grads.append(model.block["0"].weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*grads)
    seen = []
    fast.block["2"].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fast(x)
    assert seen == [1]


class Other(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "conv, norm",
    [
        (nn.Conv2d(8, 8, 3), nn.LayerNorm(8)),
        (nn.Conv2d(8, 16, 3, groups=8), nn.LayerNorm(16)),
        (nn.Conv2d(8, 8, 9, groups=8), nn.LayerNorm(8)),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"), nn.LayerNorm(8)),
        (nn.Conv2d(8, 8, 3, groups=8), nn.RMSNorm(8)),
    ],
)
def test_other_layers_stay_apart(conv, norm):
    fast = fastnets.optimize(Other(conv, norm).eval())
    assert "call_depthwise_norm" not in graphs(fast)


def test_convnext_moves_half():
    stock = create_model("convnext_tiny").to("meta").eval()
    with dispatch.assume_device_type("cuda"), dispatch.backend("triton"):
        found = compare(stock, fastnets.optimize(stock), torch.empty(32, 3, 64, 64, device="meta"))
    assert found.fast.by_op["triton.depthwise_norm_kernel"].launches == 18
    assert found.fast.flops == found.stock.flops
