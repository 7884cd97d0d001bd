"""Squeeze-and-excite whose scaling the next 1×1 convolution does: the op, and what networks call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import compare
from fastnets.fused import dispatch, squeeze_excite_conv_bn_act
from fastnets.fused.activation import ACTIVATIONS
from fastnets.kernels.launch import observe_launches
from fastnets.models import create_model
from fastnets.models.blocks import SqueezeExcite
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled
from tests.kernels.conv_cases import in_layout
from tests.lanes import STRICT_LANES

BN = ("running_mean", "running_var", "bn_weight", "bn_bias")
EXCITE = ("w1", "b1", "w2", "b2")


def arguments(C=40, K=24, S=6, *, N=2, size=(6, 5), bn=True, residual=False, dtype=torch.float32, stride=1,
              layout="last"):  # fmt: skip
    tensors = {"x": in_layout(torch.randn(N, C, *size), layout), "weight": torch.randn(K, C, 1, 1) / C**0.5}
    tensors |= {"w1": torch.randn(S, C, 1, 1) / C**0.5, "b1": torch.randn(S)}
    tensors |= {"w2": torch.randn(C, S, 1, 1), "b2": torch.randn(C)}
    if bn:
        tensors |= {name: torch.randn(K) for name in BN}
        tensors["running_var"] = torch.rand(K) + 0.5
    if residual:
        tensors["residual"] = torch.randn(N, K, -(-size[0] // stride), -(-size[1] // stride))
    return {name: t.to(dtype) for name, t in tensors.items()}


def stock(tensors, excite_activation="silu", gate="sigmoid", activation="none", stride=1, dtype=None):
    t = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    hidden = F.conv2d(t["x"].mean((2, 3), keepdim=True), t["w1"], t["b1"])
    scale = F.conv2d(ACTIVATIONS[excite_activation].forward(hidden, 0.0), t["w2"], t["b2"])
    y = F.conv2d(t["x"] * ACTIVATIONS[gate].forward(scale, 0.0), t["weight"], None, stride)
    if "running_mean" in t:
        y = F.batch_norm(y, *(t[name] for name in BN))
    y = y + t["residual"] if "residual" in t else y
    return ACTIVATIONS[activation].forward(y, 0.01)


def check(lane, dtype, activation="none", stride=1, **options):
    tensors = arguments(dtype=dtype, stride=stride, **options)
    given = {name: lane.put(t) for name, t in tensors.items()}
    with lane, torch.no_grad():
        y = squeeze_excite_conv_bn_act(
            **given, excite_activation="silu", activation=activation, stride=(stride, stride),
            backend="triton",
        )  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = stock(tensors, activation=activation, stride=stride, dtype=torch.float64)
    assert_close_to(exact, stock(tensors, activation=activation, stride=stride), y.cpu())


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"residual": True}, torch.float32),
        ({"C": 64, "stride": 2, "activation": "relu"}, torch.float16),
        ({"C": 36, "residual": True, "layout": "contiguous", "bn": False}, torch.bfloat16),
    ],
)
def test_as_accurate_as_stock(lane, options, dtype):
    check(lane, dtype, **options)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize(
    "options",
    [
        {"N": 5, "size": (7, 7)},  # tiles that lie in several images
        {"C": 33, "K": 7, "layout": "sliced"},
        {"C": 512, "K": 16, "N": 1, "size": (2, 2)},  # columns shared by several programs
        {"S": 130},
        {"size": (1, 1), "N": 3},
    ],
)
def test_shapes(lane, options):
    check(lane, torch.float32, **options)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # Several threads write the same bytes to shared memory where a sum changes its layout.
    check(lane.but(shared_races=None), torch.float16, C=24, S=4)


def test_exact_on_integers(lane):
    """With weights of zero the gate is hardsigmoid(b2), a half or one."""
    C, K = 32, 16
    x, weight, b2 = integers(2, C, 4, 3), integers(K, C, 1, 1), 3.0 * (torch.arange(C) % 2)
    tensors = {
        "x": x,
        "weight": weight,
        "w1": torch.zeros(4, C, 1, 1),
        "w2": torch.zeros(C, 4, 1, 1),
        "b2": b2,
    }
    with lane, torch.no_grad():
        y = squeeze_excite_conv_bn_act(
            **{name: lane.put(t) for name, t in tensors.items()}, gate="hardsigmoid", backend="triton"
        )
    gate = torch.where(b2 > 0, 1.0, 0.5).view(-1, 1, 1)
    assert_exact(F.conv2d(2 * x * gate, weight) / 2, y.cpu())


@pytest.mark.parametrize("name", ["squeeze_excite_conv_bn_act", "squeeze_excite_conv_bn_act_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    t = arguments(C=5, K=3, S=2)
    if not name.endswith("inference"):
        t["x"].requires_grad_()
    op = getattr(torch.ops.fastnets, name).default
    tensors = (t["x"], t["weight"], None, *(t[n] for n in BN), None, *(t[n] for n in EXCITE))
    torch.library.opcheck(op, (*tensors, "silu", "sigmoid", (1, 1), 1e-5, "relu", 0.01, "auto"))


def test_gradient_is_that_of_the_parts():
    tensors = arguments(C=4, K=3, S=2, dtype=torch.float64)
    leaves = {name: t.clone().requires_grad_("running" not in name) for name, t in tensors.items()}
    assert torch.autograd.gradcheck(
        lambda *t: squeeze_excite_conv_bn_act(**dict(zip(leaves, t)), excite_activation="silu"),
        list(leaves.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.randn(24, 40, 3, 3)}, "3×3, only 1×1 is served"),
        ({"w1": torch.randn(6, 4, 1, 1)}, r"w1 is \(6, 4, 1, 1\), expected \(6, 40, 1, 1\)"),
        ({"running_var": torch.randn(7)}, r"running_var has shape \(7,\)"),
        ({"gate": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        squeeze_excite_conv_bn_act(**{**arguments(), **change})


class Block(nn.Module):
    """The end of EfficientNet's block."""

    def __init__(self, filter_size=1):
        super().__init__()
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm1, self.act = nn.BatchNorm2d(16), nn.SiLU(inplace=True)
        self.excite = SqueezeExcite(16, 4, act=nn.SiLU)
        self.project = nn.Conv2d(16, 16, filter_size, padding=filter_size // 2, bias=False)
        self.norm2 = nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.excite(self.act(self.norm1(self.deep(x))))
        return self.norm2(self.project(y)) + x


def test_a_network_runs_and_reports_it():
    stock = settled(Block())
    fast = fastnets.optimize(stock)
    assert "call_excited_conv" in graphs(fast)
    assert "squeeze-excite+conv+bn+add" in kinds(fast)
    assert_same_answers(stock, fast, images(2, 16, 6, 5))
    losses = []
    for model in (stock.train(), fast.train()):
        loss = model(images(2, 16, 6, 5)).square().mean()
        loss.backward()
        losses.append((loss.detach(), model.excite.fc1.weight.grad))
    torch.testing.assert_close(*losses)
    fast.eval().excite.register_forward_hook(lambda *_: losses.clear())
    with torch.no_grad():
        fast(images(1, 16, 6, 5))
    assert not losses


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
def test_kernels_serve_it(lane):
    stock = settled(Block())
    fast = fastnets.optimize(copy.deepcopy(stock), backend="triton").to(lane.device)
    x, seen = images(2, 16, 6, 5), []
    with lane, torch.no_grad(), observe_launches(seen.append):
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())
    names = [launch.name for launch in seen]
    assert names == ["depthwise_conv_kernel", "plane_mean_kernel", "excite_kernel", "conv_kernel"]


def test_larger_filters_stay_apart():
    assert "call_excited_conv" not in graphs(fastnets.optimize(settled(Block(3))))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_efficientnet_reads_what_is_excited_twice(backend):
    stock = create_model("efficientnet_b0").to("meta").eval()
    with dispatch.assume_device_type("cuda"), dispatch.backend(backend):
        found = compare(stock, fastnets.optimize(stock), torch.empty(32, 3, 64, 64, device="meta"))
    assert "triton.scale_planes_kernel" not in found.fast.by_op
    excited = found.fast.by_op["triton.excite_kernel"]
    assert excited.bytes < 0.03 * found.fast.bytes  # vectors and tiny weights, no images
