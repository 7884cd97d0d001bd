"""bn_add_act against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.activation import ACTIVATIONS
from fastnets.kernels.batch_norm import bn_add_act, configs
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.lanes import STRICT_LANES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

STOCK_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# Name: (shape, tensor of that shape in the layout from one that is dense in the order given).
LAYOUTS = {
    "contiguous": lambda n, c, h, w: torch.randn(n, c, h, w),
    "channels_last": lambda n, c, h, w: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
    "channel_slice": lambda n, c, h, w: torch.randn(n, h, w, c + 5).permute(0, 3, 1, 2)[:, 3 : 3 + c],
    "every_second_pixel": lambda n, c, h, w: torch.randn(n, c, 2 * h, 2 * w)[:, :, ::2, 1::2],
    "transposed": lambda n, c, h, w: torch.randn(n, c, w, h).transpose(2, 3),
    "batch_innermost": lambda n, c, h, w: torch.randn(c, h, w, n).permute(3, 0, 1, 2),
    "expanded_batch": lambda n, c, h, w: torch.randn(1, c, h, w).expand(n, c, h, w),
    "expanded_pixels": lambda n, c, h, w: torch.randn(n, c, 1, 1).expand(n, c, h, w),
    "misaligned": lambda n, c, h, w: torch.randn(n * c * h * w + 1)[1:].view(n, c, h, w),
}


def vectors(channels, dtype=torch.float32):
    return (
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels).to(dtype),
    )


def stock(x, bias, mean, var, weight, bn_bias, residual, activation="none", dtype=torch.float64, eps=1e-5):
    """The composition in ``dtype``; batch norm with vectors left out is spelled out."""
    x, bias, mean, var, weight, bn_bias, residual = (
        None if t is None else t.to(dtype) for t in (x, bias, mean, var, weight, bn_bias, residual)
    )
    over_channels = (1, -1, *[1] * (x.dim() - 2))
    if bias is not None:
        x = x + bias.view(over_channels)
    if mean is not None and var is not None:
        x = F.batch_norm(x, mean, var, weight, bn_bias, training=False, eps=eps)
    else:
        for vector, apply in (
            (mean, torch.sub),
            (None if var is None else (var + eps).rsqrt(), torch.mul),
            (weight, torch.mul),
            (bn_bias, torch.add),
        ):
            if vector is not None:
                x = apply(x, vector.view(over_channels))
    if residual is not None:
        x = x + residual
    return STOCK_ACTIVATIONS[activation](x)


def check(lane, x, *rest, activation="relu", **options):
    x, *rest = (lane.put(t) for t in (x, *rest))
    with lane:
        y = bn_add_act(x, *rest, activation=activation, negative_slope=0.1, **options)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    reference = stock(x, *rest, activation=activation)
    assert_close_to(reference, stock(x, *rest, activation=activation, dtype=x.dtype), y)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(lane, layout, dtype):
    make = LAYOUTS[layout]
    x = make(3, 8, 5, 6)
    x = x.to(dtype) if x.is_contiguous() else cast(x, dtype)
    other = "channels_last" if layout == "contiguous" else "contiguous"
    residual = cast(LAYOUTS[other if dtype == torch.float16 else layout](3, 8, 5, 6), dtype)
    check(lane, x, torch.randn(8).to(dtype), *vectors(8), residual)


def cast(tensor, dtype):
    """To another dtype with the strides kept, gaps and overlaps included."""
    whole = torch.empty(0).set_(tensor.untyped_storage()).to(dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize(
    "shape",
    [(5, 3), (33, 64), (2, 7, 9), (2, 3, 4, 5, 6), (1, 1, 1, 1), (2, 1, 3, 3), (1, 27, 1, 1), (4, 70, 7, 7)],
    ids=str,
)
def test_shapes(lane, shape):
    x, residual = torch.randn(shape).half(), torch.randn(shape).half()
    check(lane, x, None, *vectors(shape[1]), residual)


def test_channels_last_3d(lane):
    x = torch.randn(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    y = check(lane, x, None, *vectors(8), None)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(lane, activation):
    x = torch.cat([torch.randn(200) * 3, torch.randn(100) * 0.01, torch.randn(84) * 30]).view(4, 8, 12)
    check(lane, x, None, *vectors(8), torch.randn_like(x), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_through(lane, activation):
    nan, inf = float("nan"), float("inf")
    special = [nan, inf, -inf, 0.0, -0.0, 3.0, -3.0, 6.0, 100.0, -100.0, 1e38, -1e38]
    x = lane.put(torch.tensor(special * 2).view(2, 1, 12))
    with lane:
        y = bn_add_act(x, activation=activation, negative_slope=0.1)
    expected = STOCK_ACTIVATIONS[activation](x)
    if activation == "gelu":
        # PyTorch's vectorised CPU kernel gives NaN for gelu(inf), its scalar one and CUDA give inf.
        assert y[0, 0, 1] == float("inf")
        expected = torch.where(torch.isposinf(x), x, expected)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("present", ["bias", "mean+var", "weight+bn_bias", "bias+mean+var", "residual", ""])
def test_what_is_left_out(lane, present):
    x = torch.randn(2, 24, 5, 5).to(memory_format=torch.channels_last)
    names = ("bias", "mean", "var", "weight", "bn_bias")
    values = (torch.randn(24), *vectors(24))
    given = [v if name in present.split("+") else None for name, v in zip(names, values)]
    check(lane, x, *given, torch.randn_like(x) if present == "residual" else None)


def test_vectors_of_other_dtypes_and_strides(lane):
    x = torch.randn(2, 6, 4, 4).bfloat16()
    mean, var, weight, bn_bias = vectors(12, torch.bfloat16)
    check(lane, x, torch.randn(1).bfloat16().expand(6), mean[::2], var[::2], weight[6:], bn_bias[::2], None)


def test_exact_on_integers(lane):
    x, residual = integers(3, 24, 5, 7, low=-9, high=9), integers(3, 24, 5, 7)
    one_scale = [integers(24), torch.full((24,), 3.0), integers(24), integers(24)]
    for dtype in DTYPES:
        arguments = [lane.put(t.to(dtype)) for t in (x, integers(24), *one_scale, residual)]
        with lane:
            y = bn_add_act(*arguments, eps=1.0, activation="relu6")
        assert_exact(stock(*arguments, activation="relu6", eps=1.0), y)


def test_every_config(lane):
    x = integers(2, 72, 9, 9)
    last = x.to(memory_format=torch.channels_last)
    residual = integers(2, 72, 9, 9)
    for config in configs(DEVICES["h100"]):
        for values in (x, last):
            with lane:
                y = bn_add_act(lane.put(values), residual=lane.put(residual), config=config)
            assert_exact(x + residual, y)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second_pixel"])
def test_strictly(lane, layout):
    x = cast(LAYOUTS[layout](2, 72, 9, 9), torch.float16)
    check(lane, x, None, *vectors(72), cast(LAYOUTS["contiguous"](2, 72, 9, 9), torch.float16))


def test_offsets_past_two_to_the_31(lane):
    if lane.name == "gpu" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB")
    # Pages that nobody touches cost nothing; the race detector would touch them.
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=lane.device)
    x = memory.as_strided((2, 8, 4, 4), (2**31, 16, 4, 1))
    x.copy_(torch.randn(2, 8, 4, 4))
    with lane.but(races=None):
        y = bn_add_act(x, activation="relu")
    assert_exact(x.relu(), y)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(lane, shape):
    channels = torch.ones(shape[1])
    with lane:
        y = bn_add_act(torch.empty(shape), None, channels, channels)
    assert y.shape == shape


def test_one_launch_that_reads_and_writes_once():
    x = torch.empty(32, 64, 56, 56, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    channels = [torch.empty(64, device="meta") for _ in range(4)]
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        y = bn_add_act(x, None, *channels, x, activation="relu")
    assert y.shape == x.shape
    assert y.is_meta
    (launch,) = seen
    assert launch.name == "bn_add_act_kernel"
    assert launch.bytes_written == x.numel() * 2
    assert launch.bytes_read == 2 * x.numel() * 2 + 4 * 64 * 4
    assert launch.config in configs(DEVICES["h100"])
    assert launch.constexprs["X_LAYOUT"] == launch.constexprs["Y_LAYOUT"] == ("channel", 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": torch.ones(3)}, ValueError, "1 dims, expected 2 to 5"),
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "int32, expected float32"),
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "float64"),
        ({"running_mean": torch.ones(4)}, ValueError, r"running_mean has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.ones(3, 1)}, ValueError, r"bias has shape \(3, 1\)"),
        ({"residual": torch.ones(2, 3, 1)}, ValueError, "residual has shape"),
        (
            {"residual": torch.ones(2, 3, 4).half()},
            TypeError,
            "residual is torch.float16, x is torch.float32",
        ),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        bn_add_act(**{"x": torch.ones(2, 3, 4), **arguments})
