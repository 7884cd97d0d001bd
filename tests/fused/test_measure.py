"""The measuring core: order, warm-up, what a failure or Ctrl-C leaves, and the statistics."""

import time

import numpy as np
import pytest
import torch

from fastnets.fused.measure import (
    OUT_OF_MEMORY,
    Comparison,
    NotCapturable,
    Samples,
    captured,
    cpu_threads,
    is_out_of_memory,
    measure,
    peak_bytes,
    replayed,
    rotating,
)


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


def test_enough_ends_the_rounds_but_not_before_five():
    asked = []

    def enough(comparison: Comparison) -> bool:
        asked.append(len(comparison.samples["a"].times))
        return len(asked) == 3

    samples = measure({"a": lambda: None}, rounds=50, visit_seconds=0, enough=enough).samples["a"]
    assert asked == [5, 6, 7]
    assert len(samples.wall) == 7


def test_the_chance_of_being_the_fastest():
    rounds = list(range(20))
    times = {"one": [1.0 + 0.1 * (i % 3) for i in rounds], "two": [1.05 + 0.1 * (i % 3) for i in rounds]}
    samples = {name: Samples(name, rounds, values, values) for name, values in times.items()}
    samples["broken"] = Samples("broken", failure="TypeError")
    clear = Comparison(samples, "cpu", 1)
    assert clear.chance_fastest("one") == 1
    assert clear.chance_fastest("two") == clear.chance_fastest("broken") == 0
    draws = np.random.default_rng(0).lognormal(0, 0.3, size=(2, 20))
    samples = {name: Samples(name, rounds, list(t), list(t)) for name, t in zip("ab", draws)}
    unclear = Comparison(samples, "cpu", 1)
    assert 0.02 < unclear.chance_fastest("a") < 0.98
    assert unclear.chance_fastest("a") + unclear.chance_fastest("b") == pytest.approx(1)


def test_rotating_hands_over_each_input_in_turn():
    seen = []
    call = rotating(seen.append, ["x", "y", "z"])
    for _ in range(7):
        call()
    assert "".join(seen) == "xyzxyzx"
    with pytest.raises(ValueError, match="no inputs"):
        rotating(print, [])


def test_the_peak_of_a_call_is_what_it_holds_at_once():
    def call():
        first = torch.ones(8 << 20)  # 32 MiB
        del first
        return torch.ones(16 << 20)  # 64 MiB, given back when the call is over

    peak = peak_bytes(call)
    if peak is None:
        pytest.skip("this system keeps no high-water mark of resident memory")
    assert 60 << 20 < peak < 120 << 20


def test_launches_are_named_and_on_the_cpu_there_is_one():
    assert list(measure({"a": lambda: None}, rounds=1, launches=("eager", "graph")).samples) == ["a"]
    with pytest.raises(ValueError, match="eager, graph"):
        measure({"a": lambda: None}, launches=("lazy",))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_replayed_graph_leaves_out_the_host():
    x = torch.randn(64, 64, device="cuda")

    def many_small_ones():
        y = x
        for _ in range(100):
            y = y + 1
        return y

    variants = {"small": many_small_ones, "synchronises": lambda: (x.sum().item(), x + 1)}
    comparison = measure(variants, device="cuda", rounds=10, launches=("eager", "graph"))
    assert comparison.samples[replayed("small")].launch == "graph"
    assert comparison.ratio(replayed("small"), "small").low > 1
    assert "no CUDA graph" in comparison.samples[replayed("synchronises")].failure
    assert comparison.samples["synchronises"].times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_computes_what_the_call_computes():
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    replay = captured(lambda: y.copy_(2 * x), "cuda")
    x.fill_(3)
    replay()
    assert y.tolist() == [6, 6, 6, 6]
    with pytest.raises(NotCapturable):
        captured(lambda: x.sum().item(), "cuda")
    assert peak_bytes(lambda: torch.empty(1 << 20, device="cuda"), "cuda") == 4 << 20
