"""The table of activations: names, recognition, oneDNN's forms, and agreement with the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets.fused.activation import ACTIVATIONS, activation, recognise, recognise_call


def test_kernels_know_the_same_names():
    from fastnets.kernels.activation import ACTIVATIONS as of_kernels

    assert set(of_kernels) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.Hardtanh(0, 6),
        nn.LeakyReLU(0.2),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.Identity(),
        None,
    ],
    ids=str,
)
def test_recognised_modules_are_what_the_table_computes(module):
    name, slope = recognise(module)
    x = torch.randn(100) * 4
    expected = x if module is None else module(x.clone())
    assert torch.equal(ACTIVATIONS[name].forward(x, slope), expected)
    if ACTIVATIONS[name].in_place:
        assert torch.equal(ACTIVATIONS[name].in_place(x.clone(), slope), expected)


@pytest.mark.parametrize(
    "module", [nn.Hardtanh(), nn.Softplus(), nn.PReLU(), nn.Dropout(), nn.Linear(2, 2)], ids=str
)
def test_other_modules_are_not_recognised(module):
    assert recognise(module) is None

    class MyReLU(nn.ReLU):
        def forward(self, x):
            return -x

    assert recognise(MyReLU()) is None


@pytest.mark.parametrize(
    "target, args, kwargs, expected",
    [
        (F.relu, (), {"inplace": True}, ("relu", 0.0)),
        ("relu_", (), {}, ("relu", 0.0)),
        (F.leaky_relu, (0.3,), {}, ("leaky_relu", 0.3)),
        (F.leaky_relu, (), {}, ("leaky_relu", 0.01)),
        (F.hardtanh, (0, 6), {}, ("relu6", 0.0)),
        (F.hardtanh, (), {}, None),
        (F.gelu, (), {"approximate": "tanh"}, ("gelu_tanh", 0.0)),
        (F.gelu, (), {"approximate": "fast"}, None),
        (F.relu, (), {"unknown": 1}, None),
        (F.softplus, (), {}, None),
    ],
)
def test_calls(target, args, kwargs, expected):
    assert recognise_call(target, args, kwargs) == expected


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_gradient_of_forward(name):
    x = (torch.randn(200, dtype=torch.float64) * 4).requires_grad_()
    grad = torch.randn(200, dtype=torch.float64)
    ACTIVATIONS[name].forward(x, 0.1).backward(grad)
    expected = x.grad if x.grad is not None else grad
    torch.testing.assert_close(ACTIVATIONS[name].backward(grad, x.detach(), 0.1), expected)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'hardswish'"):
        activation("hard_swish")
