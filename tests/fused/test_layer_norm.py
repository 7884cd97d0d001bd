"""Layer norm and RMS norm as ops and modules: gradients, PyTorch's own samples, registration, what networks
call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import module_db

from fastnets import fused
from fastnets.fused import dispatch
from fastnets.fused.layer_norm import (
    add_layer_norm,
    add_rms_norm,
    call_layer_norm,
    layer_norm,
    rms_norm,
)
from tests.accuracy import assert_close_to, assert_exact

NORMS = {nn.LayerNorm: fused.LayerNorm, nn.RMSNorm: fused.RMSNorm}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("affine", [True, False])
def test_gradient_formulas(affine):
    x, r, w, b = double(3, 4, 5), double(3, 4, 5), double(4, 5), double(4, 5)
    w, b = (w, b) if affine else (None, None)
    options = {"backend": "reference"}
    calls = [
        lambda x, r, w, b: layer_norm(x, (4, 5), w, b, residual=r, **options),
        lambda x, r, w, b: add_layer_norm(x, r, (4, 5), w, b, **options),
        lambda x, r, w, b: rms_norm(x, (4, 5), w, residual=r, **options),
        lambda x, r, w, b: add_rms_norm(x, r, (4, 5), w, **options),
        lambda x, r, w, b: add_layer_norm(x, r, (4, 5), w, b, **options)[0],
        lambda x, r, w, b: add_rms_norm(x, r, (4, 5), w, **options)[1] * 1.0,
    ]
    for call in calls:
        assert torch.autograd.gradcheck(call, (x, r, w, b), fast_mode=True)


def samples(stock, training):
    info = next(info for info in module_db if info.module_cls is stock)
    return info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
    )


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stock", NORMS)
def test_samples_of_pytorch_itself(lane, stock, training):
    """Every sample of PyTorch's module tests: outputs and gradients, by the kernels and by default."""
    found = 0
    for sample in samples(stock, training):
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        (x,) = sample.forward_input.args
        norm = stock(*arguments, **keywords).train(training)
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        dy = torch.randn(x.shape)
        results = []
        for dtype, kind in ((torch.float64, stock), (torch.float32, stock), (torch.float32, NORMS[stock])):
            ours = kind is not stock
            module = copy.deepcopy(norm).to(dtype)
            if ours:
                module = kind(*arguments, **keywords, backend="triton").train(training).to(lane.device)
                module.load_state_dict(norm.state_dict())
            put = lane.put if ours else lambda t: t
            leaf = put(x.detach().to(dtype)).clone().requires_grad_()
            with lane:
                y = module(leaf)
                y.backward(put(dy.to(dtype)))
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        for reference, same, value in zip(*results):
            assert_close_to(reference, same, value, 3.0)
        by_default = NORMS[stock].from_stock(norm)
        assert_exact(norm(x).detach(), by_default(x).detach())
        found += 1
    assert found >= 4


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_serves_the_ops(lane, dtype):
    x, r, dy, ds = (torch.randn(4, 6, 40).to(dtype) for _ in range(4))
    w, b = torch.rand(40), torch.randn(40)

    def run(put, wide, function):
        vectors = torch.promote_types(wide, torch.float32)
        leaves = [put(t.to(k)) for t, k in ((x, wide), (r, wide), (w, vectors), (b, vectors))]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y, s = function(*leaves)
        torch.autograd.backward([y, s], [put(dy.to(wide)), put(ds.to(wide))])
        return [y.detach(), s.detach(), *(t.grad for t in leaves)]

    def stock(x, r, w, b):
        s = x + r
        return F.layer_norm(s, (40,), w, b), s

    with lane:
        ours = run(lane.put, dtype, lambda x, r, w, b: add_layer_norm(x, r, 40, w, b, backend="triton"))
    expected, same = run(lambda t: t, torch.float64, stock), run(lambda t: t, dtype, stock)
    for ratio, reference, stocks, value in zip((2, 2, 3, 3, 5, 5), expected, same, ours):
        assert_close_to(reference, stocks, value, ratio)


@pytest.mark.lanes("interpreter", "gpu")
def test_permuted_images_need_no_copy(lane):
    """torchvision's LayerNorm2d: the result is channels-last again, and so is the gradient."""
    x = torch.randn(2, 24, 5, 5).to(memory_format=torch.channels_last)
    leaf = lane.put(x).clone().requires_grad_()
    with lane:
        y = layer_norm(leaf.permute(0, 2, 3, 1), (24,), backend="triton").permute(0, 3, 1, 2)
        y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    stock = F.layer_norm(x.permute(0, 2, 3, 1), (24,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y.detach().cpu(), stock)


def test_ops_are_registered_as_pytorch_asks():
    x, r, w, b = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(6), torch.randn(6)
    ops = torch.ops.fastnets
    leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]
    for centred in (True, False):
        options = (1, 1e-5, centred, None, "auto")
        torch.library.opcheck(ops.layer_norm.default, (*leaves, *options))
        torch.library.opcheck(ops.add_layer_norm.default, (*leaves, *options))
        torch.library.opcheck(ops.layer_norm_inference.default, (x, None, w, b, *options))
        torch.library.opcheck(ops.add_layer_norm_inference.default, (x, r, w, b, *options))
        forward = (x, r, None, w, None, *options)
        torch.library.opcheck(ops.layer_norm_forward.default, forward)
        _, s, mean, rstd = ops.layer_norm_forward(*forward)
        rest = (1, centred, [True, True, False], torch.float32, "auto")
        torch.library.opcheck(ops.layer_norm_backward.default, (x, r, s, mean, rstd, w, *rest))


def test_saves_what_it_needs():
    x, norm = torch.randn(5, 4, 8, requires_grad=True), nn.LayerNorm(8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, s = add_layer_norm(x, x, (8,), norm.weight, norm.bias, backend="reference")
    assert sum(t.numel() for t in saved if t is not norm.weight) == s.numel() + 2 * 20
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["eps of a dtype", "given"])
def test_default_eps_is_stocks(name):
    eps = None if name != "given" else 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = (1e-4 * torch.randn(3, 8)).to(dtype)
        ours = rms_norm(x, 8, eps=eps, backend="reference")
        torch.testing.assert_close(ours, F.rms_norm(x, (8,), eps=eps))


def test_cpu_default_is_stock():
    x, r = torch.randn(4, 8), torch.randn(4, 8)
    w, b = torch.rand(8), torch.randn(8)
    assert_exact(F.layer_norm(x, (8,), w, b), layer_norm(x, 8, w, b))
    assert_exact(F.layer_norm(x, (8,), w, b) + r, layer_norm(x, 8, w, b, residual=r))
    assert_exact(F.rms_norm(x, (8,), w), rms_norm(x, 8, w))
    y, s = add_layer_norm(x, r, 8, w, b, backend="library")
    assert_exact(F.layer_norm(x + r, (8,), w, b), y)
    assert_exact(x + r, s)
    y, s = add_rms_norm(x, r[:1], 8, w)
    assert_exact(F.rms_norm(x + r[:1], (8,), w), y)


def test_modules_share_stocks_parameters():
    for stock, ours in NORMS.items():
        norm = stock((4, 8), eps=1e-3).eval()
        module = ours.from_stock(norm)
        assert isinstance(module, stock)
        assert module.weight is norm.weight
        assert not module.training
        assert list(module.state_dict()) == list(norm.state_dict())
        assert repr(module) == repr(norm)
        plain = ours.from_stock(stock(8, elementwise_affine=False))
        assert not list(plain.parameters())
    without_bias = fused.LayerNorm.from_stock(nn.LayerNorm(8, bias=False))
    assert (without_bias.bias, without_bias.weight.shape) == (None, (8,))
    x, r = torch.randn(2, 8), torch.randn(2, 8)
    y, s = fused.AddLayerNorm.from_stock(nn.LayerNorm(8))(x, r)
    assert_exact(F.layer_norm(x + r, (8,)), y.detach())
    y, s = fused.AddRMSNorm(8, eps=1e-6)(x, r)
    assert_exact(F.rms_norm(s, (8,), eps=1e-6), y.detach())
    assert_exact(x + r, s)


def test_networks_call_the_modules_where_hooks_want_it():
    x, r, seen = torch.randn(2, 8), torch.randn(2, 8), []
    for norm in (nn.LayerNorm(8), nn.RMSNorm(8)):
        assert_exact(norm(x).detach(), call_layer_norm(norm, x).detach())
        y, s = call_layer_norm(norm, x, r, "reference")
        torch.testing.assert_close(y, norm(x + r))
        norm.register_forward_hook(lambda *_: seen.append(1))
        y, s = call_layer_norm(norm, x, r, "triton")  # which could not run here
        assert_exact(norm(s).detach(), y.detach())
    assert len(seen) == 4


def test_function_transforms_and_compilation():
    x, w = torch.randn(4, 8), torch.rand(8)
    norm = torch.func.vmap(lambda row: layer_norm(row, 8, w, backend="reference"))
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), w))
    leaf = x.clone().requires_grad_()
    step = torch.compile(
        lambda t: sum(add_layer_norm(t, t, 8, w, backend="reference")), fullgraph=True, backend="aot_eager"
    )
    y = step(leaf)
    y.sum().backward()
    other = x.clone().requires_grad_()
    expected = F.layer_norm(2 * other, (8,), w) + 2 * other
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.gpu
def test_autocast_gives_float32_as_stock_does():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, r = (torch.randn(4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, s = add_layer_norm(x, r, 64)
        stock = F.layer_norm(x + r, (64,))
    assert (y.dtype, s.dtype) == (stock.dtype, torch.bfloat16)
    torch.testing.assert_close(y, stock)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: layer_norm(x, 5, backend="reference"), RuntimeError, r"normalized_shape=\[5\] expects x"),
        (lambda x: layer_norm(x, (), backend="reference"), RuntimeError, r"normalized_shape=\[\]"),
        (lambda x: layer_norm(x, 4, x[0, :3], backend="reference"), ValueError, r"weight has shape \(3,\)"),
        (lambda x: layer_norm(x, 4, residual=x[:1], backend="reference"), ValueError, "residual has shape"),
        (lambda x: rms_norm(x.double(), 4, backend="triton"), dispatch.UnsupportedByBackend, "float64"),
        (lambda x: layer_norm(x, 4, backend="tritn"), ValueError, "did you mean 'triton'"),
        (lambda x: fused.LayerNorm.from_stock(nn.RMSNorm(4)), TypeError, "got RMSNorm, expected LayerNorm"),
        (lambda x: fused.RMSNorm(4, backend="fast"), ValueError, "not a backend"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
