"""What autograd keeps is counted once, and nothing that is kept escapes the count."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastnets
from fastnets.fused.saved import SavedBytes
from tests.fused.networks import Classifier, images

FLOAT = 4


def kept(run, model: nn.Module | None = None) -> tuple[object, int]:
    saved = SavedBytes(model)
    with saved.watching():
        result = run()
    return result, saved.total


def test_memory_that_two_nodes_save_counts_once():
    x = torch.randn(8, requires_grad=True)

    def run():
        y = x.exp()  # saves its result
        return (y * y).sum(), y.view(2, 4).sin()  # saves y, twice, and a view of y

    assert kept(run)[1] == 8 * FLOAT


def test_a_view_keeps_all_of_its_storage():
    x = torch.randn(100).requires_grad_()
    assert kept(lambda: (x * 1)[:10].exp().log())[1] == 10 * FLOAT
    assert kept(lambda: (x * 1)[:10].sin())[1] == 100 * FLOAT


def test_memory_that_is_free_again_counts_again():
    x = torch.randn(64, requires_grad=True)

    def run():
        for _ in range(3):
            x.sin().sin()

    assert kept(run)[1] == (64 + 3 * 64) * FLOAT


def test_parameters_and_buffers_are_not_counted():
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4).eval())
    x = torch.randn(2, 16)
    assert kept(lambda: model(x), model)[1] == (2 * 16 + 2 * 4) * FLOAT
    assert kept(lambda: model(x))[1] > kept(lambda: model(x), model)[1]


class Alive(TorchDispatchMode):
    """Remembers every piece of memory that ops hand out, weakly."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self, *without: Tensor) -> int:
        left_out = {t.untyped_storage()._cdata for t in without}
        return sum(n for key, (ref, n) in self.seen.items() if key not in left_out and not ref.expired())


@pytest.mark.parametrize("save", ["auto", "less"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_step_keeps_nothing_that_is_not_counted(backend, save):
    """What lives between forward and backward is what was counted: nothing hangs on a node past autograd."""
    model = fastnets.optimize(Classifier(), backend=backend, save=save).to("meta").train()
    x = images(4, 3, 16, 16).to("meta")
    held = [*model.parameters(), *model.buffers(), x]
    with fastnets.fused.dispatch.assume_device_type("cuda"), Alive() as alive:
        y, counted = kept(lambda: model(x), model)
    # The image itself may be saved, and is not new.
    assert alive.bytes(y, *held) <= counted
    y.sum().backward()
    del y
