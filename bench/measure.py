"""The one measuring core: several ways to do the same work, timed side by side.

Every figure of this repository that is a time comes from :func:`measure`. What makes two variants comparable:

- they take turns. A *round* visits every variant once, in a fresh random order, so that a slow spell of the
  machine (another process, a thermal limit) falls on all of them;
- each is warmed up until its time stops falling, and a visit starts with a call that is thrown away,
  because the variant before it has just emptied the caches;
- the result is the median with the 20th and 80th percentile, and a ratio carries a bootstrap interval that
  resamples whole rounds (:meth:`Comparison.ratio`);
- process CPU time is kept beside wall time: where they fall apart, threads were waiting or spinning;
- all raw samples are kept.

On CUDA a call is timed by a pair of events, the L2 cache is overwritten before each call, and the wall time
of a visit is taken around a synchronisation.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

OUT_OF_MEMORY = "out of memory"


@dataclass
class Samples:
    """Times of one variant, in seconds per call; entry ``i`` of each list belongs to one visit in
    ``rounds[i]``.

    ``device`` holds CUDA event times (``None`` on CPU). ``failure`` says why there are no times, or no more
    of them.
    """

    name: str
    rounds: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    device: list[float] | None = None
    calls_per_visit: int = 1
    warmup_calls: int = 0
    warmup_seconds: float = 0.0
    failure: str | None = None

    def keep_complete(self) -> None:
        """Drop the entries of a visit that was cut short between its list appends."""
        lists = [self.rounds, self.wall, self.cpu] + ([self.device] if self.device else [])
        complete = min(len(entries) for entries in lists)
        for entries in lists:
            del entries[complete:]

    @property
    def times(self) -> list[float]:
        """The samples that count: device time where there is one, wall time elsewhere."""
        return self.device if self.device else self.wall

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile, in seconds."""
        low, high = np.percentile(self.times, [20, 80])
        return float(low), float(high)

    @property
    def cpu_share(self) -> float:
        """Process CPU time over wall time: about the number of busy threads."""
        return statistics.median(self.cpu) / statistics.median(self.wall)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Comparison:
    """What :func:`measure` returns: the samples of every variant, in the order they were given."""

    samples: dict[str, Samples]
    device: str
    threads: int
    interrupted: bool = False

    def ratio(self, name: str, baseline: str, *, resamples: int = 2000, seed: int = 0) -> Ratio | None:
        """Median time of ``baseline`` over median time of ``name``; above 1 means that ``name`` is faster.

        The interval is a percentile bootstrap over rounds: a resample draws the same rounds for both
        variants, so what slowed both down in one round stays paired. ``None`` where the two share fewer
        than two rounds.
        """
        ours, theirs = self.samples[name], self.samples[baseline]
        ours_by_round = dict(zip(ours.rounds, ours.times))
        theirs_by_round = dict(zip(theirs.rounds, theirs.times))
        shared = sorted(ours_by_round.keys() & theirs_by_round.keys())
        if len(shared) < 2:
            return None
        fast = np.array([ours_by_round[i] for i in shared])
        slow = np.array([theirs_by_round[i] for i in shared])
        value = float(np.median(slow) / np.median(fast))
        if name == baseline:
            return Ratio(1.0, 1.0, 1.0)
        draws = np.random.default_rng(seed).integers(0, len(shared), size=(resamples, len(shared)))
        ratios = np.median(slow[draws], axis=1) / np.median(fast[draws], axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        return Ratio(value, float(low), float(high))


Observer = Callable[[str, str, int, int], None]
"""Called with (phase, variant, step, steps); phase is "warm-up" or "measure". For progress displays."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[int]:
    """Run the block with ``count`` intra-op threads (``None``: as it is) and yield the number in force."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"threads={count}: at least one thread is needed")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class _HostClock:
    """Wall and CPU time of calls that are finished when they return."""

    def __call__(self, call: Callable[[], Any], calls: int) -> tuple[float, float, float | None]:
        cpu = time.process_time()
        wall = time.perf_counter()
        for _ in range(calls):
            call()
        wall = time.perf_counter() - wall
        return wall / calls, (time.process_time() - cpu) / calls, None


class _CudaClock:
    """Event time of each call on the current stream, with a cold L2 cache."""

    def __init__(self, device: torch.device, flush_l2: bool) -> None:
        self.device = device
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.flush = torch.empty(2 * size, dtype=torch.int8, device=device) if flush_l2 else None

    def __call__(self, call: Callable[[], Any], calls: int) -> tuple[float, float, float | None]:
        with torch.cuda.device(self.device):
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
            torch.cuda.synchronize()
            cpu = time.process_time()
            wall = time.perf_counter()
            for start, stop in pairs:
                if self.flush is not None:
                    self.flush.zero_()
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            device = statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3
        return wall / calls, cpu / calls, device


def _warm_up(
    call: Callable[[], Any], clock: Callable, samples: Samples, *, min_calls: int, max_seconds: float
) -> float:
    """Call until the best of the last three is no longer 3 % below the best before them; return the
    last best.
    """
    start = time.perf_counter()
    times: list[float] = []
    while True:
        wall, _, device = clock(call, 1)
        times.append(wall if device is None else device)
        if len(times) >= max(min_calls, 4) and min(times[-3:]) >= 0.97 * min(times[:-3]):
            break
        if time.perf_counter() - start > max_seconds and len(times) >= 2:
            break
    samples.warmup_calls = len(times)
    samples.warmup_seconds = time.perf_counter() - start
    return min(times[-3:])


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    visit_seconds: float = 0.02,
    max_seconds: float | None = None,
    min_warmup_calls: int = 4,
    max_warmup_seconds: float = 20.0,
    threads: int | None = None,
    flush_l2: bool = True,
    seed: int = 0,
    observer: Observer | None = None,
) -> Comparison:
    """Time every variant, a callable without arguments, in interleaved rounds.

    A visit repeats a short call until ``visit_seconds`` are filled, and gives one sample, in seconds per
    call. ``max_seconds`` ends the rounds early (never before three of them). The caller decides about
    gradients: wrap the callables in ``torch.inference_mode()`` where none are wanted.

    A variant that raises is taken out and its ``failure`` says why, running out of memory by name; the
    others go on. Ctrl-C ends the measurement with every complete sample kept and ``interrupted`` set.
    """
    if not variants:
        raise ValueError("measure() was given no variants")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    device = torch.device(device)
    clock = _CudaClock(device, flush_l2) if device.type == "cuda" else _HostClock()
    comparison = Comparison({name: Samples(name) for name in variants}, str(device), torch.get_num_threads())
    order = random.Random(seed)
    tell = observer or (lambda phase, name, step, steps: None)
    active: list[str] = []

    def retire(name: str, error: Exception) -> None:
        reason = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        comparison.samples[name].failure = reason
        if name in active:
            active.remove(name)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    with cpu_threads(threads) as comparison.threads:
        try:
            for step, (name, call) in enumerate(variants.items()):
                tell("warm-up", name, step, len(variants))
                samples = comparison.samples[name]
                try:
                    best = _warm_up(
                        call, clock, samples, min_calls=min_warmup_calls, max_seconds=max_warmup_seconds
                    )
                except Exception as error:
                    retire(name, error)
                    continue
                samples.calls_per_visit = max(1, round(visit_seconds / max(best, 1e-9)))
                active.append(name)
            start = time.perf_counter()
            for index in range(rounds):
                if index >= 3 and max_seconds is not None and time.perf_counter() - start > max_seconds:
                    break
                for name in order.sample(active, len(active)):
                    tell("measure", name, index, rounds)
                    samples = comparison.samples[name]
                    try:
                        clock(variants[name], 1)  # refills the caches after the variant before; not counted
                        wall, cpu, on_device = clock(variants[name], samples.calls_per_visit)
                    except Exception as error:
                        retire(name, error)
                        continue
                    samples.rounds.append(index)
                    samples.wall.append(wall)
                    samples.cpu.append(cpu)
                    if on_device is not None:
                        samples.device = [*(samples.device or []), on_device]
        except KeyboardInterrupt:
            comparison.interrupted = True
            for samples in comparison.samples.values():
                samples.keep_complete()
    return comparison
