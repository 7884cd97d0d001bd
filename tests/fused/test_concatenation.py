"""Chains of concatenations that grow in one buffer: the call, the pattern, what they leave to stock."""

import copy

import pytest
import torch
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch
from fastnets.fused.concatenation import call_concatenate
from fastnets.models.densenet import DenseBlock
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, images, kinds, settled


def grown(parts, backend="triton"):
    """(results, their concatenations by stock) of a chain over the parts."""
    value, room, results, expected = parts[0], None, [], []
    for later, part in zip(range(len(parts) - 2, -1, -1), parts[1:]):
        value, room = call_concatenate(room, (value, part), later, backend)
        results.append(value)
        expected.append(torch.cat(parts[: len(results) + 1], 1))
    return results, expected


def maps(*channels, dtype=torch.float32):
    return [torch.randn(2, c, 3, 5, dtype=dtype) for c in channels]


def addresses(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_are_views_of_one_buffer_and_the_last_is_dense(dtype):
    with torch.no_grad():
        results, expected = grown(maps(6, 4, 4, 4, dtype=dtype))
    assert all(torch.equal(r, e) for r, e in zip(results, expected))
    assert len(addresses(results)) == 1
    assert results[-1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [(6, 4, 8, 4), (6, 4, 2, 4), (6, 4, 4, 2), (0, 0, 3, 1)])
def test_uneven_growth_is_right_too(channels):
    with torch.no_grad():
        results, expected = grown(maps(*channels))
    assert all(torch.equal(r, e) for r, e in zip(results, expected))
    assert results[-1].is_contiguous(memory_format=torch.channels_last) or results[-1].is_contiguous()


def test_gradients_and_other_backends_run_stock():
    parts = maps(6, 4, 4)
    assert len(addresses(grown(parts)[0])) == 2  # gradients are enabled
    with torch.no_grad():
        assert len(addresses(grown(parts, "reference")[0])) == 2
        assert len(addresses(grown([part.half() for part in parts], "auto")[0])) == 2  # on the CPU
        results, expected = grown(parts, "auto")
        assert len(addresses(results)) == 1
        assert torch.equal(results[1], expected[1])
        parts[2] = parts[2].double()
        results, expected = grown(parts)
        assert len(addresses(results)) == 2
        assert torch.equal(results[1], expected[1])


def test_errors_are_stocks():
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        call_concatenate(None, (torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 3)), 2, "triton")


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_a_dense_block(lane):
    stock = settled(DenseBlock(3, 16, 8, 0.0))
    fast = fastnets.optimize(copy.deepcopy(stock).to(lane.device))
    assert "call_concatenate" in graphs(fast)
    assert "concatenation" in kinds(fast)
    x = images(2, 16, 4, 5)
    with lane, dispatch.backend("triton"), torch.no_grad():
        y = fast(lane.put(x))
    with torch.no_grad():
        assert_close_to(copy.deepcopy(stock).double()(x.double()), stock(x), y.cpu())


def test_a_dense_block_on_the_cpu_and_in_training():
    stock = settled(DenseBlock(3, 16, 8, 0.0))
    fast = fastnets.optimize(stock)
    assert_same_answers(stock, fast, images(2, 16, 4, 5))
    stock.train(), fast.train()
    grads = []
    for model in (stock, fast):
        model(images(2, 16, 4, 5)).square().sum().backward()
        grads.append(model.denselayer1.conv1.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_dense_block_copies_only_what_is_new():
    stock = settled(DenseBlock(4, 64, 32, 0.0)).to("meta")
    fast = fastnets.optimize(stock)
    x = torch.empty(32, 64, 28, 28, device="meta").to(memory_format=torch.channels_last)
    with dispatch.assume_device_type("cuda"):
        traffic = count(fast, x)
    assert "aten.cat" not in traffic.by_op
    assert traffic.by_op["aten.copy_"].bytes == 2 * 4 * x[:, :1].numel() * (64 + 4 * 32)
    assert traffic.bytes < 0.4 * count(stock, x).bytes


class Kept(nn.Module):
    """Concatenations that must stay: somebody reads one later, or sees its layout."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b, self.c = (nn.Conv2d(c, 4, 1) for c in (8, 12, 16))

    def forward(self, x):
        one = torch.cat((x, self.a(x)), 1)
        two = torch.cat((one, self.b(one)), 1)
        if self.how == "read later":
            return torch.cat((two, self.c(two)), 1), one * 2
        if self.how == "returned":
            return torch.cat((two, self.c(two)), 1), one, two
        if self.how == "not first":
            return torch.cat((self.c(two), two), 1)
        return torch.cat((two, self.c(two)), 1), two.relu_()


@pytest.mark.parametrize("how", ["read later", "returned", "not first", "written"])
def test_readers_that_others_would_disturb(how):
    stock = settled(Kept(how))
    fast = fastnets.optimize(stock)
    with dispatch.backend("reference"):
        assert_same_answers(stock, fast, images(2, 8, 4, 5))
    calls = {"read later": 2, "returned": 0, "not first": 2, "written": 2}
    assert graphs(fast).count("call_concatenate(") == calls[how]
