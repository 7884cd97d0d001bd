"""Gated activations against stock PyTorch, in every lane."""

import pytest
import torch

from fastnets.kernels.gated import gated_act, gated_act_backward
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.test_batch_norm import STOCK_ACTIVATIONS
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def operands(kind, rows, columns, dtype):
    if kind == "packed":
        return torch.randn(rows, 2 * columns).to(dtype).chunk(2, -1)
    if kind == "transposed":
        return tuple(torch.randn(columns, rows).to(dtype).t() for _ in range(2))
    if kind == "sequences":
        return tuple(torch.randn(rows, 3, columns).to(dtype).transpose(0, 1) for _ in range(2))
    return tuple(torch.randn(rows, columns).to(dtype) for _ in range(2))


def stock(gate, up, dy, activation, dtype):
    gate, up = (t.detach().to(dtype).clone().requires_grad_() for t in (gate, up))
    y = STOCK_ACTIVATIONS[activation](gate) * up
    y.backward(dy.to(dtype))
    return y.detach(), gate.grad, up.grad


def check(lane, gate, up, activation):
    dy = torch.randn(gate.shape).to(gate.dtype)
    both = torch.empty(*gate.shape[:-1], 2 * gate.shape[-1], dtype=gate.dtype, device=lane.device)
    with lane:
        both.fill_(torch.nan)
        dgate, dup = both.chunk(2, -1)
        put = [lane.put(t) for t in (gate, up, dy)]
        y = gated_act(*put[:2], activation)
        gated_act_backward(put[2], *put[:2], activation, dgate, dup)
    results = zip(
        stock(gate, up, dy, activation, torch.float64), stock(gate, up, dy, activation, gate.dtype),
        (y, dgate, dup), (2, 3, 3),
    )  # fmt: skip
    for reference, same, value, ratio in results:
        assert_close_to(reference, same, value, ratio)


@pytest.mark.parametrize("kind, dtype", [("packed", BF16), ("sequences", FULL)])
def test_halves_and_rows_of_any_strides(lane, kind, dtype):
    check(lane, *operands(kind, 5, 72, dtype), "silu")


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("kind", ["packed", "transposed", "sequences", "plain"])
@pytest.mark.parametrize("columns", [1, 37, 2100])
def test_widths(lane, kind, columns):
    check(lane, *operands(kind, 3, columns, HALF), "gelu")


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", STOCK_ACTIVATIONS)
def test_activations(lane, activation):
    if activation == "leaky_relu":
        pytest.skip("no gated leaky_relu: a gate has no slope to be given")
    check(lane, *operands("plain", 4, 60, FULL), activation)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    check(lane, *operands("packed", 5, 40, HALF), "gelu_tanh")


def test_integers_are_exact(lane):
    gate, up = integers(6, 24), integers(6, 24)
    with lane:
        y = gated_act(lane.put(gate), lane.put(up), "relu")
    assert_exact(gate.relu() * up, y)


def test_two_reads_and_one_write():
    x = torch.empty(64, 2 * 512, dtype=HALF, device="meta")
    seen, size = [], 64 * 512 * 2
    with observe_launches(seen.append):
        gated_act(*x.chunk(2, -1), "silu")
        gradient = torch.empty_like(x)
        gated_act_backward(x[:, :512], *x.chunk(2, -1), "silu", *gradient.chunk(2, -1))
    assert [(s.bytes_read, s.bytes_written) for s in seen] == [(2 * size, size), (3 * size, 2 * size)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"up": torch.ones(3)}, ValueError, "up has shape"),
        ({"gate": torch.ones(2, 3).double()}, TypeError, "x is torch.float64"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        gated_act(**{"gate": torch.ones(2, 3), "up": torch.ones(2, 3), "activation": "silu", **change})
