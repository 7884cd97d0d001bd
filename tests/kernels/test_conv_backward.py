"""Gradients of dense and grouped convolutions against stock PyTorch, in every lane."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from fastnets.bench import static
from fastnets.kernels import conv_input_gradient as input_kernels
from fastnets.kernels import conv_weight_gradient as weight_kernels
from fastnets.kernels.conv_backward import Normalized, conv_input_gradient, conv_weight_gradient
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.conv_gradient_configs import choose_input_gradient, choose_weight_gradient, tiles_of
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.device import DEVICES, assume_device, device_for_capability
from fastnets.kernels.launch import Config, UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.conv_cases import Case, output_shape, shape_of
from tests.kernels.gradient_cases import (
    CORE,
    SPLIT,
    check_exact,
    check_normalized,
    operands,
    run,
    signs,
    stock,
    vectors_of,
)
from tests.lanes import LANES, STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FULL, HALF, BFLOAT)


def check_core(lane, case, dtype):
    """Random operands, judged by the error ratio."""
    tensors = operands(case, dtype)
    gradients = run(lane, case, *tensors)
    for reference, usual, ours in zip(stock(case, *tensors, torch.float64), stock(case, *tensors), gradients):
        assert_close_to(reference, usual, ours, ratio=3)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORE)
def test_core(lane, name, dtype):
    check_core(lane, CORE[name], dtype)


@pytest.mark.lanes("sm_80", "sm_90")
@pytest.mark.parametrize(
    "dtype", [HALF, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (BFLOAT, FULL))], ids=str
)
@pytest.mark.parametrize("name", CORE)
def test_core_compiled(lane, name, dtype):
    check_core(lane, CORE[name], dtype)


# Each odd shape in one dtype and exactly; test_core has the usual ones in all.
SHAPES = {
    "1x1 image": (HALF, Case(C=24, H=1, W=1, K=24, padding=(1, 1))),
    "odd C and K": (HALF, Case(N=1, C=37, K=19, padding=(1, 1))),
    "strided, padded 1x1": (FULL, Case(N=1, C=17, K=24, R=1, S=1, stride=(2, 3), padding=(1, 2))),
    "unequal strides, dilations, paddings": (
        BFLOAT,
        Case(N=1, C=17, H=11, W=15, K=19, R=3, S=5, stride=(2, 3), padding=(3, 1), dilation=(2, 3)),
    ),
    "7x7, more taps than bits": (HALF, Case(N=1, C=16, H=5, W=5, K=16, R=7, S=7, padding=(3, 3))),
    "stem": (HALF, Case(N=1, C=3, H=11, W=9, K=24, R=7, S=7, stride=(2, 2), padding=(3, 3), x="contiguous")),
    "2 groups": (HALF, Case(N=1, C=96, K=80, H=4, W=4, padding=(1, 1), groups=2)),
    "16 groups of 4": (HALF, Case(C=64, K=64, H=4, W=5, padding=(1, 1), groups=16)),
    "4 groups of 6 to 10, stride 2": (BFLOAT, Case(N=1, C=24, K=40, padding=(1, 1), groups=4, stride=(2, 2))),
    "sliced": (BFLOAT, Case(C=24, K=24, H=4, W=5, padding=(1, 1), x="sliced")),
    "transposed": (FULL, Case(C=17, K=24, H=4, W=3, padding=(1, 1), x="transposed", weight="transposed")),
}
MORE_SHAPES = {
    "1x1 image, 1x1 filter": (BFLOAT, Case(C=24, H=1, W=1, N=3, R=1, S=1)),
    "C = 72, K = 1": (BFLOAT, Case(C=72, K=1, padding=(1, 1))),
    "stride above the filter": (HALF, Case(C=24, K=16, H=9, W=10, R=2, S=1, stride=(3, 4))),
    "strided 1x1": (HALF, Case(C=48, K=24, R=1, S=1, stride=(2, 2))),
    "padding above the filter": (HALF, Case(C=24, H=4, W=3, padding=(4, 5))),
    "pixels behind the last window": (HALF, Case(C=16, K=16, H=12, W=9, stride=(3, 3), R=2, S=2)),
    "stride 3": (BFLOAT, Case(C=16, K=24, H=10, W=11, R=5, S=5, stride=(3, 3), padding=(2, 2))),
    "dilation 3": (HALF, Case(C=16, K=24, H=9, W=8, padding=(3, 3), dilation=(3, 3))),
    "stride 2, dilation 2": (
        HALF,
        Case(C=16, K=24, H=9, W=8, padding=(1, 2), stride=(2, 2), dilation=(2, 2)),
    ),
    "5x5": (BFLOAT, Case(N=1, C=16, K=24, R=5, S=5, padding=(2, 2))),
    "1x7": (HALF, Case(C=16, K=24, H=4, W=9, R=1, S=7, padding=(0, 3))),
    "LeNet": (FULL, Case(C=1, H=9, W=9, K=6, R=5, S=5, padding=(2, 2))),
    "2 groups of odd width": (FULL, Case(N=1, C=70, K=66, H=4, W=5, groups=2, padding=(1, 1))),
    "3 groups of 24": (HALF, Case(C=72, K=72, H=5, W=5, padding=(1, 1), groups=3)),
    "1x1 in 4 groups": (FULL, Case(C=32, K=24, R=1, S=1, groups=4)),
    "1 filter a group": (HALF, Case(C=16, K=8, padding=(1, 1), groups=8)),
    "contiguous": (HALF, Case(C=24, K=24, padding=(1, 1), x="contiguous", weight="contiguous")),
    "1x1 of sliced": (HALF, Case(C=24, K=24, R=1, S=1, x="sliced")),
    "misaligned": (HALF, Case(C=24, K=24, padding=(1, 1), x="misaligned")),
    "expanded": (HALF, Case(C=24, K=24, padding=(1, 1), x="expanded")),
}
COMPILED = ("odd C and K", "stem", "16 groups of 4")


def mostly_slow(fast):
    """All shapes by name, those that are not among ``fast`` marked slow."""
    names = [*SHAPES, *MORE_SHAPES]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("name", mostly_slow(SHAPES))
def test_shapes(lane, name):
    dtype, case = {**SHAPES, **MORE_SHAPES}[name]
    check_exact(lane, case, dtype, dy_layout=case.x)


@pytest.mark.lanes("sm_80", "sm_90")
@pytest.mark.parametrize("name", mostly_slow(COMPILED))
def test_shapes_compiled(lane, name):
    dtype, case = {**SHAPES, **MORE_SHAPES}[name]
    check_exact(lane, case, dtype, dy_layout=case.x)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize(
    "name", ["3x3, stride 2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("3x3", "1x1"))]
)
def test_strictly(lane, name):
    check_exact(lane, CORE[name], HALF)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_gradient_of_a_sum_is_expanded(lane):
    case = Case(N=1, C=16, K=24, padding=(1, 1))
    _, x, weight = operands(case, HALF, signs)
    dy = torch.ones((), dtype=HALF).expand(output_shape(case))
    dx, dw = run(lane, case, dy, x, weight)
    for reference, gradient in zip(stock(case, dy, x, weight, torch.float64), (dx, dw)):
        assert_exact(reference, gradient)


@pytest.mark.lanes("interpreter", "gpu")
def test_results_in_another_dtype(lane):
    case = CORE["3x3"]
    tensors = operands(case, BFLOAT)
    gradients = run(lane, case, *tensors, dx={"dtype": FULL}, dw={"dtype": FULL})
    reference, same = stock(case, *tensors, torch.float64), stock(case, *tensors, FULL)
    for expected, rounded, ours in zip(reference, same, gradients):
        # Tensor cores cut off what sums of fp32 would round.
        assert_close_to(expected, rounded, ours, ratio=5)


@pytest.mark.lanes("interpreter", "sm_80")
def test_results_are_the_same_bits_in_any_order(lane):
    case = Case(N=3, C=24, K=16, H=7, W=8, R=1, S=1)
    dy, x, weight = operands(case, HALF)
    vectors = vectors_of(case.C)
    normalized = Normalized(x, Prologue(*vectors, "relu"))

    def once(lane):
        with lane:
            dv, sums = conv_input_gradient(dy, weight, x.shape, **case.geometry, normalized=normalized)
            return dv, sums, conv_weight_gradient(dy, x, weight.shape, **case.geometry, splits=3)

    first = once(lane)
    again = once(lane.but(order="reversed"))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.lanes("interpreter", "sm_80")
@pytest.mark.parametrize("name", ["3x3, stride 2", "1x1"])
def test_64_bit_offsets(lane, name, monkeypatch):
    for module in (input_kernels, weight_kernels):
        monkeypatch.setattr(module, "INT32_ELEMENTS", 10)
        module._plan.cache_clear()
    try:
        check_exact(lane, CORE[name], HALF)
        if name == "1x1":
            check_normalized(lane, CORE[name], HALF, added="sliced")
    finally:
        for module in (input_kernels, weight_kernels):
            module._plan.cache_clear()


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_overflow_passes_as_stocks(lane):
    """A loss scale too large: infinities and NaN reach the gradients that they reach in stock."""
    case = Case(C=16, H=5, W=5, K=16)
    dy, x, weight = operands(case, FULL)
    dy[0, 3, 1, 1], dy[1, 5, 0, 2] = float("inf"), float("nan")
    for expected, ours in zip(stock(case, dy, x, weight), run(lane, case, dy, x, weight)):
        assert torch.equal(torch.isnan(ours.cpu()), torch.isnan(expected))
        assert torch.equal(torch.isinf(ours.cpu()), torch.isinf(expected))


@pytest.mark.parametrize("shape", [(0, 64, 7, 7), (0, 8, 9, 9)])
def test_empty_batch_launches_nothing(shape):
    launches = []
    dy, weight = torch.empty(0, 8, shape[2] - 2, shape[3] - 2), torch.randn(8, shape[1], 3, 3)
    normalized = Normalized(torch.empty(shape), Prologue(*vectors_of(shape[1])))
    with observe_launches(launches.append):
        dx, sums = conv_input_gradient(dy, weight, shape, normalized=normalized)
        dw = conv_weight_gradient(dy, torch.empty(shape), weight.shape)
    assert dx.shape == shape
    assert torch.equal(sums, torch.zeros(2, shape[1]))
    assert torch.equal(dw, torch.zeros_like(weight))
    assert not launches


MASKED = {
    "padding": Case(C=24, N=1, H=3, W=3, K=24, padding=(3, 4)),
    "stride": Case(C=40, N=1, H=7, W=5, K=24, padding=(1, 2), stride=(2, 3)),
    "tails": Case(C=40, N=1, R=1, S=1, K=19),
    "more taps than bits": Case(C=16, N=1, H=2, W=2, R=7, S=7, padding=(3, 3), K=16),
    "packed groups": Case(C=24, N=1, H=4, W=4, K=24, padding=(2, 2), groups=3),
    "one tap": Case(C=64, N=1, H=3, W=3, K=24, padding=(1, 1)),
}


@pytest.mark.lanes("interpreter")
@pytest.mark.parametrize("name", MASKED)
def test_masked_addresses_stay_inside(lane, name, monkeypatch):
    """An asynchronous copy may touch what its mask excludes: no operand has a wild address."""
    from tests.interpreter import Extents

    shapes = []
    original = Extents.check

    def check_all(self, pointers, mask, width, what):
        if what == "load" and pointers.shape in [(64, 16), (16, 32), (64, 32)]:
            shapes.append(pointers.shape)
            mask = np.ones_like(mask)
        original(self, pointers, mask, width, what)

    monkeypatch.setattr(Extents, "check", check_all)
    # Operands of 64 × 16 and 16 × 32, tiles of 64 × 32: no epilogue here loads.
    config = Config(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, SPLIT_K=1, HALVES=False)
    check_exact(lane, MASKED[name], HALF, dx={"config": config}, dw={"config": config, "splits": 2})
    assert set(shapes) == {(64, 16), (16, 32)}


def shipped():
    """Every config of every table, on the emulated devices; all but a few of them marked slow."""
    listed = [
        (capability, gradient, table, products, config)
        for capability in (80, 90)
        for gradient, table in (("dx", "taps"), ("dx", "packed"), ("dw", "weight gradient"))
        for products in ("16-bit", "tf32", "fma")
        for config in table_configs(table, products, device_for_capability(capability))
    ]
    fast = random.Random(5).sample(range(len(listed)), 3)
    for i, (capability, gradient, table, products, c) in enumerate(listed):
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}-warps{c.num_warps}-split{c.SPLIT_K}"
        yield pytest.param(
            f"sm_{capability}",
            gradient,
            table,
            products,
            c,
            id=f"{capability}-{gradient}-{table}-{products}-{tile}",
            marks=() if i in fast else pytest.mark.slow,
        )


@pytest.mark.parametrize("architecture, gradient, table, products, config", list(shipped()))
def test_shipped_configs_compute_right(architecture, gradient, table, products, config):
    lane = LANES[architecture]
    if lane.unavailable():
        pytest.skip(lane.unavailable())
    if products == "tf32":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # small integers are exact in it
    dtype = HALF if products == "16-bit" else FULL
    # More than one tile each way, with tails; the second width leaves a tail in every block.
    widths = (4, 8, 16) if table == "packed" else (64, 72) if products == "fma" else (128, 136)
    for width in widths:
        groups = 12 if table == "packed" else 1
        case = Case(N=1, C=groups * width, K=groups * width, H=13, W=12, padding=(1, 1), groups=groups)
        dy, x, weight = operands(case, dtype, signs)
        with lane:
            if gradient == "dx":
                ours = conv_input_gradient(dy, weight, x.shape, **case.geometry, config=config)
            else:
                ours = conv_weight_gradient(dy, x, weight.shape, **case.geometry, config=config)
        assert_exact(stock(case, dy, x, weight, torch.float64)[gradient == "dw"], ours)


@pytest.mark.lanes("sm_80", "sm_90", "gpu")
def test_tf32_is_as_accurate_as_tf32_can_be(lane):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = CORE["3x3"]
    tensors = operands(case, FULL)
    for expected, ours in zip(stock(case, *tensors, torch.float64), run(lane, case, *tensors)):
        error = (ours.cpu().double() - expected).norm() / expected.norm()
        # TF32 keeps 10 bits: products off by 2^-11 or so each, and random signs.
        assert 1e-5 < error < 2**-10


class TestChoice:
    """What the heuristics pick, on the devices of the table."""

    shapes = [
        Case(N=32, C=64, H=56, W=56, K=64, padding=(1, 1)),
        Case(N=32, C=128, H=56, W=56, K=128, padding=(1, 1), stride=(2, 2)),
        Case(N=32, C=256, H=14, W=14, K=1024, R=1, S=1),
        Case(N=32, C=512, H=7, W=7, K=512, padding=(1, 1)),
        Case(N=32, C=3, H=224, W=224, K=64, R=7, S=7, stride=(2, 2), padding=(3, 3)),
        Case(N=8, C=128, H=28, W=28, K=128, padding=(1, 1), groups=32),
        Case(N=8, C=16, H=28, W=28, K=24, R=1, S=1),
    ]

    @pytest.mark.parametrize("device", DEVICES.values(), ids=str)
    @pytest.mark.parametrize("case", shapes, ids=str)
    def test_is_listed_and_careful(self, device, case):
        shape = shape_of(case)
        for size, precision in ((2, "ieee"), (4, "tf32"), (4, "ieee")):
            forward = choose_input_gradient(shape, size, precision, device, True, False)
            config, splits = choose_weight_gradient(shape, size, precision, device)
            assert forward in input_kernels.configs(device)
            assert config in weight_kernels.configs(device)
            assert 1 <= splits <= max(1, shape.M // config.BLOCK_K)
            if case.R > 1 and device.capability >= 80 and precision != "ieee":
                assert max(config.num_warps, forward.num_warps) <= 4

    @pytest.mark.parametrize("case", shapes, ids=str)
    def test_workspace_is_small_or_fills_the_device(self, case):
        shape, device = shape_of(case), DEVICES["h100"]
        config, splits = choose_weight_gradient(shape, 2, "ieee", device)
        tiles, bundles = tiles_of(shape, config)
        workspace = 2 * 4 * splits * shape.K * shape.group_channels * shape.taps
        moved = 2 * shape.N * (shape.C * shape.H * shape.W + shape.K * shape.P * shape.Q)
        assert (
            splits == 1 or workspace <= moved / 10 or tiles * bundles * splits <= 2 * device.multiprocessors
        )

    def test_few_tiles_are_shared(self):
        shape = shape_of(Case(N=32, C=64, H=56, W=56, K=64, R=1, S=1))
        assert choose_weight_gradient(shape, 2, "ieee", DEVICES["h100"])[1] > 16

    def test_many_tiles_are_not(self):
        shape = shape_of(Case(N=32, C=512, H=7, W=7, K=512, padding=(1, 1)))
        assert choose_weight_gradient(shape, 2, "ieee", DEVICES["h100"])[1] == 1


def launches_of(case, run_it):
    """Launches on meta tensors of bf16, and those tensors: dy, x and weight."""
    seen = []
    tensors = [t.to("meta") for t in operands(dataclasses.replace(case, N=1), BFLOAT)]
    dy, x = (torch.empty((case.N, *t.shape[1:]), dtype=BFLOAT, device="meta") for t in tensors[:2])
    dy, x = (t.to(memory_format=torch.channels_last) for t in (dy, x))
    with observe_launches(seen.append), assume_device("h100"):
        run_it(dy, x, tensors[2])
    return seen, (dy, x, tensors[2])


def test_what_an_input_gradient_moves():
    """One launch, strided or not, that reads dy, the weight and what the epilogue needs, and writes dx."""
    case = Case(N=32, C=64, H=56, W=56, K=128, padding=(1, 1), stride=(2, 2))

    def plain(dy, x, weight):
        conv_input_gradient(dy, weight, x.shape, **case.geometry)

    (launch,), (dy, x, weight) = launches_of(case, plain)
    assert launch.bytes == dy.nbytes + weight.nbytes + x.nbytes
    assert launch.flops == shape_of(case).flops

    def fused(dy, x, weight):
        vectors = (torch.empty(case.C, device="meta") for _ in range(4))
        normalized = Normalized(x, Prologue(*vectors, "relu"))
        conv_input_gradient(dy, weight, x.shape, **case.geometry, added=x, normalized=normalized)

    launches, _ = launches_of(case, fused)
    names = [launch.name for launch in launches]
    assert names[0] == "conv_input_gradient_kernel"
    assert set(names[1:]) == {"sum_rows_kernel"}
    in_full = dy.nbytes + weight.nbytes + 3 * x.nbytes
    assert in_full < sum(launch.bytes for launch in launches) < 1.06 * in_full


def test_what_a_weight_gradient_moves():
    case = Case(N=32, C=256, H=28, W=28, K=64, R=1, S=1)

    def plain(dy, x, weight):
        conv_weight_gradient(dy, x, weight.shape)

    (launch, second), (dy, x, weight) = launches_of(case, plain)
    shares = launch.grid[2]
    assert launch.bytes == dy.nbytes + x.nbytes + 2 * shares * weight.nbytes
    assert second.bytes == 2 * shares * weight.nbytes + weight.nbytes


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("module", [input_kernels, weight_kernels], ids=["dx", "dw"])
def test_operands_are_copied_sixteen_bytes_at_a_time(module, capability):
    for call in module.representative_calls():
        if call.name in ("3x3", "3x3, 32 groups of 4"):
            facts = static.inspect_call(call.thunk, capability=capability)[0]
            assert facts.good
            # All but the block-diagonal weights of narrow groups, 8 bytes a run.
            assert set(facts.code.async_copies) <= {128, 64}
            assert facts.code.async_copies[128] > 0
            assert facts.code.matrix_ops


BAD = {
    "dy": ({"dy": torch.randn(1, 6, 5, 6)}, ValueError, r"dy has shape \[1, 6, 5, 6\].*\[1, 6, 6, 6\]"),
    "integers": ({"dy": torch.ones(1, 6, 6, 6, dtype=torch.int32)}, TypeError, "float16"),
    "mixed dtypes": ({"dy": torch.randn(1, 6, 6, 6).half()}, TypeError, "cast one"),
    "groups": ({"groups": 3}, ValueError, "groups=3 must divide"),
    "dtype": ({"dtype": torch.float64}, TypeError, "dtype is torch.float64"),
    "stride": ({"stride": (0, 1)}, ValueError, "must be positive"),
}


def masked(activation, size, order=(0, 1, 2, 3)):
    z = torch.randn(1, 4, 8, 8).permute(order)
    return Normalized(z, Prologue(*vectors_of(4), activation), torch.zeros(size, dtype=torch.uint8))


BAD_EPILOGUE = {
    "added": ({"added": torch.randn(1, 4, 8, 1)}, ValueError, r"added has shape .*\[1, 4, 8, 8\]; expand"),
    "z": (
        {"normalized": Normalized(torch.randn(1, 6, 8, 8), Prologue(*vectors_of(4)))},
        ValueError,
        "z has shape",
    ),
    "mean": (
        {"normalized": Normalized(torch.randn(1, 4, 8, 8), Prologue(*vectors_of(5)))},
        ValueError,
        r"mean has shape \[5\], expected \[4\]",
    ),
    "activation": (
        {"normalized": Normalized(torch.randn(1, 4, 8, 8), Prologue(*vectors_of(4), "swish2"))},
        ValueError,
        "swish2",
    ),
    "mask of gelu": ({"normalized": masked("gelu", 32)}, ValueError, "of 'gelu' is not"),
    "mask": ({"normalized": masked("relu", 31)}, ValueError, r"\[31\], expected contiguous uint8 of \[32\]"),
    "z of a mask": ({"normalized": masked("relu", 32, (0, 1, 3, 2))}, ValueError, "must be dense"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_so(name):
    changes, error, message = BAD[name]
    dy = changes.get("dy", torch.randn(1, 6, 6, 6))
    options = {key: value for key, value in changes.items() if key != "dy"}
    with pytest.raises(error, match=message):
        conv_input_gradient(dy, torch.randn(6, 4, 3, 3), (1, 4, 8, 8), **options)
    with pytest.raises(error, match=message):
        conv_weight_gradient(dy, torch.randn(1, 4, 8, 8), (6, 4, 3, 3), **options)


@pytest.mark.parametrize("name", BAD_EPILOGUE)
def test_bad_epilogues_say_so(name):
    changes, error, message = BAD_EPILOGUE[name]
    with pytest.raises(error, match=message):
        conv_input_gradient(torch.randn(1, 6, 6, 6), torch.randn(6, 4, 3, 3), (1, 4, 8, 8), **changes)


def test_bad_splits_and_configs_say_so():
    dy, x, weight = torch.randn(1, 8, 5, 5), torch.randn(1, 8, 5, 5), torch.randn(8, 4, 1, 1)
    with pytest.raises(ValueError, match="splits=0"):
        conv_weight_gradient(dy, x, weight.shape, groups=2, splits=0)
    with pytest.raises(UnsupportedConfig, match="its filters are split"):
        conv_input_gradient(dy, weight, x.shape, groups=2, config=SPLIT)
