"""The measuring core: order, warm-up, what a failure or Ctrl-C leaves, and the statistics."""

import time

import numpy as np
import pytest
import torch

from fastnets.bench.measure import OUT_OF_MEMORY, Comparison, Samples, cpu_threads, is_out_of_memory, measure


def spend(seconds: float):
    """A call that keeps one core busy for a given time."""

    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def test_the_ratio_is_the_ratio_of_the_work():
    comparison = measure({"slow": spend(4e-3), "fast": spend(1e-3)}, rounds=15, visit_seconds=0.004)
    ratio = comparison.ratio("fast", "slow")
    assert 3 < ratio.value < 5.5
    assert ratio.low <= ratio.value <= ratio.high
    assert comparison.ratio("slow", "slow").value == 1


def test_every_round_visits_every_variant_in_changing_order():
    visits: list[str] = []
    comparison = measure(
        {name: (lambda: None) for name in "abcd"},
        rounds=12,
        visit_seconds=0,
        observer=lambda phase, name, step, steps: visits.append(name) if phase == "measure" else None,
    )
    rounds = ["".join(visits[start : start + 4]) for start in range(0, len(visits), 4)]
    assert len(rounds) == 12
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 4
    assert all(samples.rounds == list(range(12)) for samples in comparison.samples.values())


def test_the_order_is_reproducible():
    def visits(seed: int) -> list[str]:
        seen: list[str] = []
        measure(
            {name: (lambda: None) for name in "abcd"},
            rounds=6,
            visit_seconds=0,
            seed=seed,
            observer=lambda phase, name, step, steps: seen.append(name) if phase == "measure" else None,
        )
        return seen

    assert visits(3) == visits(3) != visits(4)


def test_a_slow_start_is_warmed_away():
    """A variant whose first calls are slow, as compilation or lazy packing makes them, is timed without
    them.
    """
    calls = {"count": 0}

    def call() -> None:
        calls["count"] += 1
        spend(0.02 if calls["count"] <= 3 else 0.001)()

    samples = measure({"lazy": call}, rounds=5, visit_seconds=0.002).samples["lazy"]
    assert samples.median < 0.005
    assert samples.warmup_calls >= 4
    assert samples.warmup_seconds > 0.06


def test_raw_samples_and_spread():
    samples = measure({"a": spend(1e-3)}, rounds=10, visit_seconds=0.002).samples["a"]
    assert len(samples.wall) == len(samples.cpu) == len(samples.rounds) == 10
    assert samples.device is None
    assert samples.calls_per_visit == 2
    low, high = samples.spread
    assert min(samples.wall) <= low <= samples.median <= high <= max(samples.wall)
    assert 0.2 < samples.cpu_share < 1.5  # one busy thread, on a machine that may be busy itself


def test_sleeping_is_not_cpu_time():
    samples = measure({"sleep": lambda: time.sleep(0.005)}, rounds=4, visit_seconds=0).samples["sleep"]
    assert samples.cpu_share < 0.5


def test_max_seconds_ends_the_rounds_but_not_before_three():
    samples = measure({"a": spend(0.01)}, rounds=1000, visit_seconds=0, max_seconds=0.0).samples["a"]
    assert len(samples.wall) == 3


def test_a_variant_that_fails_says_why_and_the_others_go_on():
    calls = {"count": 0}

    def fails_later() -> None:
        calls["count"] += 1
        if calls["count"] > 12:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    comparison = measure(
        {"good": spend(1e-3), "broken": lambda: 1 / 0, "grows": fails_later}, rounds=30, visit_seconds=0
    )
    assert comparison.samples["good"].failure is None
    assert len(comparison.samples["good"].wall) == 30
    assert comparison.samples["broken"].failure == "ZeroDivisionError: division by zero"
    assert comparison.samples["broken"].wall == []
    assert comparison.samples["grows"].failure == OUT_OF_MEMORY
    assert 0 < len(comparison.samples["grows"].wall) < 30
    assert not comparison.interrupted


def test_ctrl_c_keeps_what_is_complete():
    calls = {"count": 0}

    def interrupts() -> None:
        calls["count"] += 1
        if calls["count"] == 30:
            raise KeyboardInterrupt

    comparison = measure({"a": spend(1e-4), "b": interrupts}, rounds=100, visit_seconds=0)
    assert comparison.interrupted
    for samples in comparison.samples.values():
        assert 5 < len(samples.wall) < 30
        assert len(samples.wall) == len(samples.cpu) == len(samples.rounds)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Coverage of the bootstrap interval on synthetic times whose true ratio is 2."""
    draws = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        noise = draws.lognormal(0, 0.1, size=(2, 25))
        slow = Samples("slow", list(range(25)), list(2 * noise[0]), [1.0] * 25)
        fast = Samples("fast", list(range(25)), list(noise[1]), [1.0] * 25)
        comparison = Comparison({"slow": slow, "fast": fast}, "cpu", 1)
        ratio = comparison.ratio("fast", "slow", resamples=400, seed=trial)
        covered += ratio.low <= 2 <= ratio.high
    assert 180 <= covered <= 200


def test_rounds_are_resampled_in_pairs():
    """A spell that slows both variants down alike leaves their ratio sharp."""
    spell = [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 2.0, 2.0, 5.0] * 3
    slow = Samples("slow", list(range(27)), [3 * t for t in spell], [1.0] * 27)
    fast = Samples("fast", list(range(27)), list(spell), [1.0] * 27)
    ratio = Comparison({"slow": slow, "fast": fast}, "cpu", 1).ratio("fast", "slow")
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))


def test_no_ratio_without_shared_rounds():
    one = Samples("one", [0], [1.0], [1.0])
    other = Samples("other", [1], [1.0], [1.0])
    assert Comparison({"one": one, "other": other}, "cpu", 1).ratio("one", "other") is None


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    seen = []
    comparison = measure({"a": lambda: seen.append(torch.get_num_threads())}, rounds=1, threads=1)
    assert set(seen) == {1}
    assert comparison.threads == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads=0"):
        with cpu_threads(0):
            pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_failure_is_recognised():
    comparison = measure({"huge": lambda: torch.empty(1 << 60, dtype=torch.int8)}, rounds=1)
    assert comparison.samples["huge"].failure == OUT_OF_MEMORY


@pytest.mark.parametrize("bad", [{"variants": {}}, {"variants": {"a": print}, "rounds": 0}])
def test_bad_requests(bad):
    with pytest.raises(ValueError):
        measure(**bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_times_are_event_times():
    x = torch.randn(2048, 2048, device="cuda")
    comparison = measure({"one": lambda: x @ x, "two": lambda: (x @ x) @ x}, device="cuda", rounds=10)
    one = comparison.samples["one"]
    assert len(one.device) == 10
    assert all(0 < device <= wall * 1.5 for device, wall in zip(one.device, one.wall))
    assert 1.4 < comparison.ratio("one", "two").value < 3
