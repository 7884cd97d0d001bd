"""Programs of PyTorch's operations alone: what they hold, what they overwrite, and what forbids them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastnets.kernels.recording import Recorder, Unfit, is_seen_by_modes
from tests.accuracy import assert_exact


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def program_of(function, *tensors):
    recorder = Recorder(tensors, lambda op: None, holds_constants=True)
    with torch.no_grad():
        with recorder:
            result = function(*tensors)
        if not recorder.replayable:
            raise Unfit
        return recorder.program(result)


def operations_of(program, *tensors):
    with torch.no_grad(), Operations() as mode:
        program(tensors)
    return mode.names


def assert_repeats(function, *shapes):
    """The program of a call gives what the function gives, for other tensors, which stay as they are."""
    program = program_of(function, *[torch.randn(s) for s in shapes])
    for _ in range(3):
        tensors = [torch.randn(s) for s in shapes]
        kept = [t.clone() for t in tensors]
        with torch.no_grad():
            assert_exact(function(*tensors), program(tuple(tensors)))
        assert all(torch.equal(t, k) for t, k in zip(tensors, kept))
    return program


WEIGHT = torch.randn(4, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: (x @ WEIGHT) * y, ["mm", "mul_"]),
        (lambda x, y: F.silu(x @ WEIGHT) + y, ["mm", "silu_", "add_"]),
        (lambda x, y: torch.addcmul(x @ WEIGHT, x, y), ["mm", "addcmul_"]),
        (lambda x, y: y[:, :1] * (x @ WEIGHT), ["mm", "slice", "mul_"]),
        # Arguments, constants and views are somebody else's, too.
        (lambda x, y: x * y, ["mul"]),
        (lambda x, y: WEIGHT * y, ["mul"]),
        (lambda x, y: (x @ WEIGHT).t() * y, ["mm", "t", "mul"]),
        # What is read again stays: itself, a view of it, or as a result.
        (lambda x, y: (z := x @ WEIGHT) * y + z, ["mm", "mul", "add_"]),
        (lambda x, y: (z := x @ WEIGHT) * z.t(), ["mm", "t", "mul"]),
        (lambda x, y: (z := x @ WEIGHT, z * y)[1] * z.t(), ["mm", "mul", "t", "mul_"]),
        # Another size or dtype needs other memory.
        (lambda x, y: (x @ WEIGHT)[:1].contiguous() * y, ["mm", "slice", "mul"]),
        (lambda x, y: (x @ WEIGHT) * y.double(), ["mm", "_to_copy", "mul"]),
    ],
)
def test_operands_that_nobody_reads_again_are_overwritten(function, expected):
    program = assert_repeats(function, (4, 4), (4, 4))
    assert operations_of(program, torch.randn(4, 4), torch.randn(4, 4)) == expected


def test_results_that_share_memory_with_what_was_read_are_not_overwritten():
    def function(x):
        y = x @ WEIGHT
        return y, F.relu(y), y.view(-1)

    x = torch.randn(4, 4)
    program = program_of(function, x)
    for ours, theirs in zip(program((x,)), function(x)):
        assert_exact(theirs, ours)


def test_a_view_that_leads_back_is_what_it_came_from():
    program = assert_repeats(lambda x: ((x @ WEIGHT).t().t() @ WEIGHT).t(), (4, 4))
    assert operations_of(program, torch.randn(4, 4)) == ["mm", "mm", "t"]
    program = assert_repeats(lambda x: (x @ WEIGHT).view(1, 16).relu_().view(4, 4) @ WEIGHT, (4, 4))
    assert operations_of(program, torch.randn(4, 4)) == ["mm", "view", "relu_", "mm"]


def test_constants_are_read_anew():
    weight = torch.ones(4, 4)
    program = program_of(lambda x: x @ weight.t(), torch.randn(2, 4))
    weight.mul_(3)
    x = torch.randn(2, 4)
    torch.testing.assert_close(program((x,)), x @ weight.t())


def write_into_argument(x):
    return x.add_(1) @ WEIGHT


def write_into_constant(x):
    return WEIGHT.mul_(1.0) @ x


def look(x):
    return x @ WEIGHT if x.sum() > 0 else x


def count_values(x):
    return x[x > 0]


def draw(x):
    return F.dropout(x @ WEIGHT, 0.5)


@pytest.mark.parametrize("function", [write_into_argument, write_into_constant, look, count_values, draw])
def test_what_no_program_repeats(function):
    with pytest.raises(Unfit):
        program_of(function, torch.randn(4, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x @ WEIGHT, 0.5, training=False),
        lambda x: (x @ WEIGHT)[torch.tensor([2, 0])],
        lambda x: F.adaptive_avg_pool2d(x.view(1, 4, 2, 2).to(memory_format=torch.channels_last), 1),
        lambda x: torch.cat([part * 2 for part in (x @ WEIGHT).chunk(2, 1)], 1),
        lambda x: (x.contiguous() + x.reshape(-1).view(4, 4)).to(torch.float32),
        lambda x: F.layer_norm(x, (4,)).transpose(0, 1).contiguous().relu_(),
    ],
)
def test_what_is_repeated(function):
    assert_repeats(function, (4, 4))


def test_a_recorder_does_not_look_on_and_holds_nothing():
    import weakref

    seen, gone = [], []

    def function(x):
        y = x @ WEIGHT
        seen.append(is_seen_by_modes())
        gone.append(weakref.ref(y))
        y = y + 1
        gone.append(gone[0]() is None)
        return y

    program_of(function, torch.randn(4, 4))
    assert seen == [False]
    assert gone[1]
    with Operations():
        assert is_seen_by_modes()
