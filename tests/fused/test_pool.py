"""The pooling ops: gradients, registration, stock's errors, modules; and what networks call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnets import fused
from fastnets.fused import dispatch
from fastnets.fused import pool as pools
from tests.accuracy import assert_close_to, assert_exact, integers

# (fused function, stock function, arguments, keywords)
CALLS = {
    "max 3/2": (pools.max_pool2d, F.max_pool2d, (3, 2, 1), {}),
    "max dilated ceil": (pools.max_pool2d, F.max_pool2d, ((3, 2), 2, (1, 0), 2, True), {}),
    "average": (pools.avg_pool2d, F.avg_pool2d, (3, 2, 1, True, False), {}),
    "average divisor": (pools.avg_pool2d, F.avg_pool2d, (2,), {"divisor_override": 3}),
    "global average": (pools.adaptive_avg_pool2d, F.adaptive_avg_pool2d, (1,), {}),
    "adaptive average": (pools.adaptive_avg_pool2d, F.adaptive_avg_pool2d, ((3, None),), {}),
    "adaptive max": (pools.adaptive_max_pool2d, F.adaptive_max_pool2d, ((2, 3),), {}),
}
each_call = pytest.mark.parametrize("name", CALLS)


@each_call
def test_gradient_formula(name):
    function, _, arguments, options = CALLS[name]
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: function(t, *arguments, **options, backend="reference"), x, fast_mode=True
    )


@each_call
@pytest.mark.parametrize("channels_last", [True, False])
def test_reference_is_stock(name, channels_last):
    function, stock, arguments, options = CALLS[name]
    x = torch.randn(2, 3, 7, 6)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = function(ours, *arguments, **options, backend="reference")
    expected = stock(theirs, *arguments, **options)
    assert_exact(expected.detach(), y.detach())
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("name", ["max 3/2", "adaptive average"])
def test_triton_serves_the_op(lane, name):
    function, stock, arguments, options = CALLS[name]
    x = torch.randn(2, 8, 7, 6).bfloat16().to(memory_format=torch.channels_last)
    y64 = stock(leaf64 := x.double().requires_grad_(), *arguments, **options)
    y16 = stock(leaf16 := x.clone().requires_grad_(), *arguments, **options)
    dy = torch.randn(y64.shape[:2] + (1, 1)).bfloat16().expand(y64.shape)
    y64.backward(dy.double())
    y16.backward(dy)
    ours = lane.put(x).requires_grad_()
    with lane:
        y = function(ours, *arguments, **options, backend="triton")
        y.backward(lane.put(dy))
    assert_close_to(y64.detach(), y16.detach(), y)
    assert_close_to(leaf64.grad, leaf16.grad, ours.grad, ratio=3.0)


FIXED, ADAPTIVE = (None, [3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 2], [], [], [], [], False)


@pytest.mark.parametrize("geometry", [FIXED, pytest.param(ADAPTIVE, marks=pytest.mark.slow)])
def test_ops_are_registered_as_pytorch_asks(geometry):
    x = torch.randn(2, 3, 7, 6).to(memory_format=torch.channels_last)
    leaf = x.clone().requires_grad_()
    ops = torch.ops.fastnets
    for t, name in ((leaf, "max_pool2d"), (x, "max_pool2d_inference"), (x, "max_pool2d_with_window")):
        torch.library.opcheck(getattr(ops, name).default, (t, *geometry, "auto"))
    y, window = ops.max_pool2d_with_window(x, *geometry, "auto")
    torch.library.opcheck(ops.max_pool2d_backward.default, (y, window, [7, 6], True, *geometry, "auto"))
    for t, name in ((leaf, "avg_pool2d"), (x, "avg_pool2d_inference")):
        torch.library.opcheck(getattr(ops, name).default, (t, *geometry, True, 0, "auto"))
    torch.library.opcheck(ops.avg_pool2d_backward.default, (y, [7, 6], True, *geometry, False, 0, "auto"))


def test_maximum_saves_one_byte_per_window():
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = pools.max_pool2d(x, 2, backend="reference")
    assert [t.dtype for t in saved] == [torch.uint8]
    assert saved[0].shape == y.shape


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    for function in (pools.max_pool2d, pools.avg_pool2d):
        y = function(x, 2, backend="reference")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            dx.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, **k: pools.max_pool2d(x, 3, padding=2, **k), RuntimeError, "at most half"),
        (lambda x, **k: pools.max_pool2d(x, 9, **k), RuntimeError, "Output size is too small"),
        (lambda x, **k: pools.max_pool2d(x, 2, stride=0, **k), RuntimeError, "stride should not be zero"),
        (lambda x, **k: pools.avg_pool2d(x, 2, divisor_override=0, **k), RuntimeError, "divisor must be not"),
        (lambda x, **k: pools.max_pool2d(x[0, 0], 2, **k), RuntimeError, "3D or 4D"),
        (lambda x, **k: pools.max_pool2d(x[:, :0], 2, **k), RuntimeError, "Expected 3D or 4D"),
        (lambda x, **k: pools.adaptive_avg_pool2d(x, -1, **k), RuntimeError, "output_size"),
    ],
)
def test_errors_are_those_of_stock(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 3, 7, 6), backend=backend)


def test_a_backend_that_cannot_serve_says_so():
    with pytest.raises(dispatch.UnsupportedByBackend, match="does not pool"):
        pools.max_pool2d(torch.randn(1, 1, 4, 4, dtype=torch.float64), 2, backend="triton")
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        pools.avg_pool2d(torch.randn(1, 1, 4, 4), 2, backend="tritn")


def test_single_images_empty_batches_and_empty_windows():
    x = torch.randn(3, 7, 6)
    assert_exact(F.max_pool2d(x, 3, 2), pools.max_pool2d(x, 3, 2, backend="reference"))
    empty = torch.randn(0, 3, 7, 6, requires_grad=True)
    y = pools.max_pool2d(empty, 2, backend="reference")
    y.sum().backward()
    assert y.shape == (0, 3, 3, 3)
    assert empty.grad.shape == empty.shape
    assert pools.adaptive_avg_pool2d(x[None], 0, backend="reference").shape == (1, 3, 0, 0)
    x = integers(1, 3, 7, 6).long()
    assert_exact(F.max_pool2d(x, 2), pools.max_pool2d(x, 2, backend="reference"))


MODULES = [
    (nn.MaxPool2d(3, 2, padding=1), fused.MaxPool2d),
    (nn.AvgPool2d((3, 2), ceil_mode=True, count_include_pad=False), fused.AvgPool2d),
    (nn.AdaptiveAvgPool2d((2, None)), fused.AdaptiveAvgPool2d),
    (nn.AdaptiveMaxPool2d(3), fused.AdaptiveMaxPool2d),
]


@pytest.mark.parametrize("stock, module", MODULES, ids=lambda m: getattr(m, "__name__", ""))
def test_modules(stock, module):
    x = torch.randn(2, 3, 7, 6)
    for backend in ("auto", "reference"):
        ours = module.from_stock(stock.eval(), backend=backend)
        assert isinstance(ours, type(stock))
        assert not ours.training
        assert ours.extra_repr() == stock.extra_repr()
        assert_exact(stock(x), ours(x))
        assert_exact(stock(x), pools.call_pool2d(stock, x, backend))
    with pytest.raises(TypeError, match=f"expected nn.{type(stock).__name__}"):
        module.from_stock(nn.ReLU())


def test_module_takes_the_stock_arguments():
    ours = fused.MaxPool2d(3, stride=2, padding=1, ceil_mode=True, backend="reference")
    x = torch.randn(1, 2, 8, 8)
    assert_exact(F.max_pool2d(x, 3, 2, 1, ceil_mode=True), ours(x))
    y, index = fused.MaxPool2d(2, return_indices=True, backend="reference")(x)
    assert_exact(F.max_pool2d(x, 2, return_indices=True)[1], index)
    assert y.shape == (1, 2, 4, 4)


def test_hooks_are_called():
    stock, calls = nn.MaxPool2d(2), []
    stock.register_forward_hook(lambda *a: calls.append(1))
    pools.call_pool2d(stock, torch.randn(1, 1, 4, 4), "reference")
    assert calls == [1]


def test_compiled_training_holds_the_op():
    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    module = fused.MaxPool2d(3, 2, 1, backend="reference")
    torch.compile(module, fullgraph=True, backend=backend)(x)
    assert any("fastnets.max_pool2d" in name for name in seen)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    stock = x.detach().clone().requires_grad_()
    F.max_pool2d(stock, 3, 2, 1).sum().backward()
    assert_exact(stock.grad, x.grad)


@pytest.mark.parametrize("shape", [(1, 24, 7, 7), (5, 8, 3, 9), (2, 40, 1, 4)])
def test_means_of_channels_last_maps_on_the_cpu(shape):
    x = (torch.randn(shape) + 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = pools.adaptive_avg_pool2d(x, 1)
        stock = F.adaptive_avg_pool2d(x, 1)
        assert_close_to(F.adaptive_avg_pool2d(x.double(), 1), stock, y)
        assert y.stride() == stock.stride()
        x[0, 0] = float("nan")
        x[-1, 1, 0] = float("inf")
        y = pools.adaptive_avg_pool2d(x, (1, 1))
    assert y.isnan().sum() == 1
    assert y.isinf().sum() == 1
    assert y[0, 0].isnan().all()
    assert y[-1, 1].isinf().all()
