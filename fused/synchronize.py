"""Batch norm over many machines: the two collectives that synchronised statistics take.

Forward: each rank sends the (mean, M2, count) of its images, [2C + 1] numbers, and gets everybody's, to be
merged by Chan's formula like any other tiles. Backward: the sums of dv and dv·x̂, [2, C], are added up over
the ranks. Both work on gloo and NCCL, are given their process group by name, which is what an op's schema
can carry, and are functional collectives: a compiler sees them as they are.

T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", Stanford STAN-CS-79-773, 1979.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["group_of", "merge_over_ranks", "name_of", "sum_over_ranks"]

# ``kernels.batch_norm_training.Statistics``, or a tuple of its three tensors
Statistics = TypeVar("Statistics", bound=tuple[Tensor, Tensor, Tensor])


def group_of(bn: nn.Module) -> str:
    """The name of the process group that ``bn`` would synchronise its statistics over now, "" if none.

    As in stock: a ``SyncBatchNorm`` in training mode, where more than one process has been initialised.
    """
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    return name_of(bn.process_group)


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name of a process group (None: of all processes); "" where it has one process only."""
    group = group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def merge_over_ranks(statistics: Statistics, group: str) -> Statistics:
    """Everybody's statistics, one tile for each rank and in the order of the ranks, by one all-gather.

    Args:
        statistics: of this rank, T tiles: mean [T, C], m2 [T, C], count [T], float32 or float64. None of T
            and no count need be above 0: a rank without images takes part and adds nothing.
        group: the process group's name; every rank of it must call, with the same C and dtypes.

    Returns:
        Statistics of T = world size, in the dtypes given, alike on every rank bit for bit: so are the means
        and variances made from them, whatever each rank holds. Ranks may differ in the number of images.

    Raises:
        TypeError: for statistics of another dtype.
    """
    for name, tensor in zip(("mean", "m2", "count"), statistics):
        _check_dtype("merge_over_ranks", name, tensor)
    dtypes = [tensor.dtype for tensor in statistics]
    channels, ranks = statistics[0].shape[1], _ranks_in(group)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    packed = torch.cat([tensor.to(wide).view(-1) for tensor in _merged(statistics)])
    collectives = torch.ops._c10d_functional
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(packed, ranks, group))
    mean, m2, count = gathered.view(ranks, -1).split([channels, channels, 1], 1)
    parts = [part.to(dtype).contiguous() for part, dtype in zip((mean, m2, count.flatten()), dtypes)]
    return _like(statistics, *parts)


def sum_over_ranks(sums: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``sums`` ([2, C]: Σdv, Σdv·x̂), by one all-reduce; ``sums`` itself is kept.

    The gradients of batch norm's own weight and bias are the *local* sums: whatever averages the other
    parameters' gradients over the ranks averages theirs. A rank without images sends zeros.

    Raises:
        TypeError: for sums that are neither float32 nor float64.
    """
    _check_dtype("sum_over_ranks", "sums", sums)
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", group))


def _merged(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles of this rank as one, of zeros where it has no values."""
    mean, m2, count = statistics
    if mean.is_cuda and len(count) > 1:
        from fastnets.kernels import batch_norm_training as kernels

        return kernels.merge_statistics(kernels.Statistics(mean, m2, count))
    # A tile of no values may hold anything.
    mean, m2 = (torch.where(count[:, None] > 0, tensor, 0.0) for tensor in (mean, m2))
    if len(count) == 1:
        return mean, m2, count
    mean, m2, weights = mean.double(), m2.double(), count.double()[:, None]
    total = weights.sum()
    merged = (weights * mean).sum(0) / total.clamp(min=1)
    return merged, (m2 + weights * (mean - merged).square()).sum(0), total


def _like(statistics: Statistics, *parts: Tensor) -> Statistics:
    """The parts as the kind of tuple that ``statistics`` is."""
    fields = getattr(statistics, "_fields", None)
    return parts if fields is None else statistics._replace(**dict(zip(fields, parts)))


@torch.compiler.assume_constant_result
def _ranks_in(group: str) -> int:
    return dist.distributed_c10d._resolve_process_group(group).size()


def _check_dtype(function: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: {name} is {tensor.dtype}; statistics are kept in float32 or float64")
