"""Residuals written in place: that it happens, and that nobody can tell."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused import onednn, whole_forward
from fastnets.models import create_model
from tests.accuracy import assert_exact


@pytest.fixture
def in_place_calls(monkeypatch):
    """The shapes of the residuals that oneDNN was asked to overwrite."""
    unary, binary, in_place = onednn._pointwise()
    calls = []

    def counted(residual, *arguments):
        calls.append(tuple(residual.shape))  # the tensor itself, kept, would not be given again
        return in_place(residual, *arguments)

    monkeypatch.setattr(onednn, "_pointwise", lambda: (unary, binary, counted))
    return calls


class Block(nn.Module):
    """A residual block that says what it does with its input after the addition."""

    def __init__(self, after="nothing"):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.after = after

    def forward(self, x):
        if self.after == "kept view":
            view = x.view(-1)
        y = self.relu(self.conv2(self.relu(self.conv1(x))) + x)
        if self.after == "read again":
            return y + x
        if self.after == "kept view":
            return y + view.sum()
        return y


class Collecting(nn.Sequential):
    def forward(self, x):
        maps = []
        for module in self:
            x = module(x)
            maps.append(x)
        return maps


def answers(net, x, times=3):
    with torch.no_grad():
        return [net(x) for _ in range(times)]


def test_resnets_write_every_residual_that_is_theirs_in_place(in_place_calls):
    stock = create_model("resnet18").eval()
    fast = fastnets.optimize(stock)
    x = torch.randn(2, 3, 64, 64)
    first, *_ = answers(fast, x)
    in_place_calls.clear()
    whole_forward.forget(fast)  # so that its layers run
    (again,) = answers(fast, x, 1)
    assert len(in_place_calls) == 7  # of 8: the first residual is the pooled stem, made in another container
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(again, answers(stock, x, 1)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("after", ["nothing", "read again", "kept view"])
def test_a_residual_that_is_read_again_stays(in_place_calls, after):
    net = nn.Sequential(*[Block(after) for _ in range(4)], nn.Conv2d(8, 8, 1)).eval()
    net = nn.Sequential(nn.Sequential(*net[:4]), net[4]).eval()
    fast = fastnets.optimize(net)
    x = torch.randn(2, 8, 9, 9)
    kept = x.clone()
    for y in answers(fast, x):
        torch.testing.assert_close(y, answers(net, x, 1)[0], rtol=1e-4, atol=1e-4)
    assert bool(in_place_calls) == (after == "nothing")
    assert_exact(kept, x)


def test_the_callers_input_is_never_written(in_place_calls):
    for first in (nn.Identity(), nn.Dropout(), nn.Flatten(0, 0)):
        stage = nn.Sequential(first, Block(), Block())
        fast = fastnets.optimize(nn.Sequential(stage, nn.Conv2d(8, 8, 1)).eval())
        x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
        kept = x.clone()
        answers(fast, x)
        with torch.no_grad():
            fast[0](x)
        assert_exact(kept, x)


def test_containers_that_keep_maps_keep_them(in_place_calls):
    net = nn.Sequential(Collecting(*[Block() for _ in range(3)])).eval()
    fast = fastnets.optimize(net)
    x = torch.randn(2, 8, 9, 9)
    for maps in answers(fast, x):
        for ours, theirs in zip(maps, answers(net, x, 1)[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not in_place_calls


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_what_a_hook_keeps_stays_as_it_saw_it(kind):
    """Or becomes what stock makes of it: torchvision's networks add and activate in place."""
    stock = create_model("resnet18").eval()
    names = [name for name, _ in stock.named_modules() if name.startswith(("layer1", "layer2", "maxpool"))]
    x = torch.randn(1, 3, 32, 32)
    fast = fastnets.optimize(stock)
    for name in names:
        kept = []
        for net in (stock, fast):
            maps = []

            def keep(module, *tensors, maps=maps):
                tensor = tensors[-1][0] if isinstance(tensors[-1], tuple) else tensors[-1]
                maps.append((tensor, tensor.clone()))

            answers(net, x)
            handle = getattr(net.get_submodule(name), f"register_{kind}_hook")(keep)
            answers(net, x, 1)
            handle.remove()
            kept.append(maps)
        for (theirs, _), (ours, seen) in zip(*kept, strict=True):
            if not torch.equal(ours, seen):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_stages_stay_sequentials(in_place_calls):
    net = create_model("resnet18").eval()
    fast = fastnets.optimize(net)
    x = torch.randn(2, 3, 32, 32)
    (expected,) = answers(fast, x, 1)
    assert isinstance(fast.layer1, nn.Sequential)
    assert type(fast.layer1).__name__ == "Sequential"
    assert list(fast.state_dict()) == list(net.state_dict())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(answers(twin, x, 1)[0], expected)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, expected)
    fast(x).sum().backward()
    assert type(fastnets.restore(fast).layer1) is nn.Sequential
