"""Rotary embeddings in rewritten networks, as Llama, Hugging Face and timm write them."""

import pytest
import torch
from torch import nn

import fastnets
from fastnets.kernels.launch import observe_launches
from fastnets.models.rotary import (
    angles_to_tables,
    inverse_frequencies,
    rotate_halves,
    rotate_neighbours,
)
from tests.accuracy import assert_close_to, assert_exact


def rotate_slices(x, cos, sin):
    """Hugging Face's form, with tables for a batch."""
    cos, sin = cos[None].unsqueeze(1), sin[None].unsqueeze(1)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


def rotate_reshaped(x, cos, sin):
    """timm's form, factors and terms the other way round."""
    return sin * torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) + cos * x


def wrong_halves(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-first, second], -1) * sin


def wrong_order(x, cos, sin):
    return x * cos + torch.stack([x[..., ::2], -x[..., 1::2]], -1).flatten(-2) * sin


def read_twice(x, cos, sin):
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * cos + turned * sin + turned.mean()


def of_another(x, cos, sin):
    first, second = (x + 1).chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


FORMS = {rotate_halves: False, rotate_neighbours: True, rotate_slices: False, rotate_reshaped: True}
OTHERS = (wrong_halves, wrong_order, read_twice, of_another)


class Rotates(nn.Module):
    def __init__(self, rotate, length=7, width=16, trained=False):
        super().__init__()
        self.rotate = rotate
        angles = torch.arange(length).unsqueeze(1) * inverse_frequencies(width // 2, 100.0)
        cos, sin = angles_to_tables(angles, FORMS.get(rotate, False))
        if trained:
            self.cos, self.sin = nn.Parameter(cos), nn.Parameter(sin)
        else:
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)
        self.linear = nn.Linear(2 * width, 2 * width)

    def forward(self, x):
        heads = self.linear(x).unflatten(2, (2, -1)).transpose(1, 2)
        return self.rotate(heads, self.cos, self.sin).transpose(1, 2).flatten(2)


def rotations(model):
    return [row.kind for row in fastnets.explain(model).rows].count("rope")


@pytest.mark.parametrize("rotate", FORMS, ids=lambda rotate: rotate.__name__)
def test_every_form_is_one_launch(rotate, lane):
    torch.manual_seed(0)
    stock = Rotates(rotate).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        same, reference = stock(x), Rotates.forward(stock.double(), x.double())
        stock.float()
        auto, fast = fastnets.optimize(stock), fastnets.optimize(stock, backend="triton").to(lane.device)
        assert rotations(auto) == 1
        torch.testing.assert_close(auto(x), same)
        assert_exact(same, fastnets.restore(auto)(x))
        seen = []
        with lane, observe_launches(seen.append):
            y = fast(lane.put(x))
    assert [launch.name for launch in seen].count("rope_kernel") == 1
    assert_close_to(reference, same, y)


@pytest.mark.parametrize("rotate", OTHERS, ids=lambda rotate: rotate.__name__)
def test_what_is_no_rotation_stays(rotate):
    stock = Rotates(rotate).eval()
    fast = fastnets.optimize(stock, backend="reference")
    x = torch.randn(2, 7, 32)
    assert rotations(fast) == 0
    torch.testing.assert_close(fast(x), stock(x))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("trained", [False, True], ids=["buffers", "trained"])
def test_gradients_reach_the_input_and_tables_that_learn(trained, backend):
    torch.manual_seed(0)
    stock = Rotates(rotate_halves, trained=trained)
    x = torch.randn(2, 7, 32)
    grads = []
    for model in (stock, fastnets.optimize(stock, backend=backend)):
        model(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert set(grads[0]) >= ({"cos", "sin"} if trained else {"linear.weight"})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_tables_of_another_dtype_decide_the_results_dtype_as_in_stock():
    x = torch.randn(2, 7, 32, dtype=torch.bfloat16)
    for rotate, dtype in ((rotate_halves, torch.bfloat16), (rotate_slices, torch.float32)):
        stock = Rotates(rotate).to(torch.bfloat16)
        stock.cos, stock.sin = stock.cos.float(), stock.sin.float()
        for backend in ("auto", "reference"):
            fast = fastnets.optimize(stock, backend=backend)
            assert rotations(fast) == 1
            assert fast(x).dtype == stock(x).dtype == dtype
            torch.testing.assert_close(fast(x), stock(x))


def test_a_write_in_between_keeps_the_order():
    def rotate(x, cos, sin):
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1) * sin
        x.mul_(2)
        return x * cos + turned

    stock = Rotates(rotate).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(fastnets.optimize(stock, backend="reference")(x), stock(x))
