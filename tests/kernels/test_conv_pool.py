"""Convolutions that pool their own result: the kernel for few channels, and the epilogue for more."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.bench.static import inspect_call
from fastnets.kernels import conv_pool as pooling
from fastnets.kernels import conv_shape
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.conv_pool import conv_pool, pools_result
from fastnets.kernels.device import assume_device, device_for_capability
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import in_layout
from tests.lanes import STRICT_LANES

ACTS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda y: y, "tanh": torch.tanh}


@pytest.fixture(autouse=True)
def exact_products():
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    yield
    switch.fp32_precision = before


def operands(C, K, size, filter_size, bn=False, dtype=torch.float32, layout="contiguous", N=2):
    x = in_layout(torch.randn(N, C, *size), layout)
    weight = torch.randn(K, C, filter_size, filter_size) / (C**0.5 * filter_size)
    vectors = [torch.randn(K) if i == 0 or bn else None for i in range(5)]
    if bn:
        vectors[2] = torch.rand(K) + 0.5
    return [t if t is None else t.to(dtype) for t in (x, weight, *vectors)]


def stock(tensors, activation, window=(2, 2), maximum=True, dtype=None, **geometry):
    x, weight, bias, *bn = [t if t is None or dtype is None else t.to(dtype) for t in tensors]
    y = F.conv2d(x, weight, bias, **geometry)
    if bn[0] is not None:
        y = F.batch_norm(y, *bn)
    y = ACTS[activation](y)
    return F.max_pool2d(y, window) if maximum else F.avg_pool2d(y, window)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((1, 6, (28, 28), 5), {"activation": "sigmoid", "maximum": False, "padding": (2, 2)}),
        ((6, 16, (14, 13), 5), {"activation": "relu"}),
        ((3, 40, (11, 9), 3), {"activation": "tanh", "stride": (2, 1), "padding": (1, 0), "window": (1, 3)}),
        ((24, 64, (6, 6), 3), {"activation": "none", "dilation": (2, 2), "padding": (2, 2)}),
    ],
)
def test_as_accurate_as_stock(lane, sizes, options):
    C = sizes[0]
    dtype = {1: torch.float32, 6: torch.bfloat16, 3: torch.float32, 24: torch.float16}[C]
    tensors = operands(*sizes, bn=C in (3, 24), dtype=dtype, layout="last" if C == 6 else "contiguous")
    with lane:
        y = conv_pool(*map(lane.put, tensors), **{"window": (2, 2), **options})
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to(stock(tensors, dtype=torch.float64, **options), stock(tensors, **options), y.cpu())


def test_exact_on_integers(lane):
    tensors = [integers(2, 2, 7, 8), integers(5, 2, 3, 3), integers(5), None, None, None, None]
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu", padding=(1, 1))
    assert_exact(stock(tensors, "relu", padding=(1, 1)), y.cpu())


def test_nan_stays(lane):
    tensors = operands(1, 4, (6, 6), 3)
    tensors[0][0, 0, 0, 0] = float("nan")
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="none")
    assert torch.equal(y.cpu().isnan(), stock(tensors, "none").isnan())


HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
SAME = {"padding": (1, 1)}

# Over more channels: (dtype, sizes as in ``operands``, BN, layout, images, options).
MORE = {
    "vgg": (HALF, (64, 72, (8, 10), 3), True, "last", 2, SAME),
    "vgg, bf16": (BFLOAT, (64, 40, (6, 8), 3), True, "last", 1, SAME),
    "vgg, fp32": (FULL, (32, 64, (8, 6), 3), True, "last", 2, SAME),
    "odd sizes": (HALF, (40, 19, (7, 9), 3), False, "last", 3, SAME),
    "odd sizes, fp32": (FULL, (33, 17, (5, 7), 3), False, "contiguous", 2, {**SAME, "activation": "none"}),
    "one window": (BFLOAT, (32, 16, (2, 3), 3), True, "last", 1, SAME),
    "mean": (HALF, (64, 24, (7, 6), 3), True, "last", 2, {**SAME, "maximum": False, "activation": "tanh"}),
    "pairs": (BFLOAT, (48, 24, (5, 8), 3), True, "sliced", 2, {"window": (1, 2), "activation": "sigmoid"}),
    "columns of four": (HALF, (32, 24, (9, 4), 3), False, "last", 2, {"window": (4, 1), **SAME}),
    "mean of pairs, fp32": (FULL, (32, 24, (8, 7), 3), True, "last", 2, {"window": (2, 1), "maximum": False}),
    "strides": (HALF, (32, 24, (13, 12), 3), True, "misaligned", 1, {"stride": (2, 1), "dilation": (1, 2)}),
    "1x1": (BFLOAT, (64, 24, (6, 7), 1), True, "last", 2, {}),
    "49 taps": (HALF, (32, 16, (6, 6), 7), False, "last", 1, {"padding": (3, 3)}),
}


def check(lane, name):
    dtype, sizes, bn, layout, N, options = MORE[name]
    tensors = operands(*sizes, bn=bn, dtype=dtype, layout=layout, N=N)
    options = {"window": (2, 2), "activation": "relu", **options}
    with lane:
        y = conv_pool(*map(lane.put, tensors), **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to(stock(tensors, dtype=torch.float64, **options), stock(tensors, **options), y.cpu())


@pytest.mark.parametrize("name", MORE)
def test_over_more_channels_as_accurate_as_stock(lane, name):
    check(lane, name)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["vgg", "odd sizes", "vgg, fp32", "mean"])
def test_over_more_channels_strictly(lane, name):
    check(lane, name)


def test_64_bit_offsets(lane, monkeypatch):
    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check(lane, "odd sizes")
    finally:
        conv_shape.forget_plans()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FULL], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_over_more_channels_exact_on_integers(lane, dtype, activation):
    x, weight = integers(2, 32, 7, 8, low=-1, high=1), integers(24, 32, 3, 3, low=-1, high=1)
    vectors = [integers(24), None, None, None, None]
    tensors = [t if t is None else t.to(dtype) for t in (in_layout(x, "last"), weight, *vectors)]
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation=activation, **SAME)
    expected = stock(tensors, activation, dtype=torch.float64, **SAME)
    assert expected.abs().max() <= 256
    assert_exact(expected, y.cpu())


TILES = table_configs("taps", "16-bit", device_for_capability(80))


@pytest.mark.lanes("sm_80", "sm_90", "gpu")
@pytest.mark.parametrize("config", [c for c in TILES if c.SPLIT_K == 1], ids=str)
def test_every_tile_pools(lane, config):
    """BN scales some channels by negative numbers: what is greatest is so after the epilogue."""
    tensors = operands(64, 136, (10, 14), 1, bn=True, dtype=HALF, layout="last", N=1)
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu", config=config)
    reference = stock(tensors, "relu", dtype=torch.float64)
    assert_close_to(reference, stock(tensors, "relu"), y.cpu())


def test_tiles_of_partial_sums_are_refused():
    config = next(c for c in TILES if c.SPLIT_K > 1)
    with pytest.raises(UnsupportedConfig, match="no whole sums to pool"):
        conv_pool(meta(1, 64, 8, 8), meta(64, 64, 3, 3), window=(2, 2), config=config)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("maximum", [True, False])
def test_nan_stays_wherever_it_lies_in_a_window(lane, maximum, place):
    tensors = operands(32, 4, (4, 6), 1, layout="last")
    tensors[0][1, 5, 2 + place // 2, 2 + place % 2] = float("nan")
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu", maximum=maximum)
    expected = stock(tensors, "relu", maximum=maximum)
    assert int(expected.isnan().sum()) == 4
    assert torch.equal(y.cpu().isnan(), expected.isnan())


def test_zeros_and_infinities(lane):
    """Windows of zeros of both signs are zero; the greater of two infinities wins."""
    x = torch.tensor([[0.0, -0.0, -0.0, -0.0, float("inf"), float("-inf")]]).repeat(2, 1)
    x = in_layout(x.expand(1, 32, 2, 6).contiguous(), "last")
    weight = torch.zeros(8, 32, 1, 1)
    weight[:, 0] = torch.tensor([1.0, -1.0] * 4)[:, None, None]
    x[:, 1:] = 0.0
    tensors = [x, weight, None, None, None, None, None]
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="none")
    assert_exact(stock(tensors, "none"), y.cpu())


def meta(*size, dtype=HALF):
    return torch.empty(size, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


class TestChoice:
    """Of the convolutions before VGG's poolings, for the GPU that is assumed."""

    LAYERS = ((64, 64, 224), (128, 128, 112), (256, 256, 56), (512, 512, 28), (512, 512, 14))

    @pytest.mark.parametrize("gpu", ["a100", "h100", "rtx4090"])
    @pytest.mark.parametrize("C, K, size", LAYERS)
    def test_one_launch_writes_the_pooled_map_alone(self, C, K, size, gpu):
        x, weight = meta(32, C, size, size), meta(K, C, 3, 3)
        seen = []
        with assume_device(gpu), observe_launches(seen.append):
            assert pools_result(x, weight, (2, 2), **SAME)
            y = conv_pool(x, weight, window=(2, 2), activation="relu", **SAME)
        assert y.shape == (32, K, size // 2, size // 2)
        (launched,) = seen
        assert launched.name == "conv_kernel"
        assert launched.bytes_written == y.nbytes
        assert launched.bytes_read == x.nbytes + weight.nbytes
        assert launched.flops == 2 * 4 * y.numel() * C * 9

    def test_few_pixels_are_left_to_split_columns(self):
        with assume_device("a100"):
            assert not pools_result(meta(1, 512, 14, 14), meta(512, 512, 3, 3), (2, 2), **SAME)

    def test_few_channels_are_always_pooled(self):
        assert pools_result(meta(1, 3, 32, 32), meta(64, 3, 3, 3), (2, 2))
        assert not pools_result(meta(1, 3, 32, 32), meta(72, 3, 3, 3), (2, 2))
        assert not pools_result(meta(8, 64, 32, 32), meta(72, 64, 3, 3), (3, 3))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("call", pooling.representative_calls(), ids=lambda call: call.name)
def test_compiles_without_spills(call, capability):
    """The chosen tile; the rest of the table is ``make aot``."""
    for facts in inspect_call(call.thunk, None, capability):
        assert facts.error is None, facts.error
        assert facts.code.spills == 0


@pytest.mark.lanes("sm_80_strict", "sm_90_strict")
def test_strictly(lane):
    tensors = operands(6, 16, (9, 9), 5)
    with lane:
        y = conv_pool(*map(lane.put, tensors), window=(2, 2), activation="relu")
    assert_close_to(stock(tensors, "relu", dtype=torch.float64), stock(tensors, "relu"), y.cpu())


@pytest.mark.parametrize(
    "C, K, window, error, message",
    [
        (32, 8, (1, 3), UnsupportedConfig, "1x3 over 32 channels has 3 pixels, not 2 or 4"),
        (32, 8, (1, 1), UnsupportedConfig, "has 1 pixels, not 2 or 4"),
        (32, 8, (3, 3), UnsupportedConfig, "more than 4 pixels"),
        (32, 8, (1, 4), ValueError, "does not fit 3x3"),
        (3, 65, (2, 2), UnsupportedConfig, "65 outputs are more than 64, of 3 channels"),
        (3, 8, (3, 3), UnsupportedConfig, "more than 4 pixels"),
        (3, 8, (4, 1), ValueError, "does not fit 3x3"),
    ],
)
def test_what_it_does_not_serve_is_named(C, K, window, error, message):
    with pytest.raises(error, match=message):
        conv_pool(torch.randn(1, C, 5, 5), torch.randn(K, C, 3, 3), window=window)
