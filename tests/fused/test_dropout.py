"""Dropout and stochastic depth as ops and modules: gradients, seeds, statistics, registration, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastnets import fused
from fastnets.fused import dispatch
from fastnets.fused.dropout import dropout, philox, stochastic_depth
from tests.accuracy import assert_exact

SEED = torch.tensor([42], dtype=torch.int64)


def test_philox_is_the_published_one():
    # The known answer of Random123 for philox4x32-10, counter and key zero.
    zeros = philox(torch.tensor([0]), torch.tensor([0]))
    assert [f"{int(w):08x}" for w in zeros[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("mode", ["element", "row", "batch"])
def test_gradient_formula(mode):
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def call(t, r):
        if mode == "element":
            return dropout(t, 0.4, residual=r, seed=SEED)
        return stochastic_depth(t, 0.4, mode, residual=r, seed=SEED)

    assert torch.autograd.gradcheck(call, (x, residual))


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("mode", ["element", "row", "batch"])
def test_triton_and_reference_agree(lane, mode):
    results = []
    x = torch.randn(6, 5, 9).bfloat16().transpose(1, 2)
    residual, dy = torch.randn(6, 9, 5).bfloat16(), torch.randn(6, 1, 1).bfloat16()
    for backend in ("triton", "reference"):
        t, r = lane.put(x).detach().requires_grad_(), lane.put(residual).detach().requires_grad_()
        options = {"residual": r, "seed": lane.put(SEED), "backend": backend}
        with lane:
            y = dropout(t, 0.4, **options) if mode == "element" else stochastic_depth(t, 0.4, mode, **options)
            y.backward(lane.put(dy).expand(y.shape))
        results.append((y.detach(), t.grad, r.grad))
    for ours, reference in zip(*results):
        assert_exact(reference.cpu(), ours)


@pytest.mark.parametrize("mode", ["element", "row"])
def test_ops_are_registered_as_pytorch_asks(mode):
    x = torch.randn(4, 6)
    ops = torch.ops.fastnets
    torch.library.opcheck(ops.dropout.default, (x.clone().requires_grad_(), x, SEED, 0.4, mode, "auto"))
    torch.library.opcheck(ops.dropout_inference.default, (x, None, SEED, 0.4, mode, "auto"))
    torch.library.opcheck(ops.dropout_backward.default, (x, SEED, 0.4, mode, [1, 4], "auto"))


def test_only_the_seed_is_saved():
    x = torch.randn(100, 10, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.5, residual=x)
        stochastic_depth(x, 0.5, "row")
    assert [(t.numel(), t.dtype) for t in saved] == [(1, torch.int64)] * 2


def test_generator_checkpoint_and_new_masks():
    module, x = fused.Dropout(0.5), torch.ones(50, 20, requires_grad=True)
    torch.manual_seed(5)
    first, second = module(x), module(x)
    torch.manual_seed(5)
    assert_exact(first.detach(), module(x).detach())
    assert not torch.equal(first, second)
    y = checkpoint(module, x, use_reentrant=False)
    y.sum().backward()
    assert_exact(y.detach(), x.grad)


def test_mean_and_variance_are_those_of_stock():
    x = torch.ones(200_000)
    for p in (0.1, 0.5):
        y = dropout(x, p)
        assert abs(float(y.mean()) - 1) < 5 * (p / (1 - p) / len(x)) ** 0.5
    y = stochastic_depth(torch.ones(20_000, 2), 0.3, "row")
    assert_exact(y[:, 0], y[:, 1])
    assert abs(float(y.mean()) - 1) < 5 * (0.3 / 0.7 / 20_000) ** 0.5
    y = torch.stack([stochastic_depth(torch.ones(3, 2), 0.5, "batch") for _ in range(200)])
    assert (y.flatten(1) == y[:, :1, 0]).all()
    assert 60 < int((y[:, 0, 0] > 0).sum()) < 140


def test_eval_and_probability_zero_change_nothing():
    x, residual = torch.randn(4, 6), torch.randn(4, 6)
    assert fused.Dropout(0.5).eval()(x) is x
    assert_exact(x + residual, fused.StochasticDepth(0.5, "row").eval()(x, residual))
    assert_exact(x, dropout(x, 0.0))
    assert_exact(torch.zeros(4, 6), dropout(x, 1.0))
    torch.testing.assert_close(dropout(x * torch.nan, 1.0), F.dropout(x * torch.nan, 1.0), equal_nan=True)


def test_rows_of_a_transposed_batch():
    x = torch.ones(5, 8).t()  # the batch lies innermost
    y = stochastic_depth(x, 0.5, "row", seed=SEED)
    assert_exact(y[:, :1].expand(8, 5), y)
    assert 0 < int((y[:, 0] > 0).sum()) < 8


def test_function_transforms():
    x = torch.randn(4, 6)
    grad = torch.func.grad(lambda t: dropout(t, 0.5, seed=SEED).sum())(x)
    assert_exact(dropout(torch.ones(4, 6), 0.5, seed=SEED), grad)


def test_compiled_training():
    x = torch.randn(4, 6, requires_grad=True)
    step = torch.compile(lambda t: dropout(t, 0.5, seed=SEED), fullgraph=True, backend="aot_eager")
    y = step(x)
    y.sum().backward()
    assert_exact(dropout(x, 0.5, seed=SEED).detach(), y.detach())
    assert_exact(dropout(torch.ones(4, 6), 0.5, seed=SEED), x.grad)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: dropout(x, 1.5), ValueError, "has to be between 0 and 1, but got 1.5"),
        (lambda x: dropout(x.int(), 0.5), TypeError, "floating"),
        (lambda x: dropout(x, 0.5, residual=x[:1]), ValueError, "expand or convert"),
        (lambda x: dropout(x, 0.5, seed=x), ValueError, "seed is"),
        (lambda x: dropout(x.double(), 0.5, backend="triton"), dispatch.UnsupportedByBackend, "float64"),
        (lambda x: stochastic_depth(x, 0.5, "rows"), ValueError, "mode has to be either"),
        (lambda x: fused.StochasticDepth(0.5, "column"), ValueError, "mode has to be either"),
        (lambda x: fused.StochasticDepth(-0.5, "row"), ValueError, "has to be between"),
        (lambda x: fused.Dropout(0.5, inplace=True), ValueError, "inplace=True is not supported"),
        (lambda x: fused.Dropout.from_stock(nn.ReLU()), TypeError, "got ReLU"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))


def test_modules_from_stock():
    ours = fused.Dropout.from_stock(nn.Dropout(0.25).eval())
    assert (ours.p, ours.training) == (0.25, False)
    assert isinstance(ours, nn.Dropout)
    torchvision = pytest.importorskip("torchvision")
    ours = fused.StochasticDepth.from_stock(torchvision.ops.StochasticDepth(0.3, "batch"))
    assert (ours.p, ours.mode, ours.training) == (0.3, "batch", True)
