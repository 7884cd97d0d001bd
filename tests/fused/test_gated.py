"""Gated activations as an op: gradients, packed halves, registration, errors."""

import pytest
import torch
import torch.nn.functional as F

from fastnets import fused
from fastnets.fused import dispatch
from fastnets.fused.gated import gated_act
from tests.accuracy import assert_close_to, assert_exact


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid"])
def test_gradient_formula(activation):
    def two(gate, up):
        return gated_act(gate, up, activation, backend="reference")

    def packed(both):
        return gated_act(both, activation=activation, gate_last=True, backend="reference")

    assert torch.autograd.gradcheck(two, (double(3, 4), double(3, 4)), fast_mode=True)
    assert torch.autograd.gradcheck(packed, (double(2, 3, 8),), fast_mode=True)


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("gate_last", [False, True])
def test_packed_halves_have_a_packed_gradient(lane, gate_last):
    both, dy = torch.randn(2, 5, 48).bfloat16(), torch.randn(2, 5, 24).bfloat16()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = both.detach().to(dtype).clone().requires_grad_()
        one, two = leaf.chunk(2, -1)
        y = one * F.silu(two) if gate_last else F.silu(one) * two
        y.backward(dy.to(dtype))
        results.append((y.detach(), leaf.grad))
    leaf = lane.put(both).clone().requires_grad_()
    with lane:
        y = gated_act(leaf, gate_last=gate_last, backend="triton")
        y.backward(lane.put(dy))
    for reference, same, value, ratio in zip(*results, (y.detach(), leaf.grad), (2, 3)):
        assert_close_to(reference, same, value, ratio)


def test_cpu_default_is_stock():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert_exact(F.silu(gate) * up, gated_act(gate, up))
    both = torch.cat([gate, up], -1)
    gate, up = both.chunk(2, -1)
    assert_exact(F.gelu(up) * gate, fused.gated_act(both, activation="gelu", gate_last=True))


def test_ops_are_registered_as_pytorch_asks():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    ops = torch.ops.fastnets
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    options = ("gelu", False, "auto")
    torch.library.opcheck(ops.gated_act.default, (*leaves, *options))
    torch.library.opcheck(ops.gated_act.default, (leaves[0], None, *options))
    torch.library.opcheck(ops.gated_act_inference.default, (gate, None, *options))
    torch.library.opcheck(ops.gated_act_backward.default, (gate, gate, up, *options))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: gated_act(x[:, :3]), ValueError, "3 packed features are no two halves"),
        (lambda x: gated_act(x, x[:1]), ValueError, "up is"),
        (lambda x: gated_act(x, x, "swiglu"), ValueError, "unknown activation"),
        (lambda x: gated_act(x.int(), x.int()), TypeError, "floating"),
        (
            lambda x: gated_act(x.double(), x.double(), backend="triton"),
            dispatch.UnsupportedByBackend,
            "float64",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 8))
