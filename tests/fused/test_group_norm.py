"""The group-norm op: gradients, registration, modules; and what networks call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets.fused import dispatch
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.group_norm import GroupNormAct, InstanceNormAct, call_group_norm_act, group_norm_act
from tests.accuracy import assert_close_to


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("affine, adds", [(True, True), (False, False), (True, False)])
def test_gradient_formula(activation, affine, adds):
    x, residual = (torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, weight if affine else None, bias if affine else None, residual if adds else None)

    def function(x, weight, bias, residual):
        return group_norm_act(x, 3, weight, bias, residual, activation=activation, backend="reference")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_stock(activation, dtype):
    shape = (3, 8, 5, 4)
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    dy = torch.randn(3, 8, 1, 1).to(dtype).expand(shape)
    weight, bias = torch.randn(8), torch.randn(8)

    def run(wide, function):
        vectors = torch.promote_types(wide, torch.float32)
        leaves = [x.to(wide), weight.to(vectors), bias.to(vectors)]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y.backward(dy.to(wide))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def stock(x, weight, bias):
        return ACTIVATIONS[activation].forward(F.group_norm(x, 4, weight, bias), 0.01)

    def ours(x, weight, bias):
        return group_norm_act(x, 4, weight, bias, activation=activation, backend="reference")

    results = run(dtype, ours)
    for reference, same, value in zip(run(torch.float64, stock), run(dtype, stock), results):
        assert_close_to(reference, same, value, 3.0)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.lanes("interpreter", "gpu")
def test_triton_serves_the_op(lane):
    shape = (2, 8, 6, 6)
    x, residual, dy = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(3))
    weight, bias = torch.randn(8), torch.randn(8)
    reference = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    stock = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    ours = [lane.put(t).clone().requires_grad_() for t in (x, weight, bias, residual)]
    outputs = []
    for leaves in (reference, stock):
        y = F.relu(F.group_norm(leaves[0], 2, leaves[1], leaves[2]) + leaves[3])
        y.backward(dy.to(y.dtype))
        outputs.append(y.detach())
    with lane:
        y = group_norm_act(ours[0], 2, *ours[1:], activation="relu", backend="triton")
        y.backward(lane.put(dy))
    assert_close_to(*outputs, y.detach())
    for expected, same, value in zip(reference, stock, ours):
        assert_close_to(expected.grad, same.grad, value.grad, 5.0)


def test_ops_are_registered_as_pytorch_asks():
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(6), torch.randn(6)
    options = (3, 1e-5, "silu", 0.0, "auto")
    ops = torch.ops.fastnets
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, x)]
    torch.library.opcheck(ops.group_norm_act.default, (*leaves, *options))
    torch.library.opcheck(ops.group_norm_act_inference.default, (x, weight, None, None, *options))
    torch.library.opcheck(ops.group_norm_act_forward.default, (x, weight, bias, x, *options))
    _, mean, rstd = ops.group_norm_act_forward(x, weight, bias, x, *options)
    torch.library.opcheck(
        ops.group_norm_act_backward.default,
        (x, x, mean, rstd, weight, bias, x, 3, "silu", 0.0, True, "auto"),
    )


def test_saves_the_input_and_statistics_only():
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    norm = nn.GroupNorm(4, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = group_norm_act(x, 4, norm.weight, norm.bias, x, activation="none", backend="reference")
    assert sum(t.numel() for t in saved if t is not norm.weight and t is not norm.bias) == x.numel() + 2 * 16
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_a_parameter_changed_in_place_before_backward_is_an_error():
    norm = nn.GroupNorm(2, 4)
    y = group_norm_act(torch.randn(2, 4, 3), 2, norm.weight, norm.bias, backend="reference")
    with torch.no_grad():
        norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


MODULES = {
    "group": (lambda: nn.GroupNorm(4, 8), (3, 8, 5, 5)),
    "group of a sequence": (lambda: nn.GroupNorm(2, 8, affine=False), (3, 8, 7)),
    "group of features": (lambda: nn.GroupNorm(2, 8), (3, 8)),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True), (3, 8, 5, 5)),
    "instance 1d": (lambda: nn.InstanceNorm1d(8), (3, 8, 9)),
    "instance 3d": (lambda: nn.InstanceNorm3d(8), (2, 8, 3, 4, 5)),
    "instance, tracked": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (3, 8, 5, 5)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_stock(name, training):
    make, shape = MODULES[name]
    norm = make().train(training)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
    kind = GroupNormAct if isinstance(norm, nn.GroupNorm) else InstanceNormAct
    fused = kind.from_stock(norm, nn.SiLU(), backend="reference")
    assert fused.training == training
    x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    y = fused(x, residual)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    after = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.load_state_dict(before)
    expected = F.silu(norm(x) + residual)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(after[key], value)


def test_modules_take_stock_arguments():
    group = GroupNormAct(2, 6, 1e-3, act=nn.ReLU())
    assert (group.norm.num_groups, group.norm.eps, group.activation) == (2, 1e-3, ("relu", 0.0))
    instance = InstanceNormAct(6, affine=True, track_running_stats=True, act=nn.LeakyReLU(0.2))
    stock = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    assert list(instance.state_dict()) == [f"norm.{key}" for key in stock.state_dict()]
    assert instance.activation == ("leaky_relu", 0.2)
    with pytest.raises(TypeError, match=r"norm is BatchNorm2d, expected nn.GroupNorm"):
        GroupNormAct.from_stock(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="has no fused form"):
        GroupNormAct(2, 4, act=nn.Softmax())


def fused_calls(monkeypatch):
    """The ops that run in what follows."""
    from fastnets.fused import group_norm

    seen = []
    original = group_norm.group_norm_act
    monkeypatch.setattr(group_norm, "group_norm_act", lambda *a, **k: seen.append(a) or original(*a, **k))
    return seen


@pytest.mark.parametrize(
    "why", ["auto on the CPU", "hook", "subclass", "tracked", "autocast", "residual broadcasts", "unbatched"]
)
def test_stock_runs_where_fusing_would_not_be_stock(why, monkeypatch):
    seen = fused_calls(monkeypatch)
    norm, x, residual = nn.GroupNorm(2, 8), torch.randn(3, 8, 4, 4), None
    backend = "auto" if why == "auto on the CPU" else "reference"
    if why == "hook":
        norm.register_forward_hook(lambda *a: None)
    elif why == "subclass":
        norm = type("Own", (nn.GroupNorm,), {})(2, 8)
    elif why == "tracked":
        norm = nn.InstanceNorm2d(8, track_running_stats=True)
    elif why == "residual broadcasts":
        residual = torch.randn(1, 8, 1, 1)
    elif why == "unbatched":
        norm, x = nn.InstanceNorm2d(8), torch.randn(8, 4, 4)
    with torch.autocast("cpu", enabled=why == "autocast"):
        y = call_group_norm_act(norm, None, x, "relu", 0.0, backend, residual)
        expected = F.relu(norm(x) if residual is None else norm(x) + residual)
    assert not seen
    torch.testing.assert_close(y, expected)
    assert y.dtype == expected.dtype
    if why == "auto on the CPU":
        with dispatch.backend("reference"):
            call_group_norm_act(norm, None, x, "relu")
        assert len(seen) == 1


@pytest.mark.parametrize(
    "norm, shape, message",
    [
        (nn.GroupNorm(2, 4), (2, 6, 3), "Expected weight|number of channels|weight to be a vector"),
        (nn.GroupNorm(4, 4), (1, 4), "more than 1 value per channel"),
        (nn.InstanceNorm2d(4), (2, 4, 1, 1), "more than 1 spatial element"),
    ],
)
def test_what_stock_refuses_stock_refuses(norm, shape, message):
    if shape == (1, 4):
        norm = nn.GroupNorm(1, 1)
        shape = (1, 1)
    with pytest.raises((ValueError, RuntimeError), match=message):
        call_group_norm_act(norm, None, torch.randn(shape), "relu", 0.0, "reference")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3), 1), ValueError, "got 1"),
        ((torch.ones(2, 4).int(), 1), TypeError, "int32"),
        ((torch.ones(2, 4), 3), ValueError, "groups=3 does not divide 4 channels"),
        ((torch.ones(2, 4), 2, torch.ones(3)), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        ((torch.ones(2, 4), 2, None, None, torch.ones(4)), ValueError, "residual is"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        group_norm_act(*arguments, backend="reference")


def test_compiles_for_training():
    norm = GroupNormAct(2, 4, act=nn.SiLU(), backend="reference")
    x = torch.randn(2, 4, 5, requires_grad=True)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
