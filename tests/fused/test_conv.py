"""The op conv_bn_act: every implementation against float64, its gradient, its registration, its errors."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets import fused
from fastnets.fused import conv, dispatch, onednn, packing
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.conv import call_conv_bn_act, implementation_of
from tests.accuracy import assert_close_to, assert_exact, integers

# N, C, H, W, K, R, S, stride, padding, dilation, groups
GEOMETRIES = {
    "plain": (2, 16, 9, 7, 24, 3, 3, 1, 1, 1, 1),
    "pointwise": (2, 24, 5, 6, 40, 1, 1, 1, 0, 1, 1),
    "pointwise strided": (1, 8, 7, 7, 16, 1, 1, 2, 0, 1, 1),
    "stem": (1, 3, 19, 17, 8, 7, 7, 2, 3, 1, 1),
    "odd channels": (1, 5, 7, 9, 7, 3, 3, 1, 1, 1, 1),
    "one pixel": (2, 8, 1, 1, 8, 3, 3, 1, 1, 1, 1),
    "one channel": (1, 1, 12, 12, 6, 5, 5, 1, 2, 1, 1),
    "rectangular filter": (1, 6, 8, 9, 10, 1, 5, 1, (0, 2), 1, 1),
    "stride beyond filter": (1, 4, 13, 13, 8, 2, 2, 4, 0, 1, 1),
    "padding beyond filter": (1, 4, 5, 5, 8, 3, 3, 2, 5, 1, 1),
    "dilation 3": (1, 8, 11, 12, 8, 3, 3, 1, 3, 3, 1),
    "grouped": (2, 12, 6, 6, 18, 3, 3, 1, 1, 1, 3),
    "depthwise": (2, 16, 9, 9, 16, 3, 3, 2, 1, 1, 16),
    "depthwise multiplied": (1, 6, 7, 7, 12, 3, 3, 1, 1, 1, 6),
    "empty batch": (0, 4, 5, 5, 8, 3, 3, 1, 1, 1, 1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def arguments(geometry, *, bn=True, bias=True, residual=True, dtype=torch.float32, draw=torch.randn):
    """Tensors of a call, rounded to ``dtype``, and its options."""
    N, C, H, W, K, R, S, stride, padding, dilation, groups = GEOMETRIES[geometry]
    options = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation), "groups": groups}
    x, weight = draw(N, C, H, W), draw(K, C // groups, R, S)
    if draw is torch.randn:
        weight = weight / (C // groups * R * S) ** 0.5
    shape = F.conv2d(x, weight, None, *options.values()).shape
    tensors = {
        "x": x,
        "weight": weight,
        "bias": draw(K) if bias else None,
        "running_mean": draw(K) if bn else None,
        "running_var": torch.rand(K) + 0.5 if bn else None,
        "bn_weight": draw(K) if bn else None,
        "bn_bias": draw(K) if bn else None,
        "residual": draw(*shape) if residual else None,
    }
    return {k: None if t is None else t.to(dtype) for k, t in tensors.items()}, options


def stock(tensors, options, activation="none", negative_slope=0.01, eps=1e-5, dtype=None):
    """Stock PyTorch's composition, in ``dtype``."""
    t = {k: v if v is None or dtype is None else v.to(dtype) for k, v in tensors.items()}
    y = F.conv2d(t["x"], t["weight"], t["bias"], *options.values())
    if t["running_mean"] is not None:
        y = F.batch_norm(
            y, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], False, 0.1, eps
        )
    if t["residual"] is not None:
        y = y + t["residual"]
    return ACTIVATIONS[activation].forward(y, negative_slope)


def judge(tensors, options, activation="none", backend="auto", **kwargs):
    y = fused.conv_bn_act(**tensors, **options, activation=activation, backend=backend, **kwargs)
    reference64 = stock(tensors, options, activation, dtype=torch.float64)
    assert_close_to(reference64, stock(tensors, options, activation), y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_library_and_reference_are_as_accurate_as_stock(geometry, dtype):
    draw = random.Random(f"{geometry} {dtype}")
    for backend in ("library", "reference"):
        for bn, residual in itertools.product((True, False), repeat=2):
            tensors, options = arguments(
                geometry, bn=bn, bias=draw.random() < 0.5, residual=residual, dtype=dtype
            )
            with torch.no_grad():
                judge(tensors, options, draw.choice(list(ACTIVATIONS)), backend)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_the_library_path(activation, residual):
    for dtype in DTYPES:
        tensors, options = arguments("plain", residual=residual, dtype=dtype)
        judge(tensors, options, activation, "library")


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["plain", "stem", "grouped", "depthwise", "empty batch"])
def test_triton_serves_the_op(lane, geometry, dtype):
    tensors, options = arguments(geometry, dtype=dtype)
    placed = {k: lane.put(t) for k, t in tensors.items()}
    with lane, torch.no_grad():
        y = fused.conv_bn_act(**placed, **options, activation="silu", backend="triton")
    reference64 = stock(tensors, options, "silu", dtype=torch.float64)
    assert_close_to(reference64, stock(tensors, options, "silu"), y)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("geometry", ["plain", "depthwise"])
def test_calls_of_one_kind_repeat_their_launches_on_other_tensors(lane, geometry):
    with lane, torch.no_grad():
        for _ in range(4):
            tensors, options = arguments(geometry, draw=integers, bias=False, residual=True)
            tensors["running_var"] = torch.full_like(tensors["running_var"], 0.25)  # scale 2 with eps=0
            placed = {k: lane.put(t) for k, t in tensors.items()}
            for activation in ("relu", "none"):
                y = fused.conv_bn_act(**placed, **options, activation=activation, backend="triton", eps=0.0)
                assert_exact(stock(tensors, options, activation, eps=0.0, dtype=torch.float64), y.cpu())
    replayed = [call for call in conv._calls.values() if getattr(call, "program", None)]
    assert len(replayed) >= 2


@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g != "empty batch"])
def test_small_integers_are_exact(geometry, backend):
    tensors, options = arguments(geometry, draw=integers)
    tensors["running_var"] = torch.full_like(tensors["running_var"], 0.25)  # scale 2 with eps=0
    y = fused.conv_bn_act(**tensors, **options, activation="relu", backend=backend, eps=0.0)
    assert_exact(stock(tensors, options, "relu", eps=0.0, dtype=torch.float64), y)


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_any_strides_are_taken(backend):
    tensors, options = arguments("plain")
    variants = {
        "sliced": lambda t: torch.randn(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t),
        "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "offset": lambda t: torch.cat([t.new_zeros(1, *t.shape[1:]), t])[1:],
    }
    expected = judge(tensors, options, "relu", backend)
    for make in variants.values():
        changed = {k: make(t) if t is not None and t.dim() == 4 else t for k, t in tensors.items()}
        torch.testing.assert_close(judge(changed, options, "relu", backend), expected)
    tensors["residual"] = tensors["residual"][:1, :, :1, :1].expand_as(tensors["residual"])
    tensors["x"] = tensors["x"][:1].expand_as(tensors["x"])
    judge(tensors, options, "relu", backend)


def test_inputs_are_left_alone():
    tensors, options = arguments("plain")
    before = {k: t.clone() for k, t in tensors.items()}
    for backend, activation in itertools.product(("library", "reference"), ("none", "relu", "silu")):
        fused.conv_bn_act(**tensors, **options, activation=activation, backend=backend)
    tensors["residual"] = tensors["x"] = tensors["x"][:, :, :, :]
    for name, value in before.items():
        if name not in ("residual", "x"):
            assert_exact(value, tensors[name])


def test_residual_may_be_the_input_itself():
    tensors, options = arguments("plain")
    tensors["weight"] = torch.randn(16, 16, 3, 3)
    for name in ("bias", "running_mean", "running_var", "bn_weight", "bn_bias"):
        tensors[name] = tensors[name][:16].clone()
    tensors["residual"] = tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    for backend in ("library", "reference"):
        judge(tensors, options, "relu", backend)


def test_half_precision_that_cannot_hold_folded_weights_is_still_accurate():
    tensors, options = arguments("plain", dtype=torch.float16, residual=False)
    for variance in (1e-7, 1e7):  # the scale overflows float16, or sends the weights among its subnormals
        tensors["running_var"] = torch.full((24,), variance)
        tensors["running_mean"] = torch.zeros(24)
        tensors["bn_weight"] = tensors["bn_weight"].float()
        tensors["bn_bias"] = tensors["bn_bias"].float()
        if variance > 1:
            tensors["weight"] = tensors["weight"] * 0.1
        y = fused.conv_bn_act(**tensors, **options, backend="library", eps=0.0)
        want = stock(tensors, options, eps=0.0, dtype=torch.float64)
        assert_close_to(want, stock(tensors, options, eps=0.0), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_special_weights_are_computed_not_hidden(value, activation):
    act = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}[activation]
    layers = [fused.ConvBNAct(8, 8, 3, padding=1, act=act()) for _ in range(3)]
    net = nn.Sequential(*layers).eval()
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        net(x)  # everything is prepared before the weight goes bad
        layers[1].conv.weight[3, 2, 1, 1] = value
        with dispatch.backend("reference"):
            expected = net(x)
        assert not expected.isfinite().all()
        for y in (net(x), net(x)):
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())


# --- gradient and registration ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_formula(activation):
    tensors, options = arguments("grouped", dtype=torch.float64)
    statistics = {"running_mean", "running_var"}
    inputs = [t.requires_grad_(k not in statistics) for k, t in tensors.items()]

    def call(*inputs):
        return fused.conv_bn_act(*inputs, **options, activation=activation)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def gradients(run, tensors, dtype=None):
    """Gradients of all tensors but the statistics, from an incoming gradient of stride 0."""
    t = {
        k: v.to(dtype or v.dtype).detach().requires_grad_(not k.startswith("running"))
        for k, v in tensors.items()
    }
    y = run(t)
    y.backward(torch.ones_like(y[:1, :1, :1, :1]).expand_as(y))
    return [v.grad for v in t.values() if v.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["plain", "depthwise", "stem"])
def test_gradients_are_as_accurate_as_stock(geometry, dtype):
    tensors, options = arguments(geometry, dtype=dtype)
    want = gradients(lambda t: stock(t, options, "silu"), tensors, torch.float64)
    theirs = gradients(lambda t: stock(t, options, "silu"), tensors)
    ours = gradients(lambda t: fused.conv_bn_act(**t, **options, activation="silu"), tensors)
    for w, s, o in zip(want, theirs, ours):
        assert_close_to(w, s, o, ratio=3)


def test_double_backward_says_no():
    tensors, options = arguments("plain")
    x = tensors["x"].requires_grad_()
    y = fused.conv_bn_act(**tensors, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["conv_bn_act", "conv_bn_act_inference"])
@pytest.mark.parametrize("geometry", ["plain", "one channel", "one pixel"])
def test_op_is_registered_as_pytorch_asks(name, geometry):
    tensors, options = arguments(geometry)
    if name == "conv_bn_act":
        tensors["x"].requires_grad_()
        tensors["weight"].requires_grad_()
    call = (*tensors.values(), *[list(o) if isinstance(o, tuple) else o for o in options.values()])
    op = getattr(torch.ops.fastnets, name).default
    torch.library.opcheck(op, (*call, 1e-5, "leaky_relu", 0.2, "auto"))


def test_flops_are_counted_as_the_convolutions():
    tensors, options = arguments("plain")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as ours:
        fused.conv_bn_act(**tensors, **options)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as theirs:
        F.conv2d(tensors["x"], tensors["weight"], None, *options.values())
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_follows_stock(grad):
    layer = fused.ConvBNAct(16, 24, 3, padding=1, act=nn.ReLU()).eval()
    x = torch.randn(8, 16, 32, 32)
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            expected, y = layer.act(layer.bn(layer.conv(x))), layer(x)
        reference64 = layer.double()(x.double())
    assert_close_to(reference64.detach(), expected.detach(), y.detach())
    if grad:
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert layer.conv.weight.grad.dtype == torch.float32


# --- modules ------------------------------------------------------------------------------------------------


def random_statistics(bn):
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return bn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 4, "padding": "same", "dilation": 3},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": (3, 5), "padding": (1, 2), "groups": 2, "bias": True},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_modules_equal_their_stock_parts(conv, dtype):
    layer = fused.ConvBNAct(8, 12, **conv, act=nn.Hardswish())
    random_statistics(layer.bn)
    x = torch.randn(2, 8, 17, 15)
    reference64 = nn.Sequential(*layer.children()).double().eval()(x.to(dtype).double())
    layer.to(dtype).eval()
    stock = nn.Sequential(*layer.children())(x.to(dtype))
    with torch.no_grad():
        assert_close_to(reference64.detach(), stock.detach(), layer(x.to(dtype)))


def test_constructors_take_the_stock_arguments_and_share_stock_modules():
    conv, bn, act = nn.Conv2d(4, 8, 3), random_statistics(nn.BatchNorm2d(8)), nn.SiLU()
    layer = fused.ConvBNAct.from_stock(conv, bn, act)
    assert layer.conv is conv
    assert layer.bn is bn
    assert list(fused.ConvBNAct(4, 8, 3, bias=True).state_dict()) == list(layer.state_dict())
    residual = torch.randn(2, 8, 5, 5)
    x = torch.randn(2, 4, 7, 7)
    adding = fused.ConvBNAddAct.from_stock(conv, bn, act).eval()
    with torch.no_grad():
        torch.testing.assert_close(adding(x, residual), act(bn(conv(x)) + residual))
        torch.testing.assert_close(fused.ConvAct.from_stock(conv, act)(x), act(conv(x)))
        torch.testing.assert_close(fused.BNAct.from_stock(bn, act).eval()(residual), act(bn(residual)))


def test_training_is_stock_training():
    layer = fused.ConvBNAct(4, 8, 3, act=nn.ReLU())
    twin = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    twin.load_state_dict(dict(zip(twin.state_dict(), layer.state_dict().values())))
    x = torch.randn(2, 4, 9, 9)
    layer(x).square().sum().backward()
    twin(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert_exact(twin[0].weight.grad, layer.conv.weight.grad)
    assert_exact(twin[1].running_var, layer.bn.running_var)


def test_a_fullgraph_compile_holds_the_fused_op():
    layer = fused.ConvBNAct(4, 8, 3, act=nn.ReLU()).eval()
    seen = []

    def backend(graph_module, inputs):
        seen.extend(str(n.target) for n in graph_module.graph.nodes if n.op == "call_function")
        return graph_module.forward

    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, layer(x))
    assert any("conv_bn_act" in target for target in seen), seen


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("part", ["conv", "bn", "act"])
def test_hooks_fire(kind, part):
    layer = fused.ConvBNAct(4, 8, 3, act=nn.ReLU()).eval()
    calls = []
    getattr(getattr(layer, part), f"register_{kind}_hook")(lambda *a: calls.append(part) and None)
    layer(torch.randn(2, 4, 9, 9, requires_grad=True)).sum().backward()
    assert calls == [part]


def test_functorch_sees_stock_operations():
    layer = fused.ConvBNAct(4, 8, 3, act=nn.Tanh()).eval()
    x = torch.randn(3, 2, 4, 9, 9)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(xi) for xi in x]))
    _, tangent = torch.func.jvp(layer, (x[0],), (x[1],))
    assert tangent.shape == (2, 8, 7, 7)


# --- nothing stale ------------------------------------------------------------------------------------------


def changes():
    def in_place(layer):
        with torch.no_grad():
            layer.conv.weight.mul_(2)

    def optimizer_step(layer, fused):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    def through_data(layer):
        layer.conv.weight.data.mul_(2)
        packing.refresh(layer)

    def statistics(layer):
        layer.bn.running_var.mul_(4)

    def load(layer, assign):
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=assign)

    def swap_bn(layer):
        layer.bn = random_statistics(nn.BatchNorm2d(8)).eval()

    return {
        "in place": in_place,
        "AdamW": lambda layer: optimizer_step(layer, False),
        "fused AdamW": lambda layer: optimizer_step(layer, True),
        ".data and refresh": through_data,
        "statistics": statistics,
        "load_state_dict": lambda layer: load(layer, False),
        "load_state_dict(assign=True)": lambda layer: load(layer, True),
        "another bn": swap_bn,
        "half and back": lambda layer: layer.half().float(),
    }


@pytest.mark.parametrize("change", changes())
def test_changed_weights_take_effect_at_once(change):
    layer = fused.ConvBNAct(4, 8, 3, act=nn.ReLU()).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(layer(x), before)  # now from what was kept
    changes()[change](layer)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, layer.act(layer.bn(layer.conv(x))))
    assert change == "half and back" or not torch.equal(y, before)


def test_inference_tensors_are_never_kept():
    with torch.inference_mode():
        layer = fused.ConvBNAct(4, 8, 3).eval()
        x = torch.randn(2, 4, 9, 9)
        layer(x)
        layer.conv.weight.mul_(2)  # an inference tensor counts no versions
        torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)))


def test_weights_that_die_leave_nothing_behind():
    layer = fused.ConvBNAct(4, 8, 3).eval()
    with torch.no_grad():
        layer(torch.randn(2, 4, 9, 9))
    address = id(layer.conv.weight)
    assert address in packing._entries
    del layer
    assert address not in packing._entries


def test_shapes_kept_are_bounded():
    layer = fused.ConvBNAct(4, 8, 3).eval()
    with torch.no_grad():
        for size in range(9, 24):
            layer(torch.randn(2, 4, size, size))
    assert len(packing._entries[id(layer.conv.weight)].by_key) <= packing._SHAPES_PER_WEIGHT


# --- the choice and its errors ------------------------------------------------------------------------------


def test_choice_of_implementation():
    conv, x = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)
    assert implementation_of(conv, None, None, "relu", x) == "stock"  # gradients enabled, too small to fold
    with torch.no_grad():
        assert implementation_of(conv, None, None, "relu", x) == "onednn"
        assert implementation_of(conv, None, None, "relu", x, "triton") == "triton"
        with dispatch.backend("reference"):
            assert implementation_of(conv, None, None, "relu", x, "triton") == "reference"
        meta = x.to("meta")
        with dispatch.assume_device_type("cuda"):
            assert implementation_of(conv.to("meta"), None, None, "relu", meta) == "cudnn+epilogue"
            stem = nn.Conv2d(3, 8, 7, device="meta")
            assert implementation_of(stem, None, None, "relu", meta[:, :3]) == "triton"
            assert implementation_of(conv, None, None, "relu", meta, "library") == "cudnn"
            pointwise = nn.Conv2d(8, 8, 1, device="meta")
            assert implementation_of(pointwise, None, None, "relu", meta) == "triton"


def test_library_that_cannot_serve_raises():
    tensors, options = arguments("plain", dtype=torch.float64)
    with pytest.raises(dispatch.UnsupportedByBackend, match=r"float64.*use backend='auto'"):
        fused.conv_bn_act(**tensors, **options, backend="library")
    judge(tensors, options)  # auto takes the reference


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(16, 9, 7)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"x": torch.randn(2, 15, 9, 7)}, ValueError, "x has 15 channels"),
        ({"x": torch.ones(2, 16, 9, 7, dtype=torch.int64)}, TypeError, "convert to one floating dtype"),
        (
            {"x": torch.randn(2, 16, 9, 7).half(), "weight": torch.randn(24, 16, 3, 3).bfloat16()},
            TypeError,
            "convert",
        ),
        ({"residual": torch.randn(2, 24, 9, 8)}, ValueError, r"residual is \(2, 24, 9, 8\)"),
        ({"residual": torch.randn(2, 24, 9, 7).half()}, ValueError, "convert it first"),
        ({"running_var": None}, ValueError, "go together"),
        ({"bn_bias": torch.randn(23)}, ValueError, r"bn_bias has shape \(23,\), expected \(24,\)"),
        ({"bias": torch.empty(24, device="meta")}, ValueError, "bias is on meta"),
        ({"activation": "rleu"}, ValueError, "did you mean 'relu'"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        ({"padding": (0, 0), "x": torch.randn(2, 16, 2, 2)}, ValueError, "smaller than the filter"),
        ({"stride": (0, 1)}, ValueError, "at least 1"),
        ({"groups": 5}, ValueError, "groups=5"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    tensors, options = arguments("plain")
    with pytest.raises(error, match=message):
        fused.conv_bn_act(**{**tensors, **options, **change})


def test_wrong_modules_are_named():
    with pytest.raises(ValueError, match=r"Softplus.*no fused form"):
        fused.ConvAct(3, 8, 3, act=nn.Softplus())
    with pytest.raises(TypeError, match="conv is Linear"):
        fused.ConvAct.from_stock(nn.Linear(3, 8))
    with pytest.raises(ValueError, match="bn has 4 features, conv 8 channels"):
        fused.ConvBNAct.from_stock(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4))


def test_stock_errors_stay_stock():
    layer = fused.ConvBNAct(4, 8, 3).eval()
    for x in (torch.randn(4, 9), torch.randn(2, 4, 9, 9).half(), torch.randn(2, 5, 9, 9)):
        with pytest.raises(Exception) as theirs:
            layer.conv(x)
        with pytest.raises(type(theirs.value)):
            call_conv_bn_act(layer.conv, layer.bn, None, x)


# --- on the CPU, the call by the amount of work -------------------------------------------------------------


def served_by(monkeypatch, N, C, K, pixels, size=1, stride=1, **options):
    """What made the calls ready that ran a convolution on the CPU; their results are judged."""
    torch.manual_seed(0)
    made, prepare = [], onednn.prepare_convolution

    def noted(*args):
        run = prepare(*args)
        made.append(run.__qualname__.split(".")[0])
        return run

    monkeypatch.setattr(onednn, "prepare_convolution", noted)
    weight = torch.randn(K, C, size, size) / (C * size * size) ** 0.5
    vectors = ("bias", "running_mean", "bn_weight", "bn_bias")
    tensors = {"x": torch.randn(N, C, pixels, pixels), "weight": weight, "residual": None}
    tensors |= {name: torch.randn(K) for name in vectors} | {"running_var": torch.rand(K) + 0.5} | options
    geometry = {"stride": pair(stride), "padding": pair(size // 2), "dilation": (1, 1), "groups": 1}
    with torch.no_grad():
        for activation in ("none", "relu", "relu6", "silu"):
            judge(tensors, geometry, activation, backend="library")
    return made


@pytest.mark.parametrize("adds", [False, True])
def test_pointwise_convolutions_over_few_pixels_are_products(monkeypatch, adds):
    residual = {"residual": torch.randn(2, 48, 14, 14)} if adds else {}
    assert set(served_by(monkeypatch, 2, 96, 48, 14, **residual)) == {"_by_product"}


def test_pointwise_convolutions_over_many_pixels_are_onednns(monkeypatch):
    assert set(served_by(monkeypatch, 2, 16, 24, 56)) == {"prepare_convolution"}


def test_strided_pointwise_convolutions_are_no_products(monkeypatch):
    assert "_by_product" not in served_by(monkeypatch, 2, 96, 48, 14, stride=2)


def test_one_small_image_stays_native_only_while_there_is_little_to_unroll(monkeypatch):
    assert set(served_by(monkeypatch, 1, 24, 16, 14, size=3)) == {"_native"}
    assert set(served_by(monkeypatch, 1, 64, 64, 14, size=3)) == {"prepare_convolution"}


def test_one_packed_weight_serves_every_batch_of_few_and_of_many_pixels():
    torch.manual_seed(0)
    conv2d, bn = nn.Conv2d(64, 48, 1, bias=False).eval(), nn.BatchNorm2d(48).eval()
    for N in (2, 1, 5, 40, 3, 2):
        x = torch.randn(N, 64, 9, 9)
        with torch.no_grad():
            y = call_conv_bn_act(conv2d, bn, None, x, None, "relu", 0.0, "library")
            expected = bn(conv2d(x)).relu()
            exact = F.relu(F.batch_norm(F.conv2d(x.double(), conv2d.weight.double()), *(
                t.double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            ), eps=bn.eps))  # fmt: skip
        assert_close_to(exact, expected, y)


def test_products_over_few_pixels_keep_nan():
    x = torch.randn(1, 8, 4, 4)
    x[0, :, 1, 2] = float("nan")
    weight = torch.randn(8, 8, 1, 1)
    with torch.no_grad():
        y = fused.conv_bn_act(x, weight, activation="relu", backend="library")
    assert y[0, :, 1, 2].isnan().all()
    assert y.isnan().sum() == 8
