"""DDP and FSDP2 on two gloo ranks: the same step and the same answers as stock, in either order of wrapping.

Both ranks see the same images, so that the averaged gradient is the one a single process has.
"""

import copy
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastnets
from fastnets.fused.swap import Rewritten
from tests.fused.networks import Classifier, graphs, images, settled

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here"
)
X = (2, 3, 12, 12)


def _network():
    torch.manual_seed(0)
    return settled(Classifier())


def _step(model, optimizer, training):
    model.train(training)
    model(images(*X, seed=1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _answers(model):
    with torch.no_grad():
        return model(images(*X))


def _trained_alike(wrapped, training):
    """Answers before and after a step, beside those of a stock network in one process."""
    stock = _network()
    # Before the first forward: FSDP leaves the root's parameters unsharded after one.
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in (stock, wrapped)]
    torch.testing.assert_close(_answers(wrapped), _answers(stock), rtol=1e-4, atol=1e-4)
    before = _answers(stock)
    _step(stock, optimizers[0], training)
    _step(wrapped, optimizers[1], training)
    after = _answers(stock)
    assert not torch.allclose(after, before, atol=1e-3), "the step was too small to be seen"
    torch.testing.assert_close(_answers(wrapped), after, rtol=5e-3, atol=5e-3)


def ddp(training):
    fast = fastnets.optimize(_network())
    _trained_alike(torch.nn.parallel.DistributedDataParallel(fast), training)


def fsdp_root(training):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fast = fastnets.optimize(_network())
    fully_shard(fast)
    assert isinstance(fast, FSDPModule)
    assert isinstance(fast, Rewritten)
    _trained_alike(fast, training)


def fsdp_per_block(training):
    from torch.distributed.fsdp import fully_shard

    fast = fastnets.optimize(_network())
    for part in (fast.stem, fast.layer1[1].shortcut, *fast.layer1, fast):
        fully_shard(part)
    assert isinstance(fast.layer1[0], Rewritten)
    _trained_alike(fast, training)


def fsdp_then_optimize(training):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = _network()
    for part in (*model.layer1, model):
        fully_shard(part)
    assert fastnets.optimize(model, inplace=True) is model
    assert isinstance(model.layer1[0], Rewritten)
    assert isinstance(model.layer1[0], FSDPModule)
    assert "call_conv_bn" in graphs(model)
    _trained_alike(model, training)


def fsdp_then_restore(training):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = fastnets.optimize(_network())
    for part in (*model.layer1, model):
        fully_shard(part)
    fastnets.restore(model)
    for part in (*model.layer1, model):
        assert isinstance(part, FSDPModule)
        assert not isinstance(part, Rewritten)
    _trained_alike(model, training)


def ddp_in_place_under_the_wrapper(training):
    wrapped = torch.nn.parallel.DistributedDataParallel(_network())
    fastnets.optimize(wrapped, inplace=True)
    assert isinstance(wrapped.module, Rewritten)
    _trained_alike(wrapped, training)


CASES = (
    ddp,
    fsdp_root,
    fsdp_per_block,
    fsdp_then_optimize,
    fsdp_then_restore,
    ddp_in_place_under_the_wrapper,
)


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        for training in (False, True):
            try:
                case(training)
                results[case.__name__, training] = None
            except Exception:
                results[case.__name__, training] = traceback.format_exc()
            dist.barrier()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every case came to, on each rank: one pair of processes serves them all."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_on_two_ranks(outcomes, case, training):
    for rank, outcome in enumerate(outcomes):
        failure = outcome[case.__name__, training]
        assert failure is None, f"rank {rank}:\n{failure}"


def test_an_optimized_network_is_copied_for_each_rank_alike():
    """Ranks build their graphs for themselves; the sources must not depend on the process."""
    first, second = (fastnets.optimize(_network()) for _ in range(2))
    assert type(first) is type(second)
    assert type(copy.deepcopy(first)) is type(first)
