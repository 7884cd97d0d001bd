"""The op bn_add_act: accuracy against float64, gradient, registration, errors; and what networks call."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets import fused
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.batch_norm import call_bn_add_act
from tests.accuracy import assert_close_to, assert_exact
from tests.fused.networks import settled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(3, 6), (2, 5, 9), (2, 8, 5, 7), (1, 1, 1, 1), (2, 7, 3, 4, 5), (0, 4, 3, 3)]


def arguments(shape, *, bias=True, bn=True, residual=True, dtype=torch.float32):
    C = shape[1]
    tensors = {
        "x": torch.randn(shape),
        "bias": torch.randn(C) if bias else None,
        "running_mean": torch.randn(C) if bn else None,
        "running_var": torch.rand(C) + 0.5 if bn else None,
        "bn_weight": torch.randn(C) if bn else None,
        "bn_bias": torch.randn(C) if bn else None,
        "residual": torch.randn(shape) if residual else None,
    }
    return {k: None if t is None else t.to(dtype) for k, t in tensors.items()}


def stock(tensors, activation="none", dtype=None):
    t = {k: v if v is None or dtype is None else v.to(dtype) for k, v in tensors.items()}
    y = t["x"]
    if t["bias"] is not None:
        y = y + t["bias"].view(1, -1, *[1] * (y.dim() - 2))
    if t["running_mean"] is not None:
        y = F.batch_norm(y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"])
    if t["residual"] is not None:
        y = y + t["residual"]
    return ACTIVATIONS[activation].forward(y, 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_stock(shape, dtype):
    for bias, bn, residual in itertools.product((True, False), repeat=3):
        tensors = arguments(shape, bias=bias, bn=bn, residual=residual, dtype=dtype)
        before = tensors["x"].clone()
        y = fused.bn_add_act(**tensors, activation="relu")
        assert_close_to(stock(tensors, "relu", torch.float64), stock(tensors, "relu"), y)
        assert_exact(before, tensors["x"])


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_serves_the_op(lane, dtype):
    tensors = arguments((2, 8, 5, 7), dtype=dtype)
    with lane, torch.no_grad():
        y = fused.bn_add_act(
            **{k: lane.put(t) for k, t in tensors.items()}, activation="silu", backend="triton"
        )
    assert_close_to(stock(tensors, "silu", torch.float64), stock(tensors, "silu"), y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_formula(activation):
    tensors = arguments((2, 3, 4), dtype=torch.float64)
    inputs = [t.requires_grad_(not k.startswith("running")) for k, t in tensors.items()]
    assert torch.autograd.gradcheck(
        lambda *t: fused.bn_add_act(*t, activation=activation), inputs, fast_mode=True
    )


@pytest.mark.parametrize("name", ["bn_add_act", "bn_add_act_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    tensors = arguments((2, 3, 4, 5))
    if name == "bn_add_act":
        tensors["x"].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    torch.library.opcheck(op, (*tensors.values(), 1e-5, "leaky_relu", 0.2, "auto"))


def test_memory_format_is_kept():
    for shape, memory_format in (
        ((2, 8, 5, 7), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ):
        tensors = arguments(shape)
        tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
        assert fused.bn_add_act(**tensors).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(5)}, ValueError, "2 to 5 dimensions"),
        ({"x": torch.ones(2, 8, 5, 7, dtype=torch.int32)}, TypeError, "floating"),
        ({"residual": torch.randn(2, 8, 5, 1)}, ValueError, "expand or convert"),
        ({"running_mean": None}, ValueError, "go together"),
        ({"bn_weight": torch.randn(7)}, ValueError, r"shape \(7,\), expected \(8,\)"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fused.bn_add_act(**{**arguments((2, 8, 5, 7)), **change})


def test_call_runs_stock_where_fusing_would_show():
    bn, act, x = nn.BatchNorm2d(4), nn.ReLU(), torch.randn(2, 4, 3, 3)
    bn.running_mean.normal_()
    expected = act(F.batch_norm(x, None, None, bn.weight, bn.bias, training=True))
    torch.testing.assert_close(call_bn_add_act(bn, act, x, None, "relu"), expected)  # batch statistics
    assert int(bn.num_batches_tracked) == 1
    bn.eval()
    wide = torch.randn(2, 1, 1, 1)  # a residual that broadcasts
    torch.testing.assert_close(call_bn_add_act(bn, act, x, wide, "relu"), act(bn(x) + wide))
    calls = []
    act.register_forward_hook(lambda *a: calls.append(1))
    call_bn_add_act(bn, act, x, None, "relu")
    assert calls == [1]


def test_stock_composition_never_writes_into_what_a_hook_kept():
    bn, x, kept = nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 3, 3), []
    bn.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        call_bn_add_act(bn, None, x, torch.ones_like(x), "none")
        torch.testing.assert_close(kept[0], bn.forward(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [8, 5])  # all of a map's, or its first
def test_channels_last_on_the_cpu_is_scaled_and_shifted(affine, channels):
    bn = settled(nn.BatchNorm2d(channels, affine=affine))
    x = torch.randn(3, 8, 6, 5).to(memory_format=torch.channels_last)[:, :channels]
    with torch.no_grad():
        for factor in (1.0, 2.0):
            bn.running_mean.mul_(factor)
            for _ in range(2):  # folded, and as kept
                reference64 = F.relu(copy.deepcopy(bn).double()(x.double()))
                y = call_bn_add_act(bn, None, x, None, "relu", 0.0, "auto")
                assert_close_to(reference64, F.relu(bn(x)), y)
                assert y.is_contiguous(memory_format=torch.channels_last)
        nan = torch.full_like(x, float("nan"))
        assert call_bn_add_act(bn, None, nan, None, "relu", 0.0, "auto").isnan().all()
