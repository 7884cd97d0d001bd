"""The one way to launch: observers, meta tensors, grids, configs, and what it says where nothing can run."""

import copy
import pickle
import threading

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import JITFunction

from fastnets.kernels.batch_norm import bn_add_act
from fastnets.kernels.launch import Config, launch, observe_launches
from tests.accuracy import assert_exact
from tests.lanes import LANES


@triton.jit
def _add(x, y, out, n, AMOUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n, other=0.0) + tl.load(y + i, mask=i < n, other=0.0) + AMOUNT
    tl.store(out + i, total, mask=i < n)


def add(x, y, amount=1, config=Config(BLOCK=32)):  # noqa: B008
    out = torch.empty_like(x)
    n = x.numel()
    launch(
        _add,
        (triton.cdiv(n, config.BLOCK),),
        x,
        y,
        out,
        n,
        config=config,
        reads=(x, None, y),
        writes=(out,),
        flops=2 * n,
        AMOUNT=amount,
    )
    return out


def test_it_runs_the_kernel(lane):
    x, y = lane.put(torch.randn(100)), lane.put(torch.randn(100))
    with lane:
        out = add(x, y, 3)
    torch.testing.assert_close(out, x + y + 3)


def test_observers_see_what_runs(lane):
    x, y = lane.put(torch.ones(100)), lane.put(torch.ones(100))
    seen, others = [], []
    with lane, observe_launches(seen.append):
        with observe_launches(others.append):
            add(x, y)
        out = add(x, y)
    assert_exact(x + 2, out)
    assert len(seen) == 2
    assert len(others) == 1
    assert seen[0].name == "_add"
    assert seen[0].grid == (4,)
    assert seen[0].constexprs == {"AMOUNT": 1, "BLOCK": 32}
    assert [r.shape for r in seen[0].reads] == [x.shape, y.shape]
    assert (seen[0].bytes_read, seen[0].bytes_written, seen[0].bytes) == (800, 400, 1200)
    assert seen[0].flops == 200


def test_an_observer_used_twice_leaves_once():
    seen = []
    x = torch.empty(8, device="meta")
    with observe_launches(seen.append), observe_launches(seen.append):
        add(x, x)
        assert len(seen) == 2
    add(x, x)
    assert len(seen) == 2


def test_observers_see_other_threads():
    # Autograd launches backward kernels from threads of its own.
    seen = []
    x = torch.empty(8, device="meta")
    with observe_launches(seen.append):
        thread = threading.Thread(target=add, args=(x, x))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_meta_and_fake_tensors_are_only_observed():
    seen = []
    with observe_launches(seen.append):
        assert add(*[torch.empty(1 << 40, device="meta")] * 2).is_meta
        with FakeTensorMode():
            fake = torch.empty(10)
            assert add(fake, fake).shape == (10,)
    assert [launch.grid for launch in seen] == [(1 << 35,), (1,)]


def test_an_empty_grid_launches_nothing(lane):
    seen = []
    with lane, observe_launches(seen.append):
        add(lane.put(torch.empty(0)), lane.put(torch.empty(0)))
    assert not seen


@pytest.mark.skipif(
    torch.cuda.is_available() or not isinstance(_add, JITFunction), reason="something can run kernels here"
)
def test_without_a_driver_it_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"_add: cannot run on a tensor on cpu .* has no driver here"
    ) as raised:
        add(torch.ones(3), torch.ones(3))
    for remedy in ("CUDA", "library", "TRITON_INTERPRET=1"):
        assert remedy in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_tensors_beside_a_gpu_are_refused():
    with pytest.raises(RuntimeError, match="active driver is for cuda"):
        add(torch.ones(3), torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_is_guarded():
    x = torch.randn(100, device="cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(add(x, x), 2 * x + 1)


class TestCompiledKernelsAreKept:
    """From its second launch on, a kernel does not pass Triton's binder, which the lanes count here."""

    @pytest.fixture
    def bound(self, monkeypatch):
        names = []
        run = JITFunction.run

        def counted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", counted)
        return names

    @pytest.mark.lanes("sm_80", "gpu")
    def test_by_all_that_triton_specialises_on(self, lane, bound):
        whole = lane.put(torch.randn(400))
        with lane:
            for size in (1, 16, 17, 32):  # equal to 1, divisible by 16, neither
                for start in (0, 1):  # aligned to 16 bytes, or not
                    for dtype in (torch.float32, torch.float16):
                        x = whole.to(dtype)[start : start + size]
                        for amount in (1, 3):
                            bound.clear()
                            first = add(x, x, amount)
                            compiled = list(bound)
                            again = add(x, x, amount)
                            assert bound == compiled == ["_add"]
                            assert torch.equal(first, again)
                            torch.testing.assert_close(again, 2 * x + amount)

    @pytest.mark.lanes("sm_80", "gpu")
    def test_other_values_of_a_float_launch_the_same(self, lane, bound):
        x = lane.put(torch.randn(64))
        with lane:
            assert torch.equal(scaled(x, 2.0), 2 * x)
            assert torch.equal(scaled(x, 4.0), 4 * x)
            assert bound == ["_scale"]
            assert torch.equal(scaled(x, 4), 4 * x)  # an integer is another argument
            assert bound == ["_scale"] * 2

    @pytest.mark.lanes("sm_80", "gpu")
    def test_integers_in_tuples_count(self, lane):
        x = lane.put(torch.arange(64.0))
        with lane:
            for _ in range(2):
                for steps in ((1, 16), (2, 16), (1, 3), (16, 1)):
                    assert_exact((x[:4] * 0 + steps[0] + 100 * steps[1]).cpu(), of_tuple(x, steps)[:4].cpu())

    @pytest.mark.lanes("sm_80", "gpu")
    def test_profilers_see_every_launch(self, lane, bound):
        x, seen = lane.put(torch.ones(64)), []
        hook = triton.knobs.runtime.launch_enter_hook
        with lane:
            add(x, x)
            hook.add(seen.append)
            try:
                add(x, x)
                add(x, x)
            finally:
                hook.remove(seen.append)
            assert [metadata.get()["name"] for metadata in seen] == ["_add"] * 2
            add(x, x)
        assert len(seen) == 2

    def test_not_across_drivers(self):
        x = torch.randn(64)
        for _ in range(2):
            for name in ("sm_80", "sm_90"):
                if LANES[name].unavailable():
                    pytest.skip(LANES[name].unavailable())
                with LANES[name]:
                    torch.testing.assert_close(add(x, x), 2 * x + 1)

    def test_a_bounded_number(self, lane, monkeypatch):
        monkeypatch.setattr("fastnets.kernels.launch._KEPT", 2)
        x = lane.put(torch.randn(64))
        with lane:
            for n in (1, 2, 3, 4, 3, 2, 1):
                torch.testing.assert_close(add(x[:n], x[:n]), 2 * x[:n] + 1)


@triton.jit
def _scale(x, out, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) * factor)


def scaled(x, factor):
    out = torch.empty_like(x)
    launch(_scale, (1,), x, out, factor, config=Config(BLOCK=64), reads=(x,), writes=(out,))
    return out


@triton.jit
def _of_tuple(out, steps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, (steps[0] + 100 * steps[1] + i * 0).to(tl.float32))


def of_tuple(x, steps):
    out = torch.empty_like(x)
    launch(_of_tuple, (1,), out, steps, config=Config(BLOCK=64), writes=(out,))
    return out


class TestConfig:
    def test_it_reads_like_a_mapping_and_an_object(self):
        config = Config(BLOCK_M=64, SPLIT_K=2, num_warps=8, num_stages=3)
        assert config.BLOCK_M == config["BLOCK_M"] == config.get("BLOCK_M") == 64
        assert config.get("BLOCK_K", 32) == 32
        assert config.options == {"num_warps": 8, "num_stages": 3}
        assert repr(config) == "Config(BLOCK_M=64, SPLIT_K=2, num_warps=8, num_stages=3)"
        with pytest.raises(AttributeError, match=r"no 'BLOCK_N' .*BLOCK_M, SPLIT_K"):
            _ = config.BLOCK_N

    def test_equality_is_by_content(self):
        one, other = Config(A=1, B=2), Config(B=2, A=1)
        assert one == other
        assert hash(one) == hash(other)
        assert one != Config(A=1, B=2, num_warps=8)
        assert one != Config(A=1)
        assert one != "Config"
        assert Config(maxnreg=128).options["maxnreg"] == 128

    def test_replace_changes_a_copy(self):
        config = Config(A=1, num_warps=8)
        assert config.replace(A=2, num_stages=4) == Config(A=2, num_warps=8, num_stages=4)
        assert config == Config(A=1, num_warps=8)

    def test_it_survives_pickling_and_copying(self):
        config = Config(A=1, num_stages=4, maxnreg=64)
        assert pickle.loads(pickle.dumps(config)) == config
        assert copy.deepcopy(config) == config


def test_launchers_need_no_device_to_plan():
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert bn_add_act(x, residual=x, activation="relu").shape == x.shape
