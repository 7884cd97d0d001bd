"""Forwards taken from a program: which calls are, that nobody sees it, and that every change is seen."""

import copy
import functools
import gc
import io
import random
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.fused import conv, whole_forward
from fastnets.fused.dispatch import REMEMBERS
from fastnets.kernels import recording
from fastnets.models import create_model
from tests.accuracy import assert_exact

pytestmark = pytest.mark.skipif(not REMEMBERS, reason="this PyTorch has no tensor guards to compare calls by")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


def pair():
    """A stock network with trained-looking statistics and its optimized twin, which share no memory."""
    torch.manual_seed(0)
    stock = Net().eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return stock, fastnets.optimize(copy.deepcopy(stock))


def programs(net):
    network = whole_forward._network_of(net)
    return [] if network is None else [p for p in network.programs.values() if p.sure]


def warm(net, *args, calls=4):
    for _ in range(calls):
        y = net(*args)
    return y


def is_recorded(net, *args):
    """Whether calls with these arguments are taken from a program, in the end."""
    warm(net, *args)
    return bool(programs(net))


def assert_as_stock(stock, fast, *args):
    """Several calls, so that some are usual ones, one is recorded and some are taken from the program."""
    for _ in range(5):
        torch.testing.assert_close(fast(*args), stock(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "name", ["lenet5", "resnet18", "mobilenet_v2", "googlenet", "densenet121", "vit_ti_16"]
)
def test_networks_give_the_same_bits_by_their_program(name, context):
    torch.manual_seed(0)
    stock = create_model(name).eval()
    fast = fastnets.optimize(stock)
    size = {"lenet5": (1, 28, 28), "vit_ti_16": (3, 224, 224)}.get(name, (3, 96, 96))
    with context():
        inputs = [torch.randn(1, *size) for _ in range(5)]
        results = [fast(x) for x in inputs]
        assert programs(fast)
        whole_forward.forget(fast)
        for x, y in zip(inputs, results):
            whole_forward.forget(fast)
            assert_exact(fast(x), y)


def test_explain_counts_programs():
    _, fast = pair()
    assert "program" not in str(fastnets.explain(fast))
    with torch.no_grad():
        warm(fast, torch.randn(1, 3, 12, 12))
    assert "1 kinds of call are taken from a program" in str(fastnets.explain(fast))


def test_in_the_end_no_module_runs(monkeypatch):
    _, fast = pair()
    x = torch.randn(2, 3, 12, 12)
    calls = []
    with torch.no_grad():
        warm(fast, x, calls=5)  # one is watched by what splits batches
        assert programs(fast)
        monkeypatch.setattr(conv, "_body", lambda *arguments: calls.append(arguments))
        assert fast(x).shape == (2, 5)
        assert not calls


def change_a_weight(net):
    net.blocks[0].conv.weight.mul_(1.5)


def change_a_statistic(net):
    net.blocks[1].bn.running_mean.add_(1.0)


def replace_a_weight(net):
    torch.manual_seed(4)
    net.fc.weight = nn.Parameter(torch.randn(5, 16))


def replace_a_layer(net):
    torch.manual_seed(1)
    net.blocks[0].conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def replace_a_block(net):
    torch.manual_seed(1)
    net.blocks[1] = nn.Identity()


def change_the_stride(net):
    net.stem.stride = (2, 2)


def change_eps(net):
    net.blocks[0].bn.eps = 0.5


def load_a_state(net):
    torch.manual_seed(2)
    net.load_state_dict(Net().state_dict())


def step_of_an_optimizer(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), 0.1).step()


def convert(net):
    net.double().float()
    net.fc.weight.data = net.fc.weight.data * 2
    fastnets.refresh()


def prune(net):
    torch.manual_seed(3)
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    net.fc.parametrizations.weight.original0.mul_(3)


def train_a_norm(net):
    net.blocks[0].bn.train()


def patch_a_forward(net):
    net.fc.forward = lambda x: x.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "change",
    [
        *(change_a_weight, change_a_statistic, replace_a_weight, replace_a_layer, replace_a_block),
        *(change_the_stride, change_eps, load_a_state, step_of_an_optimizer, convert, prune, train_a_norm),
        patch_a_forward,
    ],
)
def test_every_change_of_the_network_is_seen(change):
    stock, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert is_recorded(fast, x)
        before = fast(x)
        change(stock)
        change(fast)
        assert_as_stock(stock, fast, x)
        assert fast(x).shape != before.shape or not torch.equal(fast(x), before)


@pytest.mark.parametrize("where", ["fc", "blocks.0", "blocks.0.conv", "stem"])
def test_hooks_run(where):
    _, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    seen = []
    with torch.no_grad():
        assert is_recorded(fast, x)
        handle = fast.get_submodule(where).register_forward_hook(lambda *args: seen.append(1))
        warm(fast, x, calls=3)
        assert len(seen) == 3
        handle.remove()
        assert is_recorded(fast, x)
        assert len(seen) == 3


def test_global_hooks_run():
    _, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    seen = []
    with torch.no_grad():
        assert is_recorded(fast, x)
        handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
        try:
            fast(x)
        finally:
            handle.remove()
    assert seen


def test_modes_gradients_and_autocast_run_the_modules():
    from torch.utils.flop_counter import FlopCounterMode

    stock, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert is_recorded(fast, x)
        with FlopCounterMode(display=False) as ours:
            fast(x)
        with FlopCounterMode(display=False) as theirs:
            stock(x)
        assert ours.get_total_flops() == theirs.get_total_flops() > 0
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == stock(x).dtype == torch.bfloat16
    y = fast(x)
    y.sum().backward()
    assert fast.stem.weight.grad is not None
    given = x.clone().requires_grad_()
    fast(given).sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(torch.func.vmap(fast)(x[None])[0], fast(x))


def test_each_kind_of_input_has_its_own_program():
    stock, fast = pair()
    with torch.no_grad():
        for size in ((1, 3, 12, 12), (3, 3, 12, 12), (1, 3, 16, 8)):
            x = torch.randn(size)
            assert_as_stock(stock, fast, x)
            assert_as_stock(stock, fast, x.to(memory_format=torch.channels_last))
        assert len(programs(fast)) >= 4
        for size in ((1, 3, n, 12) for n in range(12, 30)):
            warm(fast, torch.randn(size))
        assert len(programs(fast)) <= whole_forward._MOST
        for _ in range(4):
            with pytest.raises(ValueError, match="x has 4 channels"):
                fast(torch.randn(1, 4, 12, 12))
    doubled = fastnets.optimize(copy.deepcopy(stock).double())
    with torch.no_grad():
        assert_as_stock(
            copy.deepcopy(stock).double(), doubled, torch.randn(1, 3, 12, 12, dtype=torch.float64)
        )


def test_results_are_the_callers_own_and_inputs_stay():
    _, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    before = x.clone()
    with torch.no_grad():
        assert is_recorded(fast, x)
        first = fast(x)
        kept = first.clone()
        second = fast(x)
        second.zero_()
        assert_exact(kept, first)
        assert_exact(kept, fast(x))
    assert_exact(before, x)


class Returning(nn.Module):
    """A network with several results, some of them its input."""

    def __init__(self, gather):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gather = gather

    def forward(self, x):
        y = F.relu(self.conv(x))
        if self.gather == "dict":
            return {"x": x, "y": y}
        if self.gather == "list":
            return [y, y.flatten(1), x]
        return y, (x, y[:, 0])


@pytest.mark.parametrize("gather", ["dict", "list", "tuple"])
def test_nests_of_results(gather):
    stock = Returning(gather).eval()
    fast = fastnets.optimize(copy.deepcopy(stock))
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(1, 3, 12, 12)
            ours, theirs = fast(x), stock(x)
            assert type(ours) is type(theirs)
            torch.testing.assert_close(ours, theirs)
            found = ours["x"] if gather == "dict" else ours[2] if gather == "list" else ours[1][0]
            assert found is x
        if gather != "dict":  # which fx hands out as its own kind
            assert programs(fast)


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.conv, self.draw = nn.Conv2d(3, 4, 3), draw

    def forward(self, x):
        y = F.relu(self.conv(x))
        if self.draw == "dropout":
            return F.dropout(y, 0.5, training=True)
        if self.draw == "noise":
            return y + torch.randn_like(y)
        return y[y > 0.1]


@pytest.mark.parametrize("draw", ["dropout", "noise", "mask"])
def test_what_is_random_or_depends_on_values_is_never_repeated(draw):
    fast = fastnets.optimize(Drawing(draw).eval())
    with torch.no_grad():
        x = torch.randn(1, 3, 12, 12)
        first, second = warm(fast, x), fast(x)
        assert not programs(fast)
        assert "draws random numbers, looks at values" in str(fastnets.explain(fast))
        if draw == "mask":
            assert fast(x * 3).shape != second.shape
        else:
            assert not torch.equal(first, second)


class Uncaptured(nn.Module):
    """Python that nobody has read runs in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.conv(x) if len(self.calls) % 2 else self.conv(x) + 1


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 3), Uncaptured()

    def forward(self, x):
        return self.inner(F.relu(self.stem(x)))


def test_code_that_nobody_has_read_runs_at_every_call():
    net = Around().eval()
    fast = fastnets.optimize(net)
    with torch.no_grad():
        for _ in range(8):
            fast(torch.randn(1, 3, 12, 12))
    assert len(fast.inner.calls) >= 8
    assert not programs(fast)
    assert "inner runs code that was not captured" in str(fastnets.explain(fast))


def test_a_program_that_gives_something_else_is_not_taken(monkeypatch):
    stock, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    program = whole_forward.Recorder.program
    monkeypatch.setattr(
        whole_forward.Recorder,
        "program",
        lambda self, result: functools.partial(lambda run, args: run(args) + 1e-6, program(self, result)),
    )
    with torch.no_grad():
        assert not is_recorded(fast, x)
        assert_as_stock(stock, fast, x)
        assert "another result each time" in str(fastnets.explain(fast))


@pytest.mark.parametrize("calls", range(4))
def test_a_call_that_fails_leaves_nothing_behind(calls, monkeypatch):
    """The usual one, the one that is recorded, the one that is compared, one by the program."""
    _, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        for _ in range(calls):
            fast(x)
        with monkeypatch.context() as broken:
            broken.setattr(conv, "_body", lambda *arguments: 1 / 0)
            broken.setattr(whole_forward, "_switches", lambda: 1 / 0 if calls == 3 else ())
            with pytest.raises(ZeroDivisionError):
                fast(x)
        assert not recording.is_seen_by_modes()
        assert recording._recorders.count == 0
        assert is_recorded(fast, x)


def test_networks_die_with_their_programs_and_copies_have_none():
    _, fast = pair()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert is_recorded(fast, x)
        twin = copy.deepcopy(fast)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        assert not programs(twin)
        change_a_weight(twin)
        assert not torch.equal(warm(twin, x), fast(x))
        gone, weight = weakref.ref(fast), weakref.ref(fast.fc.weight)
        del fast
        gc.collect()
        assert gone() is None
        assert weight() is None


def test_training_and_moving_free_what_programs_hold():
    _, fast = pair()
    with torch.no_grad():
        assert is_recorded(fast, torch.randn(1, 3, 12, 12))
        fast.train()
        assert not programs(fast)
        fast.eval()
        assert is_recorded(fast, torch.randn(1, 3, 12, 12))
        fast.to(torch.float64)
        assert not programs(fast)


def test_weights_that_change_at_every_call():
    stock, fast = pair()
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(1, 3, 12, 12)
            change_a_weight(stock)
            change_a_weight(fast)
            torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
    assert not programs(fast)


@pytest.mark.parametrize("seed", range(3))
def test_calls_and_changes_in_any_order(seed):
    """Random walks over inputs, changes, modes and hooks: always stock's answer."""
    draw = random.Random(seed)
    stock, fast = pair()
    changes = [
        change_a_weight,
        change_a_statistic,
        change_eps,
        load_a_state,
        replace_a_layer,
        step_of_an_optimizer,
    ]
    inputs = [torch.randn(n, 3, 10, 10) for n in (1, 1, 2)]
    for _ in range(60):
        action = draw.random()
        if action < 0.12:
            change, state = draw.choice(changes), torch.random.get_rng_state()
            with torch.no_grad():
                change(stock)
                torch.random.set_rng_state(state)
                change(fast)
        elif action < 0.2:
            fast.train().eval()
        else:
            context = draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
            x = draw.choice(inputs)
            with context():
                torch.testing.assert_close(fast(x), stock(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        fast.eval()  # new layers are in training mode
        assert is_recorded(fast, inputs[0])


def test_ordered_dicts_of_detection_backbones():
    backbone = create_model(next(name for name in fastnets.list_models() if "fpn" in name))
    fast = fastnets.optimize(backbone.eval())
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        results = [fast(x) for _ in range(5)]
    assert all(type(r) in (dict, OrderedDict) for r in results)
    for result in results[1:]:
        assert list(result) == list(results[0])
        for name, value in result.items():
            assert_exact(results[0][name], value)
