"""Depthwise convolution with its epilogue against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.depthwise import configs, depthwise_conv_bn_act
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.lanes import STRICT_LANES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"none": lambda x: x, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def stock(x, weight, bias, mean, var, bn_weight, bn_bias, residual, geometry, activation, dtype):
    x, weight, bias, mean, var, bn_weight, bn_bias, residual = (
        None if t is None else t.to(dtype) for t in (x, weight, bias, mean, var, bn_weight, bn_bias, residual)
    )
    y = F.conv2d(x, weight, bias, *geometry, groups=x.shape[1])
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, training=False)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def check(lane, x, weight, bias=None, vectors=(None,) * 4, residual=None, stride=(1, 1), padding=(0, 0),
          dilation=(1, 1), activation="none", config=None):  # fmt: skip
    x, weight, bias, residual, *vectors = (lane.put(t) for t in (x, weight, bias, residual, *vectors))
    with lane:
        y = depthwise_conv_bn_act(
            x, weight, bias, *vectors, residual, stride=stride, padding=padding, dilation=dilation,
            activation=activation, config=config,
        )  # fmt: skip
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    arguments = (x, weight, bias, *vectors, residual, (stride, padding, dilation), activation)
    assert_close_to(stock(*arguments, torch.float64), stock(*arguments, x.dtype), y)


def bn_vectors(K):
    return torch.randn(K), torch.rand(K) + 0.5, torch.randn(K), torch.randn(K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_mobilenet_block(lane, dtype, stride):
    x, weight = channels_last(2, 24, 9, 7).to(dtype), torch.randn(24, 1, 3, 3).to(dtype)
    check(
        lane, x, weight, vectors=bn_vectors(24), stride=(stride, stride), padding=(1, 1), activation="relu6"
    )


# Name: (C, multiplier, H, W, R, S, stride, padding, dilation).
GEOMETRIES = {
    "1x1 image": (8, 1, 1, 1, 3, 3, (1, 1), (1, 1), (1, 1)),
    "1x1 filter": (8, 1, 4, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    "odd channels": (7, 1, 6, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "one channel": (1, 1, 6, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "stride above filter": (8, 1, 11, 12, 2, 3, (4, 5), (0, 1), (1, 1)),
    "padding above filter": (8, 1, 4, 3, 3, 3, (1, 2), (5, 4), (1, 1)),
    "dilation 3": (8, 1, 11, 10, 3, 3, (1, 1), (3, 3), (3, 3)),
    "dilation and stride differ": (8, 1, 13, 9, 3, 5, (2, 1), (4, 2), (3, 1)),
    "multiplier 3": (6, 3, 7, 7, 3, 3, (1, 1), (1, 1), (1, 1)),
    "5x5 stride 2": (24, 1, 10, 9, 5, 5, (2, 2), (2, 2), (1, 1)),
    "7x7": (16, 1, 9, 8, 7, 7, (1, 1), (3, 3), (1, 1)),
    "9x1": (8, 1, 12, 4, 9, 1, (1, 1), (4, 0), (1, 1)),
    "1x11": (8, 1, 4, 12, 1, 11, (1, 1), (0, 5), (1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(lane, name):
    C, multiplier, H, W, R, S, stride, padding, dilation = GEOMETRIES[name]
    K = C * multiplier
    x, weight = channels_last(2, C, H, W).half(), torch.randn(K, 1, R, S).half()
    check(
        lane,
        x,
        weight,
        torch.randn(K).half(),
        bn_vectors(K),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def widened(shape, dims):
    """A tensor of ``shape`` that is every second element of a larger one along ``dims``."""
    larger = torch.randn([2 * n if d in dims else n for d, n in enumerate(shape)])
    return larger[tuple(slice(1, None, 2) if d in dims else slice(None) for d in range(len(shape)))]


X_LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 8, 6, 5),
    "channel slice": lambda: channels_last(2, 13, 6, 5)[:, 3:11],
    "channel slice, aligned": lambda: channels_last(2, 24, 6, 5)[:, 8:16],
    "every second pixel": lambda: widened((2, 8, 6, 5), (2, 3)),
    "transposed": lambda: torch.randn(2, 8, 5, 6).transpose(2, 3),
    "expanded batch": lambda: channels_last(1, 8, 6, 5).expand(2, 8, 6, 5),
    "expanded channels": lambda: torch.randn(2, 1, 6, 5).expand(2, 8, 6, 5),
    "expanded pixels": lambda: torch.randn(2, 8, 1, 1).expand(2, 8, 6, 5),
}


@pytest.mark.parametrize("layout", X_LAYOUTS)
def test_input_layouts(lane, layout):
    x = X_LAYOUTS[layout]()
    check(lane, x, torch.randn(8, 1, 3, 3), padding=(1, 1), activation="silu")


@pytest.mark.parametrize("layout", X_LAYOUTS)
def test_residual_layouts(lane, layout):
    residual = X_LAYOUTS[layout]()
    check(lane, channels_last(2, 8, 6, 5), torch.randn(8, 1, 3, 3), residual=residual, padding=(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_layouts(lane, dtype):
    x = channels_last(2, 8, 6, 5).to(dtype)
    weight = torch.randn(8, 1, 3, 3).to(dtype)
    innermost = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for layout in (innermost, weight.transpose(2, 3), weight[:, :, :1, :1].expand(8, 1, 3, 3)):
        check(lane, x, layout, padding=(1, 1))


def test_vectors_of_the_input_dtype_and_bias_alone(lane):
    x, weight = channels_last(1, 8, 5, 5).bfloat16(), torch.randn(8, 1, 3, 3).bfloat16()
    check(lane, x, weight, torch.randn(16).bfloat16()[::2], activation="hardswish")
    mean, var = torch.randn(8).bfloat16(), (torch.rand(8) + 0.5).bfloat16()
    check(lane, x, weight, None, (mean, var, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_integers(lane, dtype):
    x = integers(2, 24, 9, 10, low=-2, high=2, dtype=dtype).to(memory_format=torch.channels_last)
    weight, residual = integers(24, 1, 3, 3, low=-2, high=2, dtype=dtype), integers(2, 24, 9, 10, dtype=dtype)
    bias = integers(24, dtype=dtype)
    expected = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=24) + residual)
    x, weight, bias, residual = (lane.put(t) for t in (x, weight, bias, residual))
    with lane:
        y = depthwise_conv_bn_act(x, weight, bias, residual=residual, padding=(1, 1), activation="relu")
    assert_exact(expected, y)


@pytest.mark.parametrize("R", [3, 8])
def test_every_config(lane, R):
    x = integers(1, 40, 11, 5).to(memory_format=torch.channels_last)
    weight = integers(40, 1, R, 3)
    expected = F.conv2d(x, weight, padding=1, groups=40)
    for config in configs(DEVICES["h100"]):
        if R > 7 and config.BLOCK_P > 1:
            with pytest.raises(UnsupportedConfig, match="8 filter rows need BLOCK_P=1"):
                depthwise_conv_bn_act(x, weight, padding=(1, 1), config=config)
            continue
        with lane:
            y = depthwise_conv_bn_act(lane.put(x), lane.put(weight), padding=(1, 1), config=config)
        assert_exact(expected, y)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["dilation and stride differ", "9x1"])
def test_strictly(lane, name):
    test_geometries(lane, name)


def test_nan_stays_in_its_window(lane):
    x = torch.ones(1, 8, 7, 7).to(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = float("nan")
    with lane:
        y = depthwise_conv_bn_act(lane.put(x), lane.put(torch.ones(8, 1, 3, 3)), activation="relu")
    expected = torch.zeros(1, 8, 5, 5, dtype=torch.bool)
    expected[0, 3, :3, :3] = True
    assert_exact(expected, torch.isnan(y).cpu())


def test_offsets_past_two_to_the_31(lane):
    if lane.name == "gpu" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB")
    # Pages that nobody touches cost nothing; the race detector would touch them.
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=lane.device)
    x = memory.as_strided((2, 8, 4, 4), (2**31, 1, 32, 8))
    x.copy_(integers(2, 8, 4, 4))
    weight = lane.put(integers(8, 1, 3, 3).half())
    with lane.but(races=None):
        y = depthwise_conv_bn_act(x, weight)
    assert_exact(F.conv2d(x.double(), weight.double(), groups=8), y)


def test_empty_batch(lane):
    with lane:
        y = depthwise_conv_bn_act(torch.empty(0, 8, 5, 5), torch.empty(8, 1, 3, 3), stride=(2, 2))
    assert y.shape == (0, 8, 2, 2)


def test_one_launch_with_wide_accesses():
    def tensor(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(32, 144, 56, 56).to(memory_format=torch.channels_last)
    seen = []
    with observe_launches(seen.append), assume_device("a100"):
        y = depthwise_conv_bn_act(x, tensor(144, 1, 3, 3), padding=(1, 1), activation="relu6")
    (launch,) = seen
    assert launch.flops == 2 * y.numel() * 9
    assert launch.bytes == 2 * (x.numel() + y.numel() + 144 * 9)
    assert launch.constexprs["X_VEC"] == launch.constexprs["VEC"] == 8
    assert launch.config in configs(DEVICES["a100"])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(8, 5, 5)}, ValueError, "x has 3 dims and weight 4"),
        ({"weight": torch.ones(12, 1, 3, 3)}, ValueError, "not depthwise for x with 8 channels"),
        ({"weight": torch.ones(8, 2, 3, 3)}, ValueError, "not depthwise"),
        ({"groups": 4}, ValueError, "groups=4 is not depthwise"),
        ({"weight": torch.ones(8, 1, 9, 3)}, ValueError, "smaller than the filter: image 5x5"),
        ({"x": torch.ones(1, 8, 5, 5, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"weight": torch.ones(8, 1, 3, 3).half()}, TypeError, "weight is torch.float16, x is torch.float32"),
        ({"residual": torch.ones(1, 8, 5, 5)}, ValueError, r"residual has shape .* expected \(1, 8, 3, 3\)"),
        ({"bn_weight": torch.ones(4)}, ValueError, r"bn_weight has shape \(4,\), expected \(8,\)"),
        ({"stride": (0, 1)}, ValueError, "out of range"),
        ({"activation": "relu7"}, ValueError, "unknown activation 'relu7'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv_bn_act(**{"x": torch.ones(1, 8, 5, 5), "weight": torch.ones(8, 1, 3, 3), **change})
