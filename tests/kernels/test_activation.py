"""The activations one by one, closer than the tests of whole kernels look."""

import pytest
import torch
import triton
import triton.language as tl

from fastnets.kernels.activation import ACTIVATIONS, activate, check_activation
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
