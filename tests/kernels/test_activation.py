"""The activations one by one, closer than the tests of whole kernels look."""

import pytest
import torch
import triton
import triton.language as tl

from fastnets.fused.activation import activation as definition
from fastnets.kernels.activation import (
    ACTIVATIONS,
    BINARY_DERIVATIVE,
    activate,
    activation_backward,
    activation_gradient,
    check_activation,
)
from fastnets.kernels.launch import Config, launch
from tests.kernels.test_batch_norm import STOCK_ACTIVATIONS


@triton.jit
def _apply(x, y, n, negative_slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, activate(value, ACTIVATION, negative_slope), mask=i < n)


def apply(x, activation):
    y = torch.empty_like(x)
    config = Config(BLOCK=256)
    launch(_apply, (triton.cdiv(x.numel(), 256),), x, y, x.numel(), 0.1, config=config, writes=(y,),
           ACTIVATION=activation)  # fmt: skip
    return y


# Where an activation is a difference of near numbers, only its absolute error is small.
ABSOLUTE = {"gelu": 5e-7, "gelu_tanh": 1e-8, "hardswish": 2e-7, "hardsigmoid": 2e-7}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_relative_error_over_the_whole_range(lane, activation):
    small = torch.logspace(-30, 0, 200)
    x = torch.cat([torch.linspace(-15, 15, 800), small, -small])
    x = lane.put(x)
    with lane:
        y = apply(x, activation)
    reference = STOCK_ACTIVATIONS[activation](x.double())
    error = (y.double() - reference).abs()
    allowed = 1.5e-6 * reference.abs() + ABSOLUTE.get(activation, 1e-37)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{activation}({x[worst]:.8g}) = {y[worst]:.8g}, not {reference[worst]:.8g}"
    )


def test_names():
    assert set(ACTIVATIONS) == set(STOCK_ACTIVATIONS)
    for name in ACTIVATIONS:
        check_activation(name)
    with pytest.raises(ValueError, match=r"unknown activation 'mish' \(known: none, relu"):
        check_activation("mish")


def test_the_kernel_refuses_what_it_does_not_know(lane):
    x = lane.put(torch.ones(3))
    with pytest.raises(Exception) as raised, lane:
        apply(x, "mish")
    assert "unknown activation" in f"{raised.value} {raised.value.__cause__}"


@triton.jit
def _differentiate(
    dy, u, gradient, derivative, n, negative_slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(u + i, mask=i < n, other=0.0)
    incoming = tl.load(dy + i, mask=i < n, other=0.0)
    tl.store(gradient + i, activation_backward(incoming, at, ACTIVATION, negative_slope), mask=i < n)
    tl.store(derivative + i, activation_gradient(at, ACTIVATION, negative_slope), mask=i < n)


def differentiate(lane, dy, u, activation):
    """(dy act'(u), act'(u)) from the kernel."""
    dy, u = lane.put(dy), lane.put(u)
    with lane:
        gradient, derivative = torch.empty_like(u), torch.empty_like(u)
        n = u.numel()
        launch(_differentiate, (triton.cdiv(n, 256),), dy, u, gradient, derivative, n, 0.1,
               config=Config(BLOCK=256), writes=(gradient, derivative), ACTIVATION=activation)  # fmt: skip
    return gradient, derivative


def stock_gradient(dy, u, activation):
    return definition(activation).backward(dy, u, 0.1)


# Differences of near numbers in the derivative itself, from values of about 1; for tanh and sigmoid those of
# the float64 reference, 1 - y^2 and (1 - y) y.
ABSOLUTE_DERIVATIVE = {
    "silu": 3e-7,
    "hardswish": 2e-7,
    "gelu": 3e-7,
    "gelu_tanh": 3e-7,
    "sigmoid": 3e-16,
    "tanh": 3e-16,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_over_the_whole_range(lane, activation):
    small = torch.logspace(-30, 0, 100)
    u = torch.cat([torch.linspace(-15, 15, 600), small, -small])
    dy = torch.randn_like(u)
    gradient, derivative = differentiate(lane, dy, u, activation)
    reference = stock_gradient(torch.ones_like(u).double(), u.double(), activation)
    error = (derivative.cpu().double() - reference).abs()
    assert (error <= 2e-6 * reference.abs() + ABSOLUTE_DERIVATIVE.get(activation, 1e-37)).all()
    torch.testing.assert_close(gradient, derivative * lane.put(dy), rtol=3e-7, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_at_kinks_and_specials(lane, activation):
    nan, inf = float("nan"), float("inf")
    points = torch.tensor([0.0, -0.0, 6.0, -3.0, 3.0, 1e-45, -1e-45, 100.0, -100.0, inf, -inf, nan])
    ones = torch.ones_like(points)
    gradient, derivative = (t.cpu() for t in differentiate(lane, ones, points, activation))
    # One element at a time: PyTorch's vectorised CPU code treats NaN otherwise than its scalar code and CUDA.
    expected = torch.stack([stock_gradient(ones[:1], p[None], activation)[0] for p in points])
    if activation == "hardswish":
        assert gradient[-1].isnan()  # stock's branches take NaN for a value above 3; the NaN is kept here
        gradient, derivative, expected = gradient[:-1], derivative[:-1], expected[:-1]
    torch.testing.assert_close(gradient, expected, equal_nan=True, rtol=1e-6, atol=4e-7)
    torch.testing.assert_close(derivative, expected, equal_nan=True, rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "none"])
def test_overflowed_gradients_pass_as_stock_passes_them(lane, activation):
    nan, inf = float("nan"), float("inf")
    u, dy = torch.cartesian_prod(
        torch.tensor([-4.0, -1.0, 0.0, 1.0, 7.0]), torch.tensor([inf, -inf, nan, 2.0])
    ).T.contiguous()
    gradient, _ = differentiate(lane, dy, u, activation)
    expected = torch.stack([stock_gradient(g[None], p[None], activation)[0] for g, p in zip(dy, u)])
    torch.testing.assert_close(gradient.cpu(), expected, equal_nan=True, rtol=1e-6, atol=0)


def test_binary_derivatives():
    u = torch.linspace(-10, 10, 401)
    for name in ACTIVATIONS:
        derivative = stock_gradient(torch.ones_like(u), u, name)
        two_valued = set(derivative.unique().tolist()) == {0.0, 1.0}
        assert two_valued == (name in BINARY_DERIVATIVE)
