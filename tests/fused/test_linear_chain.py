"""The op of a chain of small linear layers, and the pattern that finds them in networks."""

import copy
import itertools

import pytest
import torch
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch, linear_chain
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled


def operands(dtype=torch.float32):
    weights = [torch.randn(6, 8, dtype=dtype), torch.randn(3, 6, dtype=dtype)]
    return torch.randn(4, 2, 2, 2, dtype=dtype), weights, [torch.randn(6, dtype=dtype), None]


@pytest.mark.parametrize("name", ["linear_chain", "linear_chain_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    x, weights, biases = operands()
    if name == "linear_chain":
        weights[0].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    torch.library.opcheck(op, (x, weights, biases, ["relu", "none"], "auto"))


def test_gradient_is_that_of_the_layers():
    x, weights, biases = operands(torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights, biases[0])]
    assert torch.autograd.gradcheck(
        lambda x, w, v, b: linear_chain(x, [w, v], [b, None], ["silu", "none"]), leaves, fast_mode=True
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(4, 9)}, ValueError, r"weights\[0\] has shape \(6, 8\)"),
        ({"activations": ("relu", "swish")}, ValueError, "unknown activation 'swish'"),
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, ValueError, "floating"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, weights, biases = operands()
    arguments = {"x": x, "weights": weights, "biases": biases, "activations": ("relu", "none")}
    with pytest.raises(error, match=message):
        linear_chain(**{**arguments, **change})


def classifier(*widths, flatten=True):
    layers = [nn.Flatten()] if flatten else []
    for k, n in itertools.pairwise(widths):
        layers += [nn.Linear(k, n), nn.Sigmoid()]
    return settled(nn.Sequential(*layers[:-1]))


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_a_classifier(lane):
    stock = classifier(36, 20, 12, 10)
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    assert kinds(fast) == ["linear+sigmoid+linear+sigmoid+linear"]
    x = images(5, 4, 3, 3)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_a_classifier_on_the_cpu_with_hooks_and_in_training():
    stock = classifier(36, 20, 12, 10)
    fast = fastnets.optimize(stock)
    assert_same_answers(stock, fast, images(5, 4, 3, 3))
    grads = []
    for model in (stock, fast):
        model.train()(images(5, 4, 3, 3)).square().sum().backward()
        grads.append(model[1].weight.grad)
    torch.testing.assert_close(*grads)
    seen = []
    fast.eval()[0].register_forward_hook(lambda *a: seen.append(1))
    with torch.no_grad():
        fast(images(5, 4, 3, 3))
    assert seen == [1]


@pytest.mark.parametrize("widths", [(36, 200, 10), (36, 10), (1200, 100, 10)])
def test_layers_that_are_too_large_or_alone_stay(widths):
    fast = fastnets.optimize(classifier(*widths))
    assert "call_linear_chain" not in graphs(fast)


def test_launches():
    fast = fastnets.optimize(classifier(36, 20, 12, 10)).to("meta")
    x = torch.empty(32, 4, 3, 3, device="meta").to(memory_format=torch.channels_last)
    with dispatch.assume_device_type("cuda"):
        assert count(fast, x).launches == 1
