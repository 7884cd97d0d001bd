"""Rows of partial sums, added in order, in every lane."""

import pytest
import torch

from fastnets.kernels.device import DEVICES
from fastnets.kernels.launch import observe_launches
from fastnets.kernels.partial_sums import configs, sum_rows
from tests.accuracy import assert_close_to, assert_exact, integers

SHAPES = [(1, 1), (3, 147), (70, 96), (600, 5), (1100, 33)]


@pytest.mark.parametrize("config", configs(DEVICES["a100"]), ids=["wide", "tall"])
@pytest.mark.parametrize("T, L", SHAPES)
def test_integers_are_exact(lane, T, L, config):
    partial = integers(T, L)
    on_lane = lane.put(partial)
    with lane:
        out = sum_rows(on_lane, torch.empty(L, device=on_lane.device), config=config)
    assert_exact(partial.double().sum(0), out)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_into_the_shape_of_out(lane, dtype):
    partial = torch.randn(9, 4, 3, 3, 8)
    on_lane = lane.put(partial)
    with lane:
        out = torch.empty(4, 8, 3, 3, dtype=dtype, device=on_lane.device).to(
            memory_format=torch.channels_last
        )
        sum_rows(on_lane, out)
    reference = partial.double().sum(0).permute(0, 3, 1, 2)
    assert_close_to(reference, partial.sum(0).permute(0, 3, 1, 2).to(dtype), out)


def test_few_columns_of_many_rows_take_two_stages():
    launches = []
    with observe_launches(launches.append):
        sum_rows(torch.empty(5000, 64, device="meta"), torch.empty(64, device="meta"))
    assert [launch.grid for launch in launches] == [(2, 10), (2, 1)]
    assert sum(launch.bytes for launch in launches) == 4 * 64 * (5000 + 2 * 10 + 1)


@pytest.mark.parametrize(
    "partial",
    [torch.zeros(3, 8).half(), torch.zeros(8, 3).T, torch.zeros(3, 7), torch.zeros(0, 8)],
    ids=["half", "strided", "columns", "empty"],
)
def test_bad_partials_say_so(partial):
    with pytest.raises(ValueError, match="contiguous float32 rows of 8"):
        sum_rows(partial, torch.empty(8))
