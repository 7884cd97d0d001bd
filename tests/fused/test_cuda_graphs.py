"""``optimize(cuda_graphs=True)``: what is replayed, and what must not be.

Without a GPU a stand-in for ``torch.cuda``'s graphs runs: it records the operations between two points, with
the tensors they read and write, and does them again, on the same memory.
"""

import contextlib
import copy
import io
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastnets
from fastnets.fused import cuda_graphs
from tests.accuracy import assert_close_to

REAL = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


class _Recorder(TorchDispatchMode):
    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    captured = 0

    def __init__(self):
        self.operations = []
        self.replays = 0
        FakeGraph.captured += 1

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def _record(graph, pool, stream, capture_error_mode):
    with _Recorder(graph.operations):
        yield


@pytest.fixture(params=["stand-in", REAL])
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    current = FakeStream()
    fake = types.SimpleNamespace(
        CUDAGraph=FakeGraph,
        Stream=FakeStream,
        graph=_record,
        graph_pool_handle=lambda: (0, 1),
        current_stream=lambda: current,
        stream=lambda stream: contextlib.nullcontext(),
        device=lambda device: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
    )
    monkeypatch.setattr(cuda_graphs, "cuda", fake)
    monkeypatch.setattr(cuda_graphs, "_on_cuda", lambda x: True)
    return "cpu"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.forwards = 0

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        return self.head(y.mean((2, 3)))


def network(device, **options):
    torch.manual_seed(0)
    model = Net().eval()
    model.bn.running_mean.uniform_(-1, 1)
    return fastnets.optimize(model.to(device), cuda_graphs=True, **options)


def image(device, *size):
    return torch.randn(*(size or (2, 3, 6, 6))).to(device)


def graphs_of(model):
    known = cuda_graphs._networks.get(model)
    return [] if known is None else [graph for _, graph in known.graphs.values()]


def warm(model, x):
    """Two calls: the second captures."""
    with torch.no_grad():
        model(x)
        model(x)
    assert len(graphs_of(model)) >= 1


@torch.no_grad()
def check(model, x):
    """That a call gives what the stock network gives."""
    stock = fastnets.restore(copy.deepcopy(model))
    y = model(x)
    assert_close_to(copy.deepcopy(stock).double()(x.double()).cpu(), stock(x).cpu(), y.cpu())
    return y


def test_the_second_call_captures_and_later_ones_replay(device):
    model, x = network(device, backend="reference"), image(device)  # which folds nothing
    with torch.no_grad():
        model(x)
        assert not graphs_of(model)
    for _ in range(3):
        check(model, image(device))
    (graph,) = graphs_of(model)
    if device == "cpu":
        assert graph.graph.replays == 3


def test_results_are_the_callers_own(device):
    model = network(device)
    warm(model, image(device))
    x, other = image(device), image(device)
    with torch.no_grad():
        y = model(x)
        kept, input_before = y.clone(), x.clone()
        model(other)
        assert torch.equal(y, kept)
        assert torch.equal(x, input_before)
        y.add_(1)
        assert torch.equal(model(x), kept)


def test_one_graph_for_each_kind_of_call(device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MOST", 3)
    model = network(device, backend="reference")
    sizes = [(1, 3, 6, 6), (2, 3, 6, 6), (2, 3, 8, 8)]
    for size in sizes:
        warm(model, image(device, *size))
    assert len(graphs_of(model)) == 3
    last = image(device).contiguous(memory_format=torch.channels_last)
    before = graphs_of(model)
    check(model, image(device, *sizes[0]))  # used: the second goes
    warm(model, last)
    assert len(graphs_of(model)) == 3
    assert before[0] in graphs_of(model)
    assert before[1] not in graphs_of(model)
    check(model, last)


def test_weights_may_change_in_place(device):
    model = network(device, backend="reference")
    warm(model, image(device))
    (graph,) = graphs_of(model)
    with torch.no_grad():
        model.conv.weight.mul_(2)
        model.bn.running_mean.add_(1)
        model.head.weight.data.mul_(3)
    check(model, image(device))
    assert graphs_of(model) == [graph]


CHANGES = {
    "data": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2),
    "to": lambda m: m.double() and m.float(),
    "assign": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "parameter": lambda m: setattr(m.head, "bias", nn.Parameter(m.head.bias.detach() + 1)),
    "buffer": lambda m: setattr(m.bn, "running_var", m.bn.running_var * 4),
    "module": lambda m: setattr(m, "head", nn.Linear(8, 5).to(m.head.weight.device)),
    "folded": lambda m: m.bn.running_var.mul_(4),
    "refresh": lambda m: (m.bn.running_var.data.mul_(4), fastnets.refresh(m)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_cannot_see_makes_a_new_one(device, change):
    model, x = network(device), image(device)
    warm(model, x)
    with torch.no_grad():
        CHANGES[change](model)
    for _ in range(3):
        check(model, x)


def test_it_runs_as_usual_where_a_replay_would_be_wrong(device):
    model, x = network(device, backend="reference"), image(device)
    warm(model, x)
    (graph,) = graphs_of(model)
    replays = getattr(graph.graph, "replays", None)
    model(x).sum().backward()
    assert model.conv.weight.grad is not None
    with torch.no_grad():
        hooked = []
        handle = model.bn.register_forward_hook(lambda *_: hooked.append(1))
        check(model, x)
        handle.remove()
        assert hooked
        with torch.autocast(device, torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        torch.func.vmap(model)(x[None])
        before = model.bn.num_batches_tracked.clone()
        model.train()
        model(x)
        assert model.bn.num_batches_tracked == before + 1
        model.eval()
        with fastnets.backend("library"):
            check(model, x)
        assert getattr(graph.graph, "replays", None) == replays
    check(model, x)


def test_copies_pickles_and_restore_leave_graphs_out(device):
    model, x = network(device), image(device)
    warm(model, x)
    twin = copy.deepcopy(model)
    assert not graphs_of(twin)
    check(twin, x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    warm(again, x)
    check(again, x)
    fastnets.restore(model)
    assert type(model) is Net
    assert not graphs_of(model)
    check(fastnets.optimize(model), x)


def test_a_forward_that_cannot_be_captured_says_so(device, monkeypatch):
    class Peeks(Net):
        def forward(self, x):
            return {"logits": super().forward(x), "size": torch.Size((1,)), "odd": _Odd()}

    model = Peeks().eval().to(device)
    model = fastnets.optimize(model, cuda_graphs=True)
    x = image(device)
    with torch.no_grad():
        model(x)
        with pytest.warns(UserWarning, match="no CUDA graph of Peeks could be captured.*returns a _Odd"):
            model(x)
        assert model(x)["logits"].shape == (2, 5)
    assert "cannot be captured" in str(fastnets.explain(model))
    assert not graphs_of(model)


class _Odd:
    pass


def test_explain_counts_them(device):
    model = network(device)
    assert "CUDA graphs: 0 captured" in str(fastnets.explain(model))
    warm(model, image(device))
    assert "CUDA graphs: 1 captured" in str(fastnets.explain(model))
    assert "CUDA graphs" not in str(fastnets.explain(fastnets.optimize(Net())))


def test_explain_says_why_the_last_call_ran_as_usual(device):
    model, x = network(device), image(device)

    def reason():
        return str(fastnets.explain(model)).partition("the last call ran as usual: ")[2]

    model(x)
    assert reason().startswith("gradients are enabled")
    with torch.no_grad():
        model(x)
        assert not reason()
        model(x=x)
        assert reason().startswith("keyword arguments (x)")
        with torch.autocast(device, torch.bfloat16):
            model(x)
        assert reason().startswith("autocast is enabled")
        handle = model.bn.register_forward_hook(lambda *_: None)
        model(x)
        assert reason().startswith("bn has a hook")
        handle.remove()
        model.head.train()
        model(x)
        assert reason().startswith("head is in training mode")
        model.eval()
        check(model, x)
        assert not reason()


def test_a_network_that_writes_into_its_inputs_is_not_captured(device):
    class Writes(Net):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, x = fastnets.optimize(Writes().eval().to(device), cuda_graphs=True), image(device)
    expected = x * 8
    with torch.no_grad():
        model(x)
        with pytest.warns(UserWarning, match="writes into its inputs"):
            model(x)
        model(x)
    torch.testing.assert_close(x, expected)


def test_moving_or_converting_frees_the_graphs(device):
    model, x = network(device), image(device)
    warm(model, x)
    held = [weakref.ref(t) for graph in graphs_of(model) for t in graph.inputs]
    model.bfloat16()
    assert not graphs_of(model)
    assert not any(t() is not None for t in held)
    warm(model, x.bfloat16())
    assert graphs_of(model)


def test_on_the_cpu_nothing_is_captured():
    model, x = network("cpu"), torch.randn(2, 3, 6, 6)
    for _ in range(3):
        check(model, x)
    assert cuda_graphs._networks.get(model) is None


def test_a_network_that_is_not_rewritten_is_refused():
    with pytest.raises(ValueError, match="cuda_graphs=True: the forward of Linear"):
        fastnets.optimize(nn.Linear(3, 4), cuda_graphs=True)
