"""A rewritten container in use: hooks that come and go, and a structure that changes under it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastnets
from tests.fused.networks import Classifier, assert_same_answers, images, kinds, settled

X = (2, 3, 12, 12)


@pytest.fixture
def stock():
    return settled(Classifier())


@pytest.fixture
def fast(stock):
    return fastnets.optimize(stock)


# --- hooks --------------------------------------------------------------------------------------------------

HOOKABLE = ["stem", "stem.0", "stem.1", "stem.2", "layer1", "layer1.1", "layer1.1.shortcut", "layer1.1.conv2"]
HOOKABLE += ["layer1.1.bn2", "layer1.1.relu", "layer1.1.shortcut.0", "layer1.1.shortcut.1", "pool", ""]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", HOOKABLE)
def test_forward_hooks_fire_as_in_stock(stock, path, when):
    seen = {}

    def add_hooks(model, key):
        seen[key] = []
        module = model.get_submodule(path)
        return [
            module.register_forward_pre_hook(lambda m, i: seen[key].append(("pre", i[0].shape))),
            module.register_forward_hook(lambda m, i, o: (seen[key].append(("post", o.shape)), o * 2)[1]),
        ]

    if when == "before":
        add_hooks(stock, "stock")
        fast = fastnets.optimize(stock, inplace=False)
        seen["fast"] = []
        fast.get_submodule(path)._forward_hooks.clear()
        fast.get_submodule(path)._forward_pre_hooks.clear()
        handles = add_hooks(fast, "fast")
    else:
        fast = fastnets.optimize(stock)
        with torch.no_grad():
            fast(images(*X))
        add_hooks(stock, "stock")
        handles = add_hooks(fast, "fast")
    seen["stock"].clear()
    with torch.no_grad():
        expected, got = stock(images(*X)), fast(images(*X))
    assert seen["fast"] == seen["stock"]
    assert seen["fast"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    seen["fast"].clear()
    assert len(kinds(fast)) == len(kinds(fastnets.optimize(fastnets.restore(copy.deepcopy(fast)))))
    with torch.no_grad():
        fast(images(*X))
    assert seen["fast"] == []


@pytest.mark.parametrize("path", ["stem", "stem.1", "layer1.1.shortcut", "layer1.1.conv1", "layer1.0"])
def test_backward_hooks_fire_as_in_stock(stock, fast, path):
    seen = {}
    for key, model in (("stock", stock), ("fast", fast)):
        seen[key] = []
        model.get_submodule(path).register_full_backward_hook(
            lambda m, gi, go, key=key: seen[key].append(go[0].shape)
        )
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        try:
            model(images(*X)).sum().backward()
        except RuntimeError:  # stock refuses some in-place operations behind such hooks
            seen[key] = "refused"
    assert seen["fast"] == seen["stock"]


def test_global_hooks_see_every_module(stock, fast):
    counts = {}
    for key, model in (("stock", stock), ("fast", fast)):
        names = {module: name for name, module in model.named_modules()}
        called = counts[key] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o, called=called, names=names: called.append(names[m])
        )
        try:
            with torch.no_grad():
                model(images(*X))
        finally:
            handle.remove()
    assert sorted(counts["fast"]) == sorted(counts["stock"])


def test_a_forward_replaced_on_an_instance(stock, fast):
    for model in (stock, fast):
        for path in ("stem.0", "layer1.1.shortcut"):
            module = model.get_submodule(path)
            module.forward = lambda x, f=module.forward: f(x) * 2
    assert_same_answers_no_copy(stock, fast)


def assert_same_answers_no_copy(stock, fast):
    with torch.no_grad():
        torch.testing.assert_close(fast(images(*X)), stock(images(*X)), rtol=1e-4, atol=1e-4)


# --- a structure that changes -------------------------------------------------------------------------------


def _new_relu(m):
    m.layer1[0].relu = nn.GELU()


def _new_shortcut(m):
    torch.manual_seed(0)
    m.layer1[1].shortcut = settled(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh()))


def _no_shortcut(m):
    m.layer1[1].shortcut = None


def _stem_item(m):
    m.stem[2] = nn.Tanh()


def _stem_append(m):
    m.stem.append(nn.Sigmoid())


def _stem_delete(m):
    del m.stem[2]


def _stem_insert(m):
    m.stem.insert(2, nn.Hardswish())


def _shortcut_append(m):
    m.layer1[1].shortcut.append(nn.Tanh())


def _conv_by_sequential(m):
    torch.manual_seed(0)
    m.layer1[0].conv1 = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))


def _bn_by_identity(m):
    m.layer1[0].bn1 = nn.Identity()


def _head(m):
    torch.manual_seed(0)
    m.fc = nn.Linear(32, 3)


def _add_module(m):
    m.layer1.add_module("2", nn.Tanh())


CHANGES = [_new_relu, _new_shortcut, _no_shortcut, _stem_item, _stem_append, _stem_delete, _stem_insert]
CHANGES += [_shortcut_append, _conv_by_sequential, _bn_by_identity, _head, _add_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_structure_changes_take_effect(stock, fast, change):
    with torch.no_grad():
        fast(images(*X))
    change(stock)
    change(fast)
    assert list(fast.state_dict()) == list(stock.state_dict())
    for s, f in zip(stock.parameters(), fast.parameters()):
        f.data.copy_(s.data)
    fastnets.refresh()
    assert_same_answers(stock, fast, images(*X))
    assert_same_answers(stock, copy.deepcopy(fast), images(*X))


def test_a_setting_that_changes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.residual = False

        def forward(self, x):
            y = F.relu(self.conv(x))
            return y + x if self.residual else y

    stock = settled(Net())
    fast = fastnets.optimize(stock)
    for value in (True, False):
        stock.residual = fast.residual = value
        assert_same_answers(stock, fast, images(1, 3, 5, 5))
    assert kinds(fast) == ["conv+relu"]


def test_parametrizations_before_and_after(stock):
    for when in ("before", "after"):
        fast = fastnets.optimize(stock) if when == "after" else None
        twin = copy.deepcopy(stock)
        torch.manual_seed(0)
        parametrizations.weight_norm(twin.layer1[0].conv1)
        if fast is None:
            fast = fastnets.optimize(twin)
        else:
            parametrizations.weight_norm(fast.layer1[0].conv1)
        assert_same_answers(twin, fast, images(*X))
        row = next(r for r in fastnets.explain(fast).rows if r.path == "layer1.0.conv1")
        assert not row.fused
        assert "parametrized" in row.reason
        parametrize.remove_parametrizations(fast.layer1[0].conv1, "weight")
        assert_same_answers(stock, fast, images(*X))
        assert all(r.fused for r in fastnets.explain(fast).rows if r.counts)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_old_weight_norm(stock, fast):
    for model in (stock, fast):
        nn.utils.weight_norm(model.layer1[0].conv1)
        with torch.no_grad():
            model.layer1[0].conv1.weight_g.mul_(2)
    assert_same_answers_no_copy(stock, fast)


def test_parametrization_on_a_container(fast, stock):
    class Scale(nn.Module):
        def forward(self, w):
            return 2 * w

    for model in (stock, fast):
        model.layer1[0].gain = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(model.layer1[0], "gain", Scale())
    assert_same_answers_no_copy(stock, fast)
