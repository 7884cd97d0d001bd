"""What every rank of a job checks of ``fused/synchronize.py``; ``test_distributed.py`` starts the jobs."""

import torch
import torch.distributed as dist
from torch import nn

from fastnets.fused.synchronize import group_of, merge_over_ranks, sum_over_ranks
from fastnets.kernels.batch_norm_training import Statistics
from tests.accuracy import assert_close_to, assert_exact

C = 5


def _everything() -> str:
    return dist.group.WORLD.group_name


def _values(rank: int, mean: float = 0.5, std: float = 2.0, times: int = 1) -> torch.Tensor:
    """The float64 values [count, C] that a rank holds: another number of them on each rank."""
    generator = torch.Generator().manual_seed(rank)
    offsets = torch.arange(C, dtype=torch.float64)
    return (
        mean
        + offsets
        + std * torch.randn(times * (20 + 7 * rank), C, generator=generator, dtype=torch.float64)
    )


def _tiles(values: torch.Tensor, size: int = 8) -> Statistics:
    """Statistics of the values in tiles of ``size`` and what is left over."""
    parts = values.split(size)
    mean = torch.stack([part.mean(0) for part in parts])
    m2 = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts])
    count = torch.tensor([len(part) for part in parts])
    return Statistics(mean.float(), m2.float(), count.float())


def _moments(statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance by Chan's formula in float64, of tiles that may be empty."""
    mean, m2, count = (tensor.double() for tensor in statistics)
    merged = (count[:, None] * mean).sum(0) / count.sum()
    return merged, (m2 + count[:, None] * (mean - merged).square()).sum(0) / count.sum()


def _assert_alike_on_every_rank(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        theirs = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, tensor)
        for other in theirs:
            assert torch.equal(other, tensor)


def ranks_with_different_counts():
    everybody = torch.cat([_values(rank) for rank in range(dist.get_world_size())])
    merged = merge_over_ranks(_tiles(_values(dist.get_rank())), _everything())
    ranks = dist.get_world_size()
    assert [t.shape for t in merged] == [(ranks, C), (ranks, C), (ranks,)]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in merged)
    assert_exact(torch.tensor([20.0 + 7 * rank for rank in range(ranks)]), merged.count)
    mean, var = _moments(merged)
    assert_close_to(everybody.mean(0), everybody.float().mean(0), mean.float(), ratio=2)
    assert_close_to(everybody.var(0, correction=0), everybody.float().var(0, correction=0), var.float())
    _assert_alike_on_every_rank(*merged)


def statistics_of_another_kind():
    """Plain tuples, and the means of fp32 maps in float64, which keep more of a large mean."""
    mean, m2, count = _tiles(_values(dist.get_rank(), 1e4, 1e-2))
    wide = merge_over_ranks((mean.double() + 1e-5, m2, count), _everything())
    assert type(wide) is tuple
    assert [t.dtype for t in wide] == [torch.float64, torch.float32, torch.float32]
    expected, _ = _moments(Statistics(mean.double() + 1e-5, m2, count))
    torch.testing.assert_close(wide[0][dist.get_rank()], expected, rtol=1e-14, atol=0)


def large_mean_with_small_variance():
    everybody = torch.cat([_values(rank, 1e4, 1e-2, 100) for rank in range(dist.get_world_size())])
    merged = merge_over_ranks(_tiles(_values(dist.get_rank(), 1e4, 1e-2, 100), 500), _everything())
    _, var = _moments(merged)
    # A mean of 1e4 is kept to 5e-4, the means of the tiles differ by 4e-4, and the variance is 1e-4.
    torch.testing.assert_close(var, everybody.var(0, correction=0), rtol=5e-3, atol=0)


def a_rank_without_images():
    """Whether it has no tile at all, or one of no values that nobody has written."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    everybody = torch.cat([_values(other) for other in range(ranks - 1)])
    nothing = Statistics(torch.empty(0, C), torch.empty(0, C), torch.empty(0))
    unwritten = Statistics(torch.full((1, C), torch.nan), torch.full((1, C), torch.nan), torch.zeros(1))
    for empty in (nothing, unwritten):
        merged = merge_over_ranks(_tiles(_values(rank)) if rank < ranks - 1 else empty, _everything())
        assert merged.count[-1] == 0
        assert not merged.mean[-1].any()
        assert not merged.m2[-1].any()
        mean, var = _moments(merged)
        torch.testing.assert_close(mean, everybody.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, everybody.var(0, correction=0), rtol=1e-6, atol=1e-6)


def sums_are_added_and_kept():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sums = torch.arange(2.0 * C).view(2, C) * (rank + 1)
    before = sums.clone()
    total = sum_over_ranks(sums, _everything())
    assert_exact(torch.arange(2.0 * C).view(2, C) * (ranks * (ranks + 1) // 2), total)
    assert_exact(before, sums)
    transposed = torch.full((C, 2), float(rank)).t()
    assert_exact(torch.full((2, C), ranks * (ranks - 1) / 2), sum_over_ranks(transposed, _everything()))


def overflow_is_everybodys():
    """An infinity of one rank's gradient reaches all, as in one process; nothing hides it."""
    sums = torch.ones(2, C)
    if dist.get_rank() == 0:
        sums[0, 0], sums[1, 1] = torch.inf, torch.nan
    total = sum_over_ranks(sums, _everything())
    assert total[0, 0] == torch.inf
    assert total[1, 1].isnan()
    assert (total.isfinite().sum() == 2 * C - 2).all()


def a_group_of_some_ranks():
    """``SyncBatchNorm(process_group=...)`` synchronises within that group only."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    halves = [list(range(ranks))[: ranks // 2 + 1], list(range(ranks))[ranks // 2 + 1 :]]
    groups = [dist.new_group(half) for half in halves if half]
    mine = next(i for i, half in enumerate(halves) if rank in half)
    bn = nn.SyncBatchNorm(C, process_group=groups[mine])
    if len(halves[mine]) == 1:
        assert group_of(bn) == "", "a group of one has nobody to wait for"
        return
    assert group_of(bn) == groups[mine].group_name != _everything()
    assert_exact(torch.full((2, C), float(sum(halves[mine]))),
                 sum_over_ranks(torch.full((2, C), float(rank)), group_of(bn)))  # fmt: skip
    merged = merge_over_ranks(_tiles(_values(rank)), group_of(bn))
    assert_exact(torch.tensor([20.0 + 7 * other for other in halves[mine]]), merged.count)


def who_synchronises():
    assert group_of(nn.SyncBatchNorm(C)) == _everything()
    assert group_of(nn.SyncBatchNorm(C).eval()) == ""
    assert group_of(nn.BatchNorm2d(C)) == ""
    # Stock decides by ``training``, whether or not there are running statistics.
    assert group_of(nn.SyncBatchNorm(C, track_running_stats=False)) == _everything()
    assert group_of(nn.SyncBatchNorm(C, track_running_stats=False).eval()) == ""


def compiled_in_one_graph():
    bn = nn.SyncBatchNorm(C)

    def both(mean, m2, count):
        merged = merge_over_ranks(Statistics(mean, m2, count), group_of(bn))
        return *merged, sum_over_ranks(merged.mean[:2], group_of(bn))

    tiles = _tiles(_values(dist.get_rank()))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*tiles), both(*tiles)):
        assert torch.equal(ours, expected)


CASES = (
    ranks_with_different_counts,
    statistics_of_another_kind,
    large_mean_with_small_variance,
    a_rank_without_images,
    sums_are_added_and_kept,
    overflow_is_everybodys,
    a_group_of_some_ranks,
    who_synchronises,
)
COMPILED = (compiled_in_one_graph,)
