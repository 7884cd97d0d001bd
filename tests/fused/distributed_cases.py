"""What every rank of a job checks of optimized networks that are trained by several processes.

Each rank has images of its own. What must come out is what one process gets that sees them all: in one batch
where statistics are synchronised or frozen, else slice by slice, each with its own statistics, as stock DDP
would have them. ``test_distributed.py`` starts the jobs.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnets
from fastnets.fused import dispatch, selection
from fastnets.fused.swap import Rewritten
from tests.accuracy import assert_close_to
from tests.fused.networks import Classifier, graphs, images, settled

STEPS = 3
IMAGES = (2, 3, 12, 12)  # of each rank
FULL = StateDictOptions(full_state_dict=True)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return settled(Classifier())


def _slices(step: int) -> list[Tensor]:
    """Every rank's images of a step."""
    return [images(*IMAGES, seed=100 * step + rank) for rank in range(dist.get_world_size())]


def _loss(answers: Tensor) -> Tensor:
    return answers.square().mean()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# --- one process --------------------------------------------------------------------------------------------


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _alone(dtype: torch.dtype, training: bool, together: bool, ranks_share_buffers: bool) -> nn.Module:
    """Stock after the steps, in one process, with the running statistics that this rank must have.

    together: all images in one batch. ranks_share_buffers: every step begins with those of rank 0, as under
    DDP; else each rank keeps its own.
    """
    model = _network().to(dtype).train(training)
    optimizer = _sgd(model)
    ranks = dist.get_world_size()
    kept = [_buffers(model) for _ in range(ranks)]
    for step in range(STEPS):
        slices = [x.to(dtype) for x in _slices(step)]
        if together:
            _loss(model(torch.cat(slices))).backward()
        else:
            before = [kept[0 if ranks_share_buffers else rank] for rank in range(ranks)]
            for rank, x in enumerate(slices):
                model.load_state_dict(before[rank], strict=False)
                (_loss(model(x)) / ranks).backward()
                kept[rank] = _buffers(model)
        optimizer.step()
        optimizer.zero_grad()
    if not together:
        model.load_state_dict(kept[dist.get_rank()], strict=False)
    return model


# --- many ---------------------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(fastnets.optimize(model))


def ddp_optimized_under_the_wrapper(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    fastnets.optimize(wrapped, inplace=True)
    assert isinstance(wrapped.module, Rewritten)
    return wrapped


def fsdp_root(model: nn.Module) -> nn.Module:
    fast = fastnets.optimize(model)
    fully_shard(fast)
    assert isinstance(fast, FSDPModule)
    assert isinstance(fast, Rewritten)
    return fast


def fsdp_per_block(model: nn.Module) -> nn.Module:
    fast = fastnets.optimize(model)
    for part in (fast.stem, fast.layer1[1].shortcut, *fast.layer1, fast):
        fully_shard(part)
    assert isinstance(fast.layer1[0], Rewritten)
    return fast


def fsdp_then_optimize(model: nn.Module) -> nn.Module:
    for part in (*model.layer1, model):
        fully_shard(part)
    assert fastnets.optimize(model, inplace=True) is model
    assert isinstance(model.layer1[0], Rewritten)
    assert isinstance(model.layer1[0], FSDPModule)
    assert "call_conv_bn" in graphs(model)
    return model


def fsdp_then_restore(model: nn.Module) -> nn.Module:
    fast = fsdp_per_block(model)
    fastnets.restore(fast)
    for part in (*fast.layer1, fast):
        assert isinstance(part, FSDPModule)
        assert not isinstance(part, Rewritten)
    return fast


def ddp_synchronised(model: nn.Module) -> nn.Module:
    """DDP refuses SyncBatchNorm on the CPU when it is made, and does not look again."""
    wrapped = DistributedDataParallel(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    return fastnets.optimize(wrapped, inplace=True)


def fsdp_synchronised(model: nn.Module) -> nn.Module:
    return fsdp_per_block(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): _whole(tensor) for name, tensor in state.items()}


def _train(model: nn.Module, training: bool) -> None:
    # Made before the first forward: FSDP leaves the root's parameters unsharded after one.
    optimizer = _sgd(model)
    model.train(training)
    for step in range(STEPS):
        _loss(model(_slices(step)[dist.get_rank()])).backward()
        optimizer.step()
        optimizer.zero_grad()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    # Not through DDP, which would take over the running statistics of rank 0 first.
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.no_grad():
        return model.eval()(x)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All of them in one vector, by name; what counts batches is compared apart."""
    return torch.cat(
        [tensors[name].flatten() for name in sorted(tensors) if tensors[name].is_floating_point()]
    )


def _assert_trained_as_alone(wrap: Callable, training: bool, synchronised: bool) -> None:
    model = wrap(_network())
    _train(model, training)
    shared = isinstance(model, DistributedDataParallel)
    exact, stock = (
        _alone(dtype, training, synchronised or not training, shared)
        for dtype in (torch.float64, torch.float32)
    )
    moved = (flat(dict(stock.named_parameters())) - flat(dict(_network().named_parameters()))).abs().max()
    assert moved > 1e-2, "the steps were too small to be seen"
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):
        theirs, ours = dict(of(stock)), _plain_names(dict(of(model)))
        assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
        assert_close_to(flat(dict(of(exact))).detach(), flat(theirs).detach(), flat(ours), ratio=3)
        for name, tensor in theirs.items():
            assert tensor.is_floating_point() or torch.equal(tensor, ours[name]), name
    x = images(*IMAGES)
    assert_close_to(answers(exact, x.double()), answers(stock, x), answers(model, x), ratio=3)


def _case(wrap: Callable, mode: str) -> Callable[[], None]:
    def case():
        _assert_trained_as_alone(wrap, training=mode != "frozen", synchronised=mode == "synchronised")

    case.__name__ = wrap.__name__ if mode == "synchronised" else f"{wrap.__name__}_{mode}"
    return case


# --- checkpoints --------------------------------------------------------------------------------------------


def _assert_same_network(stock: nn.Module, fast: nn.Module) -> None:
    theirs, ours = stock.state_dict(), _plain_names(fast.state_dict())
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    x = images(*IMAGES)
    exact = copy.deepcopy(stock).double()
    assert_close_to(answers(exact, x.double()), answers(stock, x), answers(fast, x))


def a_fused_checkpoint_of_ddp_loads_stock_and_back():
    model = ddp(_network())
    _train(model, True)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rank{dist.get_rank()}.pt"
        # Rank 0's, for running statistics differ between ranks.
        torch.save(model.module.state_dict(), path)
        stock = Classifier()
        stock.load_state_dict(torch.load(path))
        _assert_same_network(stock, model.module)
        torch.save(stock.state_dict(), path)
        other = fastnets.optimize(Classifier())
        answers(other, images(*IMAGES))  # packs the weights that the checkpoint replaces
        other.load_state_dict(torch.load(path))
        _assert_same_network(stock, other)


def a_full_checkpoint_of_fsdp_loads_stock_and_back():
    model = fsdp_per_block(_network())
    _train(model, True)
    full = get_model_state_dict(model, options=FULL)
    stock = Classifier()
    stock.load_state_dict(full)
    _assert_same_network(stock, model)
    torch.manual_seed(1)
    other = fsdp_per_block(settled(Classifier(), seed=1))
    answers(other, images(*IMAGES))
    other.reshard()  # a forward leaves the root's parameters whole
    set_model_state_dict(other, stock.state_dict(), options=FULL)
    _assert_same_network(stock, other)


def a_sharded_checkpoint_crosses():
    """Written by all ranks of a fused network, read into a stock one of other shards, and back."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    fused = fsdp_per_block(_network())
    _train(fused, True)
    # The running statistics of the ranks differ; a sharded checkpoint holds one of them.
    for buffer in fused.buffers():
        dist.broadcast(buffer, 0)
    dcp.save(get_model_state_dict(fused), checkpoint_id=os.path.join(folder[0], "fused"))
    stock = Classifier()
    fully_shard(stock)
    state = get_model_state_dict(stock)
    dcp.load(state, checkpoint_id=os.path.join(folder[0], "fused"))
    set_model_state_dict(stock, state)
    whole = Classifier()
    whole.load_state_dict(get_model_state_dict(stock, options=FULL))
    _assert_same_network(whole, fused)
    dcp.save(get_model_state_dict(stock), checkpoint_id=os.path.join(folder[0], "stock"))
    other = fsdp_root(settled(Classifier(), seed=1))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=os.path.join(folder[0], "stock"))
    set_model_state_dict(other, state)
    _assert_same_network(whole, other)


def rank_0_decides_what_all_ranks_run() -> None:
    model, x = _network(), torch.randn(IMAGES)
    fast, measured = fastnets.optimize(model), []
    run = selection._Selector.run
    with mock.patch.object(selection._Selector, "run", lambda self: measured.append(1) or run(self)):
        with mock.patch.dict(os.environ, FASTNETS_CACHE_DIR=tempfile.mkdtemp()):
            found = selection.select(model, fast, (x,))
    assert len(measured) == (dist.get_rank() == 0)
    assert found.layers
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [found, dict(dispatch._of_device(torch.device("cpu")))])
    assert all(found == gathered[0][0] for found, _ in gathered)
    for layer in found.layers:
        assert [table[layer.key] for _, table in gathered] == [layer.backend] * len(gathered)
    dispatch.forget_measurements()
    with pytest.raises(RuntimeError) as raised:
        selection.select(model, fast, (torch.randn(1, 7, 8, 8),))
    assert ("rank 0: " in str(raised.value)) == (dist.get_rank() > 0)


def what_is_sharded_is_not_measured() -> None:
    model = _network()
    fully_shard(model)
    with pytest.raises(ValueError, match="optimize it before it is sharded"):
        fastnets.optimize(model, torch.randn(IMAGES), select="measure", inplace=True)


WRAPPERS = (
    ddp,
    ddp_optimized_under_the_wrapper,
    fsdp_root,
    fsdp_per_block,
    fsdp_then_optimize,
    fsdp_then_restore,
)
CASES = (
    *(_case(wrap, mode) for wrap in WRAPPERS for mode in ("training", "frozen")),
    *(_case(wrap, "synchronised") for wrap in (ddp_synchronised, fsdp_synchronised)),
    a_fused_checkpoint_of_ddp_loads_stock_and_back,
    a_full_checkpoint_of_fsdp_loads_stock_and_back,
    a_sharded_checkpoint_crosses,
    rank_0_decides_what_all_ranks_run,
    what_is_sharded_is_not_measured,
)
