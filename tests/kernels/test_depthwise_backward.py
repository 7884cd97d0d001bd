"""Gradients of depthwise convolutions against autograd's in float64, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import depthwise_backward, depthwise_weight_gradient
from fastnets.kernels.conv_backward import conv_input_gradient, conv_weight_gradient
from fastnets.kernels.conv_input_gradient import Normalized
from fastnets.kernels.conv_shape import Prologue
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.conv_cases import ACTIVATIONS, in_layout
from tests.lanes import STRICT_LANES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOW = pytest.mark.slow

# Name: (C, multiplier, H, W, R, S, stride, padding, dilation).
GEOMETRIES = {
    "3x3": (24, 1, 9, 7, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": (24, 1, 9, 8, 3, 3, (2, 2), (1, 1), (1, 1)),
    "1x1 image": (8, 1, 1, 1, 3, 3, (1, 1), (1, 1), (1, 1)),
    "1x1 filter": (8, 1, 4, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    "odd channels": (7, 1, 6, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "stride above filter": (8, 1, 11, 12, 2, 3, (4, 5), (0, 1), (1, 1)),
    "padding above filter": (8, 1, 4, 3, 3, 3, (1, 2), (5, 4), (1, 1)),
    "dilation and stride differ": (8, 1, 13, 9, 3, 5, (2, 1), (4, 2), (3, 1)),
    "dilation and stride share a factor": (8, 1, 13, 9, 3, 3, (2, 4), (2, 2), (2, 2)),
    "multiplier 3, stride 2": (6, 3, 7, 8, 3, 3, (2, 1), (1, 1), (1, 1)),
    "5x5 stride 2": (24, 1, 10, 9, 5, 5, (2, 2), (2, 2), (1, 1)),
    "7x7": (16, 1, 9, 8, 7, 7, (1, 1), (3, 3), (1, 1)),
    "9x1": (8, 1, 12, 4, 9, 1, (1, 1), (4, 0), (1, 1)),
    "17x3 stride 2": (8, 1, 15, 12, 17, 3, (2, 1), (8, 1), (1, 1)),
    "1x11": (8, 1, 4, 12, 1, 11, (1, 1), (0, 5), (1, 1)),
}


def case(name, dtype=torch.float32, draw=torch.randn, N=2):
    """(x, weight, dy, geometry as keywords)"""
    C, multiplier, H, W, R, S, stride, padding, dilation = GEOMETRIES[name]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": C}
    x, weight = draw(N, C, H, W).to(dtype), draw(C * multiplier, 1, R, S).to(dtype)
    dy = draw(*F.conv2d(x.float(), weight.float(), None, **geometry).shape).to(dtype)
    return in_layout(x, "last"), weight, in_layout(dy, "last"), geometry


def autograd(x, weight, dy, geometry, dtype):
    """Stock's gradients of x and of weight, in dtype."""
    x, weight, dy = (t.detach().to(dtype) for t in (x, weight, dy))
    x.requires_grad_()
    weight.requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight, None, **geometry), (x, weight), dy)


def input_gradient(lane, dy, weight, shape, geometry, **options):
    dy, weight = lane.put(dy), lane.put(weight)
    options = {k: lane.put(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if options.get("normalized") is not None:
        z, before, _ = options["normalized"]
        vectors = (lane.put(v) for v in before.tensors)
        options["normalized"] = Normalized(lane.put(z), Prologue(*vectors, *before[4:]))
    with lane:
        result = conv_input_gradient(dy, weight, shape, **geometry, **options)
    dx = result[0] if isinstance(result, tuple) else result
    assert dx.is_contiguous(memory_format=torch.channels_last)
    return result


def weight_gradient(lane, dy, x, shape, geometry, prologue=None, **options):
    if prologue is not None:
        prologue = Prologue(*(lane.put(v) for v in prologue.tensors), *prologue[4:])
    dy, x = lane.put(dy), lane.put(x)
    with lane:
        return conv_weight_gradient(dy, x, shape, **geometry, prologue=prologue, **options)


FEW = ("3x3", "multiplier 3, stride 2")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=SLOW) for n in GEOMETRIES])
def test_exact_on_integers(lane, name):
    check_exactly(lane, name)


@pytest.mark.lanes("interpreter")
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in FEW])
def test_exact_on_integers_interpreted(lane, name):
    check_exactly(lane, name)


def check_exactly(lane, name):
    x, weight, dy, geometry = case(name, draw=integers)
    dx64, dw64 = autograd(x, weight, dy, geometry, torch.float64)
    assert_exact(dx64, input_gradient(lane, dy, weight, x.shape, geometry))
    assert_exact(dw64, weight_gradient(lane, dy, x, weight.shape, geometry))


ACCURACY = [
    ("3x3", torch.float32),
    ("3x3 stride 2", torch.float16),
    *(pytest.param(name, dtype, marks=SLOW) for name in ("3x3", "3x3 stride 2") for dtype in DTYPES),
]


@pytest.mark.parametrize("name, dtype", ACCURACY)
def test_accuracy(lane, name, dtype):
    x, weight, dy, geometry = case(name, dtype)
    reference = autograd(x, weight, dy, geometry, torch.float64)
    stock = autograd(x, weight, dy, geometry, dtype)
    assert_close_to(reference[0], stock[0], input_gradient(lane, dy, weight, x.shape, geometry), 3)
    assert_close_to(reference[1], stock[1], weight_gradient(lane, dy, x, weight.shape, geometry), 3)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # A sum that several warps have leaves through shared memory, written by each of them: the same bytes.
    check_exactly(lane.but(shared_races=None), "5x5 stride 2")


LAYOUTS = ["sliced", *(pytest.param(n, marks=SLOW) for n in ("contiguous", "misaligned", "transposed"))]


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param("expanded", marks=SLOW)])
def test_layouts(lane, layout):
    x, weight, dy, geometry = case("3x3 stride 2", torch.float16, integers)
    x, dy, added = in_layout(x, layout), in_layout(dy, layout), in_layout(integers(*x.shape).half(), layout)
    dx64, dw64 = autograd(x, weight, dy, geometry, torch.float64)
    assert_exact(dx64 + added, input_gradient(lane, dy, weight, x.shape, geometry, added=added))
    assert_exact(dw64, weight_gradient(lane, dy, x, weight.shape, geometry, dtype=torch.float32))


@pytest.mark.lanes("interpreter", "gpu")
def test_a_gradient_of_one_number(lane):
    # What .sum().backward() hands over: every stride 0.
    x, weight, dy, geometry = case("3x3")
    dy = torch.tensor(2.0).expand(dy.shape)
    reference, stock = (autograd(x, weight, dy, geometry, d) for d in (torch.float64, torch.float32))
    assert_close_to(reference[0], stock[0], input_gradient(lane, dy, weight, x.shape, geometry), 3)
    assert_close_to(reference[1], stock[1], weight_gradient(lane, dy, x, weight.shape, geometry), 3)


@pytest.mark.slow
@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_packed_weights(lane):
    x, weight, dy, geometry = case("3x3", torch.float16, integers)
    innermost = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for layout in (innermost, weight[:, :, :1, :1].expand(weight.shape)):
        dx64, _ = autograd(x, layout, dy, geometry, torch.float64)
        assert_exact(dx64, input_gradient(lane, dy, layout, x.shape, geometry))


# --- the layers before


def batch_norm(C, activation, affine=True):
    vectors = (torch.randn(C), torch.rand(C) + 0.5)
    affine = (torch.randn(C), torch.randn(C)) if affine else (None, None)
    return Prologue(*vectors, *affine, activation, 0.2)


def normalised(z, before, dtype):
    mean, rstd, weight, bias = (None if v is None else v.to(dtype)[:, None, None] for v in before.tensors)
    x_hat = (z.to(dtype) - mean) * rstd
    u = x_hat if weight is None else x_hat * weight
    return x_hat, ACTIVATIONS[before.activation](u if bias is None else u + bias, before.negative_slope)


EPILOGUES = {
    "relu6": ("3x3", torch.float32, "relu6", "last", False),
    "relu, added": ("3x3 stride 2", torch.float16, "relu", "last", True),
    "silu, contiguous, added": ("multiplier 3, stride 2", torch.bfloat16, "silu", "contiguous", True),
    "hardswish, odd": ("odd channels", torch.float16, "hardswish", "sliced", False),
    "none": ("5x5 stride 2", torch.float32, "none", "last", True),
}


@pytest.mark.parametrize(
    "name", ["relu, added", *(pytest.param(n, marks=SLOW) for n in EPILOGUES if n != "relu, added")]
)
def test_the_gradient_goes_on_through_the_layer_before(lane, name):
    geometry_name, dtype, activation, layout, accumulated = EPILOGUES[name]
    x, weight, dy, geometry = case(geometry_name, dtype)
    z = in_layout(torch.randn(x.shape).to(dtype), layout)
    before = batch_norm(x.shape[1], activation, affine=activation != "none")
    added = in_layout(torch.randn(x.shape).to(dtype), layout) if accumulated else None
    dv, sums = input_gradient(
        lane, dy, weight, x.shape, geometry, added=added, normalized=Normalized(z, before)
    )

    def expected(of):
        dx = autograd(x, weight, dy, geometry, of)[0]
        dx = dx if added is None else dx + added.to(of)
        leaf = z.detach().to(of).requires_grad_()
        x_hat, y = normalised(
            leaf, Prologue(*(v if v is None else v.to(of) for v in before[:4]), *before[4:]), of
        )
        # Through the activation alone: d/dz undoes to dv by the scale of batch norm.
        scale = before.rstd if before.bn_weight is None else before.rstd * before.bn_weight
        (dz,) = torch.autograd.grad(y, leaf, dx)
        return dz / scale.to(of)[:, None, None], x_hat.detach()

    reference, x_hat = expected(torch.float64)
    stock, _ = expected(torch.float32)
    assert_close_to(reference, stock.to(dtype), dv, 3)
    of_dv = dv.cpu().double()
    exact = torch.stack([of_dv.sum((0, 2, 3)), (of_dv * x_hat).sum((0, 2, 3))])
    size = torch.stack([of_dv.abs().sum((0, 2, 3)), (of_dv * x_hat).abs().sum((0, 2, 3))])
    assert sums.dtype == torch.float32
    assert ((sums.cpu() - exact).abs() <= 2**-20 * size + 1e-30).all()


PROLOGUES = {
    "relu6": ("3x3", torch.float16, "relu6"),
    "silu": ("3x3 stride 2", torch.float32, "silu"),
    "hardswish, padded": ("padding above filter", torch.bfloat16, "hardswish"),
    "no affine": ("multiplier 3, stride 2", torch.float32, "sigmoid"),
}


@pytest.mark.parametrize(
    "name", ["no affine", *(pytest.param(n, marks=SLOW) for n in PROLOGUES if n != "no affine")]
)
def test_the_input_is_computed_again_while_loading(lane, name):
    geometry_name, dtype, activation = PROLOGUES[name]
    z, weight, dy, geometry = case(geometry_name, dtype)
    before = batch_norm(z.shape[1], activation, affine=name != "no affine")
    dw = weight_gradient(lane, dy, z, weight.shape, geometry, before)
    y64 = normalised(z, before, torch.float64)[1]
    rounded = normalised(z, before, torch.float32)[1].to(dtype)
    reference = autograd(y64, weight, dy, geometry, torch.float64)[1]
    assert_close_to(reference, autograd(rounded, weight, dy, geometry, dtype)[1], dw, 3)


# --- programs, shares, limits


@pytest.mark.slow
@pytest.mark.parametrize("R", [3, 8])
def test_every_config(lane, R):
    x, weight = integers(1, 40, 11, 5).to(memory_format=torch.channels_last), integers(40, 1, R, 3)
    geometry = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 40}
    dy = integers(*F.conv2d(x, weight, None, **geometry).shape)
    dx64, dw64 = autograd(x, weight, dy, geometry, torch.float64)
    configs = depthwise_backward.configs(DEVICES["h100"])
    for config in configs if R == 3 else configs[:1]:
        assert_exact(dx64, input_gradient(lane, dy, weight, x.shape, geometry, config=config))
    configs = depthwise_weight_gradient.configs(DEVICES["h100"])
    for config in configs if R == 3 else configs[-1:]:
        assert_exact(dw64, weight_gradient(lane, dy, x, weight.shape, geometry, config=config))


@pytest.mark.lanes("sm_80")
def test_bit_identical_from_run_to_run(lane):
    x, weight, dy, geometry = case("3x3", torch.bfloat16)
    normalized = Normalized(x, batch_norm(24, "silu"))

    def gradients(lane):
        dv, sums = input_gradient(lane, dy, weight, x.shape, geometry, normalized=normalized)
        return dv, sums, weight_gradient(lane, dy, x, weight.shape, geometry)

    assert all(torch.equal(a, b) for a, b in zip(gradients(lane), gradients(lane.but(order="shuffled"))))


@pytest.mark.lanes("interpreter", "gpu")
def test_infinities_stay_in_their_windows(lane):
    # An overflowed loss scale: only pixels that the infinite gradient's own taps reach are not finite.
    x, weight, dy, geometry = case("3x3 stride 2")
    weight.abs_().add_(0.1)
    dy[0, 3, 2, 2] = float("inf")
    dx = input_gradient(lane, dy, weight, x.shape, geometry)
    assert_exact(
        torch.isfinite(autograd(x, weight, dy, geometry, torch.float64)[0]), torch.isfinite(dx).cpu()
    )


def test_empty_batch(lane):
    dy, x, weight = torch.empty(0, 8, 5, 5), torch.empty(0, 8, 5, 5), torch.empty(8, 1, 3, 3)
    geometry = {"padding": (1, 1), "groups": 8}
    normalized = Normalized(x, batch_norm(8, "relu"))
    with lane:
        dv, sums = conv_input_gradient(dy, weight, x.shape, **geometry, normalized=normalized)
        dw = conv_weight_gradient(dy, x, weight.shape, **geometry)
    assert dv.shape == x.shape
    assert_exact(torch.zeros(2, 8), sums)
    assert_exact(torch.zeros(8, 1, 3, 3), dw)


@pytest.mark.slow
def test_offsets_past_two_to_the_31(lane):
    if lane.name == "gpu" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB")
    # Pages that nobody touches cost nothing; the race detector would touch them.
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=lane.device)
    dy = memory.as_strided((2, 8, 4, 4), (2**31, 1, 32, 8))
    dy.copy_(integers(2, 8, 4, 4))
    x, weight = integers(2, 8, 4, 4).half(), integers(8, 1, 3, 3).half()
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 8}
    dx64, dw64 = autograd(x, weight, dy.cpu(), geometry, torch.float64)
    lane = lane.but(races=None)
    assert_exact(dx64, input_gradient(lane, dy, weight, x.shape, geometry))
    assert_exact(dw64, weight_gradient(lane, dy, x, weight.shape, geometry))


def tensor(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def test_one_launch_with_wide_accesses_for_all_classes_of_pixels():
    seen = []
    with observe_launches(seen.append), assume_device("a100"):
        conv_input_gradient(
            tensor(32, 96, 56, 56), tensor(96, 1, 3, 3), (32, 96, 112, 112), stride=(2, 2), padding=(1, 1),
            groups=96, added=tensor(32, 96, 112, 112),
        )  # fmt: skip
    (launch,) = seen
    assert launch.bytes == 2 * 96 * (32 * 56 * 56 + 2 * 32 * 112 * 112 + 9)
    assert launch.constexprs["VECTOR_DY"] == 8
    assert launch.constexprs["DENSE_ADDED"]
    assert launch.config.replace(maxnreg=None) in depthwise_backward.configs(DEVICES["a100"])


@pytest.mark.parametrize("C, size", [(32, 112), (144, 56), (960, 7), (64, 3)])
def test_partial_sums_are_a_tenth_of_what_is_read_or_fill_the_device(C, size):
    seen = []
    with observe_launches(seen.append), assume_device("h100") as device:
        conv_weight_gradient(
            tensor(32, C, size, size), tensor(32, C, size, size), (C, 1, 3, 3), padding=(1, 1), groups=C
        )
    first, *second = seen
    workspace = 2 * first.bytes_written
    programs = first.grid[0] * first.grid[1]
    assert workspace <= 0.1 * first.bytes_read or programs <= device.multiprocessors + first.grid[0]
    assert programs >= 0.9 * device.multiprocessors or size == 3
    assert {launch.name for launch in second} == {"sum_rows_kernel"}


def test_groups_that_are_not_depthwise_are_refused():
    with pytest.raises(ValueError, match="groups=4 is not depthwise for 8 channels"):
        depthwise_backward.depthwise_input_gradient(
            torch.ones(1, 8, 5, 5), torch.ones(8, 2, 1, 1), (1, 8, 5, 5), groups=4
        )
