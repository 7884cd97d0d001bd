"""A convolution whose channels take turns with those of another tensor, against stock in every lane."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnets.bench.static import inspect_call
from fastnets.kernels import conv_shape
from fastnets.kernels.conv import conv_bn_act, shuffles
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import Case, in_layout, operands, output_shape, run, stock
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32

# (dtype, the convolution, where the channels that pass lie)
CASES = {
    "half of a tensor": (HALF, Case(C=64, K=64, R=1, S=1, x="misaligned"), "first half"),
    "second half, stage 2": (HALF, Case(C=58, H=5, W=4, K=58, R=1, S=1), "second half"),
    "another's result": (BFLOAT, Case(C=48, H=5, W=4, K=72, R=1, S=1), "last"),
    "bf16, odd": (BFLOAT, Case(C=40, H=3, W=5, K=19, R=1, S=1, bias=True, bn=None), "first half"),
    "fp32": (FULL, Case(C=33, H=3, W=5, K=17, R=1, S=1, activation="silu"), "second half"),
    "fp32, 3x3, stride 2": (FULL, Case(C=32, H=6, W=5, K=24, padding=(1, 1), stride=(2, 2)), "last"),
    "one channel": (HALF, Case(C=32, H=3, W=4, K=1, R=1, S=1), "last"),
    "groups": (HALF, Case(C=128, H=4, W=3, K=96, R=1, S=1, groups=2), "first half"),
    "misaligned": (HALF, Case(C=64, H=4, W=5, K=40, R=1, S=1), "misaligned"),
}


def passing(case, dtype, layout, draw=torch.randn):
    """[N, K, P, Q] of what passes, alone or as channels of a wider tensor, whose others are NaN."""
    N, K, P, Q = size = output_shape(case)
    values = draw(*size).to(dtype)
    if "half" not in layout:
        return in_layout(values, layout)
    whole = torch.full((N, P, Q, 2 * K), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    return whole[:, :K].copy_(values) if layout == "first half" else whole[:, K:].copy_(values)


def check(lane, name, **options):
    dtype, case, layout = CASES[name]
    tensors, passed = operands(case, dtype), passing(case, dtype, layout)
    y = run(lane, conv_bn_act, case, tensors, passed=lane.put(passed), **options)
    N, K, P, Q = output_shape(case)
    assert y.shape == (N, 2 * K, P, Q)
    assert torch.equal(y[:, ::2].cpu(), passed)
    assert_close_to(stock(case, tensors, torch.float64), stock(case, tensors), y[:, 1::2].cpu())


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_stock_and_the_rest_untouched(lane, name):
    check(lane, name)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["half of a tensor", "second half, stage 2", "bf16, odd", "fp32"])
def test_strictly(lane, name):
    check(lane, name)


@pytest.mark.parametrize("name", ["another's result", "second half, stage 2"])
def test_split_columns(lane, name):
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1]
    check(lane, name, config=config.replace(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, SPLIT_K=2, HALVES=False))


def test_a_plan_is_of_one_layout(lane):
    _, case, _ = CASES["fp32"]
    tensors = operands(case, FULL)
    for layout in ("last", "first half", "misaligned", "last"):
        passed = passing(case, FULL, layout)
        y = run(lane, conv_bn_act, case, tensors, passed=lane.put(passed))
        assert torch.equal(y[:, ::2].cpu(), passed)


def test_columns_finished_in_halves(lane):
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1]
    check(lane, "second half, stage 2", config=config.replace(BLOCK_M=32, BLOCK_N=32, HALVES=True))


def test_64_bit_offsets(lane, monkeypatch):
    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check(lane, "half of a tensor")
    finally:
        conv_shape.forget_plans()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FULL], ids=str)
def test_integers_are_exact(lane, dtype):
    def draw(*shape):
        return integers(*shape, low=-1, high=1)

    case = Case(C=48, H=3, W=4, K=24, R=1, S=1, bn=None, bias=True)
    tensors = operands(case, dtype, draw)
    passed = passing(case, dtype, "second half", lambda *shape: integers(*shape, low=-9, high=9))
    y = run(lane, conv_bn_act, case, tensors, passed=lane.put(passed))
    expected = F.relu(F.conv2d(*(tensors[key].double() for key in ("x", "weight", "bias"))))
    assert expected.abs().max() <= 256
    assert_exact(F.channel_shuffle(torch.cat((passed.double(), expected), 1), 2), y)


def test_what_passes_is_not_computed_with(lane):
    """Not-a-numbers, infinities and negative zeros come out as they went in."""
    case = Case(C=32, H=2, W=3, K=8, R=1, S=1)
    passed = in_layout(torch.tensor([float("nan"), float("inf"), -0.0]).repeat(32).view(2, 8, 2, 3), "last")
    y = run(lane, conv_bn_act, case, operands(case, FULL), passed=lane.put(passed))
    bits = y[:, ::2].cpu().contiguous().view(torch.int32)
    assert torch.equal(bits, passed.contiguous().view(torch.int32))


def meta(*size, dtype=HALF):
    return torch.empty(size, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


UNITS = [(58, 28), (116, 28), (232, 14), (464, 7)]  # half the channels, and the side, of stages


@pytest.mark.parametrize("gpu", ["a100", "h100", "rtx4090"])
@pytest.mark.parametrize("K, side", UNITS)
def test_a_unit_reads_both_halves_and_writes_once(gpu, K, side):
    x, weight, whole = meta(32, K, side, side), meta(K, K, 1, 1), meta(32, 2 * K, side, side)
    seen = []
    with assume_device(gpu), observe_launches(seen.append):
        y = conv_bn_act(x, weight, passed=whole[:, :K])
    (launched,) = seen
    assert y.shape == whole.shape
    assert launched.bytes_written == y.nbytes
    assert launched.bytes_read == x.nbytes + weight.nbytes + y.nbytes // 2
    assert launched.flops == 2 * x.numel() * K


@pytest.mark.parametrize("dtype, precision", [(HALF, ""), (BFLOAT, ""), (FULL, "ieee"), (FULL, "tf32")])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("K, side", UNITS)
def test_compiles_without_spills(capability, K, side, dtype, precision):
    def thunk(config=None):
        tensors = (meta(32, K, side, side, dtype=dtype), meta(K, K, 1, 1, dtype=dtype))
        bn = [torch.empty(K, device="meta") for _ in range(4)]
        passed = meta(32, 2 * K, side, side, dtype=dtype)[:, :K]
        conv_bn_act(*tensors, None, *bn, passed=passed, activation="relu", config=config)

    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, precision or switch.fp32_precision
    try:
        found = inspect_call(thunk, None, capability)
    finally:
        switch.fp32_precision = before
    assert not any(facts.complaint for facts in found)
    assert found[0].kernel == "conv_kernel"


def test_only_channels_last_and_taps_are_served():
    x, weight = torch.ones(2, 32, 4, 5), torch.ones(8, 32, 1, 1)
    passed = in_layout(torch.ones(2, 8, 4, 5), "last")
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    assert shuffles(x, weight, passed, **plain)
    assert not shuffles(x, weight, passed.contiguous(), **plain)
    assert not shuffles(x, weight, in_layout(passed, "sliced"), **plain)
    few = torch.ones(8, 4, 3, 3)
    assert not shuffles(x[:, :4], few, passed, **{**plain, "padding": (1, 1)})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"passed": torch.ones(2, 9, 4, 5)}, ValueError, r"passed has shape \[2, 9, 4, 5\].* \[2, 8, 4, 5\]"),
        ({"passed": torch.ones(2, 8, 4, 5).half()}, TypeError, "passed is torch.float16 but x is"),
        ({"passed": torch.ones(2, 8, 4, 5)}, UnsupportedConfig, "passed: .*channels-last"),
        ({"residual": torch.ones(2, 8, 4, 5)}, UnsupportedConfig, "passed: a residual"),
        ({"prologue": Prologue(torch.ones(32), torch.ones(32))}, UnsupportedConfig, "passed: .*a prologue"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_so(change, error, message):
    given = {"passed": in_layout(torch.ones(2, 8, 4, 5), "last"), **change}
    with pytest.raises(error, match=message):
        conv_bn_act(torch.ones(2, 32, 4, 5), torch.ones(8, 32, 1, 1), **given)


def test_depthwise_filters_say_so():
    case = dataclasses.replace(CASES["fp32"][1], C=32, K=32, groups=32)
    passed = in_layout(torch.ones(output_shape(case)), "last")
    with pytest.raises(UnsupportedConfig, match="depthwise kernel"):
        conv_bn_act(**operands(case, FULL), groups=32, passed=passed)
