"""Cross-entropy and distillation as ops: gradients, registration, autocast, stock's errors, modules."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets import fused
from fastnets.fused import dispatch
from fastnets.fused.cross_entropy import cross_entropy, distillation_loss
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.test_cross_entropy import assert_loss, rows, stock_both
from tests.lanes import LANES

REDUCTIONS = ("mean", "sum", "none")


def both(function, x, *arguments, dloss, **options):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *arguments, **options)
    loss.backward(dloss.to(loss.dtype))
    return loss.detach(), x.grad


def dloss_for(reduction, target):
    return torch.randn(target.shape) if reduction == "none" else torch.tensor(1.7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 3, 2)], ids=str)
def test_gradient_formula(shape, reduction):
    x, target = rows(shape, torch.float64)
    x.requires_grad_()
    target.view(-1)[1] = -100
    weight, teacher = torch.rand(shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    options = {"reduction": reduction, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda t: cross_entropy(t, target, weight, **options), x)
    options["label_smoothing"] = 0.2
    assert torch.autograd.gradcheck(lambda t: cross_entropy(t, target, weight, **options), x)
    assert torch.autograd.gradcheck(lambda t: distillation_loss(t, teacher, target, weight, **options), x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_is_stock(reduction):
    x, target = rows((9, 13))
    target[3] = 4
    dloss = dloss_for(reduction, target)
    options = {"ignore_index": 4, "reduction": reduction, "label_smoothing": 0.1}
    loss, dx = both(cross_entropy, x, target, torch.rand(13), dloss=dloss, backend="reference", **options)
    torch.manual_seed(0)
    rows((9, 13))
    dloss_for(reduction, target)
    expected, expected_dx = both(F.cross_entropy, x, target, torch.rand(13), dloss=dloss, **options)
    assert_exact(expected, loss)
    torch.testing.assert_close(dx, expected_dx)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_triton_serves_the_op(lane, reduction):
    x, target = rows((6, 40), torch.bfloat16)
    teacher, dloss = torch.randn(6, 40).bfloat16(), dloss_for(reduction, target)
    options = {"reduction": reduction, "alpha": 0.6, "temperature": 3.0, "label_smoothing": 0.1}
    reference = stock_both(x.double(), target, None, dloss, teacher=teacher, **options)
    stock = stock_both(x, target, None, dloss, teacher=teacher, **options)
    with lane:
        loss, dx = both(
            distillation_loss,
            *map(lane.put, (x, teacher, target)),
            dloss=lane.put(dloss),
            backend="triton",
            **options,
        )
    assert_loss(reference[0], stock[0], loss)
    assert_close_to(reference[1], stock[1], dx, ratio=3.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_makes_the_loss_wide_and_leaves_the_gradient_narrow(backend):
    x, target = rows((6, 10), torch.bfloat16)
    weight = torch.rand(10)

    def fused_loss(t):
        return cross_entropy(t, target, weight, backend=backend)

    reference = both(F.cross_entropy, x.double(), target, weight.double(), dloss=torch.tensor(1.0))
    with LANES["interpreter"], torch.autocast("cpu", torch.bfloat16):
        loss, dx = both(fused_loss, x, dloss=torch.tensor(1.0))
        stock, stock_dx = both(F.cross_entropy, x, target, weight, dloss=torch.tensor(1.0))
        with torch.no_grad():
            assert fused_loss(x).dtype == torch.float32
    assert loss.dtype == stock.dtype == torch.float32
    assert dx.dtype == torch.bfloat16
    assert abs(loss - reference[0]) <= 1e-6 * reference[0]
    assert_close_to(reference[1], stock_dx, dx, ratio=3.0)


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_ops_are_registered_as_pytorch_asks(reduction):
    x, target = rows((4, 6))
    weight, teacher, leaf = torch.rand(6), torch.randn(4, 6), x.clone().requires_grad_()
    options = (-100, reduction, 0.1, 0.7, 4.0, False, "auto")
    ops = torch.ops.fastnets
    torch.library.opcheck(ops.cross_entropy.default, (leaf, target, weight, teacher, *options))
    for name in ("cross_entropy_inference", "cross_entropy_with_gradient"):
        torch.library.opcheck(getattr(ops, name).default, (x, target, weight, teacher, *options))
    loss, gradient, divisor = ops.cross_entropy_with_gradient(x, target, weight, teacher, *options)
    torch.library.opcheck(ops.cross_entropy_backward.default, (loss, gradient, divisor, "auto"))


def test_only_the_gradient_is_kept_and_the_graph_may_be():
    x, target = rows((8, 10))
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = cross_entropy(x, target, backend="reference")
    assert sorted(t.numel() for t in saved) == [1, 80]
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, torch.tensor(3.0))[0]
    torch.testing.assert_close(second, 3 * first)


def test_a_second_derivative_is_refused():
    x, target = rows((8, 10))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(cross_entropy(x, target, backend="reference"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (dx.square().sum() + x.square().sum()).backward()


X, T = torch.randn(3, 5), torch.tensor([1, 2, 3])


@pytest.mark.parametrize("backend", ["auto", "reference", "interpreted"])
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda **k: cross_entropy(X, torch.tensor([0, 5, 1]), **k), IndexError, "Target 5 is out of bounds"),
        (lambda **k: cross_entropy(X, torch.tensor([0, -7, 1]), **k), IndexError, "Target -7 is out of"),
        (lambda **k: cross_entropy(X, T[:2], **k), ValueError, r"batch_size \(3\) to match"),
        (lambda **k: cross_entropy(X, T.int(), **k), RuntimeError, "expected target dtype"),
        (lambda **k: cross_entropy(X, T, torch.rand(4), **k), RuntimeError, "weight tensor should be"),
        (lambda **k: cross_entropy(X.half(), T, torch.rand(5), **k), RuntimeError, "expected scalar type"),
        (lambda **k: cross_entropy(X, T, reduction="avg", **k), ValueError, "avg is not a valid value"),
        (lambda **k: cross_entropy(X, T, label_smoothing=1.5, **k), RuntimeError, "label_smoothing must"),
        (lambda **k: distillation_loss(X, X[:2], T, **k), ValueError, "must agree in shape"),
        (lambda **k: distillation_loss(X, X, T.int(), **k), ValueError, "class indices"),
        (lambda **k: distillation_loss(X, X, T, temperature=0.0, **k), ValueError, "must be positive"),
        (lambda **k: distillation_loss(X, X, T, alpha=1.1, **k), ValueError, "between 0 and 1"),
        (lambda **k: distillation_loss(X, X, torch.tensor([9, 1, 1]), **k), IndexError, "Target 9 is out"),
    ],
)
def test_errors_are_those_of_stock(call, error, message, backend):
    lane = LANES["interpreter"] if backend == "interpreted" else contextlib.nullcontext()
    with lane, pytest.raises(error, match=message):
        call(backend="triton" if backend == "interpreted" else backend)


def test_a_backend_that_cannot_serve_says_so():
    with pytest.raises(dispatch.UnsupportedByBackend, match="takes no logits of"):
        cross_entropy(X.double(), T, backend="triton")


def test_what_only_stock_takes():
    probabilities = torch.softmax(torch.randn(3, 5), 1)
    for target, x in ((probabilities, X), (T[0], X[0]), (T.byte(), X)):
        assert_exact(F.cross_entropy(x, target), cross_entropy(x, target, backend="reference"))


def test_nothing_flows_into_the_teacher():
    student, teacher = X.clone().requires_grad_(), X.clone().requires_grad_()
    distillation_loss(student, teacher, T).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_modules(backend):
    weight = torch.rand(5)
    stock = nn.CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.1)
    ours = fused.CrossEntropyLoss.from_stock(stock, backend=backend)
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert_exact(stock(X, T), ours(X, T))
    ours = fused.CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.1, backend=backend)
    assert_exact(stock(X, T), ours(X, T))
    with pytest.raises(TypeError, match="got MSELoss"):
        fused.CrossEntropyLoss.from_stock(nn.MSELoss())
    distil = fused.DistillationLoss(0.5, 2.0, backend=backend)
    teacher = torch.randn(3, 5)
    kl = F.kl_div(
        F.log_softmax(X / 2, 1), F.log_softmax(teacher / 2, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(distil(X, teacher, T), 0.5 * 4 * kl + 0.5 * F.cross_entropy(X, T))


def test_compiled_training():
    x, ours = X.clone().requires_grad_(), X.clone().requires_grad_()
    F.cross_entropy(x, T).backward()
    loss = fused.CrossEntropyLoss(backend="reference")
    torch.compile(loss, fullgraph=True, backend="aot_eager")(ours, T).backward()
    torch.testing.assert_close(ours.grad, x.grad)
