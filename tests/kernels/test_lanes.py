"""The lanes catch what they are there to catch: planted bugs, each seen where it should be."""

import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.code_generator import CodeGenerator
from triton.runtime import JITFunction

from fastnets.kernels.launch import Config, launch
from tests.accuracy import assert_close_to, assert_exact, error_ratio, integers
from tests.lanes import DEFAULT_LANES, LANES, STRICT_LANES, poisoned_memory

EMULATED = ("sm_80", "sm_90")


@triton.jit
def _bf16_arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(y + i, mask=i < n, other=0.0)
    # No sum of a product: compiled code contracts that into a fused multiply-add, rounded once.
    tl.store(out + i, tl.where(a > b, a * b, a - b), mask=i < n)


@triton.jit
def _bf16_dot(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def _row_sum_and_max(x, total, largest, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    a = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(total + m, tl.sum(a, axis=1))
    tl.store(largest + m, tl.max(a, axis=1))


@triton.jit
def _copy(x, out, n, SKIP_LAST: tl.constexpr, OVERRUN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n + OVERRUN, other=0.0)
    tl.store(out + i, value, mask=i < n - SKIP_LAST)


@triton.jit
def _sum_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    # Without other=, deliberately: the emulator must show what a GPU may leave in such lanes.
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def _maximum_and_loop(x, y, out, trips, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    for _ in range(tl.load(trips)):
        a = tl.maximum(a, tl.load(y + i))
    tl.store(out + i, a)


@triton.jit
def _overlapping_writes(out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out + i, tl.program_id(0).to(tl.float32) + 0.0 * i)


def copy(x, skip_last=0, overrun=0):
    out = torch.empty_like(x)
    n = x.numel()
    launch(
        _copy,
        (triton.cdiv(n, 64),),
        x,
        out,
        n,
        config=Config(BLOCK=64),
        reads=(x,),
        writes=(out,),
        SKIP_LAST=skip_last,
        OVERRUN=overrun,
    )
    return out


def test_bf16_is_computed_as_pytorch_does(lane):
    x, y = (lane.put(torch.randn(200).bfloat16()) for _ in range(2))
    with lane:
        out = torch.empty_like(x)
        launch(_bf16_arithmetic, (4,), x, y, out, 200, config=Config(BLOCK=64), reads=(x, y), writes=(out,))
    assert_exact(torch.where(x > y, x * y, x - y), out)


def test_bf16_dot_accumulates_in_fp32(lane):
    x, y = lane.put(torch.randn(32, 64).bfloat16()), lane.put(torch.randn(64, 32).bfloat16())
    with lane:
        out = x.new_empty(32, 32)
        launch(_bf16_dot, (1,), x, y, out, config=Config(M=32, N=32, K=64), reads=(x, y), writes=(out,))
    reference = x.double() @ y.double()
    assert_close_to(reference, (x.float() @ y.float()).bfloat16(), out, ratio=1.01)


def test_bf16_reductions(lane):
    x = lane.put(integers(16, 32, dtype=torch.bfloat16))
    with lane:
        total, largest = x.new_empty(16), x.new_empty(16)
        launch(_row_sum_and_max, (1,), x, total, largest, config=Config(M=16, N=32), writes=(total, largest))
    assert_exact(x.float().sum(1), total)
    assert_exact(x.amax(1), largest)


def test_maximum_drops_nan_and_range_takes_a_loaded_bound(lane):
    nan = float("nan")
    x, y = lane.put(torch.tensor([nan, 1.0] * 8)), lane.put(torch.tensor([2.0, nan] * 8))
    trips = lane.put(torch.tensor([2], dtype=torch.int32))
    with lane:
        out = torch.empty_like(x)
        launch(_maximum_and_loop, (1,), x, y, out, trips, config=Config(BLOCK=16), writes=(out,))
    assert_exact(torch.tensor([2.0, 1.0] * 8), out)


def test_outputs_are_poisoned(lane):
    x = lane.put(torch.randn(100))
    with lane:
        assert_exact(x, copy(x))
        out = copy(x, skip_last=1)
    assert torch.isnan(out[-1])
    with pytest.raises(AssertionError, match=r"1 NaN or infinities, none expected: at .*99"):
        assert_close_to(x.double(), x, out)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda d: torch.empty(3, 5, device=d),
        lambda d: torch.empty_like(torch.ones(3, 5, device=d)),
        lambda d: torch.ones(1, device=d).new_empty(3, 5),
        lambda d: torch.empty_strided((3, 5), (1, 3), device=d),
        lambda d: torch.empty(1, 3, 5, 2, dtype=torch.bfloat16, memory_format=torch.channels_last, device=d),
    ],
)
def test_every_way_to_allocate_is_poisoned(lane, allocate):
    with lane:
        fresh = allocate(lane.device)
    assert torch.isnan(fresh).all()


def test_poison_ends_with_the_block():
    with poisoned_memory():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.lanes("interpreter", *EMULATED)
def test_out_of_bounds_read_is_caught(lane):
    # The view ends where its storage goes on: only the tensor's own extent tells.
    x = torch.randn(200)[:100]
    with pytest.raises(Exception, match=r"(?i)bounds|outside|fault"), lane:
        copy(x, overrun=1)


@pytest.mark.lanes("interpreter", *EMULATED)
def test_out_of_bounds_write_is_caught(lane):
    with pytest.raises(Exception, match=r"(?i)bounds|outside|fault"), lane:
        copy(torch.randn(100), skip_last=-1)


@pytest.mark.lanes("interpreter")
def test_masked_lanes_without_other_are_garbage(lane):
    x = torch.randn(10)
    with lane:
        out = x.new_empty(1)
        launch(_sum_without_other, (1,), x, out, 10, config=Config(BLOCK=16), reads=(x,), writes=(out,))
    assert torch.isnan(out).all()


@pytest.mark.lanes(*EMULATED)
def test_races_between_blocks_are_caught(lane):
    out = torch.empty(64)
    with pytest.raises(Exception, match=r"(?i)race|conflict"), lane:
        launch(_overlapping_writes, (3,), out, config=Config(BLOCK=16), writes=(out,))


@pytest.mark.lanes(*STRICT_LANES)
def test_strict_lanes_run_ptxas(lane):
    x = torch.randn(100)
    with lane:
        assert_exact(x, copy(x))
    assert lane.launches[-1].name == "_copy"


def test_the_interpreter_leaves_no_trace():
    kinds = {name: type(vars(tl)[name]) for name in ("sum", "load", "range", "static_range")}
    builtins = {name: vars(tl.core)[name] for name in ("load", "store", "arange", "full")}
    globals_before = set(vars(sys.modules[__name__]))
    with LANES["interpreter"]:
        copy(torch.randn(10))
    assert kinds == {name: type(vars(tl)[name]) for name in kinds}
    assert builtins == {name: vars(tl.core)[name] for name in builtins}
    assert set(vars(sys.modules[__name__])) - globals_before <= {"interpreter_semantic"}
    # The compiler still knows the functions that it evaluates itself.
    for function in (tl.static_assert, tl.core.static_assert, tl.static_print):
        assert function in CodeGenerator.statically_implemented_functions
    if isinstance(_copy, JITFunction) and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cannot run on a tensor on cpu"):
            copy(torch.randn(10))


def test_strides_survive_put():
    base = torch.arange(40.0)
    for tensor in (base[::2], base.view(5, 8).t()[1:], base[:1].expand(7), base.view(2, 5, 4)[:, 1:3]):
        copied = LANES["interpreter"].put(tensor)
        assert copied.stride() == tensor.stride()
        assert copied.storage_offset() == tensor.storage_offset()
        assert_exact(tensor, copied)


def test_every_default_lane_exists():
    assert set(DEFAULT_LANES) | set(STRICT_LANES) == set(LANES)


class TestAccuracy:
    """The judge itself."""

    def setup_method(self):
        self.reference = torch.randn(64, 64, dtype=torch.float64)
        self.stock = self.reference.bfloat16()

    def test_as_good_as_stock_passes(self):
        assert_close_to(self.reference, self.stock, self.stock.clone(), ratio=1.0)
        assert error_ratio(self.reference, self.stock, self.stock) < 1.0

    def test_four_times_the_error_fails(self):
        ours = (self.reference + 4 * (self.stock.double() - self.reference)).bfloat16()
        with pytest.raises(AssertionError, match=r"error .* allowed"):
            assert_close_to(self.reference, self.stock, ours)

    def test_one_wrong_element_fails(self):
        reference = torch.randn(1000, 1000, dtype=torch.float64)
        stock = reference.bfloat16()
        ours = stock.clone()
        ours[3, 4] += 0.1
        with pytest.raises(AssertionError, match="worst element"):
            assert_close_to(reference, stock, ours)

    def test_an_exact_stock_leaves_room_for_one_rounding(self):
        reference = torch.randn(1000, dtype=torch.float64).float().double()
        stock = reference.float()
        assert_close_to(reference, stock, stock)
        with pytest.raises(AssertionError):
            assert_close_to(reference, stock, stock * (1 + 2**-21))

    def test_nan_must_stand_where_stock_has_it(self):
        stock, reference = self.stock.clone(), self.reference.clone()
        stock[0, 0] = reference[0, 0] = float("nan")
        with pytest.raises(AssertionError, match="NaN"):
            assert_close_to(reference, stock, self.stock)
        with pytest.raises(AssertionError, match="NaN"):
            assert_close_to(self.reference, self.stock, stock)
        assert_close_to(reference, stock, stock.clone())

    def test_dtype_and_shape_count(self):
        with pytest.raises(AssertionError, match="dtype"):
            assert_close_to(self.reference, self.stock, self.stock.float())
        with pytest.raises(AssertionError, match="shape"):
            assert_close_to(self.reference, self.stock, self.stock[:1])
