"""Stems by rows of their filters: every layout, alignment and edge, and what lies next to a window."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.conv_rows import configs, serves
from fastnets.kernels.conv_shape import conv_call
from fastnets.kernels.conv_training import conv_statistics
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.conv_cases import Case, check, check_exact, operands
from tests.lanes import STRICT_LANES

HALF, BFLOAT = torch.float16, torch.bfloat16
SEVEN = Case(N=2, C=3, H=9, W=12, K=24, R=7, S=7, stride=(2, 2), padding=(3, 3))
THREE = Case(N=1, C=3, H=11, W=10, K=32, stride=(2, 2), padding=(1, 1), activation="silu")
ELEVEN = Case(N=1, C=3, H=23, W=20, K=16, R=11, S=11, stride=(4, 4), padding=(2, 2), bn=None, bias=True)
CASES = {
    "7×7/2": SEVEN,
    "7×7/2, contiguous": dataclasses.replace(SEVEN, x="contiguous", residual="last"),
    "3×3/2": THREE,
    "3×3/2, contiguous": dataclasses.replace(THREE, x="contiguous", weight="contiguous"),
    "11×11/4": ELEVEN,
    "one channel": Case(N=1, C=1, H=7, W=8, K=6, R=5, S=5, stride=(1, 2), padding=(2, 2), x="contiguous"),
    "filter past both edges": Case(N=1, C=3, H=3, W=4, K=8, R=7, S=7, stride=(1, 2), padding=(5, 5)),
    "rows dilated": Case(N=1, C=3, H=9, W=8, K=8, padding=(2, 1), dilation=(2, 1), stride=(1, 2)),
}


def kernels_of(case, dtype=HALF):
    seen = []
    tensors = {name: t.to("meta") for name, t in operands(case, dtype).items()}
    with observe_launches(seen.append), assume_device("h100"):
        conv_bn_act(**tensors, **case.geometry)
    return [launch.name for launch in seen]


@pytest.mark.parametrize("name", CASES)
def test_against_stock(lane, name):
    check(lane, conv_bn_act, CASES[name], BFLOAT if "3×3" in name else HALF)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["7×7/2", "3×3/2, contiguous"])
def test_strictly(lane, name):
    check(lane, conv_bn_act, CASES[name], HALF)


@pytest.mark.parametrize("name", ["7×7/2, contiguous", "11×11/4"])
def test_integers_are_exact(lane, name):
    check_exact(lane, conv_bn_act, dataclasses.replace(CASES[name], bn=None), BFLOAT)


@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_what_lies_next_to_a_window_does_not_reach_it(lane, layout):
    """Accesses are wider than windows: a NaN or an infinity in one pixel is in its own windows' sums only."""
    x = torch.ones(1, 3, 8, 12)
    x[0, 1, 3, 5], x[0, 2, 6, 8] = float("nan"), float("inf")
    weight = torch.ones(8, 3, 3, 3)
    expected = F.conv2d(x, weight, None, 2, 1)
    memory_format = torch.channels_last if layout == "last" else torch.contiguous_format
    placed = lane.put(x.half().contiguous(memory_format=memory_format))
    with lane:
        y = conv_bn_act(placed, lane.put(weight.half()), stride=(2, 2), padding=(1, 1)).cpu().float()
    assert expected.isfinite().any()
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y[y.isfinite()], expected[expected.isfinite()])


def test_images_at_odd_addresses(lane):
    values = torch.randint(-3, 4, (2 * 9 * 12 * 3 + 1,)).half()
    weight = torch.randint(-2, 3, (16, 3, 3, 3)).half()

    def image(whole):
        return whole[1:].view(2, 9, 12, 3).permute(0, 3, 1, 2)

    with lane:
        y = conv_bn_act(image(lane.put(values)), lane.put(weight), stride=(2, 2), padding=(1, 1))
    assert_exact(F.conv2d(image(values).double(), weight.double(), None, 2, 1), y.cpu())


def test_statistics_of_what_is_stored(lane):
    tensors = operands(SEVEN, BFLOAT)
    x, weight = tensors["x"], tensors["weight"]
    with lane:
        z, statistics = conv_statistics(lane.put(x), lane.put(weight), stride=(2, 2), padding=(3, 3))
    z = z.cpu()
    reference = F.conv2d(x.double(), weight.double(), None, 2, 3)
    assert_close_to(reference, F.conv2d(x, weight, None, 2, 3), z)
    mean, m2, count = (t.cpu().double() for t in statistics)
    rows = z.double().permute(0, 2, 3, 1).flatten(0, 2)
    assert_exact(torch.tensor(float(len(rows)), dtype=torch.float64), count.sum())
    whole = (mean * count[:, None]).sum(0) / count.sum()
    torch.testing.assert_close(whole, rows.mean(0), rtol=1e-5, atol=1e-6)
    merged = (m2 + (mean - whole).square() * count[:, None]).sum(0)
    torch.testing.assert_close(merged, rows.var(0, correction=0) * len(rows), rtol=1e-5, atol=1e-6)


def test_64_bit_offsets(lane, monkeypatch):
    from fastnets.kernels import conv_shape

    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check(lane, conv_bn_act, CASES["7×7/2, contiguous"], HALF)
    finally:
        conv_shape.forget_plans()


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("config", configs(DEVICES["h100"]), ids=str)
def test_every_config(lane, config):
    case = dataclasses.replace(THREE, N=2, H=17, W=16, K=40)
    check(lane, conv_bn_act, case, HALF, config=config)


def test_which_calls_are_served():
    by_rows = ["pack_rows_kernel", "conv_rows_kernel"]
    for case in CASES.values():
        assert kernels_of(case) == by_rows
    for case, dtype in (
        (dataclasses.replace(SEVEN, W=11), HALF),  # rows of an odd number of values
        (dataclasses.replace(SEVEN, stride=(1, 1)), HALF),  # windows that begin at odd values, too
        (SEVEN, torch.float32),
        (dataclasses.replace(SEVEN, dilation=(1, 2)), HALF),
        (dataclasses.replace(SEVEN, x="transposed"), HALF),
        (dataclasses.replace(SEVEN, C=16), HALF),  # 112 values of a row
    ):
        assert kernels_of(case, dtype) == ["conv_joint_kernel"]
    with assume_device("t4"):
        x, weight = torch.empty(1, 3, 8, 8, dtype=HALF), torch.empty(8, 3, 3, 3, dtype=HALF)
        call = conv_call(x, weight, (None,) * 5, None, (1, 1), (0, 0), (1, 1), 1, 0.0, "none", 0.0, None)
        assert not serves(call)
