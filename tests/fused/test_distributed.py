"""DDP, FSDP2 and SyncBatchNorm on 2 and 4 gloo processes that ``torchrun`` starts: trained as in one."""

import copy

import pytest

import fastnets
from tests.fused.networks import Classifier, settled
from tests.ranks import assert_all_pass, needs_gloo

WRAPPED = "tests.fused.distributed_cases"
SYNC_BATCH_NORM = "tests.fused.sync_batch_norm_cases"
TWO_OR_FOUR = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@needs_gloo
@TWO_OR_FOUR
def test_trained_by_many_as_by_one(ranks, tmp_path):
    assert_all_pass(WRAPPED, ranks, tmp_path)


@needs_gloo
@TWO_OR_FOUR
def test_trained_by_many_with_synchronised_statistics(ranks, tmp_path):
    assert_all_pass(WRAPPED, ranks, tmp_path, "SYNCHRONISED")


@needs_gloo
@TWO_OR_FOUR
def test_sync_batch_norm_is_batch_norm_of_all_images(ranks, tmp_path):
    assert_all_pass(SYNC_BATCH_NORM, ranks, tmp_path)


@needs_gloo
@pytest.mark.slow
def test_sync_batch_norm_compiled(tmp_path):
    assert_all_pass(SYNC_BATCH_NORM, 2, tmp_path, "COMPILED")


@needs_gloo
@pytest.mark.slow
def test_sync_batch_norm_by_our_kernels(tmp_path):
    assert_all_pass(SYNC_BATCH_NORM, 2, tmp_path, "INTERPRETED", TRITON_INTERPRET="1")


def test_an_optimized_network_is_copied_for_each_rank_alike():
    """Ranks build their graphs for themselves; the sources must not depend on the process."""
    first, second = (fastnets.optimize(settled(Classifier())) for _ in range(2))
    assert type(first) is type(second)
    assert type(copy.deepcopy(first)) is type(first)
