"""Batch norm over many machines: the two collectives that synchronised statistics take.

Forward: each rank sends the (mean, M2, count) of its images, [2C + 1] numbers, and gets everybody's, to be
merged by Chan's formula like any other tiles. Backward: the sums of dv and dv·x̂, [2, C], are added up over
the ranks. Both work on gloo and NCCL, are given their process group by name, which is what an op's schema
can carry, and are functional collectives: a compiler sees them as they are.

T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", Stanford STAN-CS-79-773, 1979.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastnets.kernels.batch_norm_training import Statistics

__all__ = ["group_of", "merge_over_ranks", "sum_over_ranks"]


def group_of(bn: nn.Module) -> str:
    """The name of the process group that ``bn`` would synchronise its statistics over now, "" if none.

    As in stock: a ``SyncBatchNorm`` in training mode, where more than one process has been initialised.
    """
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group = bn.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def merge_over_ranks(statistics: Statistics, group: str) -> Statistics:
    """Everybody's statistics, one tile for each rank and in the order of the ranks, by one all-gather.

    Args:
        statistics: of this rank, T tiles: mean [T, C], m2 [T, C], count [T], float32. None of T and no count
            need be above 0: a rank without images takes part and adds nothing.
        group: the process group's name; every rank of it must call, with the same C.

    Returns:
        Statistics of T = world size, alike on every rank bit for bit: so are the means and variances made
        from them, whatever each rank holds. Ranks may differ in the number of their images.

    Raises:
        TypeError: for statistics that are not float32.
    """
    _expect_float32("merge_over_ranks", **statistics._asdict())
    mean, m2, count = _merged(statistics)
    channels, ranks = mean.shape[1], _ranks_in(group)
    packed = torch.cat([mean.view(-1), m2.view(-1), count.view(1)])
    collectives = torch.ops._c10d_functional
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(packed, ranks, group))
    mean, m2, count = gathered.view(ranks, -1).split([channels, channels, 1], 1)
    return statistics._replace(mean=mean.contiguous(), m2=m2.contiguous(), count=count.contiguous().flatten())


def sum_over_ranks(sums: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``sums`` ([2, C] float32: Σdv, Σdv·x̂), by one all-reduce; ``sums`` is kept.

    The gradients of batch norm's own weight and bias are the *local* sums: whatever averages the other
    parameters' gradients over the ranks averages theirs. A rank without images sends zeros.

    Raises:
        TypeError: for sums that are not float32.
    """
    _expect_float32("sum_over_ranks", sums=sums)
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", group))


def _merged(statistics: Statistics) -> Statistics:
    """The tiles of this rank as one."""
    if statistics.mean.is_cuda and len(statistics.count):
        from fastnets.kernels.batch_norm_training import merge_statistics

        return merge_statistics(statistics)
    mean, m2, count = (tensor.double() for tensor in statistics)
    weights, total = count[:, None], count.sum()
    # A tile of no values may hold anything.
    mean, m2 = (torch.where(weights > 0, tensor, 0.0) for tensor in (mean, m2))
    merged = (weights * mean).sum(0) / total.clamp(min=1)
    spread = (m2 + weights * (mean - merged).square()).sum(0)
    return statistics._replace(mean=merged.float()[None], m2=spread.float()[None], count=total.float()[None])


@torch.compiler.assume_constant_result
def _ranks_in(group: str) -> int:
    return dist.distributed_c10d._resolve_process_group(group).size()


def _expect_float32(function: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{function}: {name} is {tensor.dtype}; statistics are kept in float32")
