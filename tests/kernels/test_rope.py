"""Rotary embedding against the formula in float64, in every lane."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnets.kernels.launch import observe_launches
from fastnets.kernels.rope import rotate
from tests.accuracy import assert_close_to, assert_exact
from tests.lanes import STRICT_LANES

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def stock(x, cos, sin, rotary, interleaved, dtype):
    """As Hugging Face (halves) and timm (interleaved) write it, with tables as wide as what is rotated."""
    x = x.to(dtype)
    wide = torch.promote_types(dtype, FULL)
    if cos.shape[-1] != rotary:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))
    cos, sin = (t.to(wide)[:, None] for t in (cos, sin))
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        one, two = turned.chunk(2, -1)
        across = torch.cat([-two, one], -1)
    return torch.cat([(turned * cos + across * sin).to(dtype), rest], -1)


def tables(B, L, rotary, full, angles_differ):
    width = rotary if full and angles_differ else rotary // 2
    angle = torch.randn(B, L, width) * 3
    cos, sin = angle.cos(), angle.sin()
    return cos, sin


def check(lane, q, k, cos, sin, rotary, interleaved):
    q, k = lane.put(q).clone(memory_format=torch.preserve_format), lane.put(k)
    before = q.cpu().clone(), k.cpu().clone()
    outputs = [torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (q, k)]
    for t, out in zip((q, k), outputs):
        out[..., rotary:] = t[..., rotary:]
    with lane:
        arguments = (lane.put(cos), lane.put(sin), rotary)
        rotate(q, k, *arguments, interleaved=interleaved, out=outputs)
        rotate(q, k, *arguments, interleaved=interleaved, out=(q, k))
    for x, new, in_place in zip(before, outputs, (q, k)):
        reference = stock(x, cos, sin, rotary, interleaved, torch.float64)
        same = stock(x, cos, sin, rotary, interleaved, x.dtype)
        assert_close_to(reference, same, new, 2.0)
        assert_exact(new.cpu(), in_place.cpu())
    return before, outputs


def heads(B, Hq, Hk, L, D, dtype, packed=True):
    if packed:
        both = torch.randn(B, L, Hq + 2 * Hk, D).to(dtype)
        return both[:, :, :Hq].transpose(1, 2), both[:, :, Hq : Hq + Hk].transpose(1, 2)
    return torch.randn(B, Hq, L, D).to(dtype), torch.randn(B, Hk, L, D).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, D, rotary", [(BF16, 64, 64), (FULL, 80, 32)])
def test_queries_and_keys(lane, interleaved, dtype, D, rotary):
    q, k = heads(2, 4, 2, 9, D, dtype)
    check(lane, q, k, *tables(1, 9, rotary, True, True), rotary, interleaved)


@pytest.mark.lanes("interpreter", "gpu")
@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_shapes_strides_and_tables(lane, data):
    draw = data.draw
    D = draw(st.sampled_from([16, 40, 64, 80, 128, 256]))
    rotary = draw(st.sampled_from([D, D // 2]))
    B, L = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 65]))
    dtype = draw(st.sampled_from([FULL, HALF, BF16]))
    q, k = heads(B, draw(st.integers(1, 5)), draw(st.integers(1, 3)), L, D, dtype, draw(st.booleans()))
    table = tables(draw(st.sampled_from([1, B])), L, rotary, draw(st.booleans()), draw(st.booleans()))
    check(lane, q, k, *table, rotary, draw(st.booleans()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_inverse_turns_back(lane, interleaved):
    q, k = heads(1, 2, 1, 5, 32, FULL)
    cos, sin = tables(1, 5, 32, False, False)
    before, (q, k) = check(lane, q, k, cos, sin, 32, interleaved)
    with lane:
        options = {"interleaved": interleaved, "inverse": True}
        rotate(q, k, lane.put(cos), lane.put(sin), 32, out=(q, k), **options)
    for x, back in zip(before, (q, k)):
        torch.testing.assert_close(back.cpu(), x)


@pytest.mark.lanes("interpreter", "sm_80", "gpu")
def test_quarter_turns_are_exact(lane):
    q, k = (torch.randint(-8, 9, (1, 2, 4, 16)).float() for _ in range(2))
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])[None, :, None].repeat(1, 1, 16)
    sin = torch.tensor([0.0, 1.0, 0.0, -1.0])[None, :, None].repeat(1, 1, 16)
    out = [lane.put(torch.full_like(t, torch.nan)) for t in (q, k)]
    with lane:
        rotate(lane.put(q), lane.put(k), lane.put(cos), lane.put(sin), 16, out=out)
    for x, y in zip((q, k), out):
        one, two = x.chunk(2, -1)
        across = torch.cat([-two, one], -1)
        assert_exact(x * cos + across * sin, y)


@pytest.mark.lanes(*STRICT_LANES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_strictly(lane, interleaved):
    q, k = heads(1, 3, 1, 6, 48, HALF)
    check(lane, q, k, *tables(1, 6, 48, True, True), 48, interleaved)


def test_one_launch_that_moves_each_tensor_once():
    q, k = (t.to("meta") for t in heads(2, 8, 2, 128, 64, HALF))
    table = torch.empty(1, 128, 32, device="meta")
    seen = []
    with observe_launches(seen.append):
        rotate(q, k, table, table, 64, out=(q, k))
    (one,) = seen
    size = 2 * (q.numel() + k.numel())
    assert (one.bytes_read, one.bytes_written) == (size + 2 * 4 * table.numel(), size)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rotary": 7}, ValueError, "7 dims of 8 cannot be rotated"),
        ({"cos": torch.ones(1, 3, 8)}, ValueError, "cos is"),
        ({"k": torch.ones(2, 1, 3, 8)}, ValueError, "only heads may differ"),
        ({"q": torch.ones(2, 1, 4, 8).double()}, TypeError, "q is torch.float64"),
        ({"q": torch.ones(2, 1, 4, 16)[..., ::2]}, ValueError, "dims in a run"),
    ],
)
def test_bad_input(change, error, message):
    x, table = torch.ones(2, 1, 4, 8), torch.ones(1, 4, 8)
    arguments = {"q": x, "k": x, "cos": table, "sin": table, "rotary": 8, "out": (x, x), **change}
    with pytest.raises(error, match=message):
        rotate(**arguments)
