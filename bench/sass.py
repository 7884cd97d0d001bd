"""Machine code of a compiled kernel, read: registers, spills, and what the hottest loop is made of.

A cubin is taken apart by the nvdisasm and cuobjdump that ship inside triton; no GPU and no CUDA toolkit is
needed. Loops are the natural loops of the control-flow graph (a back edge whose target dominates its source;
Aho, Lam, Sethi, Ullman, "Compilers", 9.6).
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Loop", "MachineCode", "read_cubin"]

MATRIX_OPS = re.compile(r"(HMMA|IMMA|QMMA|OMMA|DMMA|BMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)$")
# Doing one of these makes a loop more than a wait for a barrier.
WORK = re.compile(
    r"(\w*MMA|[FH]FMA2?|FADD2?|FMUL2?|LDG\w*|STG|LDS\w*|STS\w*|UTMALDG|UBLKCP|LDL|STL|RED|ATOM\w*)$"
)
BRANCH_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
ACCESS_BITS = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")
INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    predicate: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers: ``LDG`` of ``LDG.E.128``."""
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """Width of a memory access, per thread."""
        found = ACCESS_BITS.search(self.opcode)
        return int(found.group(1).strip("US")) if found else 32

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or bool(re.search(r"\bU?P\d", self.operands))


@dataclass(frozen=True)
class Loop:
    """One pass through a loop: instructions by base opcode, accesses to global memory by width in bits.

    opcodes: the whole opcodes, with their modifiers (``HGMMA.64x64x16.F32``).
    """

    instructions: int
    mix: Counter
    matrix: int
    global_loads: Counter
    async_copies: Counter
    opcodes: Counter = field(default_factory=Counter, repr=False)

    def share(self, *bases: str) -> int:
        return sum(self.mix[b] for b in bases)


@dataclass(frozen=True)
class MachineCode:
    """What one kernel became.

    registers: per thread. stack: bytes of local memory per thread. spills: loads and stores of local memory
    (LDL, STL). global_loads, global_stores, async_copies: instructions by width in bits, in the whole
    kernel. bulk_copies: tensor-map and bulk copies. loop: the innermost loop with most matrix instructions,
    or with most instructions. loops: all innermost ones, as they stand in the code.
    """

    registers: int
    stack: int
    instructions: int
    spills: int
    global_loads: Counter
    global_stores: Counter
    async_copies: Counter
    bulk_copies: int
    matrix_ops: frozenset
    loop: Loop | None
    mix: Counter = field(repr=False)
    loops: tuple = field(default=(), repr=False)


def read_cubin(cubin: bytes) -> MachineCode:
    """Disassembles and counts. Raises ``RuntimeError`` where the tools refuse the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = json.loads(_run_tool("nvdisasm", "-json", file.name))
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
    # The kernel is the longest function; the others are traps and the like.
    function = max(listing[1], key=lambda f: f["length"])
    code = [
        Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""))
        for i in function["sass-instructions"]
    ]
    code = _without_padding(code)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    mix = Counter(i.base for i in code)
    loops = _innermost_loops(code)
    return MachineCode(
        registers=int(found.group(1)),
        stack=int(found.group(2)),
        instructions=len(code),
        spills=mix["LDL"] + mix["STL"],
        global_loads=_widths(code, "LDG"),
        global_stores=_widths(code, "STG"),
        async_copies=_widths(code, "LDGSTS"),
        bulk_copies=mix["UTMALDG"] + mix["UBLKCP"],
        matrix_ops=frozenset(b for b in mix if MATRIX_OPS.match(b)),
        loop=max(loops, key=lambda loop: (loop.matrix, loop.instructions), default=None),
        mix=mix,
        loops=tuple(loops),
    )


def _run_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _without_padding(code: list[Instruction]) -> list[Instruction]:
    """Drops what follows the last exit: a branch to itself and NOPs that fill the last line."""
    end = len(code)
    while end and code[end - 1].base in ("NOP", "BRA") and _is_padding(code, end - 1):
        end -= 1
    return code[:end]


def _is_padding(code, i) -> bool:
    return code[i].base == "NOP" or _target(code[i]) == i


def _target(instruction: Instruction) -> int | None:
    """Index of the instruction that a branch goes to."""
    found = BRANCH_TARGET.search(instruction.operands)
    return int(found.group(1), 16) // INSTRUCTION_BYTES if found else None


def _widths(code, base: str) -> Counter:
    return Counter(i.bits for i in code if i.base == base)


def _innermost_loops(code: list[Instruction]) -> list[Loop]:
    blocks = _basic_blocks(code)
    loops = [
        loop
        for loop in _natural_loops(blocks)
        if any(WORK.match(code[i].base) for i in _inside(loop, blocks))
    ]
    innermost = [a for a in loops if not any(b["body"] < a["body"] for b in loops)]
    innermost.sort(key=lambda loop: loop["head"])
    return [_count([code[i] for i in _inside(loop, blocks)]) for loop in innermost]


def _inside(loop, blocks):
    """Instructions of a loop, less the blocks moved out of line behind it (waits that rarely happen)."""
    end = max(blocks[latch]["end"] for latch in loop["latches"])
    for start in sorted(loop["body"]):
        if start < end:
            yield from range(start, blocks[start]["end"])


def _count(code: list[Instruction]) -> Loop:
    mix = Counter(i.base for i in code)
    return Loop(
        instructions=len(code),
        mix=mix,
        matrix=sum(n for base, n in mix.items() if MATRIX_OPS.match(base)),
        global_loads=_widths(code, "LDG"),
        async_copies=_widths(code, "LDGSTS"),
        opcodes=Counter(i.opcode for i in code),
    )


def _basic_blocks(code: list[Instruction]) -> dict[int, dict]:
    """Blocks by their first instruction: end (exclusive) and successors."""
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.base in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            leaders.add(i + 1)
            target = _target(instruction) if instruction.base == "BRA" else None
            if target is not None:
                leaders.add(target)
    starts = sorted(leader for leader in leaders if leader < len(code))
    blocks = {}
    for start, end in zip(starts, [*starts[1:], len(code)]):
        last = code[end - 1]
        follow = []
        if last.base == "BRA" and _target(last) is not None:
            follow.append(_target(last))
        leaves = last.base in ("BRA", "EXIT", "RET", "BRX", "JMP") and not last.conditional
        if not leaves and end < len(code):
            follow.append(end)
        blocks[start] = {"end": end, "next": [f for f in follow if f in leaders and f < len(code)]}
    return blocks


def _natural_loops(blocks: dict[int, dict]) -> list[dict]:
    """Loops as {head, body: set of blocks, latches}, those with one head merged."""
    before: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for following in block["next"]:
            before[following].append(start)
    order, seen = [], set()
    stack = [(0, iter(blocks[0]["next"]))]
    seen.add(0)
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(blocks[following]["next"])))
                break
        else:
            order.append(node)
            stack.pop()
    order.reverse()
    # Dominators as sets: kernels have a few hundred blocks at most.
    dominators = {node: set(order) for node in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            reached = [dominators[p] for p in before[node] if p in dominators]
            new = set.intersection(*reached) | {node}
            if new != dominators[node]:
                dominators[node] = new
                changed = True
    loops: dict[int, dict] = {}
    for latch in order:
        for head in blocks[latch]["next"]:
            if head not in dominators[latch]:
                continue
            loop = loops.setdefault(head, {"head": head, "body": {head}, "latches": []})
            loop["latches"].append(latch)
            work = [latch]
            while work:
                node = work.pop()
                if node not in loop["body"]:
                    loop["body"].add(node)
                    work += [p for p in before[node] if p in dominators]
    return list(loops.values())
