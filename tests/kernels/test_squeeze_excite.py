"""Squeeze-and-excite's kernels against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels.device import assume_device
from fastnets.kernels.launch import observe_launches
from fastnets.kernels.plane_mean import plane_mean
from fastnets.kernels.squeeze_excite import excite, gates, scale_planes
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def stock(dtype, x, mean, w1, b1, w2, b2):
    x, mean, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in (x, mean, w1, b1, w2, b2))
    gate = F.hardsigmoid(F.linear(F.silu(F.linear(mean, w1, b1)), w2, b2))
    return x * gate[:, :, None, None], gate


def check(lane, shape, squeezed, dtype, last=True, biases=True):
    x = torch.randn(shape).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    C = shape[1]
    mean, w1, w2 = torch.randn(shape[0], C), torch.randn(squeezed, C) / C**0.5, torch.randn(C, squeezed)
    mean, w1, w2 = (t.to(dtype) for t in (mean, w1, w2))
    b1, b2 = (torch.randn(n).to(dtype) for n in (squeezed, C)) if biases else (None, None)
    with lane:
        put = [lane.put(t) for t in (x, mean, w1, b1, w2, b2)]
        y, gate = excite(*put, "silu", "hardsigmoid", keep=True)
    assert y.stride() == x.stride()
    arguments = (x, mean, w1, b1, w2, b2)
    reference, same = (stock(d, *arguments) for d in (torch.float64, dtype))
    assert_close_to(reference[0], same[0], y, 2.0)
    assert_close_to(reference[1], same[1], gate.to(dtype), 2.0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_gate_and_scaling(lane, last, dtype):
    check(lane, (2, 40, 7, 5), 6, dtype, last)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "shape, squeezed", [((3, 7, 3, 3), 1), ((2, 130, 9, 8), 33), ((1, 70, 16, 16), 130), ((2, 8, 1, 1), 8)]
)
def test_shapes(lane, last, shape, squeezed):
    check(lane, shape, squeezed, BF16, last, biases=squeezed != 33)


@pytest.mark.parametrize("shape, squeezed, dtype", [((2, 130), 6, HALF), ((3, 40), 70, FULL)])
def test_gates_alone(lane, shape, squeezed, dtype):
    mean, w1, w2 = torch.randn(shape), torch.randn(squeezed, shape[1]) / 8, torch.randn(shape[1], squeezed)
    tensors = [t.to(dtype) for t in (mean, w1, torch.randn(squeezed), w2, torch.randn(shape[1]))]
    with lane:
        gate = gates(*map(lane.put, tensors), "silu", "hardsigmoid")
    x = torch.ones(*shape, 1, 1)
    reference, same = (stock(d, x, *tensors)[1] for d in (torch.float64, dtype))
    assert_close_to(reference, same, gate.to(dtype), 2.0)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # Several threads write the same bytes to shared memory where a sum changes its layout.
    check(lane.but(shared_races=None), (1, 24, 5, 5), 4, HALF)


@pytest.mark.parametrize("last", [True, False])
def test_scale_and_shift_of_planes(lane, last):
    x = integers(2, 20, 6, 5)
    x = x.to(memory_format=torch.channels_last) if last else x
    scale, shift = integers(2, 20), integers(2, 20)
    with lane:
        y = scale_planes(lane.put(x), lane.put(scale), lane.put(shift))
        z = scale_planes(lane.put(x), lane.put(scale), dtype=HALF)
    assert_exact(x * scale[:, :, None, None] + shift[:, :, None, None], y)
    assert_exact(x * scale[:, :, None, None], z)
    assert z.dtype == HALF


@pytest.mark.parametrize("last", [True, False])
def test_mean_of_a_product(lane, last):
    x, factor = integers(2, 20, 4, 8), integers(2, 20, 4, 8)
    if last:
        x, factor = (t.to(memory_format=torch.channels_last) for t in (x, factor))
    with lane:
        y = plane_mean(lane.put(x.half()), channels_last=last, factor=lane.put(factor), dtype=FULL)
    assert_exact((x * factor).mean((2, 3), keepdim=True), y)


def test_images_are_read_once_and_weights_no_more_than_images():
    x = torch.empty(32, 1152, 7, 7, dtype=HALF, device="meta").to(memory_format=torch.channels_last)
    weights = torch.empty(48, 1152, dtype=HALF, device="meta")
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        excite(x, x[:, :, 0, 0], weights, None, weights.t(), None, "silu", "sigmoid")
    (one,) = seen
    assert one.bytes_written == 2 * x.numel()
    assert one.grid[0] * weights.numel() <= x.numel() * 1.01


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 4, 3, 3)[..., ::2]}, ValueError, "channels-last or contiguous"),
        ({"x": torch.ones(2, 4, 3, 3).double()}, TypeError, "float64"),
        ({"w1": torch.ones(3, 5)}, ValueError, r"expected \[S, 4\]"),
        ({"w1": torch.ones(300, 4), "w2": torch.ones(4, 300)}, ValueError, "at most 256"),
        ({"gate": "swish"}, ValueError, "unknown activation"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "x": torch.ones(2, 4, 3, 3), "mean": torch.ones(2, 4), "w1": torch.ones(3, 4), "b1": None,
        "w2": torch.ones(4, 3), "b2": None, "activation": "relu", "gate": "sigmoid",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        excite(**{**arguments, **change})
