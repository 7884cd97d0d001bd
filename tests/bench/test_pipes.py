"""Cycles of a multiprocessor's units, of loops written down by hand."""

from collections import Counter

import pytest

from fastnets.bench.pipes import bound_share, unit_cycles
from fastnets.bench.sass import Loop


def loop(**opcodes):
    named = Counter({opcode.replace("_", "."): count for opcode, count in opcodes.items()})
    return Loop(sum(named.values()), Counter(), 0, Counter(), Counter(), named)


def test_units_are_counted_at_their_rates():
    step = loop(HMMA_16816_F32=64, MUFU_EX2=34, FFMA=10, IMAD_WIDE=3, FMNMX=5, LDSM_16_M88_4=2, LDS=1)
    assert unit_cycles(step, 80) == {
        "issue": 119.0, "tensor": 512.0, "exponential": 272.0, "fp32": 26.0, "integer": 10.0, "shared": 36.0,
    }  # fmt: skip
    assert unit_cycles(step, 90)["fp32"] == 16.0


def test_a_warp_group_s_product_is_shared_by_its_four_warps():
    assert unit_cycles(loop(HGMMA_64x128x16_F32=4), 90)["tensor"] == 4 * 64


def test_the_share_is_of_the_busiest_unit():
    cycles = {"issue": 320.0, "tensor": 256.0, "exponential": 288.0}
    assert bound_share(cycles, "tensor", "exponential") == 0.9
    assert bound_share(cycles, "issue") == 1.0


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="capability=75"):
        unit_cycles(loop(FFMA=1), 75)
    with pytest.raises(ValueError, match=r"HMMA\.1688"):
        unit_cycles(loop(HMMA_1688_F32_TF32=1), 80)
