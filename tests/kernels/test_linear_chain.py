"""The kernel of a chain of small linear layers."""

import pytest
import torch

from fastnets.kernels.device import assume_device, current_device
from fastnets.kernels.launch import UnsupportedConfig
from fastnets.kernels.linear_chain import configs, linear_chain
from tests.accuracy import assert_close_to, assert_exact, integers

ACTS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda y: y, "tanh": torch.tanh}


def chain_of(shape, widths, dtype=torch.float32, bias=True):
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    sizes = [x[0].numel(), *widths]
    weights = [torch.randn(n, k) / k**0.5 for k, n in zip(sizes, widths)]
    biases = [torch.randn(n) if bias else None for n in widths]
    return x.to(dtype), [w.to(dtype) for w in weights], [b if b is None else b.to(dtype) for b in biases]


def stock(x, weights, biases, activations, dtype=None):
    y = x.flatten(1).to(dtype or x.dtype)
    for w, b, name in zip(weights, biases, activations):
        y = ACTS[name](torch.nn.functional.linear(y, w.to(y.dtype), None if b is None else b.to(y.dtype)))
    return y


def run(lane, x, weights, biases, activations):
    given = [lane.put(x), [lane.put(w) for w in weights], [lane.put(b) for b in biases]]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        with lane:
            return linear_chain(*given, activations).cpu()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "shape, widths, activations, dtype, bias",
    [
        ((19, 16, 5, 5), (120, 84, 10), ("relu", "sigmoid", "none"), torch.float32, True),
        ((1, 16, 5, 5), (120, 84, 10), ("relu", "relu", "none"), torch.bfloat16, True),
        ((17, 37), (128, 1), ("tanh", "none"), torch.float16, False),
    ],
)
def test_as_accurate_as_stock(lane, shape, widths, activations, dtype, bias):
    tensors = chain_of(shape, widths, dtype, bias)
    y = run(lane, *tensors, activations)
    assert_close_to(stock(*tensors, activations, torch.float64), stock(*tensors, activations), y)


def test_exact_on_integers(lane):
    x = integers(33, 3, 2, 3)[:, :, :, :2]  # strided
    weights, biases = [integers(20, 12), integers(7, 20)], [integers(20), None]
    y = run(lane, x, weights, biases, ("relu", "none"))
    assert_exact(stock(x, weights, biases, ("relu", "none")), y)


@pytest.mark.lanes("sm_80_strict", "sm_90_strict")
def test_strictly(lane):
    tensors = chain_of((19, 16, 5, 5), (120, 84, 10))
    y = run(lane, *tensors, ("relu", "relu", "none"))
    exact = stock(*tensors, ("relu", "relu", "none"), torch.float64)
    assert_close_to(exact, stock(*tensors, ("relu", "relu", "none")), y)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x": torch.randn(4, 9)},
            ValueError,
            r"weights\[0\] has shape \[6, 8\], expected \[at most 128, 9\]",
        ),
        ({"x": torch.randn(4, 2, 4)}, ValueError, "must be"),
        ({"x": torch.randn(4, 8).double()}, TypeError, "float64"),
        ({"activations": ("relu", "leaky_relu")}, ValueError, "slope"),
        ({"activations": ("relu",)}, ValueError, "1 activations"),
        ({"biases": [torch.ones(5), None]}, ValueError, r"biases\[0\] has shape \[5\], expected \[6\]"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.randn(4, 8),
        "weights": [torch.randn(6, 8), torch.randn(3, 6)],
        "biases": [None, None],
        "activations": ("relu", "none"),
    }
    with pytest.raises(error, match=message):
        linear_chain(**{**arguments, **change})


def test_configs_are_for_their_products():
    x, weights, biases = chain_of((4, 8), (6, 3))
    with assume_device("a100"):
        wrong = next(config for config in configs(current_device(x.to("meta"))) if config.BLOCK_K == 64)
    with pytest.raises(UnsupportedConfig, match="fma"):
        linear_chain(x, weights, biases, ("relu", "none"), config=wrong)
