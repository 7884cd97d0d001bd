"""Launches recorded once per kind of call: right for all tensors of the kind, and only where that is all."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from fastnets.kernels import replay
from fastnets.kernels.launch import Config, launch, observe_launches
from fastnets.kernels.replay import Replayed
from tests.accuracy import assert_exact
from tests.lanes import LANES

pytestmark = pytest.mark.lanes("sm_80", "gpu")


@triton.jit
def _combine(x, y, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0) + factor * tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, value, mask=i < n)


def combine_into(out, x, y, factor):
    n = out.numel()
    launch(_combine, (triton.cdiv(n, 32),), x, y, out, n, factor, config=Config(BLOCK=32), writes=(out,))


def combined(x, y, factor):
    out = torch.empty_like(x)
    combine_into(out, x, y, factor)
    return out


class Both(NamedTuple):
    first: torch.Tensor | None
    second: torch.Tensor | None


def nested(x, y, factor):
    z = combined(x, y, factor)
    return combined(z, x, 1.0), Both(None, z)


def counting(function):
    """``function``, and a list that grows whenever it is called itself."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return function(*arguments)

    return counted, calls


def pair(lane, n=100):
    return lane.put(torch.randint(-9, 9, (n,)).float()), lane.put(torch.randint(-9, 9, (n,)).float())


def test_from_the_third_call_on_nothing_is_decided(lane):
    counted, calls = counting(combined)
    call = Replayed(counted, (3.0,))
    results = []
    with lane:
        for _ in range(5):
            x, y = pair(lane)
            results.append((call((x, y)), x, y))
    assert len(calls) == 2
    for result, x, y in results:
        assert_exact((x + 3 * y).cpu(), result.cpu())


def test_two_launches_and_several_results(lane):
    counted, calls = counting(nested)
    call = Replayed(counted, (2.0,))
    with lane:
        for _ in range(4):
            x, y = pair(lane)
            sum_, both = call((x, y))
            assert both.first is None
            assert type(both) is Both
            assert_exact((2 * x + 2 * y).cpu(), sum_.cpu())
            assert_exact((x + 2 * y).cpu(), both.second.cpu())
    assert len(calls) == 2


def test_results_may_be_written_into_arguments(lane):
    def add_to(x, y):
        combine_into(x, x, y, 1.0)
        return x

    counted, calls = counting(add_to)
    call = Replayed(counted, ())
    with lane:
        for _ in range(4):
            x, y = pair(lane)
            expected = x + y
            assert call((x, y)) is x
            assert_exact(expected.cpu(), x.cpu())
    assert len(calls) == 2


def with_copy(x, y, factor):
    return combined(x.t().contiguous(), y, factor)


def with_item(x, y, factor):
    return combined(x, y, factor * float(x.flatten()[0]))


def with_stranger(x, y, factor, others=[]):  # noqa: B006
    if not others:
        others.append(torch.ones_like(x))
    return combined(x, others[0], factor)


def without_launch(x, y, factor):
    return torch.empty_like(x).fill_(factor)


@pytest.mark.parametrize("function", [with_copy, with_item, with_stranger, without_launch])
def test_what_does_more_than_launch_is_never_replayed(function, lane):
    counted, calls = counting(function)
    call = Replayed(counted, (2.0,))
    with lane:
        for i in range(4):
            x, y = (t.view(10, 10) for t in pair(lane))
            assert_exact(function(x, y, 2.0).cpu(), call((x, y)).cpu())
            assert len(calls) == i + 1


def test_views_of_arguments(lane):
    """Where kernels take addresses they are replayed; an emulator needs the tensor, and is given it."""

    def halves(x, factor):
        return combined(x[:64], x.detach()[64:], factor)

    call = Replayed(halves, (2.0,))
    with lane:
        for _ in range(4):
            x, _ = pair(lane, 128)
            assert_exact((x[:64] + 2 * x[64:]).cpu(), call((x,)).cpu())


def test_addresses_that_compiled_code_does_not_expect(lane):
    counted, calls = counting(combined)
    call = Replayed(counted, (1.0,))
    whole, _ = pair(lane, 101)
    with lane:
        for start in (1, 0, 0, 0, 1, 0):
            x, (y, _) = whole[start : start + 100], pair(lane)
            assert_exact((x + y).cpu(), call((x, y)).cpu())
    assert len(calls) == 3  # two to learn it, one off the 16 bytes


def test_one_tensor_given_twice_says_nothing_of_two(lane):
    call = Replayed(combined, (2.0,))
    with lane:
        for _ in range(3):
            x, y = pair(lane)
            assert_exact((3 * x).cpu(), call((x, x)).cpu())
        for _ in range(3):
            assert_exact((x + 2 * y).cpu(), call((x, y)).cpu())
            assert_exact((3 * x).cpu(), call((x, x)).cpu())


def test_observers_see_every_launch(lane):
    call, seen = Replayed(combined, (2.0,)), []
    x, y = pair(lane)
    with lane:
        for _ in range(3):
            call((x, y))
        with observe_launches(seen.append):
            call((x, y))
    assert [one.name for one in seen] == ["_combine"]


def test_a_call_that_fails_leaves_no_recorder(lane):
    def failing(x, y):
        combined(x, y, 1.0)
        raise ValueError("no")

    call = Replayed(failing, ())
    x, y = pair(lane)
    with lane:
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                call((x, y))
            assert replay.recorders.active is None


def test_another_driver_is_recorded_anew():
    call = Replayed(combined, (2.0,))
    for name in ("sm_80", "sm_90", "sm_80"):
        if LANES[name].unavailable():
            pytest.skip(LANES[name].unavailable())
        lane = LANES[name]
        with lane:
            for _ in range(3):
                x, y = pair(lane)
                assert_exact(x + 2 * y, call((x, y)))
