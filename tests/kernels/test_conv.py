"""Dense convolution with its epilogue against stock PyTorch, in every lane."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from fastnets.kernels import conv_shape
from fastnets.kernels.conv import choose_config, configs, conv_bn_act
from fastnets.kernels.conv_configs import kernel_configs, kernel_of, table_configs
from fastnets.kernels.device import DEVICES, assume_device, device_for_capability
from fastnets.kernels.launch import Config, UnsupportedConfig, observe_launches
from tests.kernels.conv_cases import ACTIVATIONS, Case, check, check_exact, operands, run, shape_of, stock
from tests.lanes import LANES, STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FULL, HALF, BFLOAT)


CORE = {
    "3x3": Case(padding=(1, 1), residual="last"),
    "1x1": Case(C=96, K=72, R=1, S=1, residual="last", activation="silu"),
    "stem": Case(N=1, C=3, H=17, W=15, K=24, R=7, S=7, stride=(2, 2), padding=(3, 3), x="contiguous"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORE)
def test_core(lane, name, dtype):
    case = CORE[name]
    if dtype == FULL and case.C > 32:
        case = dataclasses.replace(case, C=32)  # fp32 multiplies one element at a time in the emulator
    check(lane, conv_bn_act, case, dtype)


# Each odd shape in one dtype; test_core has the usual ones in all.
SHAPES = {
    "1x1 image": (HALF, Case(H=1, W=1, padding=(1, 1))),
    "1x1 image, 1x1 filter": (BFLOAT, Case(H=1, W=1, N=3, R=1, S=1, activation="gelu")),
    "odd C and K": (HALF, Case(C=37, K=19, padding=(1, 1), bias=True, bn=None, activation="tanh")),
    "C = 72, K = 1": (BFLOAT, Case(C=72, K=1, padding=(1, 1), activation="hardswish")),
    "stride above the filter": (HALF, Case(H=9, W=10, R=2, S=1, stride=(3, 4))),
    "strided 1x1": (HALF, Case(C=48, R=1, S=1, stride=(2, 2), bn=None, activation="none")),
    "padding above the filter": (HALF, Case(H=4, W=3, padding=(4, 5), activation="leaky_relu")),
    "padded 1x1": (FULL, Case(C=40, R=1, S=1, padding=(2, 1), activation="sigmoid")),
    "batch 1": (BFLOAT, Case(N=1, padding=(1, 1), bn="no affine", bias=True)),
    "dilation 3": (HALF, Case(H=9, W=8, padding=(3, 3), dilation=(3, 3), activation="hardsigmoid")),
    "1x7": (HALF, Case(H=4, W=9, R=1, S=7, padding=(0, 3))),
    "7x1, unequal strides": (BFLOAT, Case(H=9, W=4, R=7, S=1, stride=(2, 1), padding=(3, 0))),
    "unequal dilation": (FULL, Case(C=33, H=9, W=7, stride=(1, 2), padding=(1, 2), dilation=(2, 1))),
    "more taps than bits": (HALF, Case(N=1, C=32, R=7, S=7, padding=(3, 3), K=16, activation="gelu_tanh")),
    "contiguous": (
        HALF,
        Case(C=40, padding=(1, 1), x="contiguous", weight="contiguous", residual="contiguous"),
    ),
    "sliced": (HALF, Case(C=40, padding=(1, 1), x="sliced", residual="sliced")),
    "transposed": (
        FULL,
        Case(C=36, padding=(1, 1), x="transposed", weight="transposed", residual="transposed"),
    ),
    "misaligned": (HALF, Case(padding=(1, 1), x="misaligned", residual="misaligned")),
    "expanded": (BFLOAT, Case(padding=(1, 1), x="expanded", residual="expanded")),
    "1x1 of a contiguous image": (HALF, Case(C=32, R=1, S=1, x="contiguous")),
    "1x1 of a sliced image": (BFLOAT, Case(C=32, R=1, S=1, x="sliced")),
    "LeNet, 1 channel": (
        FULL,
        Case(C=1, H=9, W=9, K=6, R=5, S=5, padding=(2, 2), bn=None, activation="sigmoid"),
    ),
    "LeNet, 6 channels": (FULL, Case(C=6, H=9, W=9, K=16, R=5, S=5, bias=True, bn=None, activation="tanh")),
    "24 channels": (HALF, Case(C=24, K=24, padding=(1, 1), residual="last", activation="relu6")),
    "16 channels, dilated": (BFLOAT, Case(C=16, K=16, padding=(2, 2), dilation=(2, 2), x="sliced")),
    "2 groups": (HALF, Case(C=96, K=80, padding=(1, 1), groups=2, residual="last")),
    "2 groups of odd width": (FULL, Case(C=70, K=66, groups=2, padding=(1, 1))),
    "depthwise": (HALF, Case(C=40, K=40, groups=40, padding=(1, 1), residual="last")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(lane, name):
    dtype, case = SHAPES[name]
    check(lane, conv_bn_act, case, dtype)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", CORE)
def test_strictly(lane, name):
    check(lane, conv_bn_act, CORE[name], HALF)


EXACT = {
    "3x3": Case(padding=(1, 1), bn=None, bias=True, residual="last"),
    "joint": Case(C=16, K=12, padding=(1, 1), bn=None),
    "1x1": Case(C=80, R=1, S=1, bn=None, residual="contiguous"),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_integers_are_exact(lane, name, dtype):
    check_exact(lane, conv_bn_act, EXACT[name], dtype)


def test_split_k(lane):
    # 9 taps of 3 blocks, the last short: shares of 7, 7, 7 and 6.
    config = table_configs("taps", "16-bit", DEVICES["h100"])[-1]
    config = config.replace(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, SPLIT_K=4)
    case = Case(C=72, H=5, padding=(1, 1), residual="last")
    check(lane, conv_bn_act, case, HALF, config=config)


@pytest.mark.parametrize("name", ["3x3", "stem"])
def test_64_bit_offsets(lane, name, monkeypatch):
    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check(lane, conv_bn_act, CORE[name], HALF)
    finally:
        conv_shape.forget_plans()


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(lane, activation):
    case = Case(N=1, C=32, H=4, W=4, K=16, R=1, S=1, activation=activation)
    check(lane, conv_bn_act, case, FULL, negative_slope=0.2, eps=1e-3)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("vector_dtype", [HALF, FULL], ids=str)
def test_batch_norm_in_either_dtype(lane, vector_dtype):
    check(lane, conv_bn_act, Case(C=32, R=1, S=1, bias=True), HALF, vector_dtype=vector_dtype)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_nan_and_infinity_are_computed(lane):
    # Without padding: there, stock skips the products that are 0 · NaN here, as in any matrix product.
    case = Case(C=32, H=5, W=5, K=16, bn=None)
    tensors = operands(case, FULL)
    tensors["weight"][3, 5, 1, 1] = float("nan")
    tensors["weight"][7, 2, 0, 0] = float("inf")
    y = run(lane, conv_bn_act, case, tensors)
    expected = stock(case, tensors)
    assert torch.equal(torch.isnan(y.cpu()), torch.isnan(expected))
    assert torch.equal(torch.isinf(y.cpu()), torch.isinf(expected))


@pytest.mark.parametrize("shape", [(0, 64, 7, 7), (0, 3, 9, 9)])
def test_empty_batch_launches_nothing(shape):
    launches = []
    with observe_launches(launches.append):
        y = conv_bn_act(torch.randn(shape), torch.randn(8, shape[1], 3, 3))
    assert y.shape == (0, 8, shape[2] - 2, shape[3] - 2)
    assert not launches


MASKED = {
    "padding": Case(C=40, N=1, H=4, W=3, padding=(4, 5)),
    "tails": Case(C=40, N=1, R=1, S=1, K=19),
    "more taps than bits": Case(C=32, N=1, H=3, W=3, R=7, S=7, padding=(3, 3), K=16),
    "joint columns": Case(C=24, N=1, H=4, W=4, padding=(2, 2)),
    "packed groups": Case(C=24, N=1, H=4, W=4, K=24, padding=(2, 2), groups=3),
}


@pytest.mark.lanes("interpreter")
@pytest.mark.parametrize("name", MASKED)
def test_masked_addresses_stay_inside(lane, name, monkeypatch):
    """An asynchronous copy may touch what its mask excludes: windows and filters have no wild addresses."""
    from tests.interpreter import Extents

    shapes = []
    original = Extents.check

    def check_all(self, pointers, mask, width, what):
        if what == "load" and pointers.shape in [(64, 32), (32, 16)]:
            shapes.append(pointers.shape)
            mask = np.ones_like(mask)
        original(self, pointers, mask, width, what)

    monkeypatch.setattr(Extents, "check", check_all)
    config = Config(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, GROUP_M=8, SPLIT_K=1, HALVES=False)
    check(lane, conv_bn_act, MASKED[name], HALF, config=config)
    assert (64, 32) in shapes


def shipped():
    """Every config of every table, on the emulated devices; all but a few of them marked slow."""
    listed = [
        (capability, kernel, products, config)
        for capability in (80, 90)
        for kernel in ("taps", "joint")
        for products in ("16-bit", "tf32", "fma")
        for config in table_configs(kernel, products, device_for_capability(capability))
    ]
    fast = random.Random(3).sample(range(len(listed)), 6)
    for i, (capability, kernel, products, c) in enumerate(listed):
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}-warps{c.num_warps}-split{c.SPLIT_K}"
        marks = () if i in fast else pytest.mark.slow
        yield pytest.param(
            f"sm_{capability}",
            kernel,
            products,
            c,
            id=f"{capability}-{kernel}-{products}-{tile}",
            marks=marks,
        )


@pytest.mark.parametrize("architecture, kernel, products, config", list(shipped()))
def test_shipped_configs_compute_right(architecture, kernel, products, config):
    lane = LANES[architecture]
    if lane.unavailable():
        pytest.skip(lane.unavailable())
    if products == "tf32":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # small integers are exact in it
    # More than one tile each way, with tails; the second C leaves a tail in every BLOCK_K.
    K = 72 if products == "fma" else 136
    for C in {"joint": (3, 24), "taps": (64, 72) if products == "fma" else (128, 136)}[kernel]:
        case = Case(N=1, C=C, H=13, W=12, K=K, padding=(1, 1), bn=None, residual="last", activation="none")
        check_exact(lane, conv_bn_act, case, HALF if products == "16-bit" else FULL, config=config)


class TestChoice:
    """The heuristic, on the devices of the table."""

    shapes = [
        Case(N=32, C=64, H=56, W=56, K=64, padding=(1, 1)),
        Case(N=1, C=512, H=7, W=7, K=512, padding=(1, 1)),
        Case(N=32, C=256, H=14, W=14, K=1024, R=1, S=1),
        Case(N=1, C=3, H=224, W=224, K=64, R=7, S=7, stride=(2, 2), padding=(3, 3)),
        Case(N=8, C=128, H=28, W=28, K=128, padding=(1, 1), groups=32),
        Case(N=8, C=16, H=28, W=28, K=24, R=1, S=1),
    ]

    @pytest.mark.parametrize("device", DEVICES.values(), ids=str)
    @pytest.mark.parametrize("case", shapes, ids=str)
    def test_is_listed_and_careful(self, device, case):
        shape = shape_of(case)
        for size, precision in ((2, "ieee"), (4, "tf32"), (4, "ieee")):
            config = choose_config(shape, size, precision, device)
            assert config in kernel_configs(kernel_of(shape), device)
            assert case.R == 1 or config.num_warps <= 4 or device.capability < 80 or precision == "ieee"

    def test_small_grids_are_split(self):
        case = Case(N=1, C=512, H=7, W=7, K=512, padding=(1, 1))
        assert choose_config(shape_of(case), 2, "ieee", DEVICES["h100"]).SPLIT_K > 1

    def test_large_grids_are_not(self):
        case = Case(N=64, C=256, H=28, W=28, K=256, padding=(1, 1))
        config = choose_config(shape_of(case), 2, "ieee", DEVICES["h100"])
        assert config.SPLIT_K == 1
        assert config.BLOCK_M * config.BLOCK_N >= 128 * 64

    def test_narrow_outputs_get_narrow_tiles(self):
        case = Case(N=32, C=64, H=56, W=56, K=16, R=1, S=1)
        assert choose_config(shape_of(case), 2, "ieee", DEVICES["a100"]).BLOCK_N <= 32

    def test_configs_are_distinct_and_fit(self):
        for device in DEVICES.values():
            listed = configs(device)
            assert len(set(listed)) == len(listed) > 0
            for c in listed:
                operands_bytes = (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * 2 * c.num_stages
                assert operands_bytes <= device.shared_memory_per_block


def test_tf32_follows_the_switch():
    x = torch.empty(8, 64, 14, 14, device="meta")
    weight = torch.empty(64, 64, 3, 3, device="meta")
    for switch, expected in (("tf32", "tf32"), ("ieee", "ieee")):
        torch.backends.cudnn.conv.fp32_precision = switch
        launches = []
        with observe_launches(launches.append), assume_device("a100"):
            conv_bn_act(x, weight)
        assert launches[0].constexprs["PRECISION"] == expected


@pytest.mark.lanes("sm_80", "sm_90", "gpu")
def test_tf32_is_as_accurate_as_tf32_can_be(lane):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = Case(padding=(1, 1), bn=None, activation="none")
    tensors = operands(case, FULL)
    y = run(lane, conv_bn_act, case, tensors).cpu().double()
    expected = stock(case, tensors, torch.float64)
    error = (y - expected).norm() / expected.norm()
    # TF32 keeps 10 bits: products off by 2^-11 or so each, and random signs.
    assert 1e-5 < error < 2**-10


def test_one_launch_where_it_counts():
    """What traffic counting sees: one kernel per layer, two where the columns are split."""

    def launches_of(case):
        seen = []
        tensors = {name: t.to("meta") for name, t in operands(case, HALF).items()}
        with observe_launches(seen.append), assume_device("h100"):
            conv_bn_act(**tensors, **case.geometry)
        return [launch.name for launch in seen]

    assert launches_of(Case(N=32, H=56, W=56, padding=(1, 1), residual="last")) == ["conv_kernel"]
    assert launches_of(Case(C=3, R=7, S=7, H=32, W=32)) == ["conv_joint_kernel"]
    by_rows = ["pack_rows_kernel", "conv_rows_kernel"]
    assert launches_of(Case(C=3, R=7, S=7, H=32, W=32, stride=(2, 2))) == by_rows
    assert launches_of(Case(C=128, K=128, groups=32, padding=(1, 1))) == ["conv_packed_kernel"]
    assert launches_of(Case(N=1, C=512, K=512, padding=(1, 1))) == ["conv_kernel", "conv_reduce_kernel"]


BAD = {
    "rank": ({"x": torch.randn(4, 8, 8)}, ValueError, "4 dimensions"),
    "channels": ({"x": torch.randn(1, 5, 8, 8)}, ValueError, "takes 4 channels, x has 5"),
    "integers": ({"x": torch.ones(1, 4, 8, 8, dtype=torch.int32)}, TypeError, "float16"),
    "mixed dtypes": ({"x": torch.randn(1, 4, 8, 8).half()}, TypeError, "cast one"),
    "groups": ({"groups": 3}, ValueError, "groups=3 must divide"),
    "too large a filter": ({"x": torch.randn(1, 4, 2, 2)}, ValueError, "does not fit 2x2"),
    "bias": ({"bias": torch.randn(5)}, ValueError, r"bias has shape \[5\], expected \[6\]"),
    "half of BN": ({"running_mean": torch.randn(6)}, ValueError, "together"),
    "residual": ({"residual": torch.randn(1, 6, 1, 1)}, ValueError, r"expected \[1, 6, 6, 6\]"),
    "residual dtype": ({"residual": torch.randn(1, 6, 6, 6).half()}, TypeError, "residual is"),
    "activation": ({"activation": "swish2"}, ValueError, "swish2"),
    "stride": ({"stride": (0, 1)}, ValueError, "must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_so(name):
    changes, error, message = BAD[name]
    arguments = {"x": torch.randn(1, 4, 8, 8), "weight": torch.randn(6, 4, 3, 3), **changes}
    with pytest.raises(error, match=message):
        conv_bn_act(**arguments)


def test_a_config_that_does_not_fit_the_kernel_is_refused():
    split = next(c for c in configs(DEVICES["h100"]) if c.SPLIT_K > 1)
    with pytest.raises(UnsupportedConfig, match="SPLIT_K"):
        conv_bn_act(torch.randn(1, 3, 8, 8), torch.randn(8, 3, 3, 3), config=split)
