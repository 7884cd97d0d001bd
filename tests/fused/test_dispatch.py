"""The choice of a backend: its order of precedence, and cuDNN's calls where there is no CUDA to run them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fastnets
from fastnets import fused
from fastnets.fused import conv, cudnn, dispatch, linear
from fastnets.fused.conv import call_conv_bn_act
from fastnets.kernels import replay
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
