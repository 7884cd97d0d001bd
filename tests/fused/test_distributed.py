"""DDP and FSDP2 on 2 and 4 gloo processes that ``torchrun`` starts: optimized networks train as in one."""

import copy

import pytest

import fastnets
from tests.fused.networks import Classifier, settled
from tests.ranks import assert_all_pass, needs_gloo

CASES = "tests.fused.distributed_cases"


@needs_gloo
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_trained_by_many_as_by_one(ranks, tmp_path):
    assert_all_pass(CASES, ranks, tmp_path)


def test_an_optimized_network_is_copied_for_each_rank_alike():
    """Ranks build their graphs for themselves; the sources must not depend on the process."""
    first, second = (fastnets.optimize(settled(Classifier())) for _ in range(2))
    assert type(first) is type(second)
    assert type(copy.deepcopy(first)) is type(first)
