"""The choice of a backend: its order of precedence, and cuDNN's calls where there is no CUDA to run them."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastnets
from fastnets import fused
from fastnets.fused import conv, cudnn, dispatch, layer_norm, linear
from fastnets.fused.conv import call_conv_bn_act
from fastnets.kernels import replay
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_exact


def test_block_beats_argument_beats_environment():
    assert dispatch.requested("auto") == "auto"
    assert dispatch.requested("library") == "library"
    with fastnets.backend("reference"):
        assert dispatch.requested("library") == "reference"
        with fastnets.backend("auto"):
            assert dispatch.requested("library") == "library"
    program = (
        "from fastnets.fused import dispatch; print(dispatch.requested('auto'), dispatch.requested('triton'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env={"FASTNETS_BACKEND": "reference"}, capture_output=True, text=True
    )
    assert result.stdout.split() == ["reference", "triton"], result.stderr


def test_unknown_backends_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'reference'"), fastnets.backend("referense"):
        pass


def test_triton_without_a_driver_says_what_to_do():
    layer = nn.Conv2d(4, 8, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"(?i)triton.*driver"):
        call_conv_bn_act(layer, None, None, torch.randn(1, 4, 8, 8), backend="triton")


@pytest.mark.parametrize("residual", [False, True])
def test_cudnn_is_called_by_its_schema(monkeypatch, residual):
    """The fused cuDNN call: arguments bound by its real schema, the result computed by stock PyTorch."""
    relu, add_relu = torch.ops.aten.cudnn_convolution_relu, torch.ops.aten.cudnn_convolution_add_relu
    calls = []

    def bound(op, args):
        names = [a.name for a in op.default._schema.arguments]
        assert len(args) == len(names)
        calls.append(op)
        return dict(zip(names, args))

    def fake_relu(*args):
        a = bound(relu, args)
        y = torch.conv2d(
            a["self"], a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"]
        )
        return y.relu()

    def fake_add_relu(*args):
        a = bound(add_relu, args)
        y = torch.conv2d(
            a["self"], a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"]
        )
        return (y + a["alpha"] * a["z"]).relu()

    monkeypatch.setattr(cudnn, "_fused_calls", lambda: (fake_relu, fake_add_relu))
    monkeypatch.setattr(dispatch, "device_type_of", lambda x: "cuda")
    layer, bn = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 9, 9)
    added = torch.randn(2, 8, 5, 5) if residual else None
    with torch.no_grad():
        y = call_conv_bn_act(layer, bn, None, x, added, "relu", backend="library")
        expected = bn(layer(x)) + (added if residual else 0)
        torch.testing.assert_close(y, expected.relu())
    assert calls == [add_relu if residual else relu]


@pytest.mark.lanes("sm_80", "gpu")
def test_library_convolution_takes_our_epilogue_in_one_pass(lane, monkeypatch):
    monkeypatch.setattr(dispatch, "device_type_of", lambda x: "cuda")
    layer, bn = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8).eval()
    bn.running_mean.normal_()
    x, added = torch.randn(2, 4, 9, 9), torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        expected = torch.nn.functional.silu(bn(layer(x)) + added)
        placed = [lane.put(t) for t in (x, added)]
        if lane.device != "cpu":
            layer.to(lane.device), bn.to(lane.device)
        with lane:
            y = call_conv_bn_act(layer, bn, None, placed[0], placed[1], "silu", backend="library")
        torch.testing.assert_close(y.cpu(), expected, rtol=2e-3, atol=2e-3)
    assert lane.device != "cpu" or len(lane.launches) == 1


def _convolution(x, weight, vectors):
    bn = (vectors, vectors.abs() + 1, None, None)
    y = fused.conv_bn_act(x, weight[:, :, None, None], None, *bn, activation="silu", backend="library")
    return fused.conv_bn_act(y, weight[:, :, None, None], None, *bn, activation="silu", backend="library")


def _linear(activation):
    def call(x, weight, vectors):
        x, options = x.flatten(2).mT, (activation, 0.0, "library")
        y = linear._body(x, weight, vectors, None, None, *options)
        return linear._body(y, weight, vectors, None, x, *options)

    return call


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize(
    "function", [_convolution, _linear("none"), _linear("relu"), _linear("gelu_tanh"), _linear("silu")]
)
def test_vendors_calls_are_repeated_with_the_same_bits(function, lane, monkeypatch):
    """On CUDA what the library path does is recorded: from the third call of a kind on nothing is decided."""
    monkeypatch.setattr(dispatch, "device_type_of", lambda x: "cuda")
    bodies = []
    for module, name in ((conv, "_convolution_then_epilogue"), (linear, "_vendor")):
        body = getattr(module, name)
        counted = lambda *arguments, body=body: bodies.append(1) or body(*arguments)  # noqa: E731
        monkeypatch.setattr(module, name, counted)
        monkeypatch.setitem(conv._CALLS, "cudnn+epilogue", conv._convolution_then_epilogue)
    shapes = [(n, 8, 5, 5) for n in (2, 2, 3, 2, 3, 3, 2)]
    weight, vectors = torch.randn(8, 8), torch.randn(8)
    counts = []
    with lane, torch.no_grad():
        placed = [lane.put(weight), lane.put(vectors)]
        for shape in shapes:
            x = lane.put(torch.randn(shape))
            y, before = function(x, *placed), len(bodies)
            counts.append(before)
            with monkeypatch.context() as patch:
                patch.setattr(replay.Replayed, "__call__", lambda self, t: self.function(*t, *self.options))
                assert_exact(function(x, *placed).cpu(), y.cpu())
            bodies[before:] = []
    assert counts[-1] == counts[-2] == counts[4] <= 8


# --- calls of layers that are repeated without asking again -------------------------------------------------


def _conv_layer(lane):
    layer, bn = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
    layer, bn = (m.eval().to(lane.device, memory_format=torch.channels_last) for m in (layer, bn))
    act = nn.ReLU()
    return (layer, bn, act), lambda x: call_conv_bn_act(layer, bn, act, x, None, "relu", 0.0, "triton")


def _linear_layer(lane):
    layer, act = nn.Linear(6, 8).eval().to(lane.device), nn.ReLU()
    return (layer, None, act), lambda x: linear.call_linear_act(
        layer, act, x, activation="relu", backend="triton"
    )


def _norm_layer(lane):
    layer = nn.LayerNorm(6).eval().to(lane.device)
    return (layer, None, None), lambda x: layer_norm.call_layer_norm(layer, x, None, "triton")


_LAYERS = [_conv_layer, _linear_layer, _norm_layer]


def _stock(modules, x):
    for module in modules:
        x = x if module is None else module(x)
    return x


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("make", _LAYERS)
def test_what_changed_since_a_call_was_remembered_is_seen(make, lane):
    """Weights, their addresses and strides, hooks, settings, other shapes and dtypes."""
    for memory in (conv._memory, linear._memory, layer_norm._memory):
        memory.clear()
    modules, call = make(lane)
    layer, bn, _ = modules
    seen = []

    def agree(x):
        torch.testing.assert_close(call(x), _stock(modules, x), rtol=2e-3, atol=2e-3)

    def image(*shape):
        return lane.put(torch.randn(*shape))

    with lane, torch.no_grad():
        for _ in range(4):
            agree(image(2, 4, 5, 6))
        assert len(conv._memory) + len(linear._memory) + len(layer_norm._memory) == 1
        layer.weight.mul_(2)  # in place
        agree(image(2, 4, 5, 6))
        layer.weight.data = layer.weight.data * 3  # elsewhere
        agree(image(2, 4, 5, 6))
        before = layer.weight
        layer.weight = nn.Parameter(torch.randn_like(before))
        agree(image(2, 4, 5, 6))
        square = layer.weight.dim() == 2
        if square:  # other strides at the same address, as a transposed view of the data has
            whole = lane.put(torch.randn(8, 8))
            layer.weight.data = whole[:, :6]
            agree(image(2, 4, 5, 6))
            layer.weight.data = whole.t()[:, :6]
            agree(image(2, 4, 5, 6))
        layer.bias = None
        agree(image(2, 4, 5, 6))
        agree(image(3, 4, 5, 6))
        agree(image(2, 4, 5, 6))
        agree(image(2, 4, 5, 6).contiguous(memory_format=torch.channels_last))
        if bn is not None:
            bn.eps = 0.5
            agree(image(2, 4, 5, 6))
            layer.stride = (2, 2)
            agree(image(2, 4, 5, 6))
            bn.running_mean = lane.put(torch.randn(8))
            agree(image(2, 4, 5, 6))
        for module in modules:
            if module is not None:
                handle = module.register_forward_hook(lambda *a: seen.append(1))
                agree(image(2, 4, 5, 6))
                handle.remove()
                agree(image(2, 4, 5, 6))
        handle = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1))
        agree(image(2, 4, 5, 6))
        handle.remove()
        for module in modules:
            if module is not None:
                module.bfloat16()
        x = image(2, 4, 5, 6).bfloat16()
        torch.testing.assert_close(call(x), _stock(modules, x), rtol=3e-2, atol=3e-2)
    assert len(seen) >= 2 * sum(m is not None for m in modules)


@pytest.mark.lanes("sm_80", "gpu")
@pytest.mark.parametrize("make", _LAYERS)
def test_who_wants_to_see_a_call_sees_it_though_it_was_remembered(make, lane):
    """Gradients, autocast, backends asked for, modes, functorch and forward-mode AD."""
    modules, call = make(lane)
    x = lane.put(torch.randn(2, 4, 5, 6))
    with lane:
        with torch.no_grad():
            for _ in range(4):
                expected = call(x)
            with torch.autocast(lane.device, torch.bfloat16):
                low = call(x)
                assert low.dtype == _stock(modules, x).dtype
            with fastnets.backend("reference"):
                torch.testing.assert_close(call(x), _stock(modules, x))
            with FlopCounterMode(display=False) as counter:
                call(x)
            assert modules[0].__class__ is nn.LayerNorm or counter.get_total_flops() > 0
            batched = torch.func.vmap(call)(torch.stack([x, 2 * x]))
            torch.testing.assert_close(batched[0], _stock(modules, x), rtol=2e-3, atol=2e-3)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                torch.testing.assert_close(call(dual), _stock(modules, x), rtol=2e-3, atol=2e-3)
        with torch.inference_mode():
            for _ in range(4):
                torch.testing.assert_close(call(x), expected)
        y = call(x.clone().requires_grad_())
        assert y.requires_grad
        torch.testing.assert_close(y.detach(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.lanes("sm_80", "gpu")
def test_attention_that_was_remembered(lane):
    q, k, v = (lane.put(torch.randn(1, 2, 24, 16)) for _ in range(3))
    mask = lane.put(torch.randn(24, 24))
    stock = torch.nn.functional.scaled_dot_product_attention
    with lane, torch.no_grad():
        for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.5}, {}):
            for i in range(3):
                y = fastnets.attention(q * (i + 1), k, v, **options, backend="triton")
                torch.testing.assert_close(y, stock(q * (i + 1), k, v, **options), rtol=2e-3, atol=2e-3)
        seen = []
        with observe_launches(seen.append):
            fastnets.attention(q, k, v, backend="triton")
        assert len(seen) == 1
        with pytest.raises(RuntimeError, match="is_causal"):
            fastnets.attention(q, k, v, mask, is_causal=True, backend="triton")
        with pytest.raises(ValueError, match="head"):
            fastnets.attention(q, k[:, :1].expand(1, 3, 24, 16), v, backend="triton")
    q.requires_grad_()
    with lane:
        fastnets.attention(q, k, v, backend="triton").sum().backward()
    assert q.grad.abs().sum() > 0
