"""Runs networks through the variants: prepares each, checks its answers, and only then measures.

The accuracy gate stands before the clock. A variant whose answers are off by more than the error ratio of
DESIGN allows (twice the stock network's own error against float64; for training three times, of the loss and
of every gradient) is reported as wrong and not timed. Vendors sum in another order where images are
channels-last, and stock may be several times less exact there (a 3×3 over 256 channels in oneDNN: 3.6 times).
Where a variant fails beside the network as it is, stock in that layout has the second word; a note says so.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastnets.bench import baselines, environment, training
from fastnets.bench.breakdown import Breakdown, break_down
from fastnets.bench.networks import Inputs, Network, arguments, first
from fastnets.fused.measure import (
    LAUNCHES,
    OUT_OF_MEMORY,
    Comparison,
    cpu_threads,
    is_out_of_memory,
    measure,
    peak_bytes,
    replayed,
)


@dataclass(frozen=True)
class Settings:
    """What a benchmark run is asked to do; the same for every network of the run."""

    batch_size: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    variants: tuple[str, ...] = ()
    rounds: int = 20
    max_seconds: float | None = None
    threads: int | None = None
    channels_last: bool = False  # the stock network itself, and so every variant
    training: bool = False  # steps of training instead of inference
    breakdown: bool = False  # also time each distinct layer alone, and count the traffic
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: at least one image is needed")
        unknown = [name for name in self.variants if name not in baselines.VARIANTS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], baselines.VARIANTS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(baselines.VARIANTS)
            raise ValueError(f"unknown variant {unknown[0]!r}; {hint}known: {known}")
        torch.device(self.device)  # raises where there is no such kind of device


@dataclass
class Row:
    """One variant of one network. ``status`` is "measured", "unavailable", "wrong" or "failed";
    ``note`` says why.
    """

    variant: str
    description: str
    ours: bool
    status: str = "failed"
    note: str = ""
    error_ratio: float | None = None
    top1_agreement: float | None = None
    ready_seconds: float | None = None
    peak_bytes: int | None = None  # of memory that one call takes, beyond what was held before it
    launch: str = "eager"  # or "graph": replayed from a CUDA graph


@dataclass
class Result:
    """All variants of one network; ``comparison`` holds the raw samples of those that were measured."""

    network: str
    weights: str
    input_shape: tuple[int, ...]
    dtype: str
    rows: list[Row]
    comparison: Comparison | None = None
    training: bool = False
    coverage: float | None = None
    implementations: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    breakdown: Breakdown | None = None


@dataclass
class Run:
    """A whole benchmark run, in the form the reports are made from."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """False where a variant of ours gave wrong answers or failed."""
        return not any(row.ours and row.status in ("wrong", "failed") for r in self.results for row in r.rows)


Tell = Callable[[str, str, str, int, int], None]
"""Called with (network, phase, variant, step, steps)."""


Judge = Callable[[], training.GradientJudge]
"""Makes the judge of gradients when it is first asked for, and then keeps it."""


def _gate(stock: nn.Module, x: Inputs, call: Callable, laid_out: Inputs, row: Row, judge: Judge) -> bool:
    """Judge the variant's answers on the benchmark's own input; fills the row's accuracy and tells
    whether to go on.
    """
    if stock.training:
        row.error_ratio = judge().error_ratio(call, laid_out)
        right = row.error_ratio <= training.ALLOWED_RATIO
    else:
        from fastnets.fused.check import check

        def answer(*_: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():  # as it will be timed; torch.compile would compile anew otherwise
                return call(*arguments(laid_out))

        report = check(stock, answer, arguments(x))
        row.error_ratio = float(report.error_ratio)
        row.top1_agreement = None if report.top1_agreement is None else float(report.top1_agreement)
        right = report.ok
        if not right and first(x).ndim == 4:
            beside = check(baselines.lay_out(copy.deepcopy(stock), x)[0], answer, arguments(x))
            right = beside.ok
            if right:
                row.note = f"error ratio {float(beside.error_ratio):.2f} beside stock channels-last"
    if not right:
        row.status = "wrong"
        row.note = f"error ratio {row.error_ratio:.2f}; not timed"
    return right


def run_network(network: Network, settings: Settings, *, tell: Tell | None = None) -> Result:
    """Prepare, check and measure every variant of one network.

    Where one runs out of memory all start over with half the batch, so that all are timed on the same one.
    """
    notes: list[str] = []
    while True:
        result = _run_batch(network, settings, tell or (lambda *_: None))
        hungry = [row.variant for row in result.rows if OUT_OF_MEMORY in row.note]
        stopped = result.comparison is not None and result.comparison.interrupted
        if not hungry or settings.batch_size == 1 or stopped:
            break
        smaller = settings.batch_size // 2
        notes.append(
            f"out of memory at batch {settings.batch_size} ({', '.join(hungry)}): now batch {smaller}"
        )
        settings = replace(settings, batch_size=smaller)
    result.notes = notes + result.notes
    return result


def _run_batch(network: Network, settings: Settings, tell: Tell) -> Result:
    device = torch.device(settings.device)
    names = settings.variants or tuple(baselines.default_variants(device, training=settings.training))
    stock = network.model.to(device=device, dtype=settings.dtype).train(settings.training)
    x = network.inputs(settings.batch_size, dtype=settings.dtype, device=device, seed=settings.seed)
    if settings.channels_last:
        stock, x = baselines.lay_out(stock, x)
    rows = [Row(name, baselines.VARIANTS[name].description, baselines.VARIANTS[name].ours) for name in names]
    result = Result(
        network.name,
        network.weights,
        tuple(first(x).shape),
        str(settings.dtype).removeprefix("torch."),
        rows,
        training=settings.training,
    )
    calls: dict[str, Callable[[], Any]] = {}
    try:
        with cpu_threads(settings.threads):
            judge = functools.cache(lambda: training.GradientJudge(stock, x))
            for step, row in enumerate(rows):
                tell(network.name, "prepare and check", row.variant, step, len(rows))
                call = _prepare(stock, x, row, result, judge)
                if call is not None:
                    calls[row.variant] = call
            if settings.batch_size > 1 and any(row.note == OUT_OF_MEMORY for row in rows):
                return result
            if calls:
                with torch.inference_mode(not settings.training):
                    result.comparison = measure(
                        calls,
                        device=device,
                        rounds=settings.rounds,
                        max_seconds=settings.max_seconds,
                        launches={
                            name: LAUNCHES if baselines.VARIANTS[name].replays else ("eager",)
                            for name in calls
                        },
                        seed=settings.seed,
                        observer=lambda phase, name, step, steps: tell(
                            network.name, phase, name, step, steps
                        ),
                    )
                if settings.breakdown and not settings.training and not result.comparison.interrupted:
                    tell(network.name, "layers", "", 0, 1)
                    result.breakdown = break_down(stock, x)
    except KeyboardInterrupt:
        if result.comparison is None:
            result.comparison = Comparison({}, str(device), torch.get_num_threads())
        result.comparison.interrupted = True
    _settle(result)
    return result


def _prepare(stock: nn.Module, x: Inputs, row: Row, result: Result, judge: Judge) -> Callable[[], Any] | None:
    variant = baselines.VARIANTS[row.variant]
    try:
        if stock.training and not variant.trains:
            raise baselines.Unavailable("it is for inference only")
        start = time.perf_counter()
        # copies are made outside inference mode: weights that are inference tensors could not be kept packed
        call, laid_out = variant.prepare(stock, x)
        with torch.inference_mode(not stock.training):
            training.answers_of(call, laid_out) if stock.training else call(*arguments(laid_out))
            if first(x).device.type == "cuda":
                torch.cuda.synchronize(first(x).device)
        row.ready_seconds = time.perf_counter() - start
        if row.variant == "fastnets" and not stock.training:
            _describe_coverage(call, laid_out, result)
        if not _gate(stock, x, call, laid_out, row, judge):
            return None
        step = (
            training.training_step(call, laid_out) if stock.training else lambda: call(*arguments(laid_out))
        )
        with torch.inference_mode(not stock.training):
            row.peak_bytes = peak_bytes(step, first(x).device)
    except baselines.Unavailable as reason:
        row.status, row.note = "unavailable", str(reason)
        return None
    except Exception as error:
        row.note = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        return None
    row.status = "measured"
    return step


def _describe_coverage(model: nn.Module, x: Inputs, result: Result) -> None:
    import fastnets

    report = fastnets.explain(model, arguments(x))
    result.coverage = report.coverage
    for line in report.rows:
        if line.fused:
            result.implementations[line.implementation] = (
                result.implementations.get(line.implementation, 0) + 1
            )


def _settle(result: Result) -> None:
    """Turn what the clock reports into the rows' status."""
    for row in result.rows:
        if row.status != "measured":
            if row.status == "failed" and not row.note:
                row.note = "not reached: interrupted"
            continue
        samples = result.comparison.samples.get(row.variant) if result.comparison else None
        if samples is None or not samples.times:
            row.status = "failed"
            row.note = (samples.failure if samples else None) or "not reached: interrupted"
        elif samples.failure:
            row.note = f"stopped early: {samples.failure}"
    result.rows = [twin for row in result.rows for twin in (row, *_replays_of(row, result.comparison))]


def _replays_of(row: Row, comparison: Comparison | None) -> list[Row]:
    """The row of the same variant replayed from a CUDA graph, where that was timed or tried."""
    samples = comparison.samples.get(replayed(row.variant)) if comparison else None
    if row.status != "measured" or samples is None:
        return []
    status = "measured" if samples.times else "unavailable"
    note = "" if samples.times else samples.failure or "not reached: interrupted"
    about = f"{row.description}, replayed from a CUDA graph"
    return [replace(row, variant=samples.name, description=about, status=status, note=note, launch="graph")]


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose its algorithms by timing them, for every variant alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def run(
    networks: Iterable[Callable[[], Network]],
    settings: Settings | Sequence[Settings],
    *,
    tell: Tell | None = None,
    finished: Callable[[Result], None] | None = None,
) -> Run:
    """Benchmark networks one after the other; each is built only when its turn comes, and dropped after it.

    ``settings``: several are run one after the other for each network. Their threads and device are those of
    the first. ``finished`` is called with each result as soon as it is there. Ctrl-C ends the run with what
    is done.
    """
    cases = [settings] if isinstance(settings, Settings) else list(settings)
    with cpu_threads(cases[0].threads), _cudnn_benchmark():
        whole = Run(environment.describe(cases[0].device), _plain(cases[0]))
        for build, case in ((build, case) for build in networks for case in cases):
            try:
                result = run_network(build(), case, tell=tell)
            except KeyboardInterrupt:
                whole.interrupted = True
                break
            whole.results.append(result)
            if finished is not None:
                finished(result)
            if result.comparison is not None and result.comparison.interrupted:
                whole.interrupted = True
                break
    return whole


def _plain(settings: Settings) -> dict[str, Any]:
    values: Sequence[tuple[str, Any]] = tuple(vars(settings).items())
    return {
        name: list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, torch.dtype)
        else value
        for name, value in values
    }
