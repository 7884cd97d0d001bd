"""Attention of a few queries, its keys split among programs, against stock PyTorch in float64."""

import pytest
import torch

from fastnets.bench.passes import nbytes
from fastnets.kernels.attention_decode import attention_decode, representative_calls
from fastnets.kernels.attention_problem import Options
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.attention_cases import Case, stock, tensors_of
from tests.lanes import STRICT_LANES

CASES = {
    "one query, grouped": Case(M=1, N=300, H=4, group=2, dtype=torch.bfloat16),
    "three, all terms": Case(
        D=40, M=3, N=197, H=4, group=4, right=0, bottom_right=True, left=37, mask="bool", bias="heads",
        D_V=48, B=2,
    ),
    "head dim 128, soft-capped": Case(
        D=128, M=1, N=130, dtype=torch.float16, softcap=1.5, alibi=True, mask="padding", B=2
    ),
    "sees nothing": Case(M=4, N=70, left=3, right=0, mask="bool"),
}  # fmt: skip


def run(lane, case, t, **options):
    q, k, v, mask, bias, slopes = (lane.put(x) for x in (t.q, t.k, t.v, t.mask, t.bias, t.slopes))
    with lane:
        return attention_decode(q, k, v, case.options, bias=bias, mask=mask, slopes=slopes, **options)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_against_stock(lane, name, splits):
    case = CASES[name]
    t = tensors_of(case)
    exact, same = stock(case, t, torch.float64)[0], stock(case, t, case.dtype)[0]
    ours = run(lane, case, t, splits=splits)
    if case.dtype == torch.float32:  # made of three TF32 products, which carry 22 bits
        error, theirs = (ours.double().cpu() - exact).norm(), (same.double() - exact).norm()
        assert error <= 2 * theirs + 2**-22 * exact.norm()
    else:
        assert_close_to(exact, same, ours, ratio=2.0)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    case = CASES["three, all terms"].but(N=70)
    t = tensors_of(case)
    exact, same = stock(case, t, torch.float64)[0], stock(case, t, case.dtype)[0]
    error, theirs = (run(lane, case, t, splits=2).double() - exact).norm(), (same.double() - exact).norm()
    assert error <= 2 * theirs + 2**-22 * exact.norm()


def test_equal_scores_average_exactly(lane):
    v = integers(1, 2, 64, 16)
    q, k = (lane.put(x) for x in (torch.zeros(1, 2, 1, 16), integers(1, 2, 64, 16)))
    with lane:
        out = attention_decode(q, k, lane.put(v), Options(1.0), splits=4)
    assert_exact(v.mean(2, keepdim=True), out)


@pytest.mark.lanes("interpreter", "gpu")
def test_a_cache_that_grows_is_planned_once(lane, monkeypatch):
    from fastnets.kernels import attention_decode as module

    made = []
    problem = module.Problem
    monkeypatch.setattr(module, "Problem", lambda *a: made.append(1) or problem(*a))
    cache = [lane.put(torch.randn(1, 1, 90, 16)) for _ in range(2)]
    q = lane.put(torch.randn(1, 3, 1, 16))
    for filled in (70, 71, 90):
        k, v = (t[:, :, :filled] for t in cache)
        with lane:
            ours = attention_decode(q, k, v, Options(0.25), splits=2)
        exact = torch.softmax(q @ k.mT * 0.25, -1) @ v
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert len(made) == 1


def test_the_cache_is_read_once():
    call = next(c for c in representative_calls() if c.name == "Llama 70B, 4096 bf16")
    launches: list = []
    with observe_launches(launches.append):
        call.thunk(None)
    keys = 2 * 2 * 8 * 4096 * 128
    rest = 2 * 2 * 64 * 128
    moved = sum(nbytes(x) for one in launches for x in (*one.reads, *one.writes))
    assert keys + rest <= moved <= 1.15 * (keys + rest)


def test_more_queries_are_refused():
    with pytest.raises(ValueError, match="18 queries for a key head"):
        attention_decode(*[torch.ones(1, 2, 18, 16)] * 3, Options(1.0))
