"""Which unit of a multiprocessor a loop keeps busy longest, by static count.

    busy = unit_cycles(facts.code.loop, capability=90)
    bound_share(busy, "tensor", "exponential")

A multiprocessor has four quarters, each with a scheduler of its own. Counted are the cycles for which one
warp's pass through a loop keeps each unit of its quarter busy; the longest bounds the loop, if all else
overlaps. Rates are those of the throughput tables in NVIDIA's CUDA programming guide and, for matrix units,
of the architectures' white papers (GA100, GH100). Shared memory is one unit for all quarters: an access
counts for the four warps that issue it side by side, as if free of bank conflicts. What wgmma reads of it by
itself is within the matrix units' rate and not counted. These are counts, not times.
"""

from __future__ import annotations

import re

from fastnets.bench.sass import Loop

__all__ = ["bound_share", "unit_cycles"]

# Multiply-adds of two-byte operands in a cycle of one quarter's matrix unit.
_MATRIX_RATE = {80: 256, 90: 512}
# Cycles that 32 lanes take: fp32 arithmetic, by architecture; the rest is alike on both.
_FP32 = {80: 2, 90: 1}
_HALF_RATE = 2
_EXPONENTIAL = 8
_ARITHMETIC = re.compile(r"(FADD|FMUL|FFMA)$")
_MULTIPLY_INTEGERS = re.compile(r"IMAD$")
_LOGIC = re.compile(
    r"(IADD3|VIADD|VIADDMNMX|VIMNMX|IMNMX|LEA|LOP3|ISETP|FSETP|SEL|FSEL|FMNMX|SHF|PRMT|PLOP3|F2FP|MOV)$"
)
_SHARED = re.compile(r"(LDS|STS|LDSM|STSM|LDGSTS|SHFL)$")


def unit_cycles(loop: Loop, capability: int) -> dict[str, float]:
    """Cycles for which one warp's pass keeps busy: issue, tensor, exponential, fp32, integer, shared.

    capability: 80 or 90; loops with other matrix instructions than HMMA.16816 and HGMMA raise ``ValueError``.
    """
    if capability not in _MATRIX_RATE:
        raise ValueError(f"unit_cycles: capability={capability} is not known (80 and 90 are)")
    cycles = dict.fromkeys(("issue", "tensor", "exponential", "fp32", "integer", "shared"), 0.0)
    cycles["issue"] = float(loop.instructions)
    for opcode, count in loop.opcodes.items():
        base = opcode.split(".")[0]
        if base in ("HMMA", "HGMMA"):
            cycles["tensor"] += count * _multiply_adds(opcode) / _MATRIX_RATE[capability]
        elif base == "MUFU":
            cycles["exponential"] += count * _EXPONENTIAL
        elif _ARITHMETIC.match(base):
            cycles["fp32"] += count * _FP32[capability]
        elif _MULTIPLY_INTEGERS.match(base):
            cycles["fp32"] += count * _HALF_RATE
        elif _LOGIC.match(base):
            cycles["integer"] += count * _HALF_RATE
        elif _SHARED.match(base):
            cycles["shared"] += count * 4 * _shared_bytes(opcode) / 128
    return cycles


def _multiply_adds(opcode: str) -> int:
    """Of one warp: a quarter of a warp group's."""
    if opcode.startswith("HMMA.16816."):
        return 16 * 8 * 16
    found = re.match(r"HGMMA\.64x(\d+)x16\.", opcode)
    if found is None:
        raise ValueError(f"unit_cycles: how much {opcode} multiplies is not known")
    return 16 * int(found.group(1)) * 16


def _shared_bytes(opcode: str) -> int:
    """What a warp moves."""
    if opcode.startswith(("LDSM", "STSM")):
        matrices = re.search(r"\.([24])$", opcode)
        return 128 * (int(matrices.group(1)) if matrices else 1)
    found = re.search(r"\.(128|64)\b", opcode)
    return 32 * (int(found.group(1)) // 8 if found else 4)


def bound_share(cycles: dict[str, float], *units: str) -> float:
    """The busiest of ``units`` by the busiest of all: 1 where one of them bounds the loop."""
    return max(cycles[unit] for unit in units) / max(cycles.values())
