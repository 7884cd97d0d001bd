"""Grouped convolution, narrow groups packed into one product, against stock PyTorch in every lane."""

import pytest
import torch

from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.conv_configs import groups_per_tile, kernel_of, table_configs
from fastnets.kernels.conv_grouped import configs
from fastnets.kernels.device import DEVICES, device_for_capability
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.kernels.conv_cases import Case, check, check_exact, operands, shape_of
from tests.lanes import LANES, STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32

RESNEXT = Case(N=1, C=64, K=64, groups=16, padding=(1, 1), residual="last")
SHAPES = {
    "4 channels a group": (BFLOAT, RESNEXT),
    "16 channels a group": (HALF, Case(N=1, C=64, K=64, groups=4, stride=(2, 2), padding=(1, 1))),
    "32 channels a group": (HALF, Case(N=1, C=64, K=64, groups=2, padding=(1, 1))),
    "a last bundle that is not full": (HALF, Case(N=1, C=72, K=72, groups=9, padding=(1, 1))),
    "unequal widths": (HALF, Case(C=24, K=40, groups=4, padding=(1, 1), residual="contiguous")),
    "odd widths": (FULL, Case(C=15, K=9, groups=3, padding=(2, 2), bias=True, bn=None)),
    "contiguous": (FULL, Case(C=16, K=16, groups=4, padding=(1, 1), x="contiguous", weight="contiguous")),
    "transposed": (BFLOAT, Case(C=16, K=24, groups=4, x="transposed", residual="transposed")),
    "1x1": (HALF, Case(C=64, K=32, R=1, S=1, groups=8, activation="silu")),
    "1x1 image, dilation 3": (HALF, Case(H=1, W=1, C=32, K=32, groups=8, padding=(3, 3), dilation=(3, 3))),
    "channels few, outputs many": (HALF, Case(C=16, K=96, groups=2, padding=(1, 1))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(lane, name):
    dtype, case = SHAPES[name]
    check(lane, conv_bn_act, case, dtype)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    check(lane, conv_bn_act, RESNEXT, HALF)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_integers_are_exact(lane, dtype):
    case = Case(N=1, C=32, K=32, groups=8, padding=(1, 1), bn=None, bias=True, residual="last")
    check_exact(lane, conv_bn_act, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("index", range(len(table_configs("packed", "16-bit", DEVICES["a100"]))))
def test_shipped_configs_compute_right(architecture, index):
    lane = LANES[f"sm_{architecture}"]
    if lane.unavailable():
        pytest.skip(lane.unavailable())
    config = table_configs("packed", "16-bit", device_for_capability(architecture))[index]
    for width in (4, 8, 16):
        case = Case(N=1, C=12 * width, K=12 * width, H=13, W=12, groups=12, padding=(1, 1), bn=None)
        check_exact(lane, conv_bn_act, case, HALF, config=config)


def test_groups_are_packed_into_one_launch():
    launches = []
    tensors = {name: t.to("meta") for name, t in operands(RESNEXT, HALF).items()}
    with observe_launches(launches.append):
        conv_bn_act(**tensors, **RESNEXT.geometry)
    (launch,) = launches
    assert launch.constexprs["PACK"] * 4 <= launch.constexprs["BLOCK_K"]
    assert launch.constexprs["PACK"] > 1
    # 16-byte loads run across groups.
    assert launch.constexprs["VECTOR_X"] == 8


def test_every_width_that_is_packed_fits_every_config():
    for device in DEVICES.values():
        for width in (2, 3, 8, 16, 31, 32):
            shape = shape_of(Case(C=8 * width, K=8 * 32, groups=8))
            assert kernel_of(shape) == "packed"
            assert all(groups_per_tile(shape, config) >= 1 for config in configs(device))


def test_split_columns_are_refused():
    config = configs(DEVICES["h100"])[0].replace(SPLIT_K=2)
    with pytest.raises(UnsupportedConfig, match="SPLIT_K=2"):
        conv_bn_act(torch.randn(1, 8, 5, 5), torch.randn(8, 4, 3, 3), groups=2, config=config)
