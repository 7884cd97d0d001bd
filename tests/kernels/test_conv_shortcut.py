"""A convolution and the 1×1 one that is added to it, in one launch, against stock PyTorch in every lane."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import conv_shape
from fastnets.kernels.conv import conv_bn_act, joins_shortcut
from fastnets.kernels.conv_configs import table_configs
from fastnets.kernels.conv_shape import Shortcut
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import UnsupportedConfig, observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import Case, in_layout, operands, output_shape, run, stock
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32

# (dtype, the first convolution, channels and stride of the shortcut, layout of its input)
CASES = {
    "bottleneck": (HALF, Case(C=64, K=72, R=1, S=1), 64, 1, "last"),
    "bottleneck, stride 2": (BFLOAT, Case(C=32, H=4, W=5, K=48, R=1, S=1), 64, 2, "last"),
    "fp32": (FULL, Case(C=32, H=4, W=4, K=24, R=1, S=1, activation="silu"), 32, 2, "last"),
    "3x3": (HALF, Case(C=64, H=5, W=5, padding=(1, 1), stride=(2, 2)), 32, 2, "last"),
    "odd channels": (HALF, Case(C=40, H=4, W=5, K=19, R=1, S=1, activation="none"), 37, 1, "last"),
    "odd channels, bf16": (BFLOAT, Case(C=64, H=4, W=5, K=24, R=1, S=1, bn=None, bias=True), 44, 2, "sliced"),
    "sliced, fp32": (FULL, Case(C=33, H=3, W=5, K=17, R=1, S=1), 21, 1, "sliced"),
    "misaligned": (HALF, Case(C=64, H=4, W=5, R=1, S=1), 64, 1, "misaligned"),
}


def shortcut_of(case, channels, stride, layout, dtype, draw=torch.randn, **options) -> tuple[Case, dict]:
    """The second convolution as a case of its own, and its operands."""
    _, _, P, Q = output_shape(case)
    pair = (stride, stride)
    other = Case(
        N=case.N, C=channels, H=(P - 1) * stride + 1, W=Q * stride, K=case.K, R=1, S=1, stride=pair,
        activation="none", x=layout, bn=case.bn, bias=case.bias,
    )  # fmt: skip
    return other, operands(other, dtype, draw, **options)


def check(lane, name, **options):
    dtype, case, *of_shortcut = CASES[name]
    tensors = operands(case, dtype)
    other, added = shortcut_of(case, *of_shortcut, dtype)
    shortcut = Shortcut(**{key: lane.put(t) for key, t in added.items()}, stride=other.stride)
    y = run(lane, conv_bn_act, case, tensors, shortcut=shortcut, **options)

    def sum_of(dtype=None):
        residual = stock(other, added, dtype)
        return stock(dataclasses.replace(case, residual="last"), {**tensors, "residual": residual}, dtype)

    assert_close_to(sum_of(torch.float64), sum_of(), y)


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_stock(lane, name):
    check(lane, name)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("name", ["bottleneck, stride 2", "odd channels", "3x3"])
def test_strictly(lane, name):
    check(lane, name)


def test_64_bit_offsets(lane, monkeypatch):
    monkeypatch.setattr(conv_shape, "INT32_ELEMENTS", 10)
    conv_shape.forget_plans()
    try:
        check(lane, "bottleneck, stride 2")
    finally:
        conv_shape.forget_plans()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_integers_are_exact(lane, dtype):
    def draw(*shape):
        return integers(*shape, low=-1, high=1)

    case = Case(C=48, H=3, W=4, K=24, R=1, S=1, bn=None, bias=True)
    tensors = operands(case, dtype, draw)
    _, added = shortcut_of(case, 40, 2, "last", dtype, draw)
    shortcut = Shortcut(**{key: lane.put(t) for key, t in added.items()}, stride=(2, 2))
    y = run(lane, conv_bn_act, case, tensors, shortcut=shortcut)
    exact = {key: t.double() for key, t in {**tensors, **{f"s_{k}": t for k, t in added.items()}}.items()}
    expected = F.conv2d(exact["x"], exact["weight"], exact["bias"])
    expected = F.relu(expected + F.conv2d(exact["s_x"], exact["s_weight"], exact["s_bias"], 2))
    assert expected.abs().max() <= 256
    assert_exact(expected, y)


def meta(*size):
    return torch.empty(size, dtype=HALF, device="meta").to(memory_format=torch.channels_last)


class TestChoice:
    """Of ResNet-50's first stage, for the GPU that is assumed."""

    def of_stage(self, N=32, width=64):
        channels, size = 4 * width, 56 * 64 // width
        x, weight = meta(N, width, size, size), meta(channels, width, 1, 1)
        return x, weight, Shortcut(meta(N, 64, size, size), meta(channels, 64, 1, 1))

    @pytest.mark.parametrize("gpu", ["a100", "h100", "rtx4090"])
    def test_one_launch_writes_the_sum_alone(self, gpu):
        x, weight, shortcut = self.of_stage()
        seen = []
        with assume_device(gpu), observe_launches(seen.append):
            assert joins_shortcut(x, weight, shortcut)
            y = conv_bn_act(x, weight, shortcut=shortcut)
        (launched,) = seen
        assert launched.name == "conv_kernel"
        assert launched.bytes_written == y.nbytes
        moved = (x, weight, shortcut.x, shortcut.weight)
        assert launched.bytes_read == sum(t.nbytes for t in moved)
        assert launched.flops == 2 * y.numel() * (64 + 64)

    def test_few_pixels_are_left_to_split_columns(self):
        x, weight = meta(1, 512, 7, 7), meta(2048, 512, 1, 1)
        shortcut = Shortcut(meta(1, 4096, 14, 14), meta(2048, 4096, 1, 1), stride=(2, 2))
        with assume_device("a100"):
            assert not joins_shortcut(x, weight, shortcut, stride=(1, 1))

    def test_contiguous_images_and_groups_are_not_served(self):
        x, weight, shortcut = self.of_stage()
        assert not joins_shortcut(x, weight, shortcut._replace(x=shortcut.x.contiguous()))
        assert not joins_shortcut(x, meta(256, 32, 1, 1), shortcut, groups=2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"stride": (2, 2)}, ValueError, r"shortcut gives \[2, 8, 2, 3\], the convolution \[2, 8, 4, 5\]"),
        (
            {"weight": torch.ones(8, 16, 3, 3)},
            ValueError,
            r"weight is \[8, 16, 3, 3\], expected \[8, C, 1, 1\]",
        ),
        ({"x": torch.ones(2, 16, 4, 5).half()}, TypeError, "shortcut: x is torch.float16"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \[3\], expected \[8\]"),
        ({"x": torch.ones(2, 16, 4, 5)}, UnsupportedConfig, "channels-last is supported"),
    ],
)
def test_bad_shortcuts_say_so(change, error, message):
    x, weight = torch.ones(2, 32, 4, 5), torch.ones(8, 32, 1, 1)
    fields = {"x": in_layout(torch.ones(2, 16, 4, 5), "last"), "weight": torch.ones(8, 16, 1, 1)}
    with pytest.raises(error, match=message):
        conv_bn_act(x, weight, shortcut=Shortcut(**{**fields, **change}))


@pytest.mark.parametrize("change", [{"SPLIT_K": 2}, {"BLOCK_M": 256}])
def test_tiles_without_room_are_refused(change):
    config = next(
        c for c in table_configs("taps", "16-bit", DEVICES["h100"]) if (c.BLOCK_M, c.BLOCK_N) == (128, 64)
    )
    x, weight = meta(2, 64, 4, 5), meta(8, 64, 1, 1)
    with pytest.raises(UnsupportedConfig, match="no room for a shortcut"):
        conv_bn_act(x, weight, shortcut=Shortcut(x, weight), config=config.replace(**change))
