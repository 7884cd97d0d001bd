"""Attention's kernels against stock PyTorch in float64, forward and backward, in every lane."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fastnets.bench.passes import nbytes
from fastnets.kernels.attention import attention_forward
from fastnets.kernels.attention_backward import attention_backward
from fastnets.kernels.attention_calls import attention_calls
from fastnets.kernels.attention_problem import Options
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to, assert_exact, integers
from tests.kernels.attention_cases import Case, cases, stock, tensors_of
from tests.lanes import STRICT_LANES

SAMPLED = {"derandomize": True, "deadline": None, "database": None, "phases": [Phase.generate]}
SAMPLED["suppress_health_check"] = list(HealthCheck)


def run(lane, case, t, config=None):
    """(o, dq, dk, dv, dbias) of our kernels."""
    q, k, v, dout, mask, bias, slopes = (
        lane.put(x) for x in (t.q, t.k, t.v, t.dout, t.mask, t.bias, t.slopes)
    )
    extra = {"bias": bias, "mask": mask, "slopes": slopes}
    with lane:
        o, lse = attention_forward(q, k, v, case.options, **extra, keep_lse=True)
        gradients = attention_backward(
            dout, None, q, k, v, o, lse, case.options, **extra, bias_gradient=bias is not None
        )
    return o, *gradients


def check(lane, case, t=None, one_hot=False):
    """one_hot: weights are, so that dq, dk and dbias are differences of numbers much greater than they."""
    t = t or tensors_of(case)
    ours = run(lane, case, t)
    reference, same = stock(case, t, torch.float64), stock(case, t, case.dtype)
    for name, exact, theirs, result in zip(("o", "dq", "dk", "dv", "dbias"), reference, same, ours):
        assert (exact is None) == (result is None), name
        if exact is None:
            continue
        lone = exact.norm() <= 1e-12 * cancelling(case, t)
        if name in ("dq", "dk", "dbias") and (one_hot or lone):
            # Likewise where every query sees one key.
            error = (result.double().cpu() - exact).norm()
            allowed = 3 * (theirs.double() - exact).norm()
            assert error <= allowed + torch.finfo(case.dtype).eps * cancelling(case, t), name
            continue
        ratio = 2.0 if name == "o" else 3.0
        if name == "dv" and one_hot:
            # The backward has p = 2^(s - lse) of fp32 s and lse: an ulp of theirs is as much of p.
            error, theirs_error = (result.double().cpu() - exact).norm(), (theirs.double() - exact).norm()
            largest = t.q.double().norm(dim=-1).max() * t.k.double().norm(dim=-1).max() * case.options.scale
            if t.bias is not None:
                largest = largest + t.bias.double().abs().max()
            assert error <= ratio * theirs_error + 2**-23 * largest * exact.norm(), name
            continue
        if case.dtype == torch.float32:
            # Made of three TF32 products, which carry 22 bits; stock may be exact.
            error, theirs_error = (result.double().cpu() - exact).norm(), (theirs.double() - exact).norm()
            if error <= ratio * theirs_error + 2**-22 * exact.norm():
                continue
        try:
            assert_close_to(exact, theirs, result, ratio)
        except AssertionError as error:
            raise AssertionError(f"{name} of {case}: {error}") from error


def cancelling(case, t):
    q, k, v, dout = (x.double().norm() for x in (t.q, t.k, t.v, t.dout))
    return dout * v * max(1.0, q * case.options.scale, k * case.options.scale)


@pytest.mark.lanes("interpreter", "gpu")
@settings(max_examples=8, **SAMPLED)
@given(case=cases(lengths=(1, 7, 64, 97)))
def test_sampled(lane, case):
    check(lane, case)


@pytest.mark.lanes("sm_80", "sm_90")
@settings(max_examples=3, **SAMPLED)
@given(case=cases(lengths=(1, 7, 64, 97), head_dims=(16, 40, 64)))
def test_sampled_compiled(lane, case):
    check(lane, case)


@pytest.mark.slow
@settings(max_examples=60, **SAMPLED)
@given(case=cases(head_dims=(16, 32, 40, 64, 72, 80, 96, 128)))
def test_sampled_widely(lane, case):
    check(lane, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vision_transformer(lane, dtype):
    length = 197 if lane.name in ("interpreter", "gpu") else 97
    check(lane, Case(D=64, M=length, N=length, H=1, dtype=dtype))


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_kept_in_registers(lane, dtype):
    check(lane, Case(D=128, M=70, N=97, H=1, right=0, dtype=dtype))
    check(lane, Case(D=72, M=130, N=70, H=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits(lane, dtype):
    # Scores of ten thousand and more: weights are nearly one-hot, and no exponential may overflow.
    check(lane, Case(D=64, M=33, N=70, H=1, dtype=dtype, magnitude=110.0), one_hot=True)


def test_large_bias(lane):
    case = Case(M=33, N=70, bias="full")
    t = tensors_of(case)
    t.bias.mul_(1e4)
    check(lane, case, t, one_hot=True)


def test_equal_scores_average_exactly(lane):
    v, dout = integers(1, 1, 64, 16), integers(1, 1, 64, 16)
    q, k = torch.zeros(1, 1, 64, 16), integers(1, 1, 64, 16)
    for dtype in (torch.float32, torch.bfloat16):
        parts = [lane.put(x.to(dtype)) for x in (q, k, v, dout)]
        with lane:
            o, lse = attention_forward(*parts[:3], Options(1.0), keep_lse=True)
            _, dk, dv, _ = attention_backward(parts[3], None, *parts[:3], o, lse, Options(1.0))
        assert_exact(v.mean(2, keepdim=True).expand_as(v), o)
        assert_exact(dout.mean(2, keepdim=True).expand_as(v), dv)
        assert_exact(torch.zeros_like(k), dk)
        assert_exact(torch.full((1, 1, 64), 6.0), lse)


@pytest.mark.lanes("interpreter", "gpu")
def test_the_same_bits_every_time(lane):
    case = Case(D=32, M=70, N=70, B=2, bias="heads", dtype=torch.bfloat16)
    t = tensors_of(case)
    first = run(lane, case, t)
    for _ in range(2):
        for one, again in zip(first, run(lane, case, t)):
            assert_exact(one, again)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    check(lane, Case(D=16, M=70, N=70, H=1, right=0, dtype=torch.float16))
    # fp32's tiles of a bias are of one warp's rows: the others write the same, which counts as a race.
    check(lane, Case(D=40, M=7, N=70, H=1, bias="heads", mask="bool", dtype=torch.bfloat16))


def observed(call):
    """(bytes moved, the compulsory ones) of forward and backward, as ``bench.traffic`` counts."""
    q, k, v, options, _ = call.tensors()
    o, lse = call.result()
    size = {name: nbytes(x) for name, x in zip(["q", "k", "v", "o", "lse"], (q, k, v, o, lse))}
    launches: list = []
    with observe_launches(launches.append):
        attention_forward(q, k, v, options)
    forward = sum(nbytes(x) for one in launches for x in (*one.reads, *one.writes))
    launches.clear()
    with observe_launches(launches.append):
        attention_backward(o, None, q, k, v, o, lse, options)
    backward = sum(nbytes(x) for one in launches for x in (*one.reads, *one.writes))
    inputs = size["q"] + size["k"] + size["v"]
    return forward, inputs + size["o"], backward, 2 * inputs + 2 * size["o"] + size["lse"]


@pytest.mark.parametrize("name", ["ViT-B bf16", "ViT-B fp32", "4096 causal fp16"])
def test_traffic_is_near_the_compulsory(name):
    forward, least_forward, backward, least_backward = observed(attention_calls()[name])
    assert least_forward <= forward <= 1.15 * least_forward
    assert least_backward <= backward <= 1.3 * least_backward
    print(f"{name}: forward {forward / least_forward:.3f}, backward {backward / least_backward:.3f}")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(1, 2, 9)}, ValueError, "query has 3 dims"),
        ({"v": torch.ones(1, 2, 9, 16).half()}, TypeError, "value is torch.float16, query torch.float32"),
        ({"v": torch.ones(1, 2, 9, 300)}, ValueError, "value has head dim 300, at most 256"),
        ({"k": torch.ones(1, 3, 9, 16), "v": torch.ones(1, 3, 9, 16)}, ValueError, "no multiple of the 3"),
        ({"mask": torch.ones(1, 1, 9, 8) > 0}, ValueError, "attn_mask is .* does not broadcast"),
        ({"mask": torch.ones(1, 1, 9, 9).int()}, TypeError, "attn_mask is torch.int32"),
        ({"bias": torch.ones(1, 1, 9, 9) > 0}, TypeError, "bias is torch.bool"),
        ({"slopes": torch.ones(1, 2).half()}, ValueError, "alibi_slopes"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {name: torch.ones(1, 2, 9, 16) for name in "qkv"} | {"options": Options(1.0)} | change
    with pytest.raises(error, match=message):
        attention_forward(**arguments)
