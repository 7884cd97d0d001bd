"""Statistics over ranks: what one process can tell. ``test_distributed.py`` runs the cases on several."""

import pytest
import torch
from torch import nn

from fastnets.fused.synchronize import group_of, merge_over_ranks, sum_over_ranks
from fastnets.kernels.batch_norm_training import Statistics


def test_one_process_has_nobody_to_synchronise_with():
    assert group_of(nn.SyncBatchNorm(4)) == ""


def test_statistics_of_another_dtype_are_refused():
    half = torch.zeros(1, 4, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"m2 is torch\.float16; statistics are kept in float32 or float64"):
        merge_over_ranks(Statistics(torch.zeros(1, 4), half, torch.zeros(1)), "0")
    with pytest.raises(TypeError, match=r"sums is torch\.float16"):
        sum_over_ranks(half, "0")
