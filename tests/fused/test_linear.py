"""The op linear_act: every implementation against float64, its gradient, its registration, its modules."""

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import module_db

from fastnets import fused
from fastnets.fused import dispatch, packing
from fastnets.fused.activation import ACTIVATIONS
from fastnets.fused.linear import _unmeasured, call_linear_act, implementation_of
from fastnets.kernels.device import DEVICES
from tests.accuracy import assert_close_to, assert_exact, integers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(*rows, K=40, N=24, bias=True, scale=False, residual=False, dtype=torch.float32, draw=torch.randn):
    weight = draw(N, K) / (K**0.5 if draw is torch.randn else 1)
    wanted = {"bias": bias, "layer_scale": scale}
    found = {"x": draw(*rows, K), "weight": weight, **{k: draw(N) if v else None for k, v in wanted.items()}}
    found["residual"] = draw(*rows, N) if residual else None
    return {k: None if t is None else t.to(dtype) for k, t in found.items()}


def stock(x, weight, bias, layer_scale, residual, activation="none", negative_slope=0.01):
    y = ACTIVATIONS[activation].forward(F.linear(x, weight, bias), negative_slope)
    if layer_scale is not None:
        y = layer_scale * y
    return y if residual is None else residual + y


def double(found):
    return {k: None if t is None else t.double() for k, t in found.items()}


def judge(found, activation="none", backend="auto", **options):
    y = fused.linear_act(**found, activation=activation, backend=backend, **options)
    assert_close_to(stock(**double(found), activation=activation), stock(**found, activation=activation), y)
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["library", "reference", "auto"])
def test_every_epilogue_is_as_accurate_as_stock(backend, dtype):
    with torch.no_grad():
        for activation, scale, residual in itertools.product(ACTIVATIONS, (False, True), (False, True)):
            found = tensors(2, 9, scale=scale, residual=residual, dtype=dtype)
            judge(found, activation, backend)
            judge(found, activation, backend)  # by what was kept


ROWS = {"1-D": (), "none": (0,), "one": (1,), "few": (3,), "many": (70,), "3-D": (2, 5), "4-D": (2, 3, 4)}


@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows):
    draw = random.Random(rows)
    for dtype, backend in itertools.product(DTYPES, ("library", "reference")):
        found = tensors(
            *ROWS[rows], K=37, N=19, bias=draw.random() < 0.7, scale=draw.random() < 0.5,
            residual=draw.random() < 0.5, dtype=dtype,
        )  # fmt: skip
        with torch.no_grad():
            judge(found, draw.choice(list(ACTIVATIONS)), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout):
    found = tensors(6, 9, residual=True)
    make = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    found["x"], found["residual"] = make(found["x"]), make(found["residual"])
    found["weight"] = found["weight"].t().contiguous().t()
    for backend in ("library", "reference"):
        with torch.no_grad():
            judge(found, "gelu", backend)


def test_a_large_weight_for_few_rows():
    with torch.no_grad():
        judge(tensors(8, K=2100, N=4100), "relu", "library")


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_integers_are_exact(backend):
    found = tensors(9, scale=True, residual=True, draw=integers)
    with torch.no_grad():
        for activation in ("none", "relu"):
            assert_exact(stock(**found, activation=activation), judge(found, activation, backend))


def gradients(found, activation, call, dy):
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in found.items()}
    y = call(**leaves, activation=activation)
    y.backward(dy.to(y.dtype))
    return [t.grad for t in leaves.values() if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_gradients(backend, dtype):
    def ours(**options):
        return fused.linear_act(**options, backend=backend)

    for activation, scale, residual in itertools.product(ACTIVATIONS, (False, True), (False, True)):
        found = tensors(3, 7, scale=scale, residual=residual, dtype=dtype)
        dy = torch.randn(3, 7, 24)
        exact = gradients(double(found), activation, stock, dy.to(dtype))
        results = zip(exact, gradients(found, activation, stock, dy), gradients(found, activation, ours, dy))
        for reference, rough, gradient in results:
            assert_close_to(reference, rough, gradient, ratio=3)


INCOMING = {
    "expanded": lambda: torch.randn(()).expand(3, 7, 24),
    "transposed": lambda: torch.randn(7, 3, 24).transpose(0, 1),
    "every other": lambda: torch.randn(3, 7, 48)[..., ::2],
}


@pytest.mark.parametrize("incoming", INCOMING)
def test_incoming_gradients_of_any_strides(incoming):
    dy = INCOMING[incoming]()
    for activation, scale in (("none", False), ("gelu", True), ("relu", False)):
        found = tensors(3, 7, scale=scale)
        exact = gradients(double(found), activation, stock, dy)
        results = zip(
            exact, gradients(found, activation, stock, dy), gradients(found, activation, fused.linear_act, dy)
        )
        for reference, rough, gradient in results:
            assert_close_to(reference, rough, gradient, ratio=3)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize(
    "activation, scale, residual",
    [("gelu", False, False), ("relu", False, False), ("none", True, True), ("none", False, True)],
)
def test_gradients_by_our_kernels(lane, activation, scale, residual):
    found = tensors(2, 11, scale=scale, residual=residual, dtype=torch.bfloat16)
    dy = torch.randn(2, 11, 24).bfloat16()

    def ours(**options):
        return fused.linear_act(**options, backend="triton")

    with lane:
        placed = {k: lane.put(t) for k, t in found.items()}
        results = gradients(placed, activation, ours, lane.put(dy))
    exact, rough = gradients(double(found), activation, stock, dy), gradients(found, activation, stock, dy)
    for reference, approximate, gradient in zip(exact, rough, results):
        assert_close_to(reference, approximate, gradient, ratio=3)


@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "silu"])
def test_gradient_formula(activation):
    found = tensors(
        2, 3, K=4, N=5, scale=activation != "relu", residual=activation == "none", dtype=torch.float64
    )
    leaves = [None if t is None else t.requires_grad_() for t in found.values()]

    def call(*arguments):
        full = iter(arguments)
        x, w, b, s, r = (None if t is None else next(full) for t in leaves)
        return fused.linear_act(x, w, b, layer_scale=s, residual=r, activation=activation)

    assert torch.autograd.gradcheck(call, [t for t in leaves if t is not None])


def test_some_gradients_only():
    found = tensors(5, scale=True, residual=True)
    found["weight"].requires_grad_()
    y = fused.linear_act(**found, activation="gelu")
    y.sum().backward()
    assert found["weight"].grad is not None
    assert all(t.grad is None for k, t in found.items() if k != "weight")


def test_second_derivatives_are_refused():
    found = tensors(5)
    found["x"].requires_grad_()
    (grad,) = torch.autograd.grad(
        fused.linear_act(**found, activation="gelu").sum(), found["x"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_ops_are_registered_as_pytorch_asks(training):
    ops = torch.ops.fastnets
    for activation, scale, residual in (("gelu", True, True), ("relu", False, False), ("none", False, False)):
        found = tensors(2, 5, scale=scale, residual=residual)
        if training:
            found = {k: None if t is None else t.requires_grad_() for k, t in found.items()}
        op = ops.linear_act.default if training else ops.linear_act_inference.default
        torch.library.opcheck(op, (*found.values(), activation, 0.01, "auto"))
    z, dy = torch.randn(2, 5), torch.randn(2, 5)
    arguments = (dy, z, torch.randn(5), "none", 0.01, torch.float32, True, "auto")
    torch.library.opcheck(ops.linear_act_backward.default, arguments)
    torch.library.opcheck(ops.matrix_product.default, (z, torch.randn(3, 5), torch.float32, "auto"))
    found = tensors(2, 5)
    torch.library.opcheck(ops.linear_act_training.default, (*found.values(), "none", 0.01, "auto"))


def test_autocast_gives_what_stock_gives():
    found = tensors(6, 9, residual=True, scale=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = fused.linear_act(**found, activation="gelu"), stock(**found, activation="gelu")
        plain = fused.linear_act(found["x"], found["weight"], found["bias"])
    assert (y.dtype, plain.dtype) == (expected.dtype, torch.bfloat16) == (torch.float32, torch.bfloat16)
    assert_close_to(stock(**double(found), activation="gelu"), expected, y)
    leaf = found["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        fused.linear_act(**found, activation="gelu").sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_packed_weights_are_forgotten_when_they_change():
    module = fused.LinearAct(256, 96, activation="gelu").eval()
    x = torch.randn(64, 256)
    with torch.no_grad():
        for change in (
            lambda: module.weight.mul_(2),
            lambda: module.bias.add_(1),
            lambda: module.load_state_dict(fused.LinearAct(256, 96).state_dict()),
            lambda: (module.weight.data.mul_(0.5), packing.refresh(module)),
        ):
            module(x)
            change()
            torch.testing.assert_close(module(x), F.gelu(F.linear(x, module.weight, module.bias)))
    module(x).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.gelu(F.linear(x, module.weight, module.bias)))


def test_function_transforms_and_flops():
    found = tensors(4)
    call = lambda x: fused.linear_act(**{**found, "x": x}, activation="gelu").sum()  # noqa: E731
    expected = torch.func.grad(lambda x: stock(**{**found, "x": x}, activation="gelu").sum())(found["x"])
    torch.testing.assert_close(torch.func.grad(call)(found["x"]), expected)
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter, torch.no_grad():
        fused.linear_act(**found)
    assert counter.get_total_flops() == 2 * 4 * 40 * 24


def test_compiled_training():
    module = fused.LinearAct(40, 24, activation="gelu")
    x, residual = torch.randn(4, 40, requires_grad=True), torch.randn(4, 24)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = step(x, residual)
    y.sum().backward()
    torch.testing.assert_close(y, residual + F.gelu(F.linear(x, module.weight, module.bias)))
    assert x.grad is not None


@pytest.mark.parametrize("train", [True, False])
def test_pytorchs_own_samples_of_linear(train):
    (info,) = [info for info in module_db if info.module_cls is nn.Linear]
    seen = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float32, True, train):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = nn.Linear(*arguments, **options).train(train)
        ours = fused.LinearAct(*arguments, **options).train(train)
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (theirs, ours):
            x = copy.deepcopy([*sample.forward_input.args, *sample.forward_input.kwargs.values()][0])
            y = module(x)
            y.sum().backward()
            results.append((y.detach(), x.grad, *(p.grad for p in module.parameters())))
        torch.testing.assert_close(*results)
        seen += 1
    assert seen >= 3


def test_modules_from_stock():
    linear, gamma = nn.Linear(40, 24), torch.randn(24)
    ours = fused.LinearAct.from_stock(linear, nn.GELU(), gamma)
    x, residual = torch.randn(64, 40), torch.randn(64, 24)
    expected = residual + gamma * F.gelu(linear(x))
    torch.testing.assert_close(ours(x, residual), expected)
    with torch.no_grad(), fused_by("library"):
        torch.testing.assert_close(ours(x, residual), expected)
    assert ours.weight is linear.weight
    assert list(ours.state_dict()) == ["weight", "bias", "layer_scale"]
    assert list(fused.LinearAct(3, 4).state_dict()) == ["weight", "bias"]
    with pytest.raises(TypeError, match="got ReLU"):
        fused.LinearAct.from_stock(nn.ReLU())
    with pytest.raises(ValueError, match="Softmax is not an activation"):
        fused.LinearAct.from_stock(linear, nn.Softmax(-1))


def fused_by(name):
    return dispatch.backend(name)


class Scale(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = nn.Parameter(gamma)

    def forward(self, x):
        return x * self.gamma


Scale.__name__ = "LayerScale"


def test_rewritten_networks_keep_what_stock_does():
    linear, act, scale = nn.Linear(40, 24), nn.GELU(), Scale(torch.randn(24))
    x, residual = torch.randn(70, 40), torch.randn(70, 24)
    expected = residual + scale(act(linear(x)))

    def call(**changed):
        arguments = {
            "linear": linear,
            "act": act,
            "x": x,
            "residual": residual,
            "activation": "gelu",
            **changed,
        }
        return call_linear_act(**{"layer_scale": scale, "backend": "library", **arguments})

    with torch.no_grad():
        torch.testing.assert_close(call(), expected)
        torch.testing.assert_close(call(layer_scale=scale.gamma), expected)
        assert implementation_of(linear, act, "gelu", x, residual, scale, "library") == "library"
        # Nothing that broadcasts, hooks into or replaces the layer is taken over.
        torch.testing.assert_close(call(residual=residual[:1]), residual[:1] + scale(act(linear(x))))
        calls = []
        handle = linear.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(call(), expected)
        handle.remove()
        assert calls == [1]
        scale.register_forward_hook(lambda *_: calls.append(2))
        torch.testing.assert_close(call(), expected)
        assert calls == [1, 2]

        class Doubled(nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        assert implementation_of(Doubled(40, 24), act, "gelu", x, backend="library") == "stock"
    assert implementation_of(linear, act, "gelu", x) == "stock"  # gradients, on the CPU


def test_small_or_learning_layers_stay_stock_on_the_cpu():
    small, large = nn.Linear(8, 8), nn.Linear(512, 512)
    with torch.no_grad():
        assert implementation_of(small, None, "relu", torch.randn(4, 8)) == "stock"
        assert implementation_of(large, None, "relu", torch.randn(64, 512)) == "library"
        assert implementation_of(large, None, "relu", torch.randn(64, 512), backend="unfolded") == "stock"
    assert implementation_of(large, None, "relu", torch.randn(64, 512)) == "stock"


def test_without_a_measurement_ours_serves_where_a_pass_is_dear():
    def chosen(M, N, K, activation="none", extra=True, size=2, precision="ieee", device="a100"):
        return _unmeasured(M, N, K, size, precision, extra, activation, DEVICES[device])

    assert chosen(25216, 3072, 768, "gelu", False) == "triton"  # ViT-B/16, 128 images
    assert chosen(25216, 768, 768) == "triton"
    for M, N, K, activation, extra in (  # as measured on an H200
        (6304, 3072, 768, "gelu", False),
        (6304, 768, 3072, "none", True),
        (6304, 768, 768, "none", True),
    ):
        assert chosen(M, N, K, activation, extra, device="h200") == "library"
    assert chosen(8192, 8192, 8192) == "library"
    assert chosen(25216, 3072, 768, "none", False) == "library"
    assert chosen(25216, 3072, 768, "relu", False) == "library"  # cuBLASLt's own epilogue
    assert chosen(25216, 3072, 768, "gelu", False, size=4) == "library"  # exact fp32
    assert chosen(1, 4096, 9216, "gelu", False) == "triton"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[\.\.\., K\]"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "one floating dtype"),
        ({"bias": torch.ones(3)}, ValueError, "bias has shape"),
        ({"layer_scale": torch.ones(3)}, ValueError, "layer_scale has shape"),
        ({"residual": torch.ones(1, 4)}, ValueError, "expand or convert"),
        ({"activation": "swoosh"}, ValueError, "unknown activation"),
        ({"backend": "cuda"}, ValueError, "is not a backend"),
        ({"x": torch.ones(2, 3).double(), "weight": torch.ones(4, 3).double(), "backend": "triton"},
         dispatch.UnsupportedByBackend, "float64"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fused.linear_act(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3), **change})
