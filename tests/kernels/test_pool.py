"""Pooling and its gradients against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import plane_mean as plane_mean_module
from fastnets.kernels import pool
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from fastnets.kernels.plane_mean import plane_mean
from fastnets.kernels.pool import average_pool, max_pool
from fastnets.kernels.pool_backward import average_pool_backward, max_pool_backward
from fastnets.kernels.pool_windows import adaptive_windows, fixed_windows, is_channels_last
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import LAYOUTS, cast
from tests.lanes import STRICT_LANES

slow = pytest.mark.slow
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# kernel_size, stride, padding, dilation, ceil_mode
FIXED = {
    "3/2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "2/2 ceil": ((2, 2), (2, 2), (0, 0), (1, 1), True),
    "5x4/1 looped": ((5, 4), (1, 1), (2, 1), (1, 1), False),
    "2x3/3x1 gaps": ((2, 3), (3, 1), (1, 1), (1, 1), False),
    "3/2 dilated ceil": ((3, 3), (2, 2), (1, 1), (2, 2), True),
}
ADAPTIVE = [(1, 1), (3, 2), (9, 8)]


def max_both(lane, x, dy, windows):
    """(y, dx) of the kernels."""
    x, dy = lane.put(x), lane.put(dy)
    with lane:
        y, window = max_pool(x, windows, keep_window=True)
        dx = max_pool_backward(dy, window, windows, channels_last=is_channels_last(x))
    return y, dx


def average_both(lane, x, dy, windows, **options):
    x, dy = lane.put(x), lane.put(dy)
    with lane:
        y = average_pool(x, windows, **options)
        dx = average_pool_backward(dy, windows, channels_last=is_channels_last(x), **options)
    return y, dx


def stock_both(function, x, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad


def compare(function, ours, x, dy):
    wide_y, wide_dx = stock_both(function, x.double(), dy.double())
    stock_y, stock_dx = stock_both(function, x, dy)
    assert_close_to(wide_y, stock_y, ours[0])
    assert_close_to(wide_dx, stock_dx, ours[1], ratio=3.0)


def size_of(x, windows):
    return (*x.shape[:2], windows.P, windows.Q)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", [pytest.param(name, marks=[slow] * (name != "3/2")) for name in FIXED])
def test_fixed_windows_exactly(lane, case, channels_last):
    x = integers(2, 6, 7, 6, low=-9, high=9)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    windows = fixed_windows((7, 6), *FIXED[case])
    dy = integers(*size_of(x, windows))
    y, dx = max_both(lane, x, dy, windows)
    expected = stock_both(lambda t: F.max_pool2d(t, *FIXED[case]), x, dy)
    assert_exact(expected[0], y)
    assert_exact(expected[1], dx)
    assert is_channels_last(y) == is_channels_last(dx) == channels_last


@pytest.mark.parametrize("count_include_pad", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[slow] * (name != "3/2")) for name in FIXED if "dilated" not in name]
)
def test_averages_of_fixed_windows(lane, case, count_include_pad):
    kernel_size, stride, padding, _, ceil_mode = FIXED[case]
    x = torch.randn(2, 6, 7, 6).to(memory_format=torch.channels_last)
    windows = fixed_windows((7, 6), *FIXED[case])
    dy = torch.randn(size_of(x, windows))
    ours = average_both(lane, x, dy, windows, count_include_pad=count_include_pad)
    compare(
        lambda t: F.avg_pool2d(t, kernel_size, stride, padding, ceil_mode, count_include_pad), ours, x, dy
    )


@pytest.mark.lanes("interpreter", "gpu")
def test_divisor_override(lane):
    x, dy = torch.randn(2, 3, 7, 6), torch.randn(2, 3, 4, 3)
    windows = fixed_windows((7, 6), (2, 2), (2, 2), (0, 0), (1, 1), True)
    ours = average_both(lane, x, dy, windows, divisor=-3)
    compare(lambda t: F.avg_pool2d(t, 2, 2, 0, True, True, -3), ours, x, dy)


@pytest.mark.parametrize(
    "output_size", [pytest.param(s, marks=[slow] * (s != (3, 2))) for s in ADAPTIVE], ids=str
)
def test_adaptive_windows(lane, output_size):
    x = torch.randn(2, 5, 7, 6).to(memory_format=torch.channels_last)
    windows = adaptive_windows((7, 6), output_size)
    dy = torch.randn(2, 5, *output_size)
    compare(lambda t: F.adaptive_avg_pool2d(t, output_size), average_both(lane, x, dy, windows), x, dy)
    x = x.contiguous()
    compare(lambda t: F.adaptive_max_pool2d(t, output_size), max_both(lane, x, dy, windows), x, dy)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(lane, layout, dtype):
    check_layout(lane, layout, dtype)


@pytest.mark.lanes("sm_90")
@pytest.mark.parametrize(
    "layout, dtype", list(zip(("expanded_pixels", "every_second_pixel", "misaligned"), DTYPES))
)
def test_a_sample_of_layouts(lane, layout, dtype):
    check_layout(lane, layout, dtype)


def check_layout(lane, layout, dtype):
    x = cast(LAYOUTS[layout](2, 8, 5, 6), dtype)
    windows = fixed_windows((5, 6), (3, 2), (2, 2), (1, 0))
    dy = cast(LAYOUTS[layout](2, 8, windows.P, windows.Q), dtype)
    compare(lambda t: F.max_pool2d(t, (3, 2), 2, (1, 0)), max_both(lane, x, dy, windows), x, dy)
    compare(lambda t: F.avg_pool2d(t, (3, 2), 2, (1, 0)), average_both(lane, x, dy, windows), x, dy)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[slow] * ("c" not in name[:2])) for name in LAYOUTS]
)
def test_global_average(lane, layout):
    x = cast(LAYOUTS[layout](2, 24, 5, 6), torch.bfloat16)
    # The gradient of a mean or sum behind it: expanded.
    dy = torch.randn(2, 1, 1, 1).bfloat16().expand(2, 24, 1, 1)
    ours = average_both(lane, x, dy, adaptive_windows((5, 6), (1, 1)))
    compare(lambda t: F.adaptive_avg_pool2d(t, 1), ours, x, dy)


def special(shape, generator):
    """Values with NaN, infinities, ties and zeros of both signs among them."""
    nan, inf = float("nan"), float("inf")
    choices = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, 1.0, -2.0, -inf, -inf])
    return choices[torch.randint(len(choices), shape, generator=generator)]


@pytest.mark.parametrize(
    "channels_last", [True, pytest.param(False, marks=slow)], ids=["channels_last", "contiguous"]
)
def test_nan_infinity_and_ties_win_as_in_stock(lane, channels_last):
    x = special((2, 8, 6, 7), torch.Generator().manual_seed(1))
    x[0, 0] = float("-inf")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    windows = fixed_windows((6, 7), (3, 3), (2, 2), (1, 1))
    dy = integers(*size_of(x, windows), low=1, high=9)
    y, dx = max_both(lane, x, dy, windows)
    stock_y, stock_dx = stock_both(lambda t: F.max_pool2d(t, 3, 2, 1), x, dy)
    torch.testing.assert_close(y.cpu(), stock_y, equal_nan=True, rtol=0, atol=0)
    assert_exact(stock_dx, dx)


@pytest.mark.lanes("interpreter")
def test_nan_in_adaptive_windows_and_averages(lane):
    x = special((1, 4, 5, 7), torch.Generator().manual_seed(2))
    windows = adaptive_windows((5, 7), (3, 3))
    dy = integers(1, 4, 3, 3, low=1)
    y, dx = max_both(lane, x, dy, windows)
    stock_y, stock_dx = stock_both(lambda t: F.adaptive_max_pool2d(t, 3), x, dy)
    torch.testing.assert_close(y, stock_y, equal_nan=True, rtol=0, atol=0)
    assert_exact(stock_dx, dx)
    y, dx = average_both(lane, x, torch.full_like(dy, float("nan")), windows)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, 3), equal_nan=True)
    assert dx.isnan().all()


@slow
@pytest.mark.lanes("sm_80", "gpu")
def test_windows_of_more_than_255_elements(lane):
    x = integers(1, 2, 17, 17, low=-99, high=99)
    windows = fixed_windows((17, 17), (16, 16), (1, 1))
    dy = integers(1, 2, 2, 2, low=1)
    assert windows.index_dtype == torch.int32
    y, dx = max_both(lane, x, dy, windows)
    expected = stock_both(lambda t: F.max_pool2d(t, 16, 1), x, dy)
    assert_exact(expected[0], y)
    assert_exact(expected[1], dx)


@pytest.mark.lanes("sm_80", "gpu")
def test_a_dilated_window_may_miss_the_image(lane):
    x = torch.ones(1, 1, 2, 4)
    windows = fixed_windows((2, 4), (2, 1), (1, 1), (1, 0), (3, 1))
    y, dx = max_both(lane, x, torch.ones(1, 1, windows.P, 4), windows)
    assert_exact(F.max_pool2d(x, (2, 1), 1, (1, 0), (3, 1)), y)
    # Stock's gradient writes out of bounds here; an element that does not exist gets none.
    assert_exact(torch.zeros_like(x), dx)


@pytest.mark.lanes("sm_80", "gpu")
def test_without_a_window_to_keep(lane):
    x = integers(2, 8, 7, 6)
    with lane:
        y, window = max_pool(lane.put(x), fixed_windows((7, 6), (3, 3), (2, 2), (1, 1)))
    assert window is None
    assert_exact(F.max_pool2d(x, 3, 2, 1), y)


@slow
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_every_config(lane, channels_last):
    x = integers(1, 24, 5, 5)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    windows, dy = fixed_windows((5, 5), (2, 2), (2, 2)), integers(1, 24, 2, 2)
    stock_y, stock_dx = stock_both(lambda t: F.max_pool2d(t, 2), x, dy)
    x, dy = lane.put(x), lane.put(dy)
    for config in pool.configs(DEVICES["h100"]):
        with lane:
            y, window = max_pool(x, windows, keep_window=True, config=config)
            dx = max_pool_backward(dy, window, windows, channels_last=channels_last, config=config)
        assert_exact(stock_y, y)
        assert_exact(stock_dx, dx)
    for config in plane_mean_module.configs(DEVICES["h100"]):
        with lane:
            y = plane_mean(x * 25, channels_last=channels_last, config=config)
        assert_exact(x.sum((2, 3), keepdim=True), y)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize(
    "layout", ["channels_last", *(pytest.param(n, marks=slow) for n in ("contiguous", "every_second_pixel"))]
)
def test_strictly(lane, layout):
    x = cast(LAYOUTS[layout](2, 8, 5, 6), torch.float16)
    windows = fixed_windows((5, 6), (3, 3), (2, 2), (1, 1))
    dy = torch.randn(2, 8, windows.P, windows.Q).half()
    compare(lambda t: F.max_pool2d(t, 3, 2, 1), max_both(lane, x, dy, windows), x, dy)
    # Triton's layout conversion behind a sum over pixels has several warps write the same value.
    lane, dy = lane.but(shared_races=None), dy[..., :1, :1]
    ours = average_both(lane, x, dy, adaptive_windows((5, 6), (1, 1)))
    compare(lambda t: F.adaptive_avg_pool2d(t, 1), ours, x, dy)


@slow
def test_offsets_past_two_to_the_31(lane):
    if lane.name == "gpu" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB")
    # Pages that nobody touches cost nothing; the race detector would touch them.
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=lane.device)
    x = memory.as_strided((2, 8, 4, 4), (2**31, 16, 4, 1))
    x.copy_(torch.randn(2, 8, 4, 4))
    with lane.but(races=None):
        y, window = max_pool(x, fixed_windows((4, 4), (2, 2), (2, 2)), keep_window=True)
        dx = max_pool_backward(memory.as_strided((2, 8, 2, 2), (2**31, 4, 2, 1)), window,
                               fixed_windows((4, 4), (2, 2), (2, 2)), channels_last=False)  # fmt: skip
        mean = average_pool(x, adaptive_windows((4, 4), (1, 1)))
    assert_exact(F.max_pool2d(x, 2), y)
    assert_exact(x.float().mean((2, 3), keepdim=True).half(), mean)
    assert dx.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty(lane, shape):
    windows = fixed_windows((4, 4), (2, 2), (2, 2))
    with lane:
        y, window = max_pool(torch.empty(shape), windows, keep_window=True)
        dx = max_pool_backward(y, window, windows, channels_last=False)
        mean = average_pool(torch.empty(shape), adaptive_windows((4, 4), (1, 1)))
    assert y.shape == (*shape[:2], 2, 2)
    assert dx.shape == shape
    assert mean.shape == (*shape[:2], 1, 1)


@slow
def test_bits_are_the_same_in_every_run(lane):
    x, dy = lane.put(torch.randn(2, 8, 6, 6)), lane.put(torch.randn(2, 8, 6, 6))
    windows = fixed_windows((6, 6), (3, 3), (1, 1), (1, 1))
    assert_exact(*(average_both(lane, x, dy, windows)[1] for _ in range(2)))
    assert_exact(*(max_both(lane, x, dy, windows)[1] for _ in range(2)))


def test_one_byte_is_kept_for_each_window():
    x = torch.empty(32, 64, 112, 112, dtype=torch.bfloat16, device="meta").to(
        memory_format=torch.channels_last
    )
    windows = fixed_windows((112, 112), (3, 3), (2, 2), (1, 1))
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        y, window = max_pool(x, windows, keep_window=True)
        max_pool_backward(y, window, windows, channels_last=True)
    assert [launch.name for launch in seen] == ["pool_kernel", "pool_backward_kernel"]
    assert seen[0].bytes_read == x.numel() * 2
    assert seen[0].bytes_written == y.numel() * 3 == seen[1].bytes_read
    assert seen[1].bytes_written == x.numel() * 2
    assert seen[0].constexprs["VEC"] == seen[0].constexprs["READ_VEC"] == 8
    assert {launch.config for launch in seen} <= set(pool.configs(DEVICES["h100"]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((7, 6), (3, 3), (2, 2), (2, 2)), "padding=2 must be between 0 and half"),
        (((7, 6), (9, 9), (2, 2)), "a window of 9 does not fit 7 pixels"),
        (((7, 6), (3, 3), (0, 1)), "stride=0"),
        (((7, 6), (3, 3), (1, 1), (-1, 0)), "padding=-1"),
    ],
)
def test_impossible_windows(arguments, message):
    with pytest.raises(ValueError, match=message):
        fixed_windows(*arguments)


def test_bad_input():
    windows = fixed_windows((4, 4), (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"the windows are for \[N, C, 4, 4\]"):
        max_pool(torch.ones(1, 1, 5, 4), windows)
    with pytest.raises(TypeError, match="float64"):
        average_pool(torch.ones(1, 1, 4, 4, dtype=torch.float64), windows)
    with pytest.raises(ValueError, match="window is"):
        max_pool_backward(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3), windows, channels_last=False)
    with pytest.raises(ValueError, match="at least 1"):
        adaptive_windows((4, 4), (0, 1))
    with pytest.raises(ValueError, match="no pixels"):
        plane_mean(torch.ones(1, 1, 0, 4), channels_last=False)
