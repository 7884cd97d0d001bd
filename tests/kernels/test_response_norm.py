"""Local response normalization's kernels against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.launch import observe_launches
from fastnets.kernels.response_norm import local_response_norm, local_response_norm_backward
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import LAYOUTS, cast
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def stock(x, dy, size, relu, dtype, **options):
    if dtype is HALF:  # which the pooling inside of stock's has not on the CPU
        return tuple(t.half() for t in stock(x, dy, size, relu, FULL, **options))
    x = x.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
    y = F.local_response_norm(F.relu(x) if relu else x, size, **options)
    y.backward(dy.to(dtype))
    return y.detach(), x.grad


def check(lane, x, dy, size=5, relu=False, **options):
    options = {"alpha": 1e-2, "beta": 0.75, "k": 2.0, **options}
    with lane:
        y = local_response_norm(lane.put(x), size, relu=relu, **options)
        dx = local_response_norm_backward(lane.put(dy), lane.put(x), size, relu=relu, **options)
    for tensor in (y, dx):
        assert tensor.stride() == torch.empty_like(x).stride()
    reference = stock(x, dy, size, relu, torch.float64, **options)
    same = stock(x, dy, size, relu, x.dtype, **options)
    for expected, like, value, ratio in zip(reference, same, (y, dx), (2, 3)):
        assert_close_to(expected, like, value, ratio)


@pytest.mark.parametrize(
    "x, dy, dtype",
    [
        ("channels_last", "channels_last", HALF),
        ("contiguous", "contiguous", FULL),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("channels_last", "expanded_pixels", BF16),
                ("channel_slice", "misaligned", HALF),
                ("every_second_pixel", "transposed", FULL),
            )
        ),
    ],
)
def test_layouts(lane, x, dy, dtype):
    x, dy = (cast(3 * LAYOUTS[layout](2, 8, 5, 6), dtype) for layout in (x, dy))
    check(lane, x, dy)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_windows_lie_as_in_pytorch(lane, size, relu):
    """Even windows reach further down than up; channels outside count as zeros; alpha is divided."""
    x = 4 * torch.randn(2, 7, 3, 4)
    check(lane, x, torch.randn(x.shape), size, relu, alpha=0.5)


@pytest.mark.parametrize("beta", [0.5, pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_exponents(lane, beta):
    x = (4 * torch.randn(2, 12, 4, 4)).to(memory_format=torch.channels_last)
    check(lane, x, torch.randn(x.shape), beta=beta, alpha=0.5, k=1.0, relu=True)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("shape", [(2, 70, 9), (1, 3, 2, 3, 4)])
def test_shapes(lane, shape):
    check(lane, torch.randn(shape), torch.randn(shape))


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize(
    "shape, options",
    [((1, 96, 13, 13), {"alpha": 5e-4, "k": 2.0}), ((1, 192, 14, 14), {"alpha": 1e-4, "k": 1.0})],
)
def test_alexnet_and_googlenet(lane, shape, options):
    x = (30 * torch.randn(shape)).half().to(memory_format=torch.channels_last)
    check(lane, x, torch.randn(shape).half(), relu=True, **options)


def test_integers_are_exact(lane):
    """With alpha 0 what remains are the powers of k, which are exact for powers of 16."""
    x = integers(2, 6, 3, 3).to(memory_format=torch.channels_last)
    with lane:
        y = local_response_norm(lane.put(x), 3, alpha=0.0, beta=0.75, k=16.0, relu=True)
        dx = local_response_norm_backward(lane.put(x), lane.put(x), 3, alpha=0.0, beta=0.5, k=4.0)
    assert_exact(x.relu() / 8, y)
    assert_exact(x / 2, dx)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    x = torch.randn(2, 10, 4, 5).half().to(memory_format=torch.channels_last)
    check(lane, x, torch.randn(x.shape).half(), relu=True)


def test_one_read_and_one_write():
    x = torch.empty(2, 96, 55, 55, dtype=HALF, device="meta")
    seen = []
    with observe_launches(seen.append):
        local_response_norm(x, 5)
        local_response_norm_backward(x, x, 5)
    size = 2 * x.numel()
    assert [(s.bytes_read, s.bytes_written) for s in seen] == [(size, size), (2 * size, size)]


@pytest.mark.parametrize(
    "x, size, error, message",
    [
        (torch.ones(2, 3, 4).double(), 5, TypeError, "float64"),
        (torch.ones(2, 3, 4), 0, ValueError, "size=0"),
        (torch.ones(3), 5, ValueError, "1 dims"),
    ],
)
def test_bad_input(x, size, error, message):
    with pytest.raises(error, match=message):
        local_response_norm(x, size)
