"""Squeeze-and-excite blocks and local response norms in rewritten networks."""

import torch
from torch import nn

import fastnets
from fastnets.kernels.launch import observe_launches
from fastnets.models.blocks import SqueezeExcite
from tests.accuracy import assert_close_to, assert_exact


class Block(nn.Module):
    def __init__(self, last=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5, alpha=0.1, k=2.0)
        self.se = SqueezeExcite(16, 4)
        self.last = nn.Conv2d(16, 8, last)

    def forward(self, x):
        return self.last(self.se(self.norm(self.conv(x).relu())))


def kinds(model):
    return {row.path: row.kind for row in fastnets.explain(model).rows if row.fused}


def test_both_are_found_and_stock_comes_back():
    stock = Block().eval()
    x = torch.randn(2, 3, 9, 9)
    fast = fastnets.optimize(stock, select="heuristic")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))
    found = kinds(fast)
    assert (found["norm"], found["last"]) == ("response norm", "squeeze-excite+conv")
    assert list(fast.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        assert_exact(stock(x), fastnets.restore(fast)(x))


def test_kernels_serve_them(lane):
    stock = Block(last=3).eval()
    x = torch.randn(1, 3, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        same, reference = stock(x), Block.forward(stock.double(), x.double())
        stock.float()
        fast = fastnets.optimize(stock, backend="triton").to(lane.device)
        seen = []
        with lane, observe_launches(seen.append):
            y = fast(lane.put(x))
    assert_close_to(reference, same, y, 2.0)
    names = [launch.name for launch in seen]
    for name in ("response_norm_kernel", "plane_mean_kernel", "excite_kernel"):
        assert names.count(name) == 1, names


def test_a_hook_inside_is_called():
    fast, seen = fastnets.optimize(Block().eval()), []
    fast.se.fc1.register_forward_hook(lambda *_: seen.append(1))
    fast.norm.register_forward_hook(lambda *_: seen.append(2))
    with torch.no_grad():
        fast(torch.randn(1, 3, 6, 6))
    assert sorted(seen) == [1, 2]
