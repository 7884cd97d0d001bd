"""What the compiler made of attention's kernels: no spills, and not many instructions."""

import functools

import pytest
import torch
import triton

from fastnets.bench import static
from fastnets.bench.pipes import bound_share, unit_cycles
from fastnets.kernels import attention, attention_backward
from fastnets.kernels.attention_calls import AttentionCall
from fastnets.kernels.attention_configs import _backward, _forward

MASK, DROPOUT, GROUPED = {"mask": torch.bool}, {"dropout_p": 0.1}, {"H": 8, "group": 4, "right": 0}
PACKED = {"B": 1, "sequences": 24}
CALLS = {
    "plain": {"B": 2},
    "causal": {"B": 2, "right": 0},
    "window": {"B": 2, "left": 511, "right": 0},
    "masked": {"B": 2, **MASK},
    "ALiBi": {"B": 2, "alibi": True, "right": 0},
    "soft-capped": {"B": 2, "softcap": 50.0, "right": 0},
    "dropout": {"B": 2, **DROPOUT},
    "masked, dropout": {"B": 2, **MASK, **DROPOUT},
    "grouped": {"B": 2, **GROUPED},
    "grouped, masked": {"B": 2, "H": 8, "group": 4, **MASK},
    "grouped, dropout": {"B": 2, **GROUPED, **DROPOUT},
    "packed": PACKED,
    "packed, causal": {**PACKED, "right": 0},
    "packed, dropout": {**PACKED, "right": 0, **DROPOUT},
    "packed, grouped": {**PACKED, **GROUPED},
}


def compiled(module, capability, config=None, **call):
    """Facts about the kernel itself; of the backward the delta pass comes first."""
    thunk = functools.partial(module._run, AttentionCall(keep_lse=True, **call))
    return static.inspect_call(thunk, config, capability=capability)[-1]


def check(capability, kind, D, dtype, N):
    for module in (attention, attention_backward):
        facts = compiled(module, capability, dtype=dtype, D=D, N=N, **CALLS[kind])
        where = f"{facts.name}, {facts.config}"
        assert facts.error is None, where
        assert facts.fits, where
        assert facts.code.spills == 0, f"{where}: {facts.code.spills} spills"


@pytest.mark.parametrize("capability", [80, 90])
def test_a_masked_vision_transformer_does_not_spill(capability):
    check(capability, "masked", 64, torch.bfloat16, 197)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["dropout", "grouped, dropout"])
def test_dropout_does_not_spill(kind, capability, D):
    check(capability, kind, D, torch.bfloat16, 197)


# In fp32 at head dim 128 no smaller tiles are left for these backward: see docs/attention.md.
SPILLING = {"masked", "masked, dropout", "grouped, masked", "grouped, dropout", "packed, dropout"}


@pytest.mark.slow
@pytest.mark.parametrize("N", [32, 197, 4096])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills(capability, kind, D, N):
    check(capability, kind, D, torch.bfloat16, N)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "D"), [(kind, D) for kind in CALLS for D in (64, 128) if D == 64 or kind not in SPILLING]
)
@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills_in_float32(capability, kind, D):
    check(capability, kind, D, torch.float32, 4096)


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("kind", ["causal", "window", "grouped", "packed"])
def test_queries_kept_in_registers_do_not_spill(kind, capability):
    call = {
        "causal": {"B": 2, "right": 0},
        "window": {"B": 2, "left": 511, "right": 0},
        "grouped": {"B": 1, "H": 32, "group": 4, "right": 0},
        "packed": {"B": 1, "sequences": 24, "left": 511, "right": 0},
    }
    facts = compiled(attention, capability, dtype=torch.bfloat16, D=128, N=4096, **call[kind])
    assert facts.code.spills == 0
    # Half of the products of a step read keys and half values; nothing else is read as fragments.
    step = min((loop for loop in facts.code.loops if loop.matrix), key=lambda loop: loop.instructions)
    assert step.mix["LDSM"] * 2 == step.matrix


# Instructions of one unmasked step in fp16, of Triton's own tutorial kernel 06-fused-attention (at 003da47,
# compiled by Triton 3.8 at the same tile): see docs/attention.md.
TUTORIAL_FORWARD = {
    (80, 64, (128, 64, 4, 3)): 649,
    (80, 64, (64, 64, 4, 3)): 368,
    (80, 128, (64, 64, 4, 3)): 679,
    (80, 128, (128, 64, 8, 2)): 488,
    (90, 64, (128, 64, 4, 3)): 514,
    (90, 64, (64, 64, 4, 3)): 298,
    (90, 128, (64, 64, 4, 3)): 353,
    (90, 128, (128, 64, 8, 2)): 354,
}
# Of a step of keys and one of queries.
TUTORIAL_BACKWARD = {
    (80, 64, (64, 32, 4, 3)): (261, 199),
    (80, 128, (64, 32, 8, 2)): (352, 296),
    (90, 64, (64, 32, 4, 3)): (198, 157),
    (90, 128, (64, 32, 8, 2)): (282, 260),
}
COUNTED = pytest.mark.skipif(
    not triton.__version__.startswith("3.8."), reason="other compilers make other instructions"
)


def steps(facts):
    """Instructions of the unmasked loops, by how many matrix instructions they have, most first."""
    counts: dict[int, list[int]] = {}
    for loop in facts.code.loops:
        if loop.matrix:
            counts.setdefault(loop.matrix, []).append(loop.instructions)
    return [min(counts[matrix]) for matrix in sorted(counts, reverse=True)]


@COUNTED
@pytest.mark.parametrize("case", TUTORIAL_FORWARD)
def test_a_step_forward_takes_no_more_instructions_than_the_tutorial_s(case, monkeypatch):
    capability, D, tile = case
    monkeypatch.setattr(attention, "check_config", lambda *arguments: None)
    call = {"dtype": torch.float16, "D": D, "N": 4096, "B": 2, "H": 16}
    (ours,) = steps(compiled(attention, capability, _forward(*tile), **call))
    assert ours <= TUTORIAL_FORWARD[case], f"{ours} instructions"


@COUNTED
@pytest.mark.parametrize("case", TUTORIAL_BACKWARD)
def test_a_step_backward_takes_no_more_instructions_than_the_tutorial_s(case, monkeypatch):
    capability, D, (n, step, warps, stages) = case
    monkeypatch.setattr(attention_backward, "check_config", lambda *arguments: None)
    call = {"dtype": torch.float16, "D": D, "N": 4096, "B": 2, "H": 16, "right": 0}
    config = _backward(n, step, n, step, warps, stages)
    ours = steps(compiled(attention_backward, capability, config, **call))
    for one, theirs in zip(ours, TUTORIAL_BACKWARD[case], strict=True):
        assert one <= theirs, f"{one} instructions"


@COUNTED
@pytest.mark.parametrize("N", [197, 4096])
@pytest.mark.parametrize(("capability", "D"), [(80, 64), (80, 128), (90, 64), (90, 128)])
def test_the_tensor_pipe_or_the_exponential_unit_bounds_a_step_forward(capability, D, N):
    facts = compiled(attention, capability, dtype=torch.float16, D=D, N=N, B=2, H=16)
    step = min((loop for loop in facts.code.loops if loop.matrix), key=lambda loop: loop.instructions)
    busy = unit_cycles(step, capability)
    assert bound_share(busy, "tensor", "exponential") >= 0.85, busy
