"""A convolution and the one on its shortcut as one op, and the call of rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.shortcut_conv import conv_shortcut
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled

VECTORS = ("mean", "var", "bn_weight", "bn_bias")
OPTIONS = ((1, 1), (0, 0), (1, 1), 1, 1e-5, (1, 1), 1e-5, "relu", 0.01, "auto")


def arguments(C=40, K=24, shortcut=16, *, R=1, step=1, bn=True, dtype=torch.float32):
    """Of the op, by name: x is 6×5, the shortcut's input ``step`` times that."""
    tensors = {
        "x": torch.randn(2, C, 6, 5),
        "weight": torch.randn(K, C, R, R) / (C**0.5 * R),
        "shortcut_x": torch.randn(2, shortcut, 6 * step, 5 * step),
        "shortcut_weight": torch.randn(K, shortcut, 1, 1) / shortcut**0.5,
    }
    if bn:
        for prefix in ("running_", "shortcut_"):
            tensors[f"{prefix}mean"], tensors[f"{prefix}var"] = torch.randn(K), torch.rand(K) + 0.5
        for prefix in ("", "shortcut_"):
            tensors |= {f"{prefix}bn_weight": torch.randn(K), f"{prefix}bn_bias": torch.randn(K)}
    else:
        tensors |= {"bias": torch.randn(K), "shortcut_bias": torch.randn(K)}
    result = {name: t.to(dtype) for name, t in tensors.items()}
    for name in ("x", "shortcut_x"):
        result[name] = result[name].to(memory_format=torch.channels_last)
    return result


def stock(tensors, R=1, step=1, activation="relu", dtype=None):
    t = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}

    def one(prefix, statistics, stride, padding):
        y = F.conv2d(
            t[f"{prefix}x"], t[f"{prefix}weight"], t.get(f"{prefix}bias"), stride=stride, padding=padding
        )
        if f"{statistics}mean" not in t:
            return y
        affine = (t[f"{prefix}bn_weight"], t[f"{prefix}bn_bias"])
        return F.batch_norm(y, t[f"{statistics}mean"], t[f"{statistics}var"], *affine)

    y = one("", "running_", 1, R // 2) + one("shortcut_", "shortcut_", step, 0)
    return ACTIVATIONS[activation].forward(y, 0.01)


@pytest.mark.parametrize(
    "options, activation, dtype",
    [
        ({}, "relu", torch.float32),
        ({"bn": False, "step": 2}, "silu", torch.float16),
        ({"C": 32, "R": 3}, "none", torch.bfloat16),
    ],
)
def test_as_accurate_as_stock(lane, options, activation, dtype):
    R, step = options.get("R", 1), options.get("step", 1)
    tensors = arguments(**options, dtype=dtype)
    given = {name: lane.put(t) for name, t in tensors.items()}
    with lane, torch.no_grad():
        y = conv_shortcut(
            **given, padding=(R // 2, R // 2), shortcut_stride=(step, step), activation=activation,
            backend="triton",
        )  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = stock(tensors, R, step, activation, torch.float64)
    assert_close_to(exact, stock(tensors, R, step, activation), y.cpu())


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_other_backends_run_both_convolutions(backend):
    tensors = arguments()
    with torch.no_grad():
        y = conv_shortcut(**tensors, activation="relu", backend=backend)
    assert_close_to(stock(tensors, dtype=torch.float64), stock(tensors), y)


def test_exact_on_integers(lane):
    tensors = {
        "x": integers(2, 32, 4, 3), "weight": integers(16, 32, 1, 1),
        "shortcut_x": integers(2, 8, 4, 3), "shortcut_weight": integers(16, 8, 1, 1),
    }  # fmt: skip
    with lane, torch.no_grad():
        y = conv_shortcut(**{name: lane.put(t) for name, t in tensors.items()}, backend="triton")
    expected = F.conv2d(tensors["x"], tensors["weight"])
    assert_exact(expected + F.conv2d(tensors["shortcut_x"], tensors["shortcut_weight"]), y.cpu())


@pytest.mark.parametrize("name", ["conv_shortcut", "conv_shortcut_inference"])
def test_op_is_registered_as_pytorch_asks(name):
    t = arguments(C=5, K=3, shortcut=4)
    if name == "conv_shortcut":
        t["x"].requires_grad_()
    tensors = (
        t["x"], t["weight"], None, *(t[f"running_{n}"] for n in VECTORS[:2]), t["bn_weight"], t["bn_bias"],
        t["shortcut_x"], t["shortcut_weight"], None, *(t[f"shortcut_{n}"] for n in VECTORS),
    )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.fastnets, name).default, (*tensors, *OPTIONS))


def test_gradient_is_that_of_the_parts():
    tensors = arguments(C=4, K=3, shortcut=5, dtype=torch.float64)
    fixed = ("running_mean", "running_var", "shortcut_mean", "shortcut_var")
    leaves = {name: t.clone().requires_grad_(name not in fixed) for name, t in tensors.items()}
    assert torch.autograd.gradcheck(
        lambda *t: conv_shortcut(**dict(zip(leaves, t)), activation="silu"),
        list(leaves.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"shortcut_weight": torch.randn(24, 16, 3, 3)}, ValueError, "3×3, only 1×1 is served"),
        ({"shortcut_stride": (2, 2)}, ValueError, r"gives \(2, 24, 6, 5\), its shortcut \(2, 24, 3, 3\)"),
        ({"shortcut_x": torch.randn(2, 16, 6, 5).half()}, TypeError, "shortcut_x torch.float16"),
        ({"shortcut_mean": torch.randn(7)}, ValueError, r"running_mean has shape \(7,\)"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        conv_shortcut(**{**arguments(), **change})


class Block(nn.Module):
    """The first block of a stage of ResNets; which branch comes first, and how they are added, varies."""

    def __init__(self, shortcut_first=True, in_place=True, k=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.conv2, self.bn2 = nn.Conv2d(48, 64, k, 2, k // 2, bias=False), nn.BatchNorm2d(64)
        self.downsample = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
        self.relu = nn.ReLU(inplace=True)
        self.shortcut_first, self.in_place = shortcut_first, in_place

    def forward(self, x):
        if self.shortcut_first:
            shortcut = self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if not self.shortcut_first:
            shortcut = self.downsample(x)
        if self.in_place:
            y += shortcut
        else:
            y = y + shortcut
        return self.relu(y)


BLOCKS = {
    "ours": {},
    "torchvision's": {"shortcut_first": False},
    "out of place": {"in_place": False},
    "basic, torchvision's": {"shortcut_first": False, "k": 3},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_network_runs_and_reports_it(name):
    stock = settled(Block(**BLOCKS[name]))
    fast = fastnets.optimize(stock)
    assert "call_conv_shortcut" in graphs(fast)
    assert sorted(kinds(fast)) == ["conv+bn", "conv+bn+add+relu", "conv+bn+relu"]
    assert fastnets.explain(fast, images(2, 32, 6, 5)).coverage == 1
    with dispatch.backend("triton"):
        found = {row.kind: row for row in fastnets.explain(fast).rows}
    adding, added = found["conv+bn+add+relu"], found["conv+bn"]
    assert adding.implementation == "triton"
    assert added.implementation == f"triton, with {adding.path}"
    assert_same_answers(stock, fast, images(2, 32, 6, 5))
    stock.train(), fast.train()
    losses = []
    for model in (stock, fast):
        loss = model(images(2, 32, 6, 5)).square().mean()
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(stock.conv1.weight.grad, fast.conv1.weight.grad)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("name", ["ours", "basic, torchvision's"])
def test_a_network_runs_it_by_triton(lane, name):
    stock = settled(Block(**BLOCKS[name]))
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(2, 32, 6, 5)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_are_honoured_and_passes_saved(name):
    fast = fastnets.optimize(settled(Block(**BLOCKS[name])).to("meta"))
    x = torch.empty(32, 32, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.backend("triton"):
        counted = count(fast, x)
        assert set(counted.by_op) == {"triton.conv_kernel"}
        assert counted.launches == 2
        size = 4 * 32 * 64 * 14 * 14
        assert counted.records[-1].moved.bytes_written == size
        seen = []
        handle = fast.downsample[1].register_forward_hook(lambda *a: seen.append(1))
        hooked = count(fast, x)
        assert hooked.launches > 2
        assert hooked.bytes >= counted.bytes + 2 * size
        handle.remove()
        assert count(fast, x).launches == 2
    assert seen


def test_what_is_written_between_keeps_them_apart():
    class Writing(Block):
        def forward(self, x):
            x = x + 1
            shortcut = self.downsample(x)
            x.relu_()
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + shortcut)

    stock = settled(Writing())
    fast = fastnets.optimize(stock)
    assert "call_conv_shortcut" not in graphs(fast)
    assert_same_answers(stock, fast, images(2, 32, 6, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_gives_stocks_dtype(dtype):
    stock = settled(Block())
    fast = fastnets.optimize(stock)
    x = images(2, 32, 6, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected, y = stock(x), fast(x)
        assert y.dtype == expected.dtype
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), expected, y)
