"""Attention's kernels against stock PyTorch in float64, forward and backward, in every lane."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fastnets.kernels.attention import attention_forward
from fastnets.kernels.attention_backward import attention_backward
from tests.accuracy import assert_close_to
from tests.kernels.attention_cases import Case, cases, stock, tensors_of

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


def check(lane, case):
    t = tensors_of(case)
    ours = run(lane, case, t)
    reference, same = stock(case, t, torch.float64), stock(case, t, case.dtype)
    for name, exact, theirs, result in zip(("o", "dq", "dk", "dv", "dbias"), reference, same, ours):
        assert (exact is None) == (result is None), name
        if exact is None:
            continue
        if name in ("dq", "dk", "dbias") and exact.norm() <= 1e-12 * cancelling(case, t):
            # Where every query sees one key, these are differences of equal numbers.
            assert result.double().norm() <= torch.finfo(case.dtype).eps * cancelling(case, t), name
            continue
        ratio = 2.0 if name == "o" else 3.0
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
@settings(max_examples=16, **SAMPLED)
@given(case=cases())
def test_sampled(lane, case):
    check(lane, case)


@pytest.mark.lanes("sm_80", "sm_90")
@settings(max_examples=3, **SAMPLED)
@given(case=cases(lengths=(1, 7, 64, 97), head_dims=(16, 40, 64)))
def test_sampled_compiled(lane, case):
    check(lane, case)


@pytest.mark.slow
@settings(max_examples=60, **SAMPLED)
@given(case=cases(head_dims=(16, 32, 40, 64, 72, 80, 96, 128, 192, 256)))
def test_sampled_widely(lane, case):
    check(lane, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vision_transformer(lane, dtype):
    check(lane, Case(D=64, M=197, N=197, H=1, dtype=dtype))
