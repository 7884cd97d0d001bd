"""The kernel of a depthwise convolution that normalises its result over channels, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.depthwise_norm import configs, depthwise_layer_norm
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import in_layout
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
WIDTHS = sorted({config.PARTS * config.BLOCK_K for config in configs(None)})


def operands(C, size, taps, dtype=FULL, layout="last", N=2, vectors=True):
    x = in_layout(torch.randn(N, C, *size), layout)
    tensors = [x, torch.randn(C, 1, *taps) / (taps[0] * taps[1]) ** 0.5]
    tensors += [torch.randn(C) if vectors else None for _ in range(3)]
    return [t if t is None else t.to(dtype) for t in tensors]


def stock(tensors, dtype, eps=1e-6, **geometry):
    x, weight, bias, *affine = [t if t is None else t.to(dtype) for t in tensors]
    z = F.conv2d(x, weight, bias, groups=x.shape[1], **geometry).permute(0, 2, 3, 1)
    return F.layer_norm(z, z.shape[-1:], *affine, eps)


def check(lane, tensors, config=None, eps=1e-6, **geometry):
    with lane:
        y = depthwise_layer_norm(*map(lane.put, tensors), eps=eps, config=config, **geometry)
    assert y.is_contiguous()
    dtype = tensors[0].dtype
    assert_close_to(
        stock(tensors, torch.float64, eps, **geometry), stock(tensors, dtype, eps, **geometry), y.cpu()
    )


@pytest.mark.parametrize(
    "C, size, taps, dtype, options, geometry",
    [
        (96, (6, 5), (7, 7), FULL, {}, {"padding": (3, 3)}),
        (40, (9, 8), (3, 3), HALF, {}, {"padding": (1, 1), "stride": (2, 2)}),
        (24, (7, 6), (5, 3), BF16, {"vectors": False, "layout": "contiguous"}, {"padding": (2, 1)}),
    ],
)
def test_as_accurate_as_stock(lane, C, size, taps, dtype, options, geometry):
    check(lane, operands(C, size, taps, dtype, **options), **geometry)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("width", WIDTHS)
def test_every_config(lane, width):
    """With as many channels as a program holds, and with fewer."""
    for config in configs(None):
        if config.PARTS * config.BLOCK_K == width:
            C = width if config.BLOCK_P == 2 else width - 5
            check(lane, operands(C, (5, 3), (3, 3), N=1), config, padding=(1, 1))


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize(
    "C, size, taps, geometry",
    [
        (1, (4, 4), (3, 3), {"padding": (1, 1)}),
        (33, (7, 9), (3, 3), {"padding": (2, 2), "dilation": (2, 1)}),
        (20, (9, 5), (2, 7), {"padding": (0, 3), "stride": (3, 1)}),
        (48, (1, 1), (7, 7), {"padding": (3, 3)}),
    ],
)
def test_geometries(lane, C, size, taps, geometry):
    check(lane, operands(C, size, taps, layout="sliced"), **geometry)


@pytest.mark.lanes("interpreter", "gpu")
def test_a_mean_far_above_the_deviations(lane):
    tensors = operands(64, (4, 4), (1, 1))
    tensors[2] += 1e4
    check(lane, tensors)


def test_integers_are_exact(lane):
    """Rows of a and -a in equal number: mean 0, variance a², and y = ±1 where eps is 0."""
    C = 32
    x = integers(2, 1, 5, 4, low=1, high=8).expand(2, C, 5, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(C, 1, 3, 3)
    weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0]).repeat(C // 2)
    with lane:
        y = depthwise_layer_norm(lane.put(x), lane.put(weight), padding=(1, 1), eps=0.0)
    assert_exact(weight[:, 0, 1, 1].expand(2, 5, 4, C), y.cpu())


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # Several threads write the same bytes to shared memory where a sum changes its layout.
    check(lane.but(shared_races=None), operands(48, (4, 5), (3, 3), HALF, N=1), padding=(1, 1))


def test_one_read_and_one_write():
    x = torch.empty(2, 96, 14, 14, dtype=HALF, device="meta").to(memory_format=torch.channels_last)
    weight, seen = torch.empty(96, 1, 7, 7, dtype=HALF, device="meta"), []
    with observe_launches(seen.append):
        depthwise_layer_norm(x, weight, padding=(3, 3))
    (launch,) = seen
    assert launch.bytes == 2 * (2 * x.numel() + weight.numel())
    assert launch.flops == 2 * 49 * x.numel()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.empty(8, 2, 3, 3)}, ValueError, "not depthwise"),
        ({"weight": torch.empty(32, 1, 3, 3)}, UnsupportedConfig, "16 channels give 32 outputs"),
        ({"weight": torch.empty(16, 1, 9, 9)}, UnsupportedConfig, "9 filter rows"),
        ({"weight": torch.empty(16, 1, 3, 3).half()}, TypeError, "weight torch.float16"),
        ({"norm_bias": torch.empty(8)}, ValueError, r"norm_bias has shape \(8,\), expected \(16,\)"),
        ({"config": configs(None)[-1]}, UnsupportedConfig, "is not for 16 channels"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.empty(1, 16, 12, 12), "weight": torch.empty(16, 1, 3, 3), **change}
    with pytest.raises(error, match=message):
        depthwise_layer_norm(**arguments)
