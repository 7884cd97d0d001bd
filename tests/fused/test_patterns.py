"""What fuses, what does not, and that both compute what stock computes."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from tests.fused.networks import (
    PATTERNS,
    Composed,
    Residual,
    assert_same_answers,
    graphs,
    images,
    kinds,
    settled,
)


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name):
    step, expected = PATTERNS[name]
    stock = settled(Composed(step, pair="sequential" in name))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == expected
    for x in (images(2, 8, 7, 5), images(2, 8, 7, 5).to(memory_format=torch.channels_last)):
        assert_same_answers(stock, fast, x)


@pytest.mark.parametrize("name", PATTERNS)
def test_training_step_equals_stock(name):
    """Outputs, gradients, statistics and dropout's noise are stock's."""
    stock = settled(Composed(PATTERNS[name][0], pair="sequential" in name)).train()
    fast = fastnets.optimize(stock)
    results = []
    for model in (stock, fast):
        x = images(2, 8, 6, 6).requires_grad_()
        torch.manual_seed(3)
        y = model(x * 1.0)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for s, f in zip(*results):
        assert (s is None) == (f is None)
        if s is not None:
            torch.testing.assert_close(f, s, rtol=1e-4, atol=3e-4)


def test_evaluation_gradients_equal_stock():
    stock = settled(Residual(shortcut=True))
    fast = fastnets.optimize(stock)
    for model in (stock, fast):
        model(images(2, 8, 6, 6)).square().sum().backward()
    for (name, s), f in zip(stock.named_parameters(), fast.parameters()):
        torch.testing.assert_close(f.grad, s.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_block_fuses_whole(shortcut):
    stock = settled(Residual(shortcut=shortcut))
    fast = fastnets.optimize(stock)
    expected = (
        ["conv+bn", "conv+bn+add+relu", "conv+bn+relu"] if shortcut else ["conv+bn+add+relu", "conv+bn+relu"]
    )
    assert kinds(fast) == expected
    assert_same_answers(stock, fast, images(2, 8, 9, 9))


# --- in-place operations that stock shows to others ---------------------------------------------------------


def _written_input(m, x):
    y = m.bn(m.conv(x))
    x += y  # the caller sees this
    return m.relu(x)


def _written_residual_read_later(m, x):
    r = m.conv2(x)
    y = m.bn(m.conv(x))
    r += y
    return m.relu(r) * 2 + r


def _conv_input_overwritten(m, x):
    x = x * 1.0
    y = m.conv(x)
    x.relu_()
    return m.bn(y) + x


def _conv_input_overwritten_by_module(m, x):
    x = x * 1.0
    y = m.conv(x)
    m.relu(x)
    return m.silu(m.bn(y))


def _residual_overwritten_after_the_add(m, x):
    r = m.conv2(x)
    y = m.bn(m.conv(x)) + r
    r.mul_(0.0)
    return m.relu(y) + r


def _view_of_residual_written(m, x):
    r = m.conv2(x)
    v = r.flatten(1)
    r += m.bn(m.conv(x))
    return m.relu(r).flatten(1) + v


def _bn_output_written_by_relu(m, x):
    y = m.bn(m.conv(x))
    z = m.relu(y)  # in place: y is z
    return y + z


def _setitem(m, x):
    y = m.conv(x)
    x = x * 1.0
    z = m.conv2(x)
    x[:, 0] = 0
    return m.bn(z) + y + x


IN_PLACE = [
    (_written_input, ["conv+bn"]),
    (_written_residual_read_later, None),
    (_conv_input_overwritten, None),
    (_conv_input_overwritten_by_module, None),
    (_residual_overwritten_after_the_add, None),
    (_view_of_residual_written, None),
    (_bn_output_written_by_relu, ["conv+bn"]),
    (_setitem, None),
]


@pytest.mark.parametrize("step, expected", IN_PLACE, ids=lambda value: getattr(value, "__name__", ""))
def test_in_place_semantics_are_kept(step, expected):
    stock = settled(Composed(step))
    fast = fastnets.optimize(stock)
    if expected is not None:
        assert kinds(fast) == expected
    assert_same_answers(stock, fast, images(2, 8, 6, 6))


def test_private_residual_written_in_place_is_fused():
    def step(m, x):
        r = m.conv2(x)
        y = m.bn(m.conv(x))
        r += y
        return m.relu(r)

    stock = settled(Composed(step))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == ["conv", "conv+bn+add+relu"]
    assert_same_answers(stock, fast, images(2, 8, 6, 6))


def test_no_addition_or_activation_is_left_in_a_fused_block():
    fast = fastnets.optimize(settled(Residual(shortcut=True)))
    lines = graphs(fast)
    assert "call_conv_bn_act" in lines
    assert " + " not in lines
    assert "self.relu(" not in lines


# --- what must not be taken for a stock layer ---------------------------------------------------------------


class _DoublingConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class _QuietConv(nn.Conv2d):
    """A subclass without a forward of its own."""


class _ShiftedBN(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "conv, bn, expected",
    [
        (_DoublingConv, nn.BatchNorm2d, ["bn+relu"]),
        (nn.Conv2d, _ShiftedBN, ["conv"]),
        (lambda *a: nn.Conv2d(*a, padding_mode="reflect", padding=1), nn.BatchNorm2d, ["conv+bn+relu"]),
        (lambda *a: nn.Conv2d(*a, padding="same"), nn.BatchNorm2d, ["conv+bn+relu"]),
        (nn.Conv2d, lambda c: nn.BatchNorm2d(c, track_running_stats=False), ["conv+bn+relu"]),
        (nn.Conv2d, lambda c: nn.BatchNorm2d(c, affine=False), ["conv+bn+relu"]),
        (nn.Conv2d, lambda c: nn.InstanceNorm2d(c), ["conv", "instance norm+relu"]),
    ],
)
def test_layers_by_exact_kind(conv, bn, expected):
    stock = settled(nn.Sequential(conv(4, 6, 3), bn(6), nn.ReLU()))
    fast = fastnets.optimize(stock)
    assert kinds(fast) == expected
    assert_same_answers(stock, fast, images(2, 4, 8, 8))


def test_subclass_without_own_forward_runs_as_stock():
    stock = settled(nn.Sequential(_QuietConv(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    assert_same_answers(stock, fastnets.optimize(stock), images(2, 4, 8, 8))


def test_conv1d_and_conv3d_are_left():
    stock = settled(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()))
    assert_same_answers(stock, fastnets.optimize(stock), images(2, 4, 8))
    stock = settled(nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU()))
    assert_same_answers(stock, fastnets.optimize(stock), images(2, 4, 5, 5, 5))


def test_unbatched_and_odd_inputs_behave_as_stock():
    stock = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))
    fast = fastnets.optimize(stock)
    assert_same_answers(stock, fast, images(4, 8, 8))
    assert_same_answers(stock, fast, images(0, 4, 8, 8))
    for wrong in (images(2, 5, 8, 8), images(2, 4, 1, 1), images(3)):
        with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
            fast(wrong)


def test_broadcast_and_promoted_residuals():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x, r):
            return torch.relu(self.conv(x) + r)

    stock = settled(Net())
    fast = fastnets.optimize(stock)
    for r in (images(2, 4, 1, 1), images(4, 1, 1), images(1, 4, 6, 6), images(3, 2, 4, 6, 6)):
        assert_same_answers(stock, fast, images(2, 4, 6, 6), r)
    x, r = images(2, 4, 6, 6), images(2, 4, 6, 6).double()
    assert fast(x, r).dtype == torch.float64
    torch.testing.assert_close(fast(x, r), stock(x, r), check_stride=False)


def test_in_place_add_keeps_the_dtype_of_what_it_writes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x, r):
            y = self.conv(x)
            y += r
            return y

    stock = settled(Net())
    fast = fastnets.optimize(stock)
    x, r = images(2, 4, 6, 6), images(2, 4, 6, 6).double()
    assert stock(x, r).dtype == torch.float32
    assert fast(x, r).dtype == torch.float32


def test_functions_on_numbers_are_not_additions():
    def step(m, x):
        return m.relu(m.bn(m.conv(x)) + operator.add(1, 2))

    stock = settled(Composed(step))
    assert_same_answers(stock, fastnets.optimize(stock), images(2, 8, 6, 6))


def test_nan_and_infinite_weights_are_computed():
    stock = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        stock[0].weight[0, 0, 0, 0] = float("nan")
        stock[1].weight[1] = float("inf")
    fast = fastnets.optimize(stock)
    with torch.no_grad():
        s, f = stock(images(1, 3, 6, 6)), fast(images(1, 3, 6, 6))
    assert torch.isnan(f[:, 0]).all()
    torch.testing.assert_close(f[:, 2:], s[:, 2:], check_stride=False)
    assert torch.equal(torch.isnan(f), torch.isnan(s))


def test_same_module_under_two_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = self.a
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.bn(self.b(F.relu(self.bn(self.a(x))))))

    stock = settled(Net())
    fast = fastnets.optimize(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert fast.a is fast.b
    assert graphs(fast).count("call_conv_bn_act(") == 2
    assert_same_answers(stock, fast, images(2, 4, 6, 6))
    assert copy.deepcopy(fast).a is not fast.a


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 6), lambda: nn.InstanceNorm2d(6, affine=True)])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU()], ids=["relu", "silu"])
def test_group_norms_take_their_activation(norm, act):
    stock = settled(nn.Sequential(nn.Conv2d(4, 6, 3), norm(), act, nn.MaxPool2d(2)))
    fast = fastnets.optimize(stock)
    assert "call_group_norm_act" in graphs(fast)
    assert "call_pool2d" in graphs(fast)
    for backend in ("auto", "reference"):
        with fastnets.backend(backend):
            assert_same_answers(stock, fast, images(2, 4, 9, 9))
            stock.train(), fast.train()
            results = []
            for model in (stock, fast):
                model.zero_grad()
                model(images(2, 4, 9, 9)).square().sum().backward()
                results.append([p.grad for p in model.parameters()])
            for s, f in zip(*results):
                torch.testing.assert_close(f, s, rtol=1e-3, atol=1e-3)
            stock.eval(), fast.eval()
