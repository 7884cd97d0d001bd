"""Launches recorded once per kind of call: right for all tensors of the kind, and only where that is all."""

import dis
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastnets.bench.host_cost import dry_launches
from fastnets.kernels import replay
from fastnets.kernels.launch import Config, kernels_of_driver, launch, observe_launches
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


def with_item(x, y, factor):
    return combined(x, y, factor * float(x.flatten()[0]))


def with_stranger(x, y, factor, others=[]):  # noqa: B006
    if not others:
        others.append(torch.ones_like(x))
    return combined(x, others[0], factor)


def with_new_values(x, y, factor):
    return combined(x, torch.tensor([factor]).to(x.device).expand_as(x).contiguous(), factor)


def writing_into_an_argument(x, y, factor):
    return combined(x, y.mul_(-1.0), factor)


def choosing_by_values(x, y, factor):
    return combined(x, y, factor)[x[:, 0] > 0]


@pytest.mark.parametrize(
    "function", [with_item, with_stranger, with_new_values, writing_into_an_argument, choosing_by_values]
)
def test_what_no_replay_would_do_is_never_replayed(function, lane):
    counted, calls = counting(function)
    call = Replayed(counted, (2.0,))
    with lane:
        for i in range(4):
            x, y = (t.view(10, 10) for t in pair(lane))
            expected = function(x, y.clone(), 2.0)
            assert_exact(expected.cpu(), call((x, y)).cpu())
            assert len(calls) == i + 1


def test_views_of_arguments(lane):
    def halves(x, factor):
        return combined(x[:64], x.detach()[64:], factor)

    counted, calls = counting(halves)
    call = Replayed(counted, (2.0,))
    with lane:
        for _ in range(4):
            x, _ = pair(lane, 128)
            assert_exact((x[:64] + 2 * x[64:]).cpu(), call((x,)).cpu())
    assert len(calls) == 2


# --- PyTorch's operations between ours ----------------------------------------------------------------------


def convolution(x, weight, residual, factor):
    """A vendor's convolution, then one pass of ours."""
    return combined(F.conv2d(x, weight, padding=1), residual, factor)


def product(x, weight, bias, factor):
    """Views, a product in 2 dimensions, and a view that is returned."""
    y = F.linear(x.transpose(0, 1).contiguous(), weight, bias)
    return combined(y, y.new_ones(y.shape), factor).unflatten(-1, (2, -1)).permute(2, 0, 1, 3)


def halves(x, weight, residual, factor):
    """Several views of one result, and an operation that writes into it."""
    y = F.conv2d(x, weight, padding=1).flatten()
    first, second = y.chunk(2)
    second.mul_(factor)
    return combined(first, second, factor), second


def attended(x, weight, residual, factor):
    """A vendor's attention, which is random with dropout alone, and returns more than is used."""
    return combined(F.scaled_dot_product_attention(x, x, x), residual, factor)


def normalized(x, weight, residual, factor):
    """What PyTorch is asked about dtypes alone is no step."""
    y = F.layer_norm(x, x.shape[1:]).to(torch.promote_types(x.dtype, torch.float64))
    return y + factor * residual


def images(lane):
    x, residual = (torch.randint(-9, 9, (2, 4, 6, 6)).float() for _ in range(2))
    return lane.put(x), lane.put(torch.randint(-3, 3, (4, 4, 3, 3)).float()), lane.put(residual)


def rows(lane):
    shapes = (3, 5, 8), (6, 8), (6,)
    return tuple(lane.put(torch.randint(-9, 9, shape).float()) for shape in shapes)


def same(found, expected) -> None:
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        assert one.dtype == other.dtype
        assert_exact(other.cpu(), one.cpu())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "function, tensors",
    [(convolution, images), (product, rows), (halves, images), (attended, images), (normalized, images)],
)
def test_operations_of_pytorch_are_repeated_with_the_same_bits(function, tensors, inference, lane):
    counted, calls = counting(function)
    call = Replayed(counted, (2.0,))
    with lane, torch.inference_mode(inference), torch.set_grad_enabled(False):
        for _ in range(4):
            given = tensors(lane)
            same(call(given), function(*given, 2.0))
    assert len(calls) == 2


def test_what_was_recorded_in_inference_mode_serves_outside_it(lane):
    counted, calls = counting(convolution)
    call = Replayed(counted, (2.0,))
    with lane, torch.no_grad():
        for inference in (True, True, False, True, False):
            given = images(lane)
            with torch.inference_mode(inference):
                y = call(given)
            assert y.is_inference() == inference
            same(y, convolution(*given, 2.0))
    assert len(calls) == 2


def test_results_share_memory_as_they_did(lane):
    """An argument returned is itself, a view of one shares its memory, a new result is new each time."""

    def several(x, weight, residual, factor):
        return x, x[1:], convolution(x, weight, residual, factor)

    counted, calls = counting(several)
    call, seen = Replayed(counted, (2.0,)), []
    with lane, torch.no_grad():
        for _ in range(4):
            given = images(lane)
            itself, part, y = call(given)
            assert itself is given[0]
            assert part.data_ptr() == given[0][1:].data_ptr()
            seen.append(y)
    assert len(calls) == 2
    assert len({y.data_ptr() for y in seen}) == 4


def test_arguments_that_overlap(lane):
    call = Replayed(convolution, (2.0,))
    with lane, torch.no_grad():
        for overlap in (False, False, True, True, False):
            x, weight, residual = images(lane)
            if overlap:
                whole = torch.cat([x, residual])
                x, residual = whole[:2], whole[1:3]
            same(call((x, weight, residual)), convolution(x, weight, residual, 2.0))


def test_operations_on_addresses_that_compiled_code_does_not_expect(lane):
    counted, calls = counting(convolution)
    call = Replayed(counted, (2.0,))
    with lane, torch.no_grad():
        for start in (1, 0, 0, 0, 1, 0):
            x, weight, residual = images(lane)
            whole = x.new_zeros(x.numel() + 1)
            x = whole[start : start + x.numel()].view(x.shape).copy_(x)
            same(call((x, weight, residual)), convolution(x, weight, residual, 2.0))
    assert len(calls) == 3


@pytest.mark.parametrize("first", [False, True])
def test_autocast_is_not_recorded(first, lane):
    """What PyTorch casts to depends on autocast, which no kind of call tells."""

    def cast(x, weight, bias, factor):
        y = F.linear(x, weight, bias)
        return combined(y, y, factor)

    call = Replayed(cast, (2.0,))
    with lane, torch.no_grad():
        for enabled in (first, first, not first, not first, first, not first):
            given = rows(lane)
            with torch.autocast(lane.device, torch.bfloat16, enabled=enabled):
                y = call(given)
                assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
                same(y, cast(*given, 2.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        torch.rand_like,
    ],
)
def test_random_numbers_are_drawn_anew(function, lane):
    call = Replayed(function, ())
    x = lane.put(torch.ones(2, 2, 16, 16))
    with lane, torch.no_grad():
        results = [call((x,)) for _ in range(5)]
    assert call.never
    for i, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:i])


def test_what_has_a_gradient_is_not_replayed(lane):
    counted, calls = counting(lambda x, weight, residual: F.conv2d(x, weight, padding=1) + residual)
    call = Replayed(counted, ())
    with lane:
        for _ in range(4):
            x, weight, residual = images(lane)
            call((x, weight.requires_grad_(), residual)).sum().backward()
            assert weight.grad.abs().sum() > 0
    assert len(calls) == 4


def test_an_operation_that_fails_leaves_no_recorder(lane):
    call = Replayed(lambda x, y: combined(x @ y, y, 1.0), ())
    x, y = pair(lane)
    with lane, torch.no_grad():
        for _ in range(3):
            with pytest.raises(RuntimeError):
                call((x.view(1, 100), y.view(1, 100)))
            assert replay.recorders.active is None
            assert torch._C._len_torch_dispatch_stack() == 0


def test_what_dies_within_a_call_is_freed_there(lane):
    """A chain of ten needs no more memory replayed than run: its parts go when the next one is made."""
    alive = []

    def chain(x):
        for _ in range(10):
            x = x + 1.0
            alive.append(weakref.ref(x))
        return x

    call = Replayed(chain, ())
    with lane, torch.no_grad():
        for _ in range(2):
            call((lane.put(torch.zeros(8)),))
        names = call.program.__code__.co_names + call.program.__code__.co_varnames
        assert call((lane.put(torch.zeros(8)),)).tolist() == [10.0] * 8
    deleted = [i.argval for i in dis.get_instructions(call.program) if i.opname == "DELETE_FAST"]
    assert len(deleted) == 9
    assert {*deleted} < {*names}


def test_kernels_are_given_addresses_where_the_driver_takes_them(monkeypatch):
    """As Triton's own driver for CUDA does: of arguments, of views of them and of PyTorch's results."""
    launched = []

    def parts(x, y):
        z = x[:64] + 1.0
        return z, combined(z[32:], y[16:48], 2.0)

    call = Replayed(parts, ())
    with dry_launches(launched), torch.no_grad():
        monkeypatch.setattr(kernels_of_driver(), "takes_addresses", True)
        for _ in range(2):
            call((torch.randn(128), torch.randn(128)))
        for _ in range(2):
            x, y = torch.randn(128), torch.randn(128)
            z, out = call((x, y))
            *_, first, second, third, n, factor, block = launched[-1]
            assert (first, second, third) == (z.data_ptr() + 128, y.data_ptr() + 64, out.data_ptr())
            assert (n, factor, block) == (32, 2.0, 32)
            assert_exact(x[:64] + 1.0, z)
    assert call.program is not None


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
