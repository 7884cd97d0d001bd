"""DDP, FSDP2 and SyncBatchNorm on 2 and 4 gloo processes that ``torchrun`` starts: trained as in one."""

import copy

import pytest

import fastnets
from tests.fused.networks import Classifier, settled
from tests.ranks import assert_all_pass, needs_gloo

STATISTICS = "tests.fused.synchronize_cases"
SYNC_BATCH_NORM = "tests.fused.sync_batch_norm_cases"
WRAPPED = "tests.fused.distributed_cases"


@needs_gloo
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_train_as_one(ranks, tmp_path):
    assert_all_pass(ranks, tmp_path, *(f"{of}:CASES" for of in (STATISTICS, SYNC_BATCH_NORM, WRAPPED)))


@needs_gloo
@pytest.mark.slow
def test_compiled_on_ranks(tmp_path):
    assert_all_pass(2, tmp_path, f"{STATISTICS}:COMPILED", f"{SYNC_BATCH_NORM}:COMPILED")


@needs_gloo
@pytest.mark.slow
def test_sync_batch_norm_by_our_kernels(tmp_path):
    assert_all_pass(2, tmp_path, f"{SYNC_BATCH_NORM}:INTERPRETED", TRITON_INTERPRET="1")


def test_an_optimized_network_is_copied_for_each_rank_alike():
    """Ranks build their graphs for themselves; the sources must not depend on the process."""
    first, second = (fastnets.optimize(settled(Classifier())) for _ in range(2))
    assert type(first) is type(second)
    assert type(copy.deepcopy(first)) is type(first)
