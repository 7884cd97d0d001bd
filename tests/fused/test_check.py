"""``check``: what it accepts, and that it catches what is wrong."""

import copy

import pytest
import torch
from torch import nn

import fastnets
from tests.fused.networks import Classifier, images, settled

X = (4, 3, 12, 12)


@pytest.fixture
def stock():
    return settled(Classifier())


def test_a_network_and_its_optimized_form(stock):
    report = fastnets.check(stock, fastnets.optimize(stock), images(*X))
    assert report.ok
    assert report
    assert 0 < report.error_ratio <= 2
    assert report.top1_agreement == 1
    assert str(report).startswith("ok")


def test_stock_against_itself(stock):
    assert fastnets.check(stock, stock, images(*X)).error_ratio == pytest.approx(1)
    assert fastnets.check(stock, lambda x: stock(x), (images(*X),)).ok


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y + 1e-4,
        lambda y: y.flip(1),
        lambda y: y.half(),
        lambda y: y[:2],
        lambda y: (y, y),
        lambda y: y.masked_fill(y == y.max(), float("nan")),
        lambda y: None,
    ],
)
def test_wrong_answers_are_found(stock, damage):
    report = fastnets.check(stock, lambda x: damage(stock(x)), images(*X))
    assert not report.ok
    assert not report
    assert report.problems
    assert "NOT OK" in str(report)


def test_top1_counts_clear_rows_only():
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 1.0001, 0.0], [0.0, 0.0, 4.0]])

    class Net(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, x):
            return self.logits + 0 * x

    stock = Net(logits)
    for rows, agreement in (([2], 1.0), ([0], 2 / 3), ([0, 1, 3], 0.0)):
        wrong = logits.clone()
        wrong[rows] = wrong[rows].roll(1, 1)
        report = fastnets.check(stock, Net(wrong), torch.zeros(1))
        assert report.top1_agreement == pytest.approx(agreement)


def test_nests_numbers_and_integers():
    class Net(nn.Module):
        def __init__(self, step=0, word="a"):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.step, self.word = step, word

        def forward(self, x, extra):
            y = self.conv(x) + extra["bias"]
            return {"map": y, "more": (y.argmax(1) + self.step, [self.word, 3])}

    stock = Net()
    inputs = (images(2, 3, 4, 4), {"bias": images(1, 4, 1, 1)})
    report = fastnets.check(stock, fastnets.optimize(stock), inputs)
    assert report.ok
    assert report.top1_agreement is None
    for wrong in (Net(step=1), Net(word="b")):
        wrong.load_state_dict(stock.state_dict())
        assert not fastnets.check(stock, wrong, inputs).ok


def test_another_dtype_is_judged_in_that_dtype(stock):
    fast = fastnets.optimize(stock, dtype=torch.bfloat16)
    report = fastnets.check(stock, fast, images(*X))
    assert report.ok, str(report)
    assert 1e-4 < report.stock_error < 0.1
    assert stock.fc.weight.dtype == torch.float32


def test_training_mode_leaves_statistics_alone():
    stock = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))).train()
    fast = fastnets.optimize(stock)
    before = copy.deepcopy(stock.state_dict())
    # ATen's batch statistics of channels-last maps are a few times less exact than those of contiguous ones.
    assert fastnets.check(stock, fast, images(*X)).error_ratio < 10
    for model in (stock, fast):
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert model.training


def test_inputs_are_not_written_to():
    stock = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))
    x = images(1, 3, 4, 4)
    kept = x.clone()
    assert fastnets.check(stock, fastnets.optimize(stock), x).ok
    assert torch.equal(x, kept)


def test_infinite_outputs_that_agree_are_fine():
    stock = nn.Sequential(nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        stock[0].weight[0] = float("inf")
    assert fastnets.check(stock, fastnets.optimize(stock), images(1, 3, 4, 4)).ok


def test_the_state_of_the_random_numbers_is_kept(stock):
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    fastnets.check(stock, stock, images(*X))
    assert torch.equal(torch.rand(2), expected)


def test_bad_arguments_and_stocks_own_errors(stock):
    with pytest.raises(TypeError, match="stock"):
        fastnets.check(None, stock, images(*X))
    with pytest.raises(TypeError, match="fast"):
        fastnets.check(stock, 3, images(*X))
    with pytest.raises(RuntimeError) as ours:
        fastnets.check(stock, stock, images(1, 5, 12, 12))
    with pytest.raises(RuntimeError) as own:
        stock(images(1, 5, 12, 12))
    assert str(ours.value) == str(own.value)


def test_a_float64_network_is_allowed_its_roundings():
    """Stock in float64 is the reference itself: nothing could be within twice an error of nought."""
    stock = settled(Classifier()).double()
    report = fastnets.check(stock, fastnets.optimize(stock), images(2, 3, 12, 12).double())
    assert report.ok, str(report)
    assert report.stock_error == 0
    wrong = copy.deepcopy(stock)
    with torch.no_grad():
        wrong.fc.bias += 1e-12
    assert not fastnets.check(stock, wrong, images(2, 3, 12, 12)).ok
