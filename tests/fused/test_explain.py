"""``explain``: rows, reasons and shares."""

import copy

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused import dispatch
from fastnets.fused.saved import SavedBytes
from fastnets.kernels.device import assume_device
from tests.fused.networks import Classifier, Residual, images, settled


def _rows(model, *args):
    return {row.path: row for row in fastnets.explain(model, *args).rows}


def test_rows_of_a_network():
    fast = fastnets.optimize(settled(Classifier()))
    rows = _rows(fast)
    assert {path: row.kind for path, row in rows.items()} == {
        "stem.0": "conv+bn+relu",
        "layer1.0.conv1": "conv+bn+relu",
        "layer1.0.conv2": "conv+bn+add+relu",
        "layer1.1.conv1": "conv+bn+relu",
        "layer1.1.conv2": "conv+bn",
        "layer1.1.shortcut.0": "conv+bn+add+relu",
        "pool": "pool",
        "fc": "linear",
    }
    assert all(row.fused for row in rows.values())
    assert rows["pool"].implementation == "stock"  # on the CPU
    assert all(row.implementation not in ("", "stock") for row in rows.values() if "conv" in row.kind)


def test_coverage_with_and_without_shapes():
    stock = settled(Classifier())
    without = fastnets.explain(fastnets.optimize(stock))
    assert without.coverage == without.coverage_by["layers"] == 1
    assert "flops" not in without.coverage_by
    assert "no FLOPs" in str(without)
    x = images(2, 3, 12, 12)
    given = fastnets.explain(fastnets.optimize(stock, filter_fn=lambda m, name: name != "fc"), x)
    whole = fastnets.explain(fastnets.optimize(stock), x)
    assert whole.coverage == 1
    kept = fastnets.explain(fastnets.optimize(stock, x))
    assert whole.coverage_by == kept.coverage_by
    conv_flops = 2 * 2 * 8 * 100 * (27 + 4 * 72 + 8)
    fc_flops = 2 * 2 * 32 * 10
    assert given.coverage == pytest.approx(conv_flops / (conv_flops + fc_flops))
    stem = next(row for row in given.rows if row.path == "stem.0")
    assert stem.flops == 2 * 2 * 8 * 100 * 27
    image, feature_map = 2 * 3 * 144, 2 * 8 * 100
    assert stem.bytes == 4 * (image + feature_map + 8 * 27 + 4 * feature_map)
    assert 0 < given.coverage_by["bytes"] < 1
    fc = next(row for row in given.rows if row.path == "fc")
    assert fc.reason == "kept stock by filter_fn"


def test_the_flop_counter_agrees():
    from torch.utils.flop_counter import FlopCounterMode

    stock = settled(Classifier())
    x = images(2, 3, 12, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(x)
    report = fastnets.explain(fastnets.optimize(stock), x)
    assert sum(row.flops for row in report.rows) == counter.get_total_flops()


def test_a_shared_layer_counts_for_each_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return torch.relu(self.conv(torch.relu(self.conv(x))))

    row = _rows(fastnets.optimize(Net().eval()), images(1, 4, 5, 5))["conv"]
    assert row.flops == 2 * (2 * 25 * 16)


def test_running_explain_changes_nothing():
    calls = []
    fast = fastnets.optimize(settled(Classifier()).train())
    fast.register_forward_hook(lambda *a: calls.append(1))
    before = [b.clone() for b in fast.buffers()]
    flags = [m.training for m in fast.modules()]
    report = fastnets.explain(fast, images(2, 3, 12, 12))
    assert "training mode" in str(report)
    assert calls == []
    assert [m.training for m in fast.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(before, fast.buffers()))
    assert len(fast._forward_hooks) == 1


def test_reasons():
    class OwnConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return nn.functional.conv2d(x, self.unused.weight)

    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) * y

    stock = nn.Sequential(OwnConv(4, 4, 1), Opaque(), Functional(), TwoReaders(), nn.Conv1d(4, 4, 1))
    fast = fastnets.optimize(settled(stock))
    fast[3].conv.register_forward_hook(lambda *a: None)
    rows = _rows(fast)
    assert "forward of its own" in rows["0"].reason
    assert "control flow" in rows["1.inner"].reason
    assert "Opaque" in rows["1.inner"].reason
    assert "does not call it" in rows["2.unused"].reason
    assert "hooks" in rows["3.conv"].reason
    assert not rows["3.conv"].fused
    assert "2 readers" in rows["3.bn"].reason
    assert "no fused form" in rows["4"].reason
    assert all(row.reason for row in rows.values() if not row.fused)


def test_activations_and_layers_of_ones_own_are_rows():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.fft.fft(x).real * self.weight

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()
            self.before, self.after, self.unused = nn.Tanh(), nn.PReLU(), nn.GELU()
            self.own = Doubled()

        def forward(self, x):
            return self.own(self.after(self.relu(self.conv(self.before(x)))))

    stock = Net().eval()
    rows = _rows(fastnets.optimize(stock))
    assert {path: row.reason for path, row in rows.items()} == {
        "conv": "",
        "before": "it follows nothing that it could fuse with",
        "after": "PReLU has no fused form",
        "unused": "its container does not call it as a layer",
        "own": "Doubled has a forward of its own",
    }
    assert rows["conv"].kind == "conv+relu"
    assert fastnets.explain(fastnets.optimize(stock)).coverage == 1  # of what could be fused
    reasons = {path: row.reason for path, row in _rows(stock).items()}
    assert reasons["conv"] == reasons["before"] == "the network is not optimized"


def test_a_hook_on_a_block_shows_the_other_graph():
    fast = fastnets.optimize(settled(Residual(shortcut=True)))
    handle = fast.shortcut.register_forward_hook(lambda *a: None)
    rows = _rows(fast)
    assert rows["conv2"].kind == "conv+bn+add+relu"
    assert rows["shortcut.0"].kind == "conv+bn"
    handle.remove()
    assert _rows(fast)["conv2"].kind == "conv+bn"


def test_a_stock_network():
    report = fastnets.explain(settled(Classifier()))
    assert report.coverage == 0
    assert not any(row.fused for row in report.rows)
    assert "fastnets.optimize" in str(report)


def test_text():
    text = str(fastnets.explain(fastnets.optimize(settled(Classifier())), images(1, 3, 12, 12)))
    assert "layer1.0.conv2" in text
    assert "conv+bn+add+relu" in text
    assert "convolutions fused: 6 of 6" in text
    assert "100.0%" in text


def test_backend_in_force():
    fast = fastnets.optimize(settled(Classifier()), backend="reference")
    rows = [row for row in fastnets.explain(fast).rows if row.fused]
    assert {row.implementation for row in rows if row.kind != "pool"} == {"reference"}


@pytest.mark.parametrize("model", [None, 3, torch.zeros(1)])
def test_something_that_is_no_module(model):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastnets.explain(model)


def test_inputs_that_do_not_fit_are_told():
    report = fastnets.explain(fastnets.optimize(settled(Classifier())), images(1, 7, 12, 12))
    assert "shapes are unknown" in str(report)
    assert report.coverage == 1


def test_what_a_training_step_keeps():
    stock = settled(Classifier()).train()
    x = images(4, 3, 12, 12)
    kept = SavedBytes(stock)
    with kept.watching():
        stock(x)
    report = fastnets.explain(fastnets.optimize(stock), x)
    assert report.saved_bytes["stock"] == kept.total
    assert report.saved_bytes["fused"] > 0
    assert f"by stock {kept.total / 2**20:,.1f} MiB" in str(report)


def test_what_a_training_step_keeps_on_stock_itself():
    stock = settled(Classifier())
    report = fastnets.explain(stock, images(4, 3, 12, 12))
    assert report.saved_bytes["stock"] == report.saved_bytes["fused"] > 0
    assert not stock.training
    assert fastnets.explain(stock.requires_grad_(False), images(4, 3, 12, 12)).saved_bytes == {}


def test_a_step_that_cannot_be_taken_is_said():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = fastnets.explain(stock, images(1, 3, 3, 3))
    assert report.saved_bytes == {}
    assert "what a training step keeps is unknown: its forward raises ValueError" in str(report)
    assert "more than 1 value per channel" in str(report)


def test_layers_that_run_as_one_are_named_after_what_runs_all_of_them():
    """One image of LeNet-5 is stock's functions on the CPU, and on CUDA each is one launch."""
    model = fastnets.create_model("lenet5", fused=False).eval()

    def served(model: nn.Module, N: int, device: str) -> list[str]:
        x = torch.zeros(N, 1, 28, 28, device=device)
        return [row.implementation for row in fastnets.explain(fastnets.optimize(model), (x,)).rows]

    assert served(model, 1, "cpu") == ["stock", "stock", "stock"]
    if torch.backends.mkldnn.is_available():
        assert served(model, 64, "cpu")[0] == "onednn"
    with dispatch.assume_device_type("cuda"), assume_device("h100"):
        assert served(copy.deepcopy(model).to("meta"), 8, "meta") == ["triton"] * 3
