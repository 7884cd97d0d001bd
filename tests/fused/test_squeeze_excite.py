"""Squeeze-and-excite as an op and a module; what networks call."""

import pytest
import torch
from torch import nn

from fastnets import fused
from fastnets.fused.squeeze_excite import call_squeeze_excite, parts_of, squeeze_excite
from fastnets.kernels.launch import observe_launches
from fastnets.models.blocks import SqueezeExcite as Ours
from tests.accuracy import assert_close_to, assert_exact


def modules():
    yield "ours", Ours(24, 6, act=nn.SiLU)
    misc = pytest.importorskip("torchvision.ops.misc")
    yield "torchvision", misc.SqueezeExcitation(24, 6, scale_activation=nn.Hardsigmoid)
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    yield "timm", blocks.SqueezeExcite(24, rd_ratio=0.25, act_layer=nn.SiLU)
    yield "timm's other", pytest.importorskip("timm.layers.squeeze_excite").SEModule(24, rd_channels=6)


def test_gradient_formula():
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    arguments = tensor(2, 5, 3, 2), tensor(3, 5, 1, 1), tensor(3), tensor(5, 3, 1, 1), tensor(5)

    def function(*tensors):
        return squeeze_excite(*tensors, "silu", "sigmoid", backend="reference")

    assert torch.autograd.gradcheck(function, arguments)


def run(module, function, x, dy, dtype):
    module = module.to(dtype)
    for parameter in module.parameters():
        parameter.grad = None
    leaf = x.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(module, leaf)
    y.backward(dy.to(dtype))
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("last", [True, False])
def test_every_module_that_is_known(lane, last):
    x, dy = torch.randn(2, 24, 5, 4), torch.randn(2, 24, 5, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    for name, module in modules():
        module.eval()
        reference = run(module, lambda m, t: m(t), x, dy, torch.float64)
        same = run(module, lambda m, t: m(t), x, dy, torch.float32)
        with lane:
            ours = run(
                module.to(lane.device), lambda m, t: call_squeeze_excite(m, t, "triton"), lane.put(x),
                lane.put(dy), torch.float32,
            )  # fmt: skip
        assert ours[0].stride() == x.stride()
        for i, (expected, stock, value) in enumerate(zip(reference, same, ours)):
            # Sums over the batch and pixels of fp32, where stock's on the CPU are blocked.
            assert_close_to(expected, stock, value, 2.0 if i == 0 else 5.0), name


@pytest.mark.lanes("interpreter", "gpu")
def test_two_launches(lane):
    module = fused.SqueezeExcite(24, 6, backend="triton").to(lane.device)
    x = lane.put(torch.randn(2, 24, 6, 6).half())
    seen = []
    with lane, observe_launches(seen.append), torch.no_grad():
        module.half()(x)
    assert [launch.name for launch in seen] == ["plane_mean_kernel", "excite_kernel"]


@pytest.mark.lanes("interpreter", "gpu")
def test_more_squeezed_channels_than_the_kernel_takes(lane):
    module = fused.SqueezeExcite(300, 290, backend="triton").to(lane.device)
    x = lane.put(torch.randn(1, 300, 3, 3))
    with lane, torch.no_grad():
        y = module(x)
    expected = squeeze_excite(
        x.cpu(), *(p.detach().cpu() for p in (module.reduce.weight, module.reduce.bias, module.expand.weight,
                                              module.expand.bias)), backend="reference"
    )  # fmt: skip
    torch.testing.assert_close(y.cpu(), expected)


def test_ops_are_registered_as_pytorch_asks():
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    parameters = torch.randn(3, 6, 1, 1), torch.randn(3), torch.randn(6, 3, 1, 1), None
    options = ("relu", "sigmoid", "auto")
    ops = torch.ops.fastnets
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *parameters)]
    torch.library.opcheck(ops.squeeze_excite.default, (*leaves, *options))
    torch.library.opcheck(ops.squeeze_excite_inference.default, (x, *parameters, *options))
    torch.library.opcheck(ops.squeeze_excite_forward.default, (x, *parameters, *options))
    mean = torch.randn(2, 6)
    torch.library.opcheck(ops.squeeze_excite_backward.default, (x, x, mean, *parameters, *options))


def test_stock_on_the_cpu_and_under_hooks():
    x, seen = torch.randn(2, 24, 5, 4), []
    for _, module in modules():
        module.eval()
        assert_exact(module(x).detach(), call_squeeze_excite(module, x).detach())
        ours = fused.SqueezeExcite.from_stock(module)
        torch.testing.assert_close(ours(x), module(x))
        assert ours.reduce.weight is parts_of(module)[0].weight
        parts_of(module)[0].register_forward_hook(lambda *_: seen.append(1))
        call_squeeze_excite(module, x, "triton")  # which could not run here
    assert len(seen) == 4


def test_what_is_not_taken():
    class Own(Ours):
        def forward(self, x):
            return 2 * super().forward(x)

    assert parts_of(Own(8, 2)) is None
    assert parts_of(Ours(8, 2, act=nn.ELU)) is None
    with pytest.raises(TypeError, match="got Own"):
        fused.SqueezeExcite.from_stock(Own(8, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 4, 3)}, r"x is \(2, 4, 3\)"),
        ({"w1": torch.ones(3, 5, 1, 1)}, r"w1 is \(3, 5, 1, 1\), expected \(3, 4, 1, 1\)"),
        ({"x": torch.ones(2, 4, 0, 3)}, "no pixels"),
        ({"gate": "swish"}, "unknown activation"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "x": torch.ones(2, 4, 3, 3), "w1": torch.ones(3, 4, 1, 1), "b1": None, "w2": torch.ones(4, 3, 1, 1),
        "b2": None, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        squeeze_excite(**arguments)
