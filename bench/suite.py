"""Runs networks through the variants: prepares each, checks its answers, and only then measures.

The accuracy gate stands before the clock. A variant whose answers are off by more than the error ratio of
DESIGN allows (twice the stock network's own error against float64; for training three times, of the loss and
of every gradient) is reported as wrong and not timed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastnets.bench import baselines, environment, training
from fastnets.bench.networks import Network
from fastnets.fused.measure import OUT_OF_MEMORY, Comparison, cpu_threads, is_out_of_memory, measure


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
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: at least one image is needed")
        unknown = [name for name in self.variants if name not in baselines.VARIANTS]
        if unknown:
            raise ValueError(f"unknown variant {unknown[0]!r}; known: {', '.join(baselines.VARIANTS)}")
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


def _gate(
    stock: nn.Module, x: torch.Tensor, call: Callable, laid_out: torch.Tensor, row: Row, judge: Judge
) -> bool:
    """Judge the variant's answers on the benchmark's own input; fills the row's accuracy and tells
    whether to go on.
    """
    if stock.training:
        row.error_ratio = judge().error_ratio(call, laid_out)
        right = row.error_ratio <= training.ALLOWED_RATIO
    else:
        from fastnets.fused.check import check

        def answer(_: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():  # as it will be timed; torch.compile would compile anew otherwise
                return call(laid_out)

        report = check(stock, answer, (x,))
        row.error_ratio = float(report.error_ratio)
        row.top1_agreement = None if report.top1_agreement is None else float(report.top1_agreement)
        right = report.ok
    if not right:
        row.status = "wrong"
        row.note = f"error ratio {row.error_ratio:.2f}; not timed"
    return right


def run_network(network: Network, settings: Settings, *, tell: Tell | None = None) -> Result:
    """Prepare, check and measure every variant of one network."""
    tell = tell or (lambda *_: None)
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
        tuple(x.shape),
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
            if calls:
                with torch.inference_mode(not settings.training):
                    result.comparison = measure(
                        calls,
                        device=device,
                        rounds=settings.rounds,
                        max_seconds=settings.max_seconds,
                        seed=settings.seed,
                        observer=lambda phase, name, step, steps: tell(
                            network.name, phase, name, step, steps
                        ),
                    )
    except KeyboardInterrupt:
        result.comparison = result.comparison or Comparison({}, str(device), torch.get_num_threads(), True)
    _settle(result)
    return result


def _prepare(
    stock: nn.Module, x: torch.Tensor, row: Row, result: Result, judge: Judge
) -> Callable[[], Any] | None:
    variant = baselines.VARIANTS[row.variant]
    try:
        if stock.training and not variant.trains:
            raise baselines.Unavailable("it is for inference only")
        start = time.perf_counter()
        # copies are made outside inference mode: weights that are inference tensors could not be kept packed
        call, laid_out = variant.prepare(stock, x)
        with torch.inference_mode(not stock.training):
            training.answers_of(call, laid_out) if stock.training else call(laid_out)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
        row.ready_seconds = time.perf_counter() - start
        if row.variant == "fastnets" and not stock.training:
            _describe_coverage(call, laid_out, result)
        if not _gate(stock, x, call, laid_out, row, judge):
            return None
    except baselines.Unavailable as reason:
        row.status, row.note = "unavailable", str(reason)
        return None
    except Exception as error:
        row.note = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        return None
    row.status = "measured"
    return training.training_step(call, laid_out) if stock.training else lambda: call(laid_out)


def _describe_coverage(model: nn.Module, x: torch.Tensor, result: Result) -> None:
    import fastnets

    report = fastnets.explain(model, (x,))
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
    settings: Settings,
    *,
    tell: Tell | None = None,
    finished: Callable[[Result], None] | None = None,
) -> Run:
    """Benchmark networks one after the other; each is built only when its turn comes, and dropped after it.

    ``finished`` is called with each result as soon as it is there. Ctrl-C ends the run with what is done.
    """
    with cpu_threads(settings.threads), _cudnn_benchmark():
        whole = Run(environment.describe(settings.device), _plain(settings))
        for build in networks:
            try:
                result = run_network(build(), settings, tell=tell)
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
