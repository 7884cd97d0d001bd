"""What a fused call costs the host, and the driver that launches nothing."""

import pytest
import torch

from fastnets.bench.host_cost import dry_launches, measure_cuda_path, measure_network
from fastnets.kernels import launch as launching
from fastnets.kernels.batch_norm import bn_add_act
from tests.lanes import ptxsim_unavailable

COMPILES = pytest.mark.skipif(
    torch.cuda.is_available() or bool(ptxsim_unavailable()), reason="is about machines without a GPU"
)


@COMPILES
def test_a_call_that_launches_costs_less_than_a_tenth_of_a_millisecond():
    """Or little more than stock's convolution, which takes 60 µs of a quiet core and more of a busy one."""
    least = {name: min(s.cpu) for name, s in measure_cuda_path(rounds=5).samples.items()}
    stock = least.pop("stock convolution")
    assert len(least) == 7
    assert {name: cost for name, cost in least.items() if cost > max(1e-4, 1.5 * stock)} == {}


@COMPILES
def test_launches_again_take_addresses_from_a_driver_for_cuda(monkeypatch):
    launched = []
    x = torch.randn(2, 8, 4, 4)
    with dry_launches(launched):
        bn_add_act(x, residual=x, activation="relu")
        monkeypatch.setattr(launching._compiled, "takes_addresses", True)
        launching._compiled.kernels.clear()
        for _ in range(2):
            y = bn_add_act(x, residual=x, activation="relu")
    _, bound, direct = (arguments[9:] for arguments in launched)  # past grid, stream, function and hooks
    assert bound[0] is x
    assert direct[:3] == (x.data_ptr(), y.data_ptr(), x.data_ptr())
    assert bound[3:] == direct[3:]


@COMPILES
def test_a_whole_network_is_measured_on_the_path_that_launches():
    seconds, launches = measure_network("lenet5", rounds=2)
    assert launches > 0
    assert 0 < min(seconds) < 1e-2
