"""Splitting batches on the CPU: when it happens, when it must not, and that nobody sees it."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.fused import memory, whole_forward
from fastnets.models import create_model
from fastnets.models.dynamic_depth import StochasticDepth
from tests.accuracy import assert_close_to


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr(memory, "_BYTES", 1 << 16)
    monkeypatch.setattr(memory, "_MAPPED", 1 << 17)


def batches_seen(net, x):
    """Batch sizes that the stock convolution calls below ``net`` get, while its modules run."""
    sizes = []
    whole_forward.forget(net)
    with torch.no_grad(), SizesOfConvolutions(sizes):
        y = net(x)
    return sizes, y


class SizesOfConvolutions:
    """Notes the batch size of every fused convolution; a dispatch mode would forbid splitting."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __enter__(self):
        from fastnets.fused import conv

        self.conv, self.body = conv, conv._body

        def body(x, *arguments):
            self.sizes.append(len(x))
            return self.body(x, *arguments)

        conv._body = body

    def __exit__(self, *error):
        self.conv._body = self.body


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_large_batches_are_split_and_answers_stay(small_budget, name):
    torch.manual_seed(0)
    stock = create_model(name).eval()
    x = torch.randn(3, 3, 64, 64)
    fast = fastnets.optimize(stock)
    with torch.no_grad():
        fast(x)  # is watched, whole
        sizes, y = batches_seen(fast, x)
        assert set(sizes) == {1}
        reference64 = stock.double()(x.double())
        assert_close_to(reference64, stock.float()(x), y)


class Gated(nn.Module):
    """Squeeze-and-excite's product with a gate, and a scale that is a view of a parameter."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.randn(16, 1, 1))
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        y = F.relu(self.conv(x))
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid() * self.scale
        rows = self.inner(y.permute(0, 2, 3, 1)) * self.scale.view(1, 1, 1, 16)
        return rows.permute(0, 3, 1, 2) * self.scale.view(1, 16, 1, 1)


def test_gates_scales_and_rows_of_pixels_do_not_keep_a_batch_whole(small_budget):
    torch.manual_seed(0)
    stock, x = Gated().eval(), torch.randn(4, 3, 40, 40)
    fast = fastnets.optimize(stock)
    with torch.no_grad():
        fast(x)
        sizes, y = batches_seen(fast, x)
        assert set(sizes) == {1}
        assert_close_to(stock.double()(x.double()), stock.float()(x), y)


def test_dropout_that_is_not_pytorchs_own_does_not_keep_a_batch_whole(small_budget):
    torch.manual_seed(0)
    stock = WithStochasticDepth().eval()
    x = torch.randn(3, 3, 64, 64)
    fast = fastnets.optimize(stock)
    with torch.no_grad():
        fast(x)
        sizes, y = batches_seen(fast, x)
        assert set(sizes) == {1}
        assert_close_to(stock.double()(x.double()), stock.float()(x), y)


class WithStochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.drop = StochasticDepth(0.2)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return x + self.drop(self.inner(x))


def test_a_batch_that_fits_stays_whole():
    fast = fastnets.optimize(create_model("resnet18").eval())
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        fast(x)
    assert set(batches_seen(fast, x)[0]) == {3}


class Mixing(nn.Module):
    """Networks whose answer for one image depends on the others."""

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.how = how
        self.place = nn.Parameter(torch.arange(16.0).view(16, 1, 1, 1))
        self.inner = Opaque() if how == "opaque module" else nn.Identity()

    def forward(self, x):
        y = F.relu(self.conv(x))
        if self.how == "batch mean":
            y = y - y.mean(0, keepdim=True)
        if self.how == "softmax over the batch":
            y = torch.softmax(y, 0)
        if self.how == "batch norm of the batch":
            y = F.batch_norm(y, None, None, training=True)
        if self.how == "flattened batch":
            y = y.reshape(-1, 16, 7, 4) + 1
        if self.how == "transposed batch":
            y = y.transpose(0, 1)
        if self.how == "samples along the channels":
            y = y * y.mean((1, 2, 3))[:, None, None]
        if self.how == "scaled each by its place":
            y = y * self.place
        if self.how == "rolled batch":
            y = torch.roll(y, 1, 0)
        return self.inner(y)


class Opaque(nn.Module):
    def forward(self, x):
        return x + len(x) if x.sum() < 1e9 else x  # control flow on values: cannot be captured


@pytest.mark.parametrize(
    "how",
    [
        "batch mean",
        "softmax over the batch",
        "batch norm of the batch",
        "flattened batch",
        "transposed batch",
        "samples along the channels",
        "scaled each by its place",
        "rolled batch",
        "opaque module",
    ],
)
def test_networks_that_look_across_the_batch_are_never_split(small_budget, how):
    net = Mixing(how).eval()
    fast = fastnets.optimize(net)
    x = torch.randn(16, 3, 30, 30)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-3)
        assert set(batches_seen(fast, x)[0]) == {16}


def test_a_layer_put_in_later_is_looked_at_again(small_budget):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Identity()).eval()
    fast = fastnets.optimize(net)
    x = torch.randn(4, 3, 30, 30)
    with torch.no_grad():
        fast(x)
        assert set(batches_seen(fast, x)[0]) == {1}
        fast[2] = net[2] = Opaque()
        torch.testing.assert_close(fast(x), net(x))
        torch.testing.assert_close(fast(x), net(x))


def test_hooks_see_whole_batches(small_budget):
    fast = fastnets.optimize(create_model("resnet18").eval())
    x = torch.randn(4, 3, 64, 64)
    seen = []
    with torch.no_grad():
        fast(x)
        fast.layer2.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        fast(x)
    assert seen == [4]


def test_gradients_and_compilers_get_the_whole_forward(small_budget):
    fast = fastnets.optimize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval())
    x = torch.randn(4, 3, 30, 30)
    with torch.no_grad():
        fast(x)
        split = fast(x)
        compiled = torch.compile(fast, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, split)
        traced = torch.jit.trace(fast, x)
        torch.testing.assert_close(traced(x), split)
    fast(x).sum().backward()
    assert fast[0].weight.grad is not None


def test_signature_is_stock():
    net = create_model("resnet18")
    fast = fastnets.optimize(net)
    assert inspect.signature(fast.forward) == inspect.signature(net.forward)


def test_retained_memory_is_used_again():
    program = """
import resource, torch, fastnets
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
fastnets.retain_memory()
faults()
print(before, faults())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert after < before / 2
