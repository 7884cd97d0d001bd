"""Convolutions that emit the statistics of their output and normalise their input, in every lane."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import conv_shape
from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.conv_training import conv_statistics
from fastnets.kernels.device import DEVICES
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to
from tests.kernels.conv_cases import ACTIVATIONS, Case, in_layout, operands, stock
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
SLOW = pytest.mark.slow


def plain(**changes) -> Case:
    """A convolution with nothing behind it."""
    return Case(**{"bn": None, "activation": "none", **changes})


def run(lane, case: Case, tensors: dict, **options):
    tensors = {name: lane.put(tensor) for name, tensor in tensors.items()}
    if "prologue" in options:
        before = options["prologue"]
        vectors = (lane.put(vector) for vector in before.tensors)
        options["prologue"] = Prologue(*vectors, before.activation, before.negative_slope)
    with lane:
        z, statistics = conv_statistics(**tensors, **case.geometry, **options)
    assert z.is_contiguous(memory_format=torch.channels_last)
    return z.cpu(), type(statistics)(*(t.cpu() for t in statistics))


def assert_statistics_of(z: torch.Tensor, statistics) -> None:
    """The tiles, merged by Chan's formula in float64, are as near to z's moments as one pass in fp32 is."""
    mean, m2, count = statistics
    assert all(t.dtype == torch.float32 for t in statistics)
    assert mean.shape == m2.shape == (len(count), z.shape[1])
    assert count.sum() == z.numel() // z.shape[1]
    assert (count > 0).all()
    assert (m2 >= 0).all()
    weight = count.double()[:, None]
    total = (mean.double() * weight).sum(0) / weight.sum()
    spread = (m2.double() + weight * (mean.double() - total) ** 2).sum(0)
    values = z.transpose(0, 1).flatten(1)
    exact_mean = values.double().mean(1)
    exact_m2 = ((values.double() - exact_mean[:, None]) ** 2).sum(1)
    size = values.double().abs().mean(1)
    assert ((total - exact_mean).abs() <= 2**-22 * size).all(), (total - exact_mean).abs() / size
    assert ((spread - exact_m2).abs() <= 2**-19 * exact_m2 + 2**-40 * size**2).all()


SHAPES = {
    "3x3": (HALF, plain(padding=(1, 1), bias=True)),
    "3x3, fp32": (FULL, plain(C=32, padding=(1, 1))),
    "1x1, bf16": (BFLOAT, plain(C=96, K=72, R=1, S=1)),
    "strided, odd K": (HALF, plain(C=37, K=19, H=9, W=10, stride=(2, 3), padding=(1, 1))),
    "one pixel": (HALF, plain(N=1, H=1, W=1, padding=(1, 1))),
    "several tiles": (BFLOAT, plain(N=3, C=32, H=12, W=11, K=24, padding=(1, 1))),
    "stem": (HALF, plain(N=1, C=3, H=17, W=15, K=24, R=7, S=7, stride=(2, 2), padding=(3, 3))),
    "2 groups": (HALF, plain(C=96, K=80, padding=(1, 1), groups=2)),
    "narrow groups": (BFLOAT, plain(C=72, K=72, padding=(1, 1), groups=9)),
    "depthwise": (HALF, plain(C=40, K=40, H=11, groups=40, padding=(1, 1), bias=True)),
    "depthwise, strided, odd": (FULL, plain(C=7, K=14, H=9, W=9, groups=7, stride=(2, 2), padding=(1, 1))),
    "transposed": (FULL, plain(C=36, padding=(1, 1), x="transposed", weight="transposed")),
    "expanded": (BFLOAT, plain(C=40, padding=(1, 1), x="expanded")),
    "sliced": (HALF, plain(C=40, R=1, S=1, x="sliced")),
}  # fmt: skip


FEW = ("3x3", "depthwise", "narrow groups", "stem")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=SLOW) for n in SHAPES])
def test_statistics(lane, name):
    check_statistics(lane, name)


def check_statistics(lane, name):
    dtype, case = SHAPES[name]
    tensors = operands(case, dtype)
    z, statistics = run(lane, case, tensors)
    assert_close_to(stock(case, tensors, torch.float64), stock(case, tensors), z)
    assert_statistics_of(z, statistics)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_strictly(lane, name):
    # Each warp that has a channel's statistics writes them to shared memory on their way out: the same bytes.
    check_statistics(lane.but(shared_races=None), name)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("name", ["3x3", "stem", "narrow groups", "depthwise"])
def test_the_output_is_that_of_inference(lane, name):
    dtype, case = SHAPES[name]
    tensors = operands(case, dtype)
    z, _ = run(lane, case, tensors)
    with lane:
        y = conv_bn_act(**{name: lane.put(t) for name, t in tensors.items()}, **case.geometry)
    assert torch.equal(z, y.cpu())


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
def test_split_columns_are_summed_up_behind(lane):
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1]
    config = config.replace(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, SPLIT_K=4)
    case = plain(C=72, H=5, W=9, padding=(1, 1))
    tensors = operands(case, HALF)
    z, statistics = run(lane, case, tensors, config=config)
    assert_close_to(stock(case, tensors, torch.float64), stock(case, tensors), z)
    assert len(statistics.count) == 3
    assert_statistics_of(z, statistics)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_constants_have_no_variance(lane, name):
    _, case = SHAPES[name]
    tensors = operands(case, FULL)
    tensors["weight"].zero_()
    tensors["bias"] = torch.linspace(-1e4, 1e4, case.K)
    _, (mean, m2, _) = run(lane, case, tensors)
    assert torch.equal(mean, tensors["bias"].expand(mean.shape))
    # A rough mean off by its last bit leaves the rounding of that bit's square, and never less than nothing.
    assert (m2 >= 0).all()
    assert m2.max() <= (2**-24 * 1e4) ** 2


@pytest.mark.lanes("sm_90", "gpu")
@pytest.mark.parametrize("name", ["3x3, fp32", "depthwise"])
def test_a_large_mean_does_not_drown_a_small_variance(lane, name):
    _, case = SHAPES[name]
    case = dataclasses.replace(case, N=1, H=5, W=5, bias=True)  # one tile: merging is not tested here
    tensors = operands(case, FULL)
    tensors["weight"] *= 1e-2
    tensors["bias"] = torch.full((case.K,), 1e4)
    z, (mean, m2, count) = run(lane, case, tensors)
    assert count.tolist() == [25]
    values = z.flatten(2)[0].double()
    spread = ((values - values.mean(1, keepdim=True)) ** 2).sum(1)
    assert ((mean[0] - values.mean(1)).abs() <= 2**-23 * 1e4).all()
    assert ((m2[0] - spread).abs() <= 1e-5 * spread).all()


@pytest.mark.slow
def test_64_bit_offsets(lane, monkeypatch):
    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check_statistics(lane, "several tiles")
    finally:
        conv_shape.forget_plans()


@pytest.mark.lanes("sm_80")
def test_bit_identical_from_run_to_run(lane):
    dtype, case = SHAPES["several tiles"]
    tensors = operands(case, dtype)
    first, second = run(lane, case, tensors), run(lane.but(order="shuffled"), case, tensors)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("shape", [(0, 64, 7, 7), (0, 3, 9, 9), (0, 8, 9, 9)])
def test_empty_batch_has_no_tiles(shape):
    launches = []
    groups = 8 if shape[1] == 8 else 1
    with observe_launches(launches.append):
        z, statistics = conv_statistics(
            torch.randn(shape), torch.randn(8, shape[1] // groups, 3, 3), groups=groups
        )
    assert z.shape == (0, 8, shape[2] - 2, shape[3] - 2)
    assert statistics.mean.shape == statistics.m2.shape == (0, 8)
    assert statistics.count.shape == (0,)
    assert not launches


def test_statistics_cost_one_launch_and_little_traffic():
    launches = []
    x = torch.empty(32, 64, 56, 56, dtype=HALF, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, dtype=HALF, device="meta")
    with observe_launches(launches.append):
        z, statistics = conv_statistics(x, weight, padding=(1, 1))
    (launch,) = launches
    assert launch.bytes_written == 2 * z.numel() + 4 * sum(t.numel() for t in statistics)
    assert launch.bytes_written <= 1.07 * 2 * z.numel()


# --- the prologue


def prologue_for(C: int, activation="relu", affine=True, dtype=torch.float32) -> Prologue:
    # Shifts well above 0, so that padding that was normalised would show.
    affine = (torch.randn(C).to(dtype), (torch.rand(C) + 0.5).to(dtype)) if affine else (None, None)
    return Prologue(torch.randn(C), torch.rand(C) + 0.5, *affine, activation, 0.2)


def unfused(case: Case, tensors: dict, before: Prologue, dtype: torch.dtype, rounded: torch.dtype | None):
    """The convolution of a stored act(bn(x)); float64 does not round it."""
    mean, rstd, weight, bias = (None if v is None else v.to(dtype)[:, None, None] for v in before.tensors)
    y = (tensors["x"].to(dtype) - mean) * (rstd if weight is None else rstd * weight)
    y = ACTIVATIONS[before.activation](y if bias is None else y + bias, before.negative_slope)
    cast = {**tensors, "x": y if rounded is None else y.to(rounded)}
    return stock(case, cast, dtype if rounded is None else None)


PROLOGUES = {
    "fp16": (HALF, plain(C=96, K=72, R=1, S=1), "relu"),
    "bf16, odd": (BFLOAT, plain(N=1, C=37, K=19, R=1, S=1), "silu"),
    "fp32": (FULL, plain(C=40, K=24, R=1, S=1), "relu6"),
    "stride 2": (HALF, plain(C=64, H=9, W=8, R=1, S=1, stride=(2, 2)), "relu"),
    "padded": (HALF, plain(N=1, C=40, H=4, W=3, R=1, S=1, padding=(2, 1), bias=True), "sigmoid"),
    "wide groups": (HALF, plain(C=96, K=80, R=1, S=1, groups=2), "leaky_relu"),
    "contiguous": (BFLOAT, plain(C=48, R=1, S=1, x="contiguous", weight="contiguous"), "hardswish"),
    "sliced": (HALF, plain(C=40, R=1, S=1, x="sliced"), "none"),
}


@pytest.mark.parametrize(
    "name", [n if n in ("stride 2", "padded") else pytest.param(n, marks=SLOW) for n in PROLOGUES]
)
def test_prologue(lane, name):
    check_prologue(lane, name)


def check_prologue(lane, name):
    dtype, case, activation = PROLOGUES[name]
    tensors = operands(case, dtype)
    before = prologue_for(case.C, activation, affine=name != "sliced")
    z, statistics = run(lane, case, tensors, prologue=before)
    reference = unfused(case, tensors, before, torch.float64, None)
    assert_close_to(reference, unfused(case, tensors, before, torch.float32, dtype), z)
    assert_statistics_of(z, statistics)


@pytest.mark.lanes(*STRICT_LANES)
def test_prologue_strictly(lane):
    check_prologue(lane.but(shared_races=None), "padded")


@pytest.mark.lanes("sm_80", "gpu")
def test_prologue_rounds_as_a_stored_activation(lane):
    # x of fp16, scaled by 2^-12 to where fp16 has 3 bits left: unrounded products would differ.
    case = plain(N=1, C=32, H=4, W=4, K=16, R=1, S=1)
    tensors = operands(case, HALF)
    before = Prologue(torch.zeros(32), torch.full((32,), 2.0**-22), None, None, "relu")
    z, _ = run(lane, case, tensors, prologue=before)
    stored = F.relu(tensors["x"].float() * 2.0**-22).half()
    with lane:
        expected = conv_bn_act(lane.put(stored), lane.put(tensors["weight"]))
    assert torch.equal(z, expected.cpu())


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prologue_activations(lane, activation):
    case = plain(N=1, C=32, H=4, W=4, K=16, R=1, S=1)
    tensors = operands(case, FULL)
    before = prologue_for(32, activation, dtype=HALF)
    z, _ = run(lane, case, tensors, prologue=before)
    reference = unfused(case, tensors, before, torch.float64, None)
    assert_close_to(reference, unfused(case, tensors, before, torch.float32, FULL), z)


@pytest.mark.slow
@pytest.mark.lanes("interpreter", "sm_90")
def test_prologue_with_split_columns(lane):
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1].replace(SPLIT_K=4)
    case = plain(C=320, K=24, R=1, S=1)
    tensors = operands(case, HALF)
    before = prologue_for(case.C)
    z, statistics = run(lane, case, tensors, prologue=before, config=config)
    reference = unfused(case, tensors, before, torch.float64, None)
    assert_close_to(reference, unfused(case, tensors, before, torch.float32, HALF), z)
    assert_statistics_of(z, statistics)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.ones(8, 32, 3, 3)}, UnsupportedConfig, "3x3 filter would normalise every pixel 9"),
        ({"weight": torch.ones(32, 1, 1, 1), "groups": 32}, UnsupportedConfig, "depthwise kernel"),
        ({"weight": torch.ones(8, 8, 1, 1), "groups": 4}, UnsupportedConfig, "packed kernel"),
        ({"prologue": prologue_for(8)}, ValueError, r"prologue.mean has shape \[8\], expected \[32\]"),
        ({"prologue": prologue_for(32, "relu7")}, ValueError, "unknown activation 'relu7'"),
        ({"bias": torch.ones(4)}, ValueError, "bias has shape"),
        ({"weight": torch.ones(8, 32, 1, 1).half()}, TypeError, "weight is torch.float16"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.ones(1, 32, 5, 5), "weight": torch.ones(8, 32, 1, 1)}
    with pytest.raises(error, match=message):
        conv_statistics(**{**arguments, "prologue": prologue_for(32), **change})


@pytest.mark.lanes("interpreter", "gpu")
def test_vectors_of_any_stride_are_taken(lane):
    case = plain(N=1, C=32, H=4, W=4, K=16, R=1, S=1)
    tensors = operands(case, HALF)
    before = prologue_for(64)
    spread = Prologue(*(vector[::2] for vector in before.tensors), "relu")
    z, _ = run(lane, case, tensors, prologue=spread)
    reference = unfused(case, tensors, spread, torch.float64, None)
    assert_close_to(reference, unfused(case, tensors, spread, torch.float32, HALF), z)
    assert in_layout(tensors["x"], "last").equal(tensors["x"])
