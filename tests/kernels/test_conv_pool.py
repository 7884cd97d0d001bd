"""The kernel of a small convolution that pools its own result."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.conv_pool import conv_pool
from fastnets.kernels.launch import UnsupportedConfig
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import in_layout

ACTS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda y: y, "tanh": torch.tanh}


@pytest.fixture(autouse=True)
def exact_products():
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    yield
    switch.fp32_precision = before


def operands(C, K, size, filter_size, bn=False, dtype=torch.float32, layout="contiguous", N=2):
    x = in_layout(torch.randn(N, C, *size), layout)
    weight = torch.randn(K, C, filter_size, filter_size) / (C**0.5 * filter_size)
    vectors = [torch.randn(K) if i == 0 or bn else None for i in range(5)]
    if bn:
        vectors[2] = torch.rand(K) + 0.5
    return [t if t is None else t.to(dtype) for t in (x, weight, *vectors)]


def stock(tensors, activation, window=(2, 2), maximum=True, dtype=None, **geometry):
    x, weight, bias, *bn = [t if t is None or dtype is None else t.to(dtype) for t in tensors]
    y = F.conv2d(x, weight, bias, **geometry)
    if bn[0] is not None:
        y = F.batch_norm(y, *bn)
    y = ACTS[activation](y)
    return F.max_pool2d(y, window) if maximum else F.avg_pool2d(y, window)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((1, 6, (28, 28), 5), {"activation": "sigmoid", "maximum": False, "padding": (2, 2)}),
        ((6, 16, (14, 13), 5), {"activation": "relu"}),
        ((3, 40, (11, 9), 3), {"activation": "tanh", "stride": (2, 1), "padding": (1, 0), "window": (1, 3)}),
        ((24, 64, (6, 6), 3), {"activation": "none", "dilation": (2, 2), "padding": (2, 2)}),
    ],
)
def test_as_accurate_as_stock(lane, sizes, options):
    C = sizes[0]
    dtype = {1: torch.float32, 6: torch.bfloat16, 3: torch.float32, 24: torch.float16}[C]
    tensors = operands(*sizes, bn=C in (3, 24), dtype=dtype, layout="last" if C == 6 else "contiguous")
    with lane:
        y = conv_pool(*map(lane.put, tensors), **{"window": (2, 2), **options})
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to(stock(tensors, dtype=torch.float64, **options), stock(tensors, **options), y.cpu())


def test_exact_on_integers(lane):
    tensors = [integers(2, 2, 7, 8), integers(5, 2, 3, 3), integers(5), None, None, None, None]
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu", padding=(1, 1))
    assert_exact(stock(tensors, "relu", padding=(1, 1)), y.cpu())


def test_nan_stays(lane):
    tensors = operands(1, 4, (6, 6), 3)
    tensors[0][0, 0, 0, 0] = float("nan")
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="none")
    assert torch.equal(y.cpu().isnan(), stock(tensors, "none").isnan())


@pytest.mark.lanes("sm_80_strict", "sm_90_strict")
def test_strictly(lane):
    tensors = operands(6, 16, (9, 9), 5)
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu")
    assert_close_to(stock(tensors, "relu", dtype=torch.float64), stock(tensors, "relu"), y.cpu())


@pytest.mark.parametrize(
    "C, K, window, error, message",
    [
        (32, 8, (2, 2), UnsupportedConfig, "32 channels and 8 outputs are more than 31 and 64"),
        (3, 65, (2, 2), UnsupportedConfig, "65 outputs"),
        (3, 8, (3, 3), UnsupportedConfig, "more than 4 pixels"),
        (3, 8, (4, 1), ValueError, "does not fit 3x3"),
    ],
)
def test_what_it_does_not_serve_is_named(C, K, window, error, message):
    with pytest.raises(error, match=message):
        conv_pool(torch.randn(1, C, 5, 5), torch.randn(K, C, 3, 3), window=window)
