"""What Inductor would move on a GPU: small networks by hand, and what must not change while it is asked."""

import pytest
import torch
from torch import nn

from fastnets.bench.inductor import count_compiled
from fastnets.bench.traffic import count

FLOAT = 4


def images(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)


class Pointwise(nn.Module):
    """A convolution, so that there is something to train, between two chains of pointwise work."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 1, bias=False)

    def forward(self, x):
        y = self.conv(torch.sin(x) * 2 + 1)
        return torch.tanh(y * 0.5).relu()


def test_a_chain_of_pointwise_ops_is_one_pass():
    model, x = Pointwise().to("meta"), images(2, 8, 16, 16)
    traffic = count_compiled(model, x, gpu="a100")
    size, out, weight = 2 * 8 * 256, 2 * 16 * 256, 16 * 8
    kernels = [r.moved for r in traffic.records if r.op.startswith("triton.")]
    # sin, * and + in one kernel; * and tanh and relu in one (it may keep a mask); their gradient in one.
    assert len(kernels) == 3
    first, second, third = kernels
    assert (first.bytes_read, first.bytes_written) == (FLOAT * size, FLOAT * size)
    assert second.bytes_read == FLOAT * out
    assert third.bytes_written == FLOAT * out
    convolutions = [r.moved for r in traffic.records if r.op.startswith("aten.convolution")]
    assert convolutions[0].bytes == FLOAT * (size + weight + out)
    assert convolutions[1].bytes == FLOAT * (out + size + weight)  # the image needs no gradient
    assert [r.in_backward for r in traffic.records] == [False, False, False, True, True]


def test_batch_norm_reads_twice_and_writes_once():
    network = nn.Sequential(
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
    )
    model, x = network.to("meta", memory_format=torch.channels_last), images(4, 8, 56, 56)
    eager, compiled = count(model, x, training=True), count_compiled(model, x, gpu="h100")
    assert compiled.flops == eager.flops
    maps = [4 * 3136 * channels * FLOAT for channels in (16, 32)]
    forward = [r.moved for r in compiled.records if not r.in_backward and r.op.startswith("triton.")]
    large = [moved for moved in forward if moved.bytes_read >= min(maps)]
    assert len(large) == 4  # statistics, and normalise with relu, of each
    assert sum(moved.bytes_read for moved in large) == pytest.approx(2 * sum(maps), rel=0.01)
    written = sum(moved.bytes_written for moved in large)
    assert sum(maps) < written < 1.3 * sum(maps)  # a mask of bytes, and partial statistics
    assert 0.7 * eager.bytes < compiled.bytes < 0.95 * eager.bytes
    assert compiled.saved_bytes <= eager.saved_bytes + maps[1] // FLOAT  # at most a mask more


def test_the_incoming_gradient_goes_straight_into_a_vendors_op():
    """As under the classifier at the end of a network: no kernel of Inductor's stands between."""
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48, bias=False)).to("meta")
    traffic = count_compiled(network, torch.empty(16, 64, device="meta"), gpu="h100")
    products = [r.moved for r in traffic.records if r.in_backward and r.op == "aten.mm"]
    dy, y, weight = 16 * 48, 16 * 32, 48 * 32
    first = 16 * 32 + 16 * 64 + 32 * 64  # of the first layer's weight; the images need no gradient
    expected = [FLOAT * size for size in (dy + y + weight, dy + weight + y, first)]
    assert sorted(moved.bytes for moved in products) == sorted(expected)
    assert sum(moved.flops for moved in products) == 2 * 16 * (2 * 48 * 32 + 32 * 64)


def test_a_loop_that_reads_again_is_a_second_pass():
    class Centred(nn.Module):
        """Rows too long for one block: their mean is one loop, the difference another."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1 << 15))

        def forward(self, x):
            return (x - x.mean(1, keepdim=True)) * self.scale

    x = torch.empty(512, 1 << 15, device="meta")
    traffic = count_compiled(Centred().to("meta"), x, gpu="a100")
    forward = sum(r.moved.bytes_read for r in traffic.records if not r.in_backward)
    assert forward == pytest.approx(2 * x.numel() * FLOAT, rel=0.02)


def test_nothing_is_left_behind():
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.Dropout()).eval().to("meta"),
        torch.empty(2, 4, device="meta"),
    )
    questions = [torch.cuda.is_available, torch.cuda.get_device_properties, torch.cuda.set_device]
    modes = [module.training for module in model.modules()]
    available = torch.cuda.is_available()
    count_compiled(model, x)
    assert [torch.cuda.is_available, torch.cuda.get_device_properties, torch.cuda.set_device] == questions
    assert torch.cuda.is_available() == available
    assert modes == [module.training for module in model.modules()]


def test_several_graphs_are_refused():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x)
            torch._dynamo.graph_break()
            return self.fc(x)

    with pytest.raises(ValueError, match="Broken: Dynamo made 2 graphs"):
        count_compiled(Broken().to("meta"), torch.empty(2, 4, device="meta"))
