"""Group and instance norm's kernels against stock PyTorch, in every lane."""

import pytest
import torch
import torch.nn.functional as F

from fastnets.kernels import group_norm
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.group_norm import group_norm_add_act, group_norm_backward, group_statistics
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import LAYOUTS, STOCK_ACTIVATIONS, cast
from tests.lanes import STRICT_LANES

EPS = 1e-5
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def ours(lane, x, dy, weight, bias, residual, groups, activation):
    x, dy, weight, bias, residual = (lane.put(t) for t in (x, dy, weight, bias, residual))
    options = {"groups": groups, "activation": activation, "negative_slope": 0.1}
    with lane:
        mean, rstd = group_statistics(x, groups, eps=EPS)
        y = group_norm_add_act(x, mean, rstd, weight, bias, residual, **options)
        dx, dv, sums = group_norm_backward(
            dy, x, mean, rstd, weight, bias, residual, keep=residual is not None, **options
        )
    for tensor in (y, dx, dv):
        assert tensor is None or tensor.stride() == torch.empty_like(x).stride()
    affine = weight is not None
    return {
        "y": y,
        "x": dx,
        "residual": dv,
        "weight": sums[1] if affine else None,
        "bias": sums[0] if affine else None,
    }


def stock(x, dy, weight, bias, residual, groups, activation, dtype):
    """The same by PyTorch's autograd; vectors stay in fp32 where x is of 16 bits."""
    vector_dtype = torch.promote_types(dtype, FULL)
    leaves = {"x": x.to(dtype), "residual": None if residual is None else residual.to(dtype)}
    leaves |= {n: None if v is None else v.to(vector_dtype) for n, v in (("weight", weight), ("bias", bias))}
    leaves = {n: None if v is None else v.detach().clone().requires_grad_() for n, v in leaves.items()}
    u = F.group_norm(leaves["x"], groups, leaves["weight"], leaves["bias"], EPS)
    y = STOCK_ACTIVATIONS[activation](u if residual is None else u + leaves["residual"])
    y.backward(dy.to(dtype))
    return {"y": y.detach(), **{n: None if leaf is None else leaf.grad for n, leaf in leaves.items()}}


def check(lane, x, dy, residual=None, *, groups, activation="relu", affine=True):
    weight, bias = (torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])) if affine else (None, None)
    arguments = (x, dy, weight, bias, residual)
    result = ours(lane, *arguments, groups, activation)
    reference = stock(*arguments, groups, activation, torch.float64)
    same = stock(*arguments, groups, activation, x.dtype)
    for name, value in result.items():
        assert (value is None) == (reference[name] is None), name
        if value is not None:
            # Sums of fp32: stock's are of float64 on the CPU.
            ratio = {"y": 2.0, "x": 3.0, "residual": 3.0}.get(name, 5.0)
            assert_close_to(reference[name], same[name], value, ratio)


@pytest.mark.parametrize(
    "x, dy, residual, dtype, groups",
    [
        ("channels_last", "channels_last", "channels_last", HALF, 2),
        ("contiguous", "contiguous", None, BF16, 4),
        pytest.param("channels_last", "contiguous", None, FULL, 8, marks=pytest.mark.slow),
        pytest.param("contiguous", "expanded_pixels", "channels_last", FULL, 1, marks=pytest.mark.slow),
        pytest.param("channel_slice", "expanded_batch", None, HALF, 2, marks=pytest.mark.slow),
        pytest.param("every_second_pixel", "misaligned", "transposed", BF16, 8, marks=pytest.mark.slow),
        pytest.param("batch_innermost", "transposed", "expanded_batch", FULL, 4, marks=pytest.mark.slow),
        pytest.param("expanded_batch", "batch_innermost", None, FULL, 4, marks=pytest.mark.slow),
    ],
)
def test_layouts(lane, x, dy, residual, dtype, groups):
    x, dy, residual = (
        None if layout is None else cast(LAYOUTS[layout](3, 8, 5, 6), dtype) for layout in (x, dy, residual)
    )
    check(lane, x, dy, residual, groups=groups)


@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 140, 17), 2),
        pytest.param((5, 6), 2, marks=pytest.mark.slow),
        pytest.param((2, 21, 9), 7, marks=pytest.mark.slow),
        pytest.param((2, 3, 4, 5, 6), 3, marks=pytest.mark.slow),
        pytest.param((1, 12, 1, 1), 1, marks=pytest.mark.slow),
    ],
)
def test_shapes(lane, shape, groups):
    check(lane, torch.randn(shape), torch.randn(shape), groups=groups, activation="silu", affine=groups > 1)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ["none", "leaky_relu", "gelu", "tanh"])
def test_instances_without_affine(lane, activation):
    x = (torch.randn(3, 8, 6, 6) * 3).to(memory_format=torch.channels_last)
    check(lane, x, torch.randn(x.shape), groups=8, activation=activation, affine=False)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_large_mean_and_small_variance(lane):
    """Each sample has a mean of its own, 10^6 standard deviations from zero."""
    x = torch.tensor([1e4, -2e4]).view(2, 1, 1, 1) + 1e-2 * torch.randn(2, 8, 24, 24)
    reference = [t.flatten() for t in torch.native_group_norm(x.double(), None, None, 2, 8, 576, 4, EPS)[1:]]
    stock = [t.flatten() for t in torch.native_group_norm(x, None, None, 2, 8, 576, 4, EPS)[1:]]
    x = lane.put(x.to(memory_format=torch.channels_last))
    with lane:
        ours = group_statistics(x, 4, eps=EPS)
    for expected, same, value in zip(reference, stock, ours):
        assert_close_to(expected, same, value)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
def test_exact_on_integers_with_given_statistics(lane):
    shape = (2, 24, 4, 4)
    x, dy, residual = integers(*shape), integers(*shape), integers(*shape)
    mean, ones = integers(2 * 3), torch.ones(6)
    weight, bias = integers(24), integers(24)
    centred = x - mean.view(2, 3, 1).expand(2, 3, 8).reshape(2, 24, 1, 1)
    u = centred * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1) + residual
    dv = torch.where(u > 0, dy, 0.0)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        arguments = [
            lane.put(t.to(memory_format=memory_format) if t.dim() == 4 else t)
            for t in (dy, x, mean, ones, weight, bias, residual)
        ]
        with lane:
            y = group_norm_add_act(*arguments[1:], groups=3, activation="relu")
            dx, kept, sums = group_norm_backward(*arguments, groups=3, activation="relu", keep=True)
        assert_exact(u.relu(), y)
        assert_exact(dv, kept)
        assert_exact(torch.stack([dv.sum((0, 2, 3)), (dv * centred).sum((0, 2, 3))]), sums)
        # 128 values of a group: their averages are exact too.
        weighted = (dv * weight.view(1, -1, 1, 1)).view(2, 3, -1)
        inside = centred.view(2, 3, -1)
        a, b = weighted.mean(2, keepdim=True), (weighted * inside).mean(2, keepdim=True)
        assert_exact((weighted - (a + inside * b)).view(shape), dx)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_strictly(lane, layout):
    # Triton's layout conversion behind a sum has several warps write the same value to shared memory.
    lane = lane.but(shared_races=None)
    x, dy = (cast(LAYOUTS[layout](2, 24, 9, 9), HALF) for _ in range(2))
    check(lane, x, dy, groups=3)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(lane, shape):
    x = torch.empty(shape)
    with lane:
        mean, rstd = group_statistics(x, 4, eps=EPS)
        y = group_norm_add_act(x, mean, rstd, groups=4, activation="relu")
        dx, dv, sums = group_norm_backward(x, x, mean, rstd, groups=4, keep=True)
    assert mean.shape == rstd.shape == (shape[0] * 4,)
    assert y.shape == dx.shape == dv.shape == shape
    assert_exact(torch.zeros(2, 8).double(), sums)


def test_bytes_of_a_step():
    x = torch.empty(32, 64, 56, 56, dtype=BF16, device="meta").to(memory_format=torch.channels_last)
    vector = torch.empty(64, device="meta")
    seen = []
    with observe_launches(seen.append), assume_device("h100"):
        mean, rstd = group_statistics(x, 32, eps=EPS)
        group_norm_add_act(x, mean, rstd, vector, vector, groups=32, activation="relu")
        group_norm_backward(x, x, mean, rstd, vector, vector, groups=32, activation="relu")
    size = x.numel() * 2
    large = {launch.name: launch.bytes / size for launch in seen if launch.bytes > size / 2}
    assert large == {
        "channel_statistics_kernel": pytest.approx(1, abs=0.05),
        "bn_add_act_kernel": pytest.approx(2, abs=0.01),
        "bn_backward_sums_kernel": pytest.approx(2, abs=0.05),
        "bn_backward_input_kernel": pytest.approx(3, abs=0.01),
    }
    assert sum(launch.bytes for launch in seen) < 8.2 * size
    assert len(seen) <= 8


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, v: group_statistics(x, 3, eps=EPS), ValueError, "groups=3 does not divide 4 channels"),
        (lambda x, v: group_statistics(x.int(), 2, eps=EPS), TypeError, "x is torch.int32"),
        (
            lambda x, v: group_norm_add_act(x, v, v, groups=4),
            ValueError,
            r"mean has shape \(4,\), expected \(8,\), one for each sample and group",
        ),
        (
            lambda x, v: group_norm_backward(x, x, v, v, residual=x, groups=2, activation="relu"),
            ValueError,
            "use keep=True",
        ),
        (lambda x, v: group_norm_backward(x[:1], x, v, v, groups=2), ValueError, "dy has shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 4, 3), torch.ones(4))


def test_every_representative_call_is_served_on_every_device():
    for device in DEVICES.values():
        for call in group_norm.representative_calls():
            seen = []
            with observe_launches(seen.append), assume_device(device):
                call.thunk(None)
            large = [launch for launch in seen if launch.name.startswith(("bn_", "channel_"))]
            assert large
            shipped = group_norm.configs(device)
            assert all(launch.config.replace(maxnreg=None) in shipped for launch in large)
