"""Batch statistics against stock PyTorch, in every lane: exactness, merging, what is not finite."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.batch_norm_training import (
    Statistics,
    channel_statistics,
    finalize_statistics,
    merge_statistics,
    normalize_add_act,
)
from tests.accuracy import assert_close_to, assert_exact, integers

MOMENTUM, EPS = 0.1, 1e-5
slow = pytest.mark.slow


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_large_mean_and_small_variance(lane):
    """Statistics as exact as stock's, which adds in float64 on the CPU; the output much more so."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = (1e4 + 1e-2 * torch.randn(16, 8, 12, 12)).to(memory_format=memory_format)
        wide = x.double()
        _, mean64, rstd64 = torch.native_batch_norm(wide, None, None, None, None, True, MOMENTUM, EPS)
        expected, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, MOMENTUM, EPS)
        on_lane = lane.put(x)
        with lane:
            statistics = channel_statistics(on_lane)
            our_mean, our_rstd = finalize_statistics(statistics, momentum=MOMENTUM, eps=EPS)
            y = normalize_add_act(on_lane, our_mean, our_rstd)
        assert len(statistics.count) > 1
        assert_close_to(mean64, mean, our_mean)
        assert_close_to(rstd64, rstd, our_rstd)
        reference = F.batch_norm(wide, None, None, None, None, True, MOMENTUM, EPS)
        assert_close_to(reference, expected, y)


@pytest.mark.lanes("interpreter", "gpu")
def test_a_large_mean_that_only_later_tiles_have(lane):
    x = torch.randn(600, 4)
    x[:5] += 1e4
    x[:, 1] -= 3e4
    on_lane = lane.put(x)
    with lane:
        mean, rstd = finalize_statistics(channel_statistics(on_lane), momentum=MOMENTUM, eps=EPS)
    stock_rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.1, EPS)[2]
    wide = x.double()
    assert_close_to(wide.mean(0), x.mean(0), mean)
    # Deviations of 1e4 in the first of several tiles: digits lost at most in proportion to the tiles.
    assert_close_to((wide.var(0, correction=0) + EPS).rsqrt(), stock_rstd, rstd, 8.0)


def test_statistics_exact_on_integers(lane):
    """Means of 64 integers with a sum divisible by 64 are integers."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = integers(4, 24, 4, 4, low=-9, high=9)
        x[-1, :, -1, -1] -= x.sum((0, 2, 3)) % 64
        x = lane.put(x.to(memory_format=memory_format))
        with lane:
            merged = merge_statistics(channel_statistics(x))
        wide = x.double()
        assert_exact(wide.mean((0, 2, 3))[None], merged.mean)
        deviations = wide - wide.mean((0, 2, 3), keepdim=True)
        assert_exact((deviations**2).sum((0, 2, 3))[None], merged.m2)
        assert_exact(torch.tensor([64.0], dtype=torch.float64), merged.count)


def parts_of(rows, lengths):
    """Statistics of consecutive runs of rows."""
    parts = rows.split(lengths)
    return Statistics(
        torch.stack([p.mean(0) if len(p) else torch.full_like(p[:0].sum(0), torch.nan) for p in parts]),
        torch.stack([((p - p.mean(0)) ** 2).sum(0) for p in parts]),
        torch.tensor([float(len(p)) for p in parts]),
    )


@pytest.mark.parametrize("many", [pytest.param(False, marks=slow), True], ids=["few", "many"])
def test_merging_parts_of_different_lengths(lane, many):
    """Empty ones too, whose mean is nobody's business."""
    lengths = [0, 3, 200, 0, 1, 77, 0] + [2, 5, 0, 1] * (200 if many else 1)
    rows = torch.randn(sum(lengths), 21) * 3 + 100
    wide = rows.double()
    statistics = Statistics(*(lane.put(t) for t in parts_of(rows, lengths)))
    running = [torch.randn(42).half()[::2], torch.rand(21).bfloat16()]
    expected = [r.double() for r in running]
    stock_running = [r.float() for r in running]
    F.batch_norm(wide, *expected, training=True, momentum=0.3)
    F.batch_norm(rows, *stock_running, training=True, momentum=0.3)
    running = [lane.put(r) for r in running]
    with lane:
        mean, rstd = finalize_statistics(statistics, *running, momentum=0.3, eps=EPS)
        merged = merge_statistics(statistics)
    assert_close_to(wide.mean(0), rows.mean(0), mean)
    variance = wide.var(0, correction=0)
    assert_close_to((variance + EPS).rsqrt(), (rows.var(0, correction=0) + EPS).rsqrt(), rstd)
    assert_exact(mean[None], merged.mean)
    assert_close_to(variance[None] * len(rows), rows.var(0, correction=0)[None] * len(rows), merged.m2)
    assert merged.count.tolist() == [float(len(rows))]
    for reference, same, value in zip(expected, stock_running, running):
        assert_close_to(reference, same.to(value.dtype), value)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_nothing_to_merge_leaves_running_statistics_alone(lane):
    for parts in (0, 2):
        statistics = Statistics(
            *(lane.put(t) for t in (torch.zeros(parts, 5), torch.zeros(parts, 5), torch.zeros(parts)))
        )
        running = [lane.put(torch.arange(5.0)), lane.put(torch.arange(5.0) + 1)]
        with lane:
            mean, rstd = finalize_statistics(statistics, *running, momentum=0.5, eps=0.25)
            merged = merge_statistics(statistics)
        assert_exact(torch.zeros(5).double(), mean)
        assert_exact(torch.full((5,), 2.0).double(), rstd)
        assert [t.tolist() for t in merged] == [[[0.0] * 5], [[0.0] * 5], [0.0]]
        assert_exact(torch.arange(5.0).double(), running[0])
        assert_exact(torch.arange(5.0).double() + 1, running[1])


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_infinities_and_nan_are_seen(lane):
    x = torch.randn(40, 4)
    x[0, 0], x[-1, 1], x[7, 2] = float("inf"), float("-inf"), float("nan")
    x = lane.put(x)
    with lane:
        mean, rstd = finalize_statistics(channel_statistics(x), momentum=MOMENTUM, eps=EPS)
    assert mean[0] == float("inf")
    assert mean[1] == float("-inf")
    assert mean[2].isnan()
    assert rstd[:3].isnan().all()
    assert torch.isfinite(mean[3])
    assert torch.isfinite(rstd[3])
