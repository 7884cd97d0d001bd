"""The kernel of a local response norm that pools its own result, against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from fastnets.kernels.pool_windows import adaptive_windows, fixed_windows
from fastnets.kernels.response_norm_pool import configs, local_response_norm_max_pool
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import LAYOUTS, cast
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
WINDOW = ((3, 3), (2, 2), (0, 0), (1, 1), False)


def stock(x, size, window, relu, dtype, **options):
    if dtype in (HALF, BF16):  # which the pooling inside of stock's has not on the CPU
        return stock(x, size, window, relu, FULL, **options).to(dtype)
    x = x.to(dtype)
    return F.max_pool2d(F.local_response_norm(F.relu(x) if relu else x, size, **options), *window)


def check(lane, x, size=5, window=WINDOW, relu=False, config=None, **options):
    options = {"alpha": 1e-2, "beta": 0.75, "k": 2.0, **options}
    windows = fixed_windows(tuple(x.shape[2:]), *window)
    with lane:
        y = local_response_norm_max_pool(lane.put(x), size, windows, relu=relu, config=config, **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    reference, same = (stock(x, size, window, relu, dtype, **options) for dtype in (torch.float64, x.dtype))
    assert_close_to(reference, same, y.cpu())


@pytest.mark.parametrize(
    "layout, dtype", [("channels_last", HALF), ("contiguous", FULL), ("every_second_pixel", BF16)]
)
def test_layouts(lane, layout, dtype):
    check(lane, cast(3 * LAYOUTS[layout](2, 8, 7, 6), dtype))


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((3, 3), (2, 2), (0, 0), (1, 1), True),
        ((2, 3), (3, 1), (1, 0), (1, 2), False),
        ((3, 1), (1, 2), (0, 0), (2, 1), False),
    ],
)
def test_windows_lie_as_in_pytorch(lane, window, relu):
    check(lane, 4 * torch.randn(2, 7, 8, 9), 4, window, relu, alpha=0.5)


@pytest.mark.parametrize("beta, size", [(0.5, 1), (0.6, 3)])
def test_exponents(lane, beta, size):
    x = (4 * torch.randn(2, 12, 5, 5)).to(memory_format=torch.channels_last)
    check(lane, x, size, beta=beta, alpha=0.5, k=1.0, relu=True)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("block_p", [1, 2])
def test_every_height_of_columns(lane, block_p):
    config = next(c for c in configs(None) if c.BLOCK_P == block_p and c.BLOCK_K == 16)
    x = torch.randn(2, 20, 11, 6).to(memory_format=torch.channels_last)
    check(lane, x, config=config)


def test_integers_are_exact(lane):
    """With alpha 0 what remains are the powers of k, which are exact for powers of 16."""
    x = integers(2, 6, 7, 7).to(memory_format=torch.channels_last)
    windows = fixed_windows((7, 7), *WINDOW)
    with lane:
        y = local_response_norm_max_pool(lane.put(x), 3, windows, alpha=0.0, beta=0.75, k=16.0)
    assert_exact(F.max_pool2d(x, 3, 2) / 8, y)


@pytest.mark.lanes("interpreter", "gpu")
def test_nan_and_infinity_stay(lane):
    x = torch.randn(1, 6, 5, 5)
    x[0, 3, 1, 1], x[0, 0, 4, 4] = float("nan"), float("-inf")
    check(lane, x.to(memory_format=torch.channels_last), size=3)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    x = torch.randn(2, 10, 6, 7).half().to(memory_format=torch.channels_last)
    check(lane, x, relu=True)


def test_one_read_and_one_write_of_what_is_left():
    x = torch.empty(2, 96, 55, 55, dtype=HALF, device="meta").to(memory_format=torch.channels_last)
    seen = []
    with observe_launches(seen.append):
        local_response_norm_max_pool(x, 5, fixed_windows((55, 55), *WINDOW))
    (launch,) = seen
    assert launch.bytes == 2 * 2 * 96 * (55 * 55 + 27 * 27)


@pytest.mark.parametrize(
    "x, windows, error, message",
    [
        (torch.empty(1, 4, 8, 8), fixed_windows((8, 8), (4, 4), (2, 2)), UnsupportedConfig, "4x4 has more"),
        (torch.empty(1, 4, 8, 8), adaptive_windows((8, 8), (2, 2)), UnsupportedConfig, "adaptive"),
        (torch.empty(1, 4, 8, 9), fixed_windows((8, 8), (2, 2), (2, 2)), ValueError, r"\[N, C, 8, 8\]"),
        (torch.empty(1, 4, 8, 8).int(), fixed_windows((8, 8), (2, 2), (2, 2)), TypeError, "int32"),
    ],
)
def test_wrong_arguments_are_named(x, windows, error, message):
    with pytest.raises(error, match=message):
        local_response_norm_max_pool(x, 5, windows)
