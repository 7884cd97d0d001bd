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
of a visit is taken around a synchronisation. A variant can be timed in two ways there: launched call by call,
which the host's work may hold up, and replayed from a CUDA graph, where only the device's work is left
(``launches=("eager", "graph")``). :func:`rotating` gives a call fresh inputs each time, as a network gives
its layers.

This file stands in ``fused`` because choosing implementations by measurement (``fused.selection``) is the
lowest of its users; the benchmarks import it from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

OUT_OF_MEMORY = "out of memory"
LAUNCHES = ("eager", "graph")


@dataclass
class Samples:
    """Times of one variant, in seconds per call; entry ``i`` of each list belongs to one visit in
    ``rounds[i]``.

    ``device`` holds CUDA event times (``None`` on CPU). ``launch`` is "eager", or "graph" where a CUDA graph
    was replayed. ``failure`` says why there are no times, or no more of them.
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
    launch: str = "eager"

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
        if name == baseline:
            return Ratio(1.0, 1.0, 1.0)
        fast = np.array([ours_by_round[i] for i in shared])
        slow = np.array([theirs_by_round[i] for i in shared])
        return ratio_of(np.median(slow) / np.median(fast), resampled_ratios(fast, slow, resamples, seed))

    def chance_fastest(self, name: str, *, resamples: int = 1000, seed: int = 0) -> float:
        """In what share of bootstrap resamples of the rounds ``name`` has the lowest median of all."""
        measured = [samples for samples in self.samples.values() if samples.times]
        shared = sorted(set.intersection(*(set(samples.rounds) for samples in measured)))
        if name not in {samples.name for samples in measured} or not shared:
            return 0.0
        times = np.array([[dict(zip(s.rounds, s.times))[i] for i in shared] for s in measured])
        draws = np.random.default_rng(seed).integers(0, len(shared), size=(resamples, len(shared)))
        winners = np.median(times[:, draws], axis=2).argmin(axis=0)
        return float(np.mean(winners == [samples.name for samples in measured].index(name)))


def resampled_ratios(fast: np.ndarray, slow: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap replicates [resamples] of median(slow) / median(fast), both [rounds] of the same rounds."""
    draws = np.random.default_rng(seed).integers(0, len(fast), size=(resamples, len(fast)))
    return np.median(slow[draws], axis=1) / np.median(fast[draws], axis=1)


def ratio_of(value: float, replicates: np.ndarray) -> Ratio:
    """The ratio with the 95 % percentile interval of its bootstrap replicates."""
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Ratio(float(value), float(low), float(high))


Observer = Callable[[str, str, int, int], None]
"""Called with (phase, variant, step, steps); phase is "warm-up" or "measure". For progress displays."""


def replayed(name: str) -> str:
    """The name of a variant's samples when it was replayed from a CUDA graph."""
    return f"{name}, replayed"


def _named(name: str, launch: str) -> str:
    return name if launch == "eager" else replayed(name)


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


class NotCapturable(RuntimeError):
    """A call that cannot be replayed from a CUDA graph; the message says why."""


def captured(call: Callable[[], Any], device: torch.device | str) -> Callable[[], None]:
    """A function that replays ``call`` from a CUDA graph, captured here after three calls on a side stream.

    Raises :class:`NotCapturable` where the capture fails: the call synchronises, or allocates on the host.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = call()  # its memory belongs to the graph and must outlive it
        except Exception as error:
            torch.cuda.synchronize()
            if is_out_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0]
            raise NotCapturable(
                f"no CUDA graph can be made of it: {type(error).__name__}: {first_line}"
            ) from error

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def rotating(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call without arguments that hands ``call`` the next of ``inputs`` each time, and starts over.

    With inputs that are together larger than the last cache, none is found there by the call that reads it.
    """
    if not inputs:
        raise ValueError("rotating() was given no inputs")
    turn = itertools.cycle(inputs)
    return lambda: call(next(turn))


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Memory that one call takes at its peak, beyond what was held before it.

    On CUDA what PyTorch's allocator had handed out; on the CPU the resident pages of the process, where the
    kernel keeps their high-water mark (Linux), else ``None``. Freed memory is given back first.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = begin_resident_peak()
    if before is None:
        return None
    call()
    return max(0, resident_bytes("VmHWM") - before)


def begin_resident_peak() -> int | None:
    """Give freed memory back, begin a new high-water mark of resident pages and return it, in bytes; ``None``
    where the system has none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident_bytes("VmRSS")
    except (OSError, StopIteration):
        return None


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


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
    launches: Sequence[str] | Mapping[str, Sequence[str]] = ("eager",),
    enough: Callable[[Comparison], bool] | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Comparison:
    """Time every variant, a callable without arguments, in interleaved rounds.

    A visit repeats a short call until ``visit_seconds`` are filled, and gives one sample, in seconds per
    call. ``max_seconds`` ends the rounds early (never before three of them), and so does ``enough``, which is
    asked after every round from the fifth on. The caller decides about gradients: wrap the callables in
    ``torch.inference_mode()`` where none are wanted.

    ``launches``: on CUDA, how each variant is timed: "eager", "graph" or both; or that by variant's name. The
    samples of replays go by the name :func:`replayed` gives; a variant that no graph can be made of fails
    there and says why. On the CPU there is nothing to replay, and every variant is timed once.
    """
    if not variants:
        raise ValueError("measure() was given no variants")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    by_variant = launches if isinstance(launches, Mapping) else dict.fromkeys(variants, launches)
    if not all(set(by_variant[name]) <= set(LAUNCHES) and by_variant[name] for name in variants):
        raise ValueError(f"launches={launches!r}: choose from {', '.join(LAUNCHES)}")
    device = torch.device(device)
    clock = _CudaClock(device, flush_l2) if device.type == "cuda" else _HostClock()
    if device.type != "cuda":
        by_variant = dict.fromkeys(variants, ("eager",))
    ways = {_named(name, how): (call, how) for name, call in variants.items() for how in by_variant[name]}
    comparison = Comparison(
        {name: Samples(name, launch=how) for name, (_, how) in ways.items()},
        str(device),
        torch.get_num_threads(),
    )
    calls: dict[str, Callable[[], Any]] = {}
    order = random.Random(seed)
    tell = observer or (lambda phase, name, step, steps: None)
    active: list[str] = []

    def retire(name: str, error: Exception) -> None:
        reason = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        if isinstance(error, NotCapturable):
            reason = str(error)
        calls.pop(name, None)
        comparison.samples[name].failure = reason
        if name in active:
            active.remove(name)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    with cpu_threads(threads) as comparison.threads:
        try:
            for step, (name, (call, how)) in enumerate(ways.items()):
                tell("warm-up", name, step, len(ways))
                samples = comparison.samples[name]
                try:
                    calls[name] = call = call if how == "eager" else captured(call, device)
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
                        clock(calls[name], 1)  # refills the caches after the variant before; not counted
                        wall, cpu, on_device = clock(calls[name], samples.calls_per_visit)
                    except Exception as error:
                        retire(name, error)
                        continue
                    samples.rounds.append(index)
                    samples.wall.append(wall)
                    samples.cpu.append(cpu)
                    if on_device is not None:
                        samples.device = [*(samples.device or []), on_device]
                if enough is not None and index >= 4 and enough(comparison):
                    break
        except KeyboardInterrupt:
            comparison.interrupted = True
            for samples in comparison.samples.values():
                samples.keep_complete()
    return comparison
