"""``restore``: the stock network, exactly, with the weights of now."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastnets
from fastnets.fused.swap import Rewritten
from fastnets.fused.variants import without_rewrite
from tests.fused.networks import Classifier, Residual, assert_same_answers, images, kinds, settled

torchvision = pytest.importorskip("torchvision")


def _assert_stock(restored, stock):
    for (name, r), s in zip(restored.named_modules(), stock.modules()):
        assert type(r) is type(s), name
        assert list(r.__dict__) == list(s.__dict__), name
    assert list(restored.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize(
    "make",
    [Classifier, torchvision.models.resnet18, torchvision.models.mobilenet_v2],
    ids=lambda f: f.__name__,
)
def test_exact(make):
    stock = settled(make())
    restored = fastnets.optimize(stock)
    x = images(1, 3, 32, 32) if make is not Classifier else images(1, 3, 12, 12)
    with torch.no_grad():
        restored(x)
        assert fastnets.restore(restored) is restored
        _assert_stock(restored, stock)
        assert torch.equal(restored(x), stock(x))


def test_current_weights():
    stock = settled(Residual())
    fast = fastnets.optimize(stock)
    with torch.no_grad():
        fast.conv1.weight.mul_(2)
        stock.conv1.weight.mul_(2)
    fastnets.restore(fast)
    assert torch.equal(fast(images(1, 8, 5, 5)), stock(images(1, 8, 5, 5)))


def test_in_place_and_again():
    stock = settled(Classifier())
    twin = copy.deepcopy(stock)
    fused = None
    for _ in range(2):
        fastnets.optimize(stock, inplace=True)
        fused = fused or kinds(stock)
        assert kinds(stock) == fused
        fastnets.restore(stock)
        _assert_stock(stock, twin)
    assert kinds(stock) == []


def test_of_a_stock_network_is_nothing():
    stock = settled(Classifier())
    before = [type(m) for m in stock.modules()]
    assert [type(m) for m in fastnets.restore(stock).modules()] == before


def test_after_copies_and_pickles():
    stock = settled(Classifier())
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        _assert_stock(fastnets.restore(copied(fastnets.optimize(stock))), stock)


def test_of_a_part():
    stock = settled(Classifier())
    fast = fastnets.optimize(stock)
    fastnets.restore(fast.layer1)
    assert not any(isinstance(m, Rewritten) for m in fast.layer1.modules())
    assert isinstance(fast, Rewritten)
    assert_same_answers(stock, fast, images(1, 3, 12, 12))


def test_classes_that_were_derived_from_ours():
    """Parametrizing a container derives from its generated class; restoring takes that out of the middle."""

    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    stock = settled(Residual())
    fast = fastnets.optimize(stock)
    for model in (stock, fast):
        model.gain = nn.Parameter(torch.ones(2))
        parametrize.register_parametrization(model, "gain", Twice())
    assert isinstance(fast, Rewritten)
    fastnets.restore(fast)
    assert not isinstance(fast, Rewritten)
    assert isinstance(fast, Residual)
    assert torch.equal(fast.gain, torch.full((2,), 2.0))
    parametrize.remove_parametrizations(fast, "gain")
    assert type(fast) is Residual


def test_without_rewrite_leaves_other_classes():
    assert without_rewrite(nn.Conv2d) is nn.Conv2d
    fast = fastnets.optimize(settled(Residual()))
    assert without_rewrite(type(fast)) is Residual

    class Derived(type(fast)):
        pass

    stock = without_rewrite(Derived)
    assert stock.__mro__[1] is Residual
    assert without_rewrite(Derived) is stock
