"""Choosing by measurement: what wins, what is refused, what is kept, and what a call then runs."""

import copy
import time
import warnings

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused import dispatch, onednn, selection
from fastnets.fused.choices import Choice, Store, device_name
from fastnets.fused.conv import implementation_of
from fastnets.fused.measure import Comparison, Samples
from fastnets.fused.selection import is_clear, select, simplest_of_the_fastest
from tests.fused.networks import settled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Store:
    """An empty store for each test, and nothing measured before or after it."""
    monkeypatch.setenv("FASTNETS_CACHE_DIR", str(tmp_path / "choices"))
    dispatch.forget_measurements()
    yield Store()
    dispatch.forget_measurements()


class Net(nn.Module):
    """Three fused layers of two shapes, and a linear one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(torch.relu(self.bn3(self.conv3(x))).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    return settled(Net())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 16, 32, 32)


def shapes(found: selection.Selection) -> list[str]:
    return [layer.shape for layer in found.layers]


def test_each_distinct_layer_is_measured_once(net, x, store):
    fast = fastnets.optimize(net)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    found = select(net, fast, (x,))
    assert shapes(found) == [
        "4×16×32×32 16×16×3×3 1×1 1×1 1 relu False",
        "4×16×32×32 32×16×1×1 1×1 1×1 1 relu False",
    ]
    assert [layer.calls for layer in found.layers] == [2, 1]
    for layer in found.layers:
        assert layer.source == "measured"
        assert set(layer.seconds) == {"reference", "library"}
        assert 0.5 <= layer.confidence <= 1
    assert found.ratio is not None
    stored = {choice[:3]: choice for choice in store.read(device_name("cpu"))}
    assert [stored[layer.key].backend for layer in found.layers] == [layer.backend for layer in found.layers]
    assert any(op == "network" for op, *_ in stored)
    assert "distinct layers" in str(found)
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_what_the_store_knows_is_not_measured_again(net, x, monkeypatch):
    fast = fastnets.optimize(net)
    first = select(net, fast, (x,))
    dispatch.forget_measurements()
    monkeypatch.setattr(selection, "measure", lambda *_, **__: pytest.fail("measured again"))
    second = select(net, fast, (x,))
    assert [layer.source for layer in second.layers] == ["stored", "stored"]
    assert [layer.backend for layer in second.layers] == [layer.backend for layer in first.layers]
    assert second.keeps_stock == first.keeps_stock
    assert second.ratio.value == pytest.approx(first.ratio.value)


def slowed(prepare, seconds: float):
    """A vendor's call that takes ``seconds`` more."""

    def slow(*arguments):
        run = prepare(*arguments)

        def call(*tensors, **options):
            time.sleep(seconds)
            return run(*tensors, **options)

        return call

    return slow


def test_a_candidate_made_ten_times_slower_is_never_chosen(net, x, monkeypatch):
    monkeypatch.setattr(onednn, "prepare_convolution", slowed(onednn.prepare_convolution, 5e-3))
    fast = fastnets.optimize(net)
    found = select(net, fast, (x,))
    assert [layer.backend for layer in found.layers] == ["reference", "reference"]
    assert all(layer.seconds["library"] > 4e-3 for layer in found.layers)
    assert all(layer.confidence > 0.99 for layer in found.layers)
    # and the network runs what was chosen
    called = []
    monkeypatch.setattr(onednn, "prepare_convolution", lambda *_: called.append("library"))
    with torch.inference_mode():
        fast(x)
    assert not called


def test_a_candidate_that_is_wrong_is_refused_with_a_message(net, x, monkeypatch):
    prepare = onednn.prepare_convolution

    def wrong(*arguments):
        run = prepare(*arguments)
        return lambda *tensors, **options: run(*tensors, **options) * 1.001

    monkeypatch.setattr(onednn, "prepare_convolution", wrong)
    with pytest.warns(UserWarning, match=r"conv_bn_act float32 4×16.*: library is refused: .* as far"):
        found = select(net, fastnets.optimize(net), (x,))
    assert [layer.backend for layer in found.layers] == ["reference", "reference"]
    assert all("library" in layer.refused for layer in found.layers)
    assert all("library" not in layer.seconds for layer in found.layers)


def test_stock_is_kept_where_fused_is_not_faster(net, x, monkeypatch):
    """The layers are fine one by one; it is the rewritten network that is slow."""
    rewrite = fastnets.optimize

    class Slow(nn.Module):
        def __init__(self, fast):
            super().__init__()
            self.fast = fast

        def forward(self, x):
            time.sleep(0.02)
            return self.fast(x)

    found = select(net, Slow(rewrite(net)).eval(), (x,))
    assert found.keeps_stock
    assert found.ratio.high < 1
    assert "stock is kept" in found.verdict


def test_optimize_returns_the_stock_network_and_says_so(net, x, monkeypatch):
    verdict = selection.Selection("cpu", keeps_stock=True, reason="fused is not clearly faster")
    monkeypatch.setattr(selection, "select", lambda *_, **__: verdict)
    with pytest.warns(UserWarning, match="stock is kept: fused is not clearly faster"):
        kept = fastnets.optimize(net, x, select="measure")
    assert type(kept) is Net
    assert kept is not net
    with pytest.warns(UserWarning, match="stock is kept"):
        assert fastnets.optimize(net, x, select="measure", inplace=True) is net
    assert type(net) is Net


def test_optimize_by_measurement(net, x, monkeypatch):
    monkeypatch.setattr(
        selection, "is_clear", lambda comparison: len(comparison.samples["stock"].times) > 2
        if "stock" in comparison.samples else is_clear(comparison)
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whichever wins on this machine
        fast = fastnets.optimize(net, (x,), select="measure")
    assert fastnets.check(net, fast, x).ok
    assert len(Store().read(device_name("cpu"))) == 3


def test_what_was_measured_serves_near_batches_of_its_own_shapes(net, x):
    dispatch.adopt(
        CPU, {("conv_bn_act", "float32", "4×16×32×32 16×16×3×3 1×1 1×1 1 relu False"): "reference"}
    )
    args = (net.conv1, net.bn1, None, "relu")
    with torch.no_grad():
        assert implementation_of(*args, x) == "reference"
        assert implementation_of(*args, x[:3]) == "reference"
        assert implementation_of(*args, torch.empty(4, 16, 30, 30, device="meta")) == "reference"
        assert implementation_of(*args, x[:2]) == "onednn"
        assert implementation_of(net.conv3, net.bn3, None, "relu", x) == "onednn"
        # what was asked for by name, or by heuristic alone, is not overruled
        assert implementation_of(*args, x, "library") == "onednn"
        assert implementation_of(*args, x, dispatch.UNMEASURED) == "onednn"
        assert implementation_of(*args, x, dispatch.UNFOLDED) == "reference"
    report = fastnets.explain(fastnets.optimize(net, x))
    chosen = {row.path: row.implementation for row in report.rows if row.path.startswith("conv")}
    assert chosen == {"conv1": "reference", "conv2": "reference", "conv3": "onednn"}
    shipped = fastnets.explain(fastnets.optimize(net, x, select="shipped"))
    assert {row.implementation for row in shipped.rows if row.path.startswith("conv")} == {"onednn"}


def test_the_store_is_read_when_a_layer_is_first_called(net, x, store):
    shape = "4×16×32×32 16×16×3×3 1×1 1×1 1 relu False"
    store.write(device_name("cpu"), [Choice("conv_bn_act", "float32", shape, "reference", 1.0, {})])
    dispatch.forget_measurements()
    with torch.no_grad():
        assert implementation_of(net.conv1, net.bn1, None, "relu", x) == "reference"


def test_a_choice_nobody_offers_is_not_run(net, x):
    dispatch.adopt(CPU, {("conv_bn_act", "float32", "4×16×32×32 16×16×3×3 1×1 1×1 1 relu False"): "magic"})
    with torch.no_grad():
        assert implementation_of(net.conv1, net.bn1, None, "relu", x) == "onednn"


def test_a_prepared_call_gives_way_to_another_choice(net, x, monkeypatch):
    fast = fastnets.optimize(net)
    with torch.inference_mode():
        fast(x)  # prepares oneDNN's calls
        dispatch.adopt(
            CPU, {("conv_bn_act", "float32", "4×16×32×32 16×16×3×3 1×1 1×1 1 relu False"): "reference"}
        )
        seen = []
        monkeypatch.setattr("fastnets.fused.conv._reference", lambda *a: seen.append(1) or a[0])
        fast(x)
    assert len(seen) == 2


def test_large_batches_are_measured_in_the_parts_they_run_in():
    net = settled(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()))
    x = torch.randn(24, 3, 96, 96)  # 54 MiB of output
    selector = selection._Selector(net, fastnets.optimize(net), (x,), CPU, 5.0, True, lambda *_: None)
    (part,) = selector._as_run()
    assert len(part) == 8


def test_ctrl_c_keeps_what_was_measured(net, x, store):
    def tell(phase, what, step, steps):
        if phase == "layers" and step == 1:
            raise KeyboardInterrupt

    found = select(net, fastnets.optimize(net), (x,), tell=tell)
    assert found.interrupted
    assert [layer.source for layer in found.layers] == ["measured", "not measured"]
    assert len(store.read(device_name("cpu"))) == 1


def test_a_spent_budget_leaves_the_heuristic(net, x):
    found = select(net, fastnets.optimize(net), (x,), budget=1e-6)
    assert [layer.source for layer in found.layers] == ["not measured", "not measured"]
    assert [layer.backend for layer in found.layers] == ["auto", "auto"]
    assert found.ratio is not None  # the promise about the whole network is kept all the same


@pytest.mark.parametrize("budget", [0, -1.0])
def test_a_budget_of_nothing_is_refused(net, x, budget):
    with pytest.raises(ValueError, match="nothing can be measured in no time"):
        select(net, fastnets.optimize(net), (x,), budget=budget)


def test_what_stock_refuses_is_its_own_error(net):
    wrong = torch.randn(1, 5, 8, 8)
    with pytest.raises(RuntimeError) as expected:
        net(wrong)
    with pytest.raises(RuntimeError) as raised:
        fastnets.optimize(net, wrong, select="measure")
    assert str(raised.value) == str(expected.value)
    with pytest.raises(ValueError, match="needs example_inputs"):
        fastnets.optimize(net, select="measure")


def test_training_is_judged_as_a_whole_and_changes_nothing(net, x):
    net.train()
    before = copy.deepcopy(net.state_dict())
    found = select(net, fastnets.optimize(net), (x,))
    assert found.layers == []
    assert found.ratio is not None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# --- the rule -----------------------------------------------------------------------------------------------


def comparison(**times: list[float]) -> Comparison:
    samples = {name: Samples(name, list(range(len(t))), t, t) for name, t in times.items()}
    return Comparison(samples, "cpu", 1)


ORDER = ("reference", "library", "triton")


def test_the_clearly_fastest_wins():
    clear = comparison(
        reference=[1.5, 1.6, 1.5, 1.6, 1.5], library=[1.3] * 5, triton=[1.0, 1.1, 1.0, 1.0, 1.1]
    )
    assert is_clear(clear)
    assert simplest_of_the_fastest(clear, ORDER) == "triton"


def test_on_a_tie_the_simpler_one_wins():
    tie = comparison(reference=[1.0, 1.3, 0.9, 1.2, 1.0], library=[0.9, 1.4, 0.8, 1.3, 1.1], triton=[2.0] * 5)
    assert not is_clear(tie)
    assert simplest_of_the_fastest(tie, ORDER) == "reference"
    close = comparison(reference=[1.001, 1.002, 1.001, 1.002, 1.001], library=[1.0] * 5)
    assert is_clear(close)  # to be within two per cent is known


def test_one_that_failed_is_not_chosen():
    half = comparison(reference=[], library=[1.0] * 5, triton=[1.0] * 5)
    assert simplest_of_the_fastest(half, ORDER) == "library"
    assert is_clear(comparison(reference=[1.0] * 5, library=[]))


def test_a_look_up_costs_a_microsecond():
    """An upper bound that also holds on a busy machine; `python -m fastnets.bench.host_cost` measures."""
    x, weight = torch.empty(4, 16, 32, 32), torch.empty(16, 16, 3, 3)

    def cost() -> float:
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                dispatch.preferred("conv_bn_act", "auto", x, weight.shape, (1, 1), (1, 1), 1, "relu", False)
            best = min(best, (time.perf_counter() - start) / 200)
        return best

    empty = cost()
    dispatch.adopt(CPU, {("other", "float32", ""): "library"})
    assert (
        dispatch.preferred("conv_bn_act", "auto", x, weight.shape, (1, 1), (1, 1), 1, "relu", False) == "auto"
    )
    print(f"nothing measured {empty * 1e6:.2f} µs, measured {cost() * 1e6:.2f} µs")
    assert empty < 2e-6
    assert cost() < 8e-6
