"""Fused layers work channels-last; code that the rewriting does not see must not notice."""

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused.layout import is_channels_last, may_observe_layout, restore_layout
from tests.fused.networks import Classifier, assert_same_answers, graphs, images, kinds, settled


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class _ViewsItself(nn.Module):
    """LeNet's way: view on a feature map, in the container that owns the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.fc(x.view(-1, 4 * 36))


class _Flatten(nn.Module):
    """A leaf of the user's own."""

    def forward(self, x):
        return x.view(x.size(0), -1)


class _StubbornFlatten(nn.Module):
    """A leaf that cannot be captured, either."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x.view(x.shape[0], -1)


class _Strides(nn.Module):
    def forward(self, x):
        return torch.tensor(x.stride()), x


class _Opaque(nn.Module):
    """Cannot be captured and views what its child returns, and what a grandchild returns."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"a": _block()})
        self.deep = nn.Module()
        self.deep.block = _block()

    def forward(self, x):
        y = self.body["a"](x)
        if y.sum() > 1e9:
            return y
        z = self.deep.block(x)
        return y.view(-1) + z.view(-1)


class _OpaqueWithSetting(nn.Module):
    """Captured for the default of ``flat`` only; the other way views what its child returns."""

    def __init__(self):
        super().__init__()
        self.body = _block()

    def forward(self, x, flat=False):
        y = self.body(x)
        return y.view(-1) if flat else y


class _Tokens(nn.Module):
    """Returns views of a feature map."""

    def __init__(self):
        super().__init__()
        self.body = _block()

    def forward(self, x):
        y = self.body(x)
        return y.flatten(2), y.permute(0, 2, 3, 1), {"map": y, "half": y.chunk(2, 1)[0]}


class _Helper(nn.Module):
    """Views in a function of its own module."""

    def __init__(self):
        super().__init__()
        self.body = _block()

    def forward(self, x):
        y = self.body(x)
        if y.sum() > 1e9:
            return y
        return _flat(y)


def _flat(x):
    return x.view(x.size(0), -1)


NETWORKS = {
    "view in the container": _ViewsItself,
    "view after blocks": Classifier,
    "view in a leaf": lambda: nn.Sequential(_block(), _Flatten()),
    "view in a leaf that cannot be captured": lambda: nn.Sequential(_block(), _StubbornFlatten()),
    "view in an opaque parent": _Opaque,
    "view in a helper function": _Helper,
    "strides read by a leaf": lambda: nn.Sequential(_block(), _Strides()),
    "a feature map": _block,
    "nested blocks": lambda: nn.Sequential(_block(), nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU())),
    "views of a feature map": _Tokens,
    "pixel shuffle": lambda: nn.Sequential(_block(), nn.PixelShuffle(2)),
    "pool and flatten": lambda: nn.Sequential(_block(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layout_is_what_stock_shows(name, channels_last):
    stock = settled(NETWORKS[name]())
    fast = fastnets.optimize(stock)
    assert kinds(fast), "nothing was fused"
    x = images(2, 3, 8, 8) if "fc" in dict(stock.named_children()) else images(2, 3, 7, 9)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        try:
            stock(x)
        except RuntimeError:  # view on channels-last: stock cannot do it either
            return
    assert_same_answers(stock, fast, x)


def test_the_other_way_of_a_setting_still_views():
    stock = settled(_OpaqueWithSetting())
    fast = fastnets.optimize(stock)
    x = images(2, 3, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, flat=True), stock(x, flat=True), rtol=1e-4, atol=1e-5)


def test_view_as_another_dtype_is_kept():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.relu(self.conv(x)).sum((2, 3)).view(torch.int32)

    stock = settled(Bits())
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv+relu"]
    x = images(1, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x).view(torch.float32), stock(x).view(torch.float32))


def test_a_classifier_pays_for_no_copy():
    """Inside a network that is captured throughout, nothing converts layouts; logits need none."""
    fast = fastnets.optimize(settled(Classifier()))
    assert graphs(fast).count("restore_layout(") == 0
    layouts = []
    fast.layer1[1].register_forward_hook(lambda m, i, o: layouts.append(is_channels_last(o)))
    with torch.no_grad():
        fast(images(1, 3, 12, 12))
    assert layouts == [True]


def test_weights_laid_out_channels_last_change_nothing_outside():
    """What optimize does to weights on CUDA must not show in the layout of results."""
    stock = settled(nn.Sequential(_block(), _StubbornFlatten()))
    fast = fastnets.optimize(stock)
    for module in fast.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    assert_same_answers(stock, fast, images(2, 3, 7, 7))
    stock.train()
    fast.train()
    with torch.no_grad():
        torch.testing.assert_close(fast(images(2, 3, 7, 7)), stock(images(2, 3, 7, 7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, stride, expected",
    [
        ((2, 3, 4, 5), None, False),
        ((2, 3, 4, 5), "channels_last", True),
        ((2, 1, 4, 5), None, False),
        ((2, 3, 1, 1), None, False),
        ((2, 3, 1, 1), "channels_last", True),
        ((2, 3, 4, 4), (0, 0, 0, 0), False),
    ],
)
def test_is_channels_last_follows_torch(shape, stride, expected):
    x = torch.zeros(shape)
    if stride == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif stride is not None:
        x = torch.zeros(1).as_strided(shape, stride)
    assert is_channels_last(x) == expected
    conv = nn.Conv2d(shape[1], 4, 1)
    if shape[2] > 1:  # and that is what a stock convolution makes of it
        y = conv(x)
        assert (y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()) == expected


def test_restore_layout_copies_only_what_it_must():
    x = images(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert restore_layout(x) is x
    assert restore_layout(last).is_contiguous()
    assert restore_layout(last, last) is last
    assert restore_layout(last, x).is_contiguous()
    assert restore_layout(last.flatten(1)).dim() == 2
    assert restore_layout("text") == "text"


def test_which_classes_may_observe():
    assert may_observe_layout(_Flatten)
    assert may_observe_layout(_Helper)
    assert not may_observe_layout(nn.Conv2d)
    assert not may_observe_layout(nn.Sequential)
    assert not may_observe_layout(_Tokens)
