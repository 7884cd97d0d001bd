"""The pass over dy in a linear layer's backward, against autograd in float64, in every lane."""

import pytest
import torch

from fastnets.fused.activation import ACTIVATIONS
from fastnets.kernels.launch import observe_launches
from fastnets.kernels.linear_backward import activation_gradient
from tests.accuracy import assert_close_to, assert_exact
from tests.lanes import STRICT_LANES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def composed(dy, z, scale, activation):
    """(dz, dbias, dscale) by autograd."""
    z, bias = z.detach().requires_grad_(), torch.zeros(z.shape[-1], dtype=z.dtype, requires_grad=True)
    act = ACTIVATIONS[activation].forward(z + bias, 0.01)
    vector = None if scale is None else scale.to(z.dtype).requires_grad_()
    (act if scale is None else act * vector).backward(dy.to(z.dtype))
    return z.grad, bias.grad, None if scale is None else vector.grad


def check(lane, dy, z, scale=None, activation="gelu"):
    with lane:
        dz, dbias, dscale = activation_gradient(
            lane.put(dy), lane.put(z), lane.put(scale), activation=activation, negative_slope=0.01
        )
    exact = composed(dy.double(), z.double(), None if scale is None else scale.double(), activation)
    rough = composed(dy, z, scale, activation)
    N = z.shape[-1]
    assert_close_to(exact[0].reshape(-1, N), rough[0].reshape(-1, N), dz, ratio=3)
    assert_close_to(exact[1], rough[1], dbias.to(z.dtype), ratio=3)
    if scale is not None:
        assert_close_to(exact[2], rough[2], dscale.to(z.dtype), ratio=3)
    else:
        assert dscale.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_and_its_sums(lane, scaled, dtype):
    dy, z = torch.randn(3, 31, 72).to(dtype), torch.randn(3, 31, 72).to(dtype)
    check(lane, dy, z, torch.randn(72).to(dtype) if scaled else None)


@pytest.mark.lanes("interpreter", "gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(lane, activation):
    check(lane, torch.randn(20, 33), torch.randn(20, 33), torch.randn(33), activation)


@pytest.mark.lanes("sm_80", "sm_90", "gpu")
def test_many_columns(lane):
    check(lane, torch.randn(70, 520).half(), torch.randn(70, 520).half(), torch.randn(520).half(), "silu")


LAYOUTS = {
    "expanded": lambda: torch.randn(()).expand(4, 9, 40),
    "a row for all": lambda: torch.randn(40).expand(4, 9, 40),
    "transposed": lambda: torch.randn(40, 4, 9).permute(1, 2, 0),
    "sliced": lambda: torch.randn(4, 9, 50)[..., 5:45],
}


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(lane, layout):
    check(lane, LAYOUTS[layout](), torch.randn(4, 9, 40), torch.randn(40))


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    # Every warp holds the column sums and writes the same bytes of them to shared memory.
    lane = lane.but(shared_races=None)
    check(lane, torch.randn(37, 72).half(), torch.randn(37, 72).half(), torch.randn(72).half(), "silu")


@pytest.mark.lanes("sm_80", "gpu")
def test_the_same_bits_each_time(lane):
    dy, z, scale = (lane.put(torch.randn(s)) for s in ((300, 40), (300, 40), (40,)))
    results = []
    for _ in range(2):
        with lane:
            results.append(activation_gradient(dy, z, scale, activation="gelu"))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.lanes("interpreter", "gpu")
def test_nothing_to_do(lane):
    empty = torch.empty(0, 5, device=lane.device)
    with lane:
        dz, dbias, dscale = activation_gradient(
            empty, empty, torch.ones(5, device=lane.device), activation="relu"
        )
    assert dz.shape == (0, 5)
    assert_exact(torch.zeros(2, 5), torch.stack([dbias, dscale]))


def test_one_read_and_one_write():
    z = torch.empty(1576, 3072, dtype=torch.bfloat16, device="meta")
    seen = []
    with observe_launches(seen.append):
        activation_gradient(z, z, activation="gelu")
    first, second = seen
    partial = second.bytes_read
    assert first.bytes_read == 2 * 2 * z.numel()
    assert first.bytes_written == 2 * z.numel() + partial
    assert partial < 0.07 * first.bytes


def test_bad_input():
    with pytest.raises(ValueError, match="expected one shape"):
        activation_gradient(torch.ones(2, 3), torch.ones(3, 3), activation="relu")
    with pytest.raises(ValueError, match="layer_scale has shape"):
        activation_gradient(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), activation="relu")
