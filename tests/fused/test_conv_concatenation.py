"""Convolutions that are concatenated: the op, and the call of rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.models.squeezenet import Fire
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.fused.networks import assert_same_answers, graphs, images, settled

OPS = ("conv_concatenation", "conv_concatenation_inference")


def op(parts, backend="triton", dtype=None, place=lambda t: t):
    """The op on parts (x, layer, padding, activation), layer of six tensors or None."""
    xs = [place(x) for x, *_ in parts]
    layers = [None if t is None else place(t) for _, layer, *_ in parts for t in layer or [None] * 6]
    geometry = [n for *_, padding, _ in parts for n in (1, 1, padding, padding, 1, 1, 1)]
    arguments = (xs, layers, geometry, [1e-5] * len(parts), [a for *_, a in parts], [0.01] * len(parts))
    return torch.ops.fastnets.conv_concatenation_inference(*arguments, backend)


def stock(parts, dtype=None):
    found = []
    for x, layer, padding, activation in parts:
        x, *layer = (t if t is None or dtype is None else t.to(dtype) for t in (x, *(layer or [None] * 6)))
        if layer[0] is not None:
            x = F.conv2d(x, layer[0], layer[1], padding=padding)
            if layer[2] is not None:
                x = F.batch_norm(x, *layer[2:])
            x = {"relu": F.relu, "none": lambda y: y, "silu": F.silu}[activation](x)
        found.append(x)
    return torch.cat(found, 1)


def part(C, K, R, activation="relu", bn=True, size=5, dtype=torch.float32):
    x = torch.randn(2, C, size, size).to(memory_format=torch.channels_last)
    layer = [torch.randn(K, C, R, R) / (C**0.5 * R), None if bn else torch.randn(K)]
    layer += [torch.randn(K), torch.rand(K) + 0.5, torch.randn(K), torch.randn(K)] if bn else [None] * 4
    return x.to(dtype), [None if t is None else t.to(dtype) for t in layer], R // 2, activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_accurate_as_stock(lane, dtype):
    pooled = (torch.randn(2, 12, 5, 5).to(dtype), None, 0, "none")
    options = {"dtype": dtype}
    parts = [part(32, 24, 1, **options), part(33, 19, 1, "silu", bn=False, **options), pooled]
    parts.append(part(16, 40, 3, "none", **options))
    with lane, torch.no_grad():
        y = op(parts, place=lane.put)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to(stock(parts, torch.float64), stock(parts), y.cpu())


def test_exact_on_integers(lane):
    layers = [[integers(K, 32, 1, 1), *[None] * 5] for K in (16, 7)]
    x = integers(2, 32, 3, 4)
    parts = [(x, layer, 0, "none") for layer in layers]
    with lane, torch.no_grad():
        y = op(parts, place=lane.put)
    assert_exact(stock(parts), y.cpu())


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_other_backends_concatenate(backend):
    parts = [part(8, 6, 1), part(8, 5, 3)]
    with torch.no_grad():
        assert_close_to(stock(parts, torch.float64), stock(parts), op(parts, backend))


@pytest.mark.parametrize("name", OPS)
def test_op_is_registered_as_pytorch_asks(name):
    x, layer, *_ = part(6, 4, 1)
    if name == OPS[0]:
        x.requires_grad_()
    arguments = ([x, x], [*layer, *[None] * 6], [1, 1, 0, 0, 1, 1, 1] * 2, [1e-5] * 2, ["relu", "none"])
    torch.library.opcheck(getattr(torch.ops.fastnets, name).default, (*arguments, [0.0] * 2, "auto"))


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="they may differ in channels alone"):
        op([part(8, 6, 1), part(8, 6, 1, size=4)])


class Shared(nn.Module):
    """Of the convolutions one is read again; an inner concatenation, a pool and the input go in, too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(32, 8, 1), nn.Conv2d(32, 16, 1)
        self.conv3, self.conv4 = nn.Conv2d(32, 24, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        again = F.relu(self.conv1(x))
        inner = torch.cat([self.conv2(x), self.conv3(x)], 1)
        return torch.cat([again, inner, self.pool(x), x], 1) + torch.cat([self.conv4(again)] * 14, 1)


def settle(make):
    return settled(make())


NETWORKS = {"Fire": lambda: Fire(32, 32, 16), "shared": Shared}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_runs_and_reports_it(name):
    stock = settle(NETWORKS[name])
    fast = fastnets.optimize(stock)
    assert "call_conv_concatenation" in graphs(fast)
    assert graphs(fast).count("torch.cat(") == (name == "shared")  # of one value, repeated
    assert "concatenation" in [row.kind for row in fastnets.explain(fast).rows]
    assert_same_answers(stock, fast, images(2, 32, 6, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images(2, 32, 6, 5)).dtype == stock(images(2, 32, 6, 5)).dtype


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_runs_it_by_triton(lane, name):
    stock = settle(NETWORKS[name])
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    x = images(2, 32, 6, 5)
    with lane, dispatch.backend("triton"), torch.no_grad():
        for _ in range(3):  # repeated from a recording
            y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_nothing_is_copied_and_hooks_are_honoured():
    fast = fastnets.optimize(settle(NETWORKS["Fire"]).to("meta"))
    x = torch.empty(8, 32, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.backend("triton"):
        counted = count(fast, x)
        assert set(counted.by_op) == {"triton.conv_kernel"}
        assert counted.launches == 3
        handle = fast.expand1x1.register_forward_hook(lambda *a: None)
        assert "aten.copy_" in count(fast, x).by_op  # of what the hook sees
        handle.remove()
        assert count(fast, x).bytes == counted.bytes


class Unit(nn.Module):
    def __init__(self, K, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(32, K, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(K)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Watching(Unit):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return super().forward(x)


class Inception(nn.Module):
    """Branches that are containers of their own, as torchvision's are."""

    def __init__(self, unit=Unit):
        super().__init__()
        self.branch1, self.branch2 = unit(8, 1), nn.Sequential(nn.Identity(), Unit(32, 3), Unit(16, 3))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(24, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.branch1, self.branch2, self.branch3)], 1)


def test_units_of_one_convolution_are_gone_through():
    stock = settle(Inception)
    fast = fastnets.optimize(stock)
    assert_same_answers(stock, fast, images(2, 32, 6, 5))
    fast = fastnets.optimize(stock.to("meta"))
    assert fastnets.explain(fast).coverage == 1
    x = torch.empty(8, 32, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.backend("triton"):
        counted = count(fast, x)
        assert "aten.cat" not in counted.by_op
        assert counted.launches == 5  # four convolutions and a pool
        seen = []
        handle = fast.branch1.register_forward_hook(lambda *a: seen.append(1))
        assert "aten.cat" in count(fast, x).by_op
        handle.remove()
        assert seen
        fast.branch1.conv.register_forward_hook(lambda *a: seen.append(2))
        count(fast, x)
    assert 2 in seen
    assert count(fast, x, training=True).launches


def test_a_unit_that_does_more_is_called():
    stock = settle(lambda: Inception(Watching))
    fast = fastnets.optimize(stock)
    fast.branch1.seen.clear()
    with torch.no_grad():
        for _ in range(4):
            fast(images(2, 32, 6, 5))
    assert len(fast.branch1.seen) == 4


@pytest.mark.parametrize(
    "copies, written, pays", [(0, 1, True), (1, 1, True), (2, 1, False), (3, 1 << 25, True)]
)
def test_copies_cost_launches(copies, written, pays):
    from fastnets.kernels.conv_configs import slices_pay
    from fastnets.kernels.device import DEVICES

    assert slices_pay(written, copies, DEVICES["h100"]) is pays


def test_gradients_are_stocks():
    stock = settle(NETWORKS["Fire"])
    fast = fastnets.optimize(stock)
    gradients = []
    for model in (stock, fast):
        x = images(2, 32, 6, 5).requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
