"""Dropout and stochastic depth against a mask made by the reference's Philox, in every lane."""

import math

import pytest
import torch

from fastnets.fused.dropout import _factors
from fastnets.kernels.dropout import dropout
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.test_batch_norm import LAYOUTS, cast
from tests.lanes import STRICT_LANES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = (0, 1, 2**62 + 12345, 2**63 - 1)


def seed_of(value, device="cpu"):
    return torch.tensor([value], dtype=torch.int64, device=device)


def expected_factors(seed, y, p, rows):
    """The multiplier of each element, at its place in y's memory."""
    factors = torch.empty_strided(y.shape, y.stride())
    factors.as_strided((y.numel(),), (1,)).copy_(_factors(seed_of(seed), y.numel(), p, rows))
    return factors


def check(lane, x, p, residual=None, rows=0, seed=7, **options):
    with lane:
        y = dropout(lane.put(x), seed_of(seed, lane.device), p, lane.put(residual), rows=rows, **options)
    factors = expected_factors(seed, y, p, rows)
    added = 0 if residual is None else residual
    reference = x.double() * factors.double() + added
    # Stock rounds what it adds to; the sum in float32, rounded once, is what is promised.
    assert_close_to(reference, (x.float() * factors + added).to(x.dtype), y, ratio=1.01)
    return y, factors


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_those_of_the_reference(lane, seed):
    x = torch.ones(1030)
    y, factors = check(lane, x, 0.5, seed=seed)
    assert_exact(factors, y)
    assert 400 < int((y > 0).sum()) < 630


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0])
def test_probabilities(lane, p):
    x = torch.ones(8192)
    y, _ = check(lane, x, p)
    kept = (y > 0).float().mean()
    assert abs(kept - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / 8192)
    assert p in (0.0, 1.0) or math.isclose(float(y.max()), 1 / (1 - p), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(lane, dtype):
    check(lane, torch.randn(3, 7, 5).to(dtype), 0.3, torch.randn(3, 7, 5).to(dtype))


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(lane, layout):
    x, residual = cast(LAYOUTS[layout](2, 8, 5, 6), torch.bfloat16), torch.randn(2, 8, 5, 6).bfloat16()
    y, _ = check(lane, x, 0.3, residual)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_are_dropped_whole(lane, rows, dtype):
    x, residual = torch.randn(5, 8, 20, 7).to(dtype), torch.randn(5, 8, 20, 7).to(dtype)
    for seed in (1, 2, 3):
        _, factors = check(lane, x, 0.4, residual, rows=rows, seed=seed)
        assert (factors.view(rows, -1) == factors.view(rows, -1)[:, :1]).all()


def test_nan_and_infinity_come_through_as_in_stock(lane):
    x = torch.full((64,), math.nan)
    x[::2] = math.inf
    with lane:
        y = dropout(lane.put(x), seed_of(3, lane.device), 0.5).cpu()
    stock = x * expected_factors(3, y, 0.5, 0)
    torch.testing.assert_close(y, stock, equal_nan=True)
    assert y[1::2].isnan().all()


def test_the_gradient_is_the_same_function(lane):
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    seed = seed_of(11, lane.device)
    dy = torch.randn(1, 8, 1, 1).expand(x.shape)
    with lane:
        y = dropout(lane.put(x), seed, 0.5)
        dx = dropout(lane.put(dy), seed, 0.5, strides=y.stride())
    assert_exact((y.cpu() != 0) * 2.0 * dy, dx)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    check(lane, torch.randn(3, 7, 50).half(), 0.3, torch.randn(3, 7, 50).half())
    check(lane, torch.randn(3, 7, 50).half(), 0.3, torch.randn(3, 7, 50).half(), rows=3)


@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    # The numbering of elements is 64 bits wide there: seen in what is launched, as 4 GiB are not to be had.
    seen = []
    with observe_launches(seen.append):
        for rows in (0, 4):
            x = torch.empty(2**31 + 64, dtype=torch.float16, device="meta")
            dropout(x, torch.empty(1, dtype=torch.int64, device="meta"), 0.5, rows=rows)
    assert all(launch.constexprs["WIDE"] for launch in seen)


def test_one_read_and_one_write():
    x, seed = torch.empty(32, 768, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    seen = []
    with observe_launches(seen.append):
        dropout(x, seed, 0.1)
        dropout(x, seed, 0.1, x, rows=32)
    assert [launch.bytes_read for launch in seen] == [x.numel() * 4 + 8, x.numel() * 8 + 8]
    assert all(launch.bytes_written == x.numel() * 4 for launch in seen)


@pytest.mark.lanes("interpreter", "gpu")
def test_empty(lane):
    with lane:
        y = dropout(torch.empty(0, 3, device=lane.device), seed_of(1, lane.device), 0.5)
    assert y.shape == (0, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4, dtype=torch.float64)}, TypeError, "float64"),
        ({"p": 1.5}, ValueError, "has to be between 0 and 1"),
        ({"seed": torch.ones(1)}, ValueError, "expected one int64"),
        ({"residual": torch.ones(3)}, ValueError, "residual is"),
        ({"rows": 3}, ValueError, "no 3 equal rows"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        dropout(**{"x": torch.ones(4), "seed": seed_of(1), "p": 0.5, **change})
