"""Convolutions that write into a slice of a buffer's channels: the same values, and nothing beside them."""

import dataclasses

import pytest
import torch

from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.device import DEVICES
from fastnets.kernels.launch import UnsupportedConfig
from tests.accuracy import assert_close_to
from tests.kernels.conv_cases import Case, operands, output_shape, stock
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32

# (dtype, the convolution, channels of the buffer before its own, and behind)
CASES = {
    "1x1": (HALF, Case(C=64, K=64, R=1, S=1), 32, 96),
    "3x3": (BFLOAT, Case(C=32, H=5, W=4, padding=(1, 1)), 8, 0),
    "few channels": (FULL, Case(C=16, H=5, W=4, K=12, padding=(1, 1)), 4, 8),
    "few channels by rows": (HALF, Case(C=4, H=6, W=8, K=16, padding=(1, 1)), 16, 8),
    "odd": (HALF, Case(C=33, H=4, W=5, K=19, R=1, S=1, bias=True, bn=None), 3, 5),
    "odd behind even": (FULL, Case(C=32, H=3, W=5, K=16, R=1, S=1, activation="silu"), 16, 1),
}


def check(lane, name, **options):
    dtype, case, before, behind = CASES[name]
    tensors = operands(case, dtype)
    N, K, P, Q = output_shape(case)
    whole = torch.full((N, P, Q, before + K + behind), -7.0, dtype=dtype)
    buffer = lane.put(whole).permute(0, 3, 1, 2)
    given = {key: lane.put(t) for key, t in tensors.items()}
    out = buffer[:, before : before + K]
    with lane:
        y = conv_bn_act(**given, **case.geometry, activation=case.activation, out=out, **options)
    assert y is out
    assert_close_to(stock(case, tensors, torch.float64), stock(case, tensors), y.cpu())
    around = torch.cat([buffer[:, :before], buffer[:, before + K :]], 1)
    assert (around == -7).all()


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_stock_and_nothing_beside_is_written(lane, name):
    check(lane, name)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["1x1", "odd"])
def test_strictly(lane, name):
    check(lane, name)


def test_split_columns(lane):
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1]
    config = config.replace(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, SPLIT_K=2)
    check(lane, "3x3", config=config)


def test_what_is_no_slice_says_so():
    case = Case(C=32, H=3, W=5, K=16, R=1, S=1)
    tensors = operands(case, FULL)
    for out, message in (
        (torch.empty(2, 17, 3, 5), r"out is \[2, 17, 3, 5\]"),
        (torch.empty(2, 16, 3, 5), "expected channels of a channels-last tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_bn_act(**tensors, out=out)
    out = torch.empty(2, 3, 5, 16).permute(0, 3, 1, 2)
    with pytest.raises(UnsupportedConfig, match="a residual is added"):
        conv_bn_act(**tensors, residual=torch.zeros(2, 16, 3, 5), out=out)
    grouped = dataclasses.replace(case, K=32, groups=32)
    with pytest.raises(UnsupportedConfig, match="depthwise kernel"):
        conv_bn_act(**operands(grouped, FULL), groups=32, out=torch.empty(2, 3, 5, 32).permute(0, 3, 1, 2))
