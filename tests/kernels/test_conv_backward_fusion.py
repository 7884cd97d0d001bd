"""What is fused to the gradients of convolutions: the epilogue of dx, the shares and the prologue of dw."""

import dataclasses

import pytest
import torch

from fastnets.kernels.conv_backward import conv_weight_gradient
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.launch import Config
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.conv_cases import ACTIVATIONS, Case, in_layout
from tests.kernels.gradient_cases import (
    CORE,
    SPLIT,
    bn,
    check_exact,
    check_normalized,
    operands,
    run,
    signs,
    stock,
    vectors_of,
)

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32

# The epilogue of the input gradient.


@pytest.mark.parametrize(
    "dtype", [HALF, *(pytest.param(d, marks=pytest.mark.slow) for d in (BFLOAT, FULL))], ids=str
)
def test_normalized(lane, dtype):
    check_normalized(lane, CORE["3x3, stride 2"], dtype, added="last")


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_normalized_with_every_activation(lane, activation):
    case = Case(N=1, C=20, H=5, W=5, K=16, R=1, S=1)
    check_normalized(lane, case, BFLOAT if activation in ("silu", "relu6") else FULL, activation)


NORMALIZED = {
    "3x3": (CORE["3x3"], {"added": "last"}),
    "narrow groups": (Case(C=64, K=64, H=4, W=5, padding=(1, 1), groups=16), {"added": "last"}),
    "wide groups": (Case(N=1, C=80, K=96, H=4, W=5, padding=(1, 1), groups=2), {}),
    "odd channels, contiguous": (Case(C=19, K=24), {"added": "contiguous", "layout": "contiguous"}),
    "sliced": (Case(C=24, K=16, stride=(2, 2)), {"added": "sliced", "layout": "sliced"}),
    "expanded": (Case(C=24, K=16, R=1, S=1, stride=(2, 2)), {"added": "expanded", "layout": "transposed"}),
    "gelu": (Case(C=24, K=16), {"activation": "gelu", "affine": False}),
}


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("name", NORMALIZED)
def test_normalized_in_odd_cases(lane, name):
    case, options = NORMALIZED[name]
    check_normalized(lane, case, HALF, **options)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("case", [CORE["1x1"], Case(N=1, C=19, H=5, W=5, K=16)], ids=["bytes", "odd"])
def test_derivative_from_a_mask(lane, case):
    check_normalized(lane, case, HALF, added="last", mask=True)


MASKED = {
    "contiguous": (Case(N=1, C=24, K=16, stride=(2, 2)), {"layout": "contiguous"}),
    "narrow groups": (Case(N=1, C=64, K=64, H=4, W=5, padding=(1, 1), groups=16), {}),
    "groups of 8": (Case(N=1, C=32, K=32, H=4, W=5, padding=(1, 1), groups=4), {}),
    "split": (CORE["3x3"], {"config": SPLIT}),
    "depthwise": (Case(N=1, C=24, K=24, padding=(1, 1), groups=24), {}),
    "odd depthwise": (Case(N=1, C=19, K=19, padding=(1, 1), groups=19, stride=(2, 2)), {"added": "last"}),
}


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("name", MASKED)
def test_mask_in_odd_cases(lane, name):
    case, options = MASKED[name]
    check_normalized(lane, case, HALF, mask=True, **options)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("added", ["last", "contiguous", "sliced", "expanded"])
def test_added_alone(lane, added):
    """Also to pixels that no tap reaches: with stride 2 under a 1×1 filter, three of four."""
    case = Case(C=24, K=16, R=1, S=1, stride=(2, 2))
    dy, x, weight = operands(case, HALF, signs)
    added = in_layout(signs(*x.shape).to(HALF), added)
    on_lane = lane.put(added)
    dx, _ = run(lane, case, dy, x, weight, dx={"added": on_lane})
    assert_exact(stock(case, dy, x, weight, torch.float64)[0] + added, dx)


def test_split_filters(lane):
    """Shares of 9 taps of 2 blocks, the last short; under a stride, classes of 1, 2, 2 and 4 taps of them."""
    check_normalized(lane, dataclasses.replace(CORE["3x3"], K=40), HALF, added="last", config=SPLIT)
    check_normalized(lane, dataclasses.replace(CORE["3x3, stride 2"], K=40), HALF, config=SPLIT)


def test_halves(lane):
    config = SPLIT.replace(SPLIT_K=1, HALVES=True)
    check_normalized(lane, CORE["3x3"], HALF, added="last", config=config)


# The weight gradient's shares and prologue.


@pytest.mark.parametrize(
    "splits", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_shares_of_pixels(lane, splits):
    case = Case(N=3, C=8, K=16, H=4, W=5, padding=(1, 1))
    config = Config(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, SPLIT_K=1, HALVES=False)
    check_exact(lane, case, HALF, dw={"splits": splits, "config": config})


PROLOGUES = {
    "3x3": Case(N=1, C=40, K=24, padding=(1, 1)),
    "3x3 of 64 channels": Case(N=1, C=64, H=4, K=24, padding=(1, 1)),
    "1x1": Case(N=1, C=48, K=24, R=1, S=1),
    "stride 2": Case(C=24, K=16, padding=(2, 1), stride=(2, 2), x="sliced"),
    "narrow groups": Case(N=1, C=32, K=32, padding=(1, 1), groups=8),
}


@pytest.mark.parametrize(
    "name", ["3x3", *(pytest.param(n, marks=pytest.mark.slow) for n in PROLOGUES if n != "3x3")]
)
def test_prologue_is_exact_and_leaves_padding_zero(lane, name):
    case = PROLOGUES[name]
    dy, z, weight = operands(case, HALF, signs)
    vectors = (signs(case.C), 2.0 ** signs(case.C), signs(case.C), 1.0 + signs(case.C).abs())
    prologue = Prologue(*(lane.put(v) for v in vectors), "relu")
    put_dy, put_z = lane.put(dy), lane.put(z)
    with lane:
        dw = conv_weight_gradient(put_dy, put_z, weight.shape, **case.geometry, prologue=prologue)
    y = torch.relu(bn(z, vectors, torch.float64)[1])
    expected = stock(case, dy, y, weight, torch.float64)[1]
    assert expected.abs().max() <= 1024, "halves are exact in float16 below 1024"
    assert_exact(expected, dw)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prologue_with_every_activation(lane, activation):
    case = Case(N=1, C=20, H=5, W=5, K=16, padding=(1, 1))
    dtype = BFLOAT if activation in ("silu", "relu6") else FULL
    dy, z, weight = operands(case, dtype)
    vectors = vectors_of(case.C, affine=activation != "tanh")
    prologue = Prologue(*(lane.put(v) for v in vectors), activation, 0.2)
    put_dy, put_z = lane.put(dy), lane.put(z)
    with lane:
        ours = conv_weight_gradient(put_dy, put_z, weight.shape, **case.geometry, prologue=prologue)
    y = ACTIVATIONS[activation](bn(z, vectors, torch.float64)[1], 0.2)
    usual = ACTIVATIONS[activation](bn(z, vectors, FULL)[1], 0.2).to(dtype)
    reference, eager = stock(case, dy, y, weight, torch.float64)[1], stock(case, dy, usual, weight)[1]
    assert_close_to(reference, eager, ours, ratio=3)
