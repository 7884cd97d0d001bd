"""What every rank of a job checks of a fused SyncBatchNorm; ``test_distributed.py`` starts the jobs.

Over the ranks' images it must be what stock's batch norm is over all of them in one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnets
from tests.accuracy import assert_close_to
from tests.fused.distributed_cases import answers, flat
from tests.fused.networks import Residual, images, settled


def _blocks() -> nn.Module:
    """Convolution before batch norm and after it, with and without a residual; no head."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    behind = (nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    return settled(nn.Sequential(*stem, Residual(), Residual(shortcut=True), *behind)).train()


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _gradients_of(
    model: nn.Module, x: Tensor, upstream: Tensor, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    """Answers and the input's gradient of one forward and backward; the weights' are left in ``.grad``."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward(upstream.to(y.dtype))
    return y.detach(), x.grad


def _assert_as_one_batch(
    images_of_ranks: list[int],
    settle: Callable[[nn.Module], object] = lambda model: None,
    dtype: torch.dtype = torch.float32,
    finish: Callable[[nn.Module], nn.Module] = fastnets.optimize,
    size: int = 9,
    autocast: bool = False,
) -> None:
    """Two forwards and backwards over ranks that hold so many images each, and over all in one batch.

    settle: sets the networks' modes. finish: makes the network of the ranks from one with SyncBatchNorm.
    """
    count, rank = sum(images_of_ranks), dist.get_rank()
    make = {}
    for kind in ("exact", "stock", "ours"):
        make[kind] = _blocks()
        settle(make[kind])
        make[kind].to(torch.float64 if kind == "exact" else dtype)
    exact, stock = make["exact"], make["stock"]
    ours = finish(nn.SyncBatchNorm.convert_sync_batchnorm(make["ours"]))
    compared = []
    for step in range(2):
        x = images(count, 3, size, size, seed=step)
        upstream = images(count, 4, size - 2, size - 2, seed=10 + step)
        expected = _gradients_of(exact, x.double(), upstream.double())
        theirs = _gradients_of(stock, x.to(dtype), upstream.to(dtype), autocast)
        here = (t.to(dtype).split(images_of_ranks)[rank] for t in (x, upstream))
        mine = _gradients_of(ours, *here, autocast)
        assert mine[0].shape == theirs[0].split(images_of_ranks)[rank].shape
        compared += zip(expected, theirs, (_of_all_ranks(tensor) for tensor in mine))
    gradients = [flat({n: p.grad for n, p in model.named_parameters()}) for model in (exact, stock, ours)]
    dist.all_reduce(gradients[2])
    buffers = [flat(dict(model.named_buffers())) for model in (exact, stock, ours)]
    # Judged last: a rank that stopped at an error would leave the others waiting.
    for e, s, m in (*compared, gradients, buffers):
        if dtype == torch.float64:
            torch.testing.assert_close(m, e, rtol=1e-9, atol=1e-9)
        else:
            assert_close_to(e, s, m, ratio=3)
    for theirs, mine in zip(_norms(stock), _norms(ours)):
        assert theirs.num_batches_tracked == mine.num_batches_tracked


def _of_all_ranks(tensor: Tensor) -> Tensor:
    """The ranks' tensors, of as many images as each has, in one batch."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


def ranks_with_different_numbers_of_images():
    _assert_as_one_batch([1 + 2 * rank for rank in range(dist.get_world_size())])


def a_batch_norm_without_images():
    _assert_as_one_batch([3] * (dist.get_world_size() - 1) + [0])
    _assert_as_one_batch([0] + [4] * (dist.get_world_size() - 1))


def in_float64():
    _assert_as_one_batch([1 + 2 * rank for rank in range(dist.get_world_size())], dtype=torch.float64)


def by_the_reference():
    _assert_as_one_batch(
        [2] * dist.get_world_size(), finish=lambda model: fastnets.optimize(model, backend="reference")
    )


def under_autocast():
    _assert_as_one_batch([2] * dist.get_world_size(), autocast=True)


def images_of_different_sizes():
    """Each rank has its own resolution; to a 1×1 convolution all pixels are images of one pixel."""

    def make():
        torch.manual_seed(0)
        return settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())).train()

    def of_rank(channels: int, rank: int) -> Tensor:
        return images(2, channels, 3 + rank, 4, seed=10 * channels + rank)

    def in_one_batch(channels: int, dtype: torch.dtype) -> Tensor:
        everybody = [of_rank(channels, rank) for rank in range(dist.get_world_size())]
        pixels = [x.movedim(1, -1).reshape(-1, channels, 1, 1) for x in everybody]
        return torch.cat(pixels).to(dtype)

    ours = fastnets.optimize(nn.SyncBatchNorm.convert_sync_batchnorm(make()))
    y, dx = _gradients_of(ours, of_rank(3, dist.get_rank()), of_rank(8, dist.get_rank()))
    mine = [_of_all_ranks(t.movedim(1, -1).reshape(-1, t.shape[1], 1, 1)) for t in (y, dx)]
    exact, stock = (
        _gradients_of(make().to(dtype), in_one_batch(3, dtype), in_one_batch(8, dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for e, s, m in zip(exact, stock, mine):
        assert_close_to(e, s, m, ratio=3)


def with_cumulative_statistics():
    def settle(model):
        for bn in _norms(model):
            bn.momentum = None

    _assert_as_one_batch([2] * dist.get_world_size(), settle)


def without_weights():
    def settle(model):
        for bn in _norms(model):
            bn.affine, bn.weight, bn.bias = False, None, None

    _assert_as_one_batch([2] * dist.get_world_size(), settle)


def half_frozen():
    """Batch norms in evaluation among others in training: only these synchronise."""

    def settle(model):
        for bn in _norms(model)[::2]:
            bn.eval()

    _assert_as_one_batch([1 + rank for rank in range(dist.get_world_size())], settle)


def one_value_per_channel_on_each_rank():
    """Stock's error is for one value in all. So few leave a gradient that float32 hardly holds."""
    _assert_as_one_batch([1] * dist.get_world_size(), dtype=torch.float64, size=3)


def recomputed_in_backward():
    """Activation checkpointing runs the forward's collectives again, on all ranks alike."""

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    counts = [2] * dist.get_world_size()
    ours = fastnets.optimize(nn.SyncBatchNorm.convert_sync_batchnorm(_blocks()))
    plain = copy.deepcopy(ours)
    x = images(sum(counts), 3, 9, 9).split(counts)[dist.get_rank()]
    upstream = images(2, 4, 7, 7, seed=1)
    for again, once in zip(_gradients_of(Checkpointed(ours), x, upstream), _gradients_of(plain, x, upstream)):
        assert torch.equal(again, once)
    for again, once in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(again.grad, once.grad)


def evaluation_waits_for_nobody():
    ours = fastnets.optimize(nn.SyncBatchNorm.convert_sync_batchnorm(_blocks())).eval()
    if dist.get_rank() == 0:
        x = images(2, 3, 9, 9)
        stock = _blocks().eval()
        assert_close_to(
            answers(copy.deepcopy(stock).double(), x.double()), answers(stock, x), answers(ours, x)
        )
        _gradients_of(ours, x, images(2, 4, 7, 7))


def compiled():
    _assert_as_one_batch(
        [1 + rank for rank in range(dist.get_world_size())],
        finish=lambda model: torch.compile(fastnets.optimize(model), backend="aot_eager"),
    )


def by_triton():
    _assert_as_one_batch(
        [1 + rank for rank in range(dist.get_world_size())],
        finish=lambda model: fastnets.optimize(model, backend="triton"),
        size=5,
    )


CASES = (
    ranks_with_different_numbers_of_images,
    a_batch_norm_without_images,
    in_float64,
    by_the_reference,
    under_autocast,
    images_of_different_sizes,
    with_cumulative_statistics,
    without_weights,
    half_frozen,
    one_value_per_channel_on_each_rank,
    recomputed_in_backward,
    evaluation_waits_for_nobody,
)
COMPILED = (compiled,)
INTERPRETED = (by_triton,)
