"""``python -m fastnets.verify``: is fastnets right on this machine, and what does it run at.

For the first person with a new GPU. Every op against PyTorch on the device at hand, forward and backward, in
every dtype; every shipped kernel config a hundred times over; whole networks; a short benchmark; and one JSON
file to attach to an issue. Where there is no GPU, the CPU is checked and the report says what was left out.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastnets.bench import environment, suite
from fastnets.bench.native import NativeResult, disagreements, run_case
from fastnets.bench.networks import load
from fastnets.bench.operations import OPERATIONS, Inputs, Operation

__all__ = ["SCHEMA", "OpResult", "Verification", "verify_networks", "verify_op"]

SCHEMA = "fastnets-verify/1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD_RATIO, GRADIENT_RATIO = 2.0, 3.0  # of PyTorch's own error
NETWORKS = ("lenet5", "resnet18", "mobilenet_v2", "resnet50")


@dataclass
class OpResult:
    """One op, shape, dtype and implementation: its error over PyTorch's own, forward and backward."""

    name: str
    dtype: str
    backend: str
    forward: float | None = None
    gradients: float | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        if self.error or self.forward is None or not self.forward <= FORWARD_RATIO:
            return False
        return self.gradients is None or self.gradients <= GRADIENT_RATIO


@dataclass
class Verification:
    """Everything one run found. ``left_out``: what it could not or was told not to do, in words."""

    environment: dict[str, Any]
    ops: list[OpResult] = field(default_factory=list)
    configs: list[NativeResult] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    networks: list[OpResult] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing that ran was wrong."""
        return (
            all(r.passed for r in [*self.ops, *self.networks])
            and not any(c.status == "failed" for c in self.configs)
            and not self.disagreements
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data with the schema's name; the configs' sampled values stay out."""
        plain = dataclasses.asdict(self)
        for config in plain["configs"]:
            config.pop("sample")
        return {"schema": SCHEMA, "passed": self.passed, **plain}


# --- the checks ---------------------------------------------------------------------------------------------


def _ratio(
    exact: Iterable[torch.Tensor], stock: Iterable[torch.Tensor], ours: Iterable[torch.Tensor]
) -> float:
    """The largest of ‖ours − exact‖ / (‖stock − exact‖ + what rounding the result once costs)."""
    worst = 0.0
    for e, s, o in zip(exact, stock, ours):
        if o.shape != e.shape or not torch.equal(torch.isfinite(o), torch.isfinite(s)):
            return math.inf
        finite = torch.isfinite(s) & torch.isfinite(e)
        e64, s64, o64 = e.double()[finite], s.double()[finite], o.double()[finite]
        allowed = (s64 - e64).norm() + torch.finfo(s.dtype).eps / 4 * e64.norm()
        error = (o64 - e64).norm()
        if error > 0:
            worst = max(worst, float(error / allowed))
    return worst


def verify_op(
    operation: Operation, backend: str, dtype: torch.dtype, device: torch.device | str, batch_size: int = 2
) -> OpResult:
    """One op by one implementation against PyTorch in the same dtype, both judged by float64."""
    result = OpResult(operation.name, str(dtype).removeprefix("torch."), backend)
    try:
        call = operation.make(Inputs(device, dtype), batch_size)
        exact = call.in_float64()
        with torch.no_grad():
            ours, stock = call.run(backend), call.run("reference")
            result.forward = _ratio([exact.run("reference")], [stock], [ours])
        if operation.trains:
            dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
            result.gradients = _ratio(
                exact.gradients("reference", dy.double()),
                call.gradients("reference", dy),
                call.gradients(backend, dy),
            )
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return result


def verify_networks(
    names: Iterable[str], dtypes: Iterable[torch.dtype], device: torch.device
) -> list[OpResult]:
    """Whole networks, fused as ``optimize`` chooses, against stock; on CUDA by our kernels alone as well."""
    import fastnets

    results = []
    for name in names:
        network = load(name)
        for dtype in dtypes:
            stock = copy.deepcopy(network.model).to(device=device, dtype=dtype)
            x = network.inputs(4, dtype=dtype, device=device)
            for backend in ("auto", "triton") if device.type == "cuda" else ("auto",):
                result = OpResult(name, str(dtype).removeprefix("torch."), backend)
                try:
                    fast = fastnets.optimize(stock, backend=backend)
                    result.forward = float(fastnets.check(stock, fast, x).error_ratio)
                except Exception as error:
                    result.error = f"{type(error).__name__}: {error}"
                results.append(result)
    return results


def _configs_in_parallel(
    cases: list, device: str, repeats: int, jobs: int, budget: float, tick: Callable[[], None]
) -> list[NativeResult]:
    """Cases over ``jobs`` processes (most of the time goes to compiling), for ``budget`` seconds at most."""
    context = multiprocessing.get_context("spawn")
    results: list[NativeResult] = []
    deadline = time.perf_counter() + budget
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_case, case, device, repeats): case for case in cases}
        try:
            for done in concurrent.futures.as_completed(waiting, timeout=budget):
                results.append(_result_of(done, waiting[done]))
                tick()
                if time.perf_counter() > deadline:
                    break
        except concurrent.futures.TimeoutError:
            pass
        pool.shutdown(wait=False, cancel_futures=True)
    return results


def _result_of(done: concurrent.futures.Future, case: Any) -> NativeResult:
    try:
        return done.result()
    except Exception as error:
        note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return NativeResult(case.module, case.name, str(case.config), "failed", note)


def _bench(name: str, dtype: torch.dtype, device: torch.device, training: bool) -> list[dict[str, Any]]:
    settings = suite.Settings(
        batch_size=32 if device.type == "cuda" else 2,
        dtype=dtype,
        device=str(device),
        variants=("eager", "channels-last", "fastnets"),
        rounds=7,
        max_seconds=10,
        training=training,
    )
    run = suite.run([lambda: load(name)], settings)
    rows = []
    for result in run.results:
        for row in result.rows:
            samples = result.comparison.samples.get(row.variant) if result.comparison else None
            milliseconds = samples.median * 1e3 if samples and samples.times else None
            rows.append(
                {
                    "network": name,
                    "training": training,
                    "dtype": result.dtype,
                    "variant": row.variant,
                    "status": row.status,
                    "note": row.note,
                    "error_ratio": row.error_ratio,
                    "milliseconds": milliseconds,
                }
            )
    return rows


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 is not TF32 inside, for stock and ours: vendors use TF32 for some shapes and not for others."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- the program --------------------------------------------------------------------------------------------


def _implementations(device: torch.device) -> tuple[str, ...]:
    return ("triton", "library", "auto") if device.type == "cuda" else ("auto",)


def _print(found: Verification, console: Console) -> None:
    table = Table(title="error over PyTorch's own (allowed: 2 forward, 3 gradients)")
    for heading in ("what", "dtype", "implementation", "forward", "gradients", ""):
        table.add_column(heading)
    for row in [*found.ops, *found.networks]:
        if not row.passed:
            forward, gradients = ("" if v is None else f"{v:.2f}" for v in (row.forward, row.gradients))
            table.add_row(row.name, row.dtype, row.backend, forward, gradients, row.error, style="red")
    if table.row_count:
        console.print(table)
    for config in found.configs:
        if config.status == "failed":
            console.print(f"[red]{config.module}: {config.name}: {config.config}: {config.note}[/red]")
    for line in found.disagreements:
        console.print(f"[red]{line}[/red]")
    right = sum(r.passed for r in [*found.ops, *found.networks])
    console.print(
        f"ops and networks: {right} of {len(found.ops) + len(found.networks)} within the allowed error"
    )
    if found.configs:
        by_status = {s: sum(c.status == s for c in found.configs) for s in ("passed", "failed", "skipped")}
        console.print("kernel configs: " + ", ".join(f"{n} {s}" for s, n in by_status.items()))
    for row in found.bench:
        time_text = "-" if row["milliseconds"] is None else f"{row['milliseconds']:.3f} ms"
        kind = "training step" if row["training"] else "inference"
        console.print(
            f"{row['network']}, {kind}, {row['dtype']}, {row['variant']}: {time_text} {row['note']}"
        )
    for line in found.left_out:
        console.print(f"[yellow]left out: {line}[/yellow]")
    console.print("[green]passed[/green]" if found.passed else "[red]NOT PASSED[/red]")


def command(
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; cuda where there is one")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the JSON report")] = Path(
        "fastnets-verify.json"
    ),
    quick: Annotated[bool, typer.Option(help="fewer shapes, configs and repetitions")] = False,
    budget: Annotated[float, typer.Option(min=1, help="seconds for the kernel configs")] = 1200.0,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each kernel config")] = 100,
    jobs: Annotated[int, typer.Option(min=1, help="processes that compile and run configs")] = 4,
    bench: Annotated[bool, typer.Option(help="a short benchmark at the end")] = True,
) -> None:
    """Check fastnets against PyTorch on this machine, and write one JSON to attach to an issue."""
    if output.exists() and not output.is_file():
        raise typer.BadParameter(f"{output} is not a file", param_hint="--output")
    try:
        with output.open("a"):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written: {error}", param_hint="--output") from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} sees no CUDA device here", param_hint="--device")
    console = Console()
    found = Verification(environment.describe(str(target)))
    dtypes = DTYPES if target.type == "cuda" else (torch.float32, torch.bfloat16)
    operations = list(OPERATIONS.values())[:: 4 if quick else 1]
    with Progress(console=Console(stderr=True)) as bar, _full_precision():
        start = time.perf_counter()
        todo = [(o, b, d) for o in operations for b in _implementations(target) for d in dtypes]
        task = bar.add_task("ops", total=len(todo))
        for operation, backend, dtype in todo:
            found.ops.append(verify_op(operation, backend, dtype, target))
            bar.advance(task)
        found.seconds["ops"] = time.perf_counter() - start
        start = time.perf_counter()
        task = bar.add_task("networks", total=1)
        names = NETWORKS[:2] if quick or target.type == "cpu" else NETWORKS
        found.networks = verify_networks(names, dtypes[:2], target)
        bar.advance(task)
        found.seconds["networks"] = time.perf_counter() - start
        if target.type == "cuda":
            start = time.perf_counter()
            _verify_configs(found, target, quick, budget, repeats, jobs, bar)
            found.seconds["configs"] = time.perf_counter() - start
        else:
            found.left_out.append("the Triton kernels: they need a CUDA device (the tests emulate one)")
        if bench:
            task = bar.add_task("short benchmark", total=2)
            for training in (False, True):
                dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
                found.bench += _bench("resnet18" if quick else "resnet50", dtype, target, training)
                bar.advance(task)
        else:
            found.left_out.append("the benchmark, as asked")
    output.write_text(json.dumps(found.as_json(), indent=1, default=str))
    _print(found, console)
    console.print(f"report: {output}")
    raise typer.Exit(0 if found.passed else 1)


def _verify_configs(found, target, quick, budget, repeats, jobs, bar) -> None:
    from fastnets.bench import static
    from fastnets.kernels.device import device_for_capability

    major, minor = torch.cuda.get_device_capability(target)
    known = [c for c in static.ARCHITECTURES if c <= 10 * major + minor]
    if not known:
        found.left_out.append(f"kernel configs: compute capability {major}.{minor} is not supported")
        return
    capability = max(known)
    device_for_capability(capability)
    everything = static.cases(None, (capability,))
    chosen = static.sample(everything, 400 if quick else len(everything), seed=0)
    task = bar.add_task("kernel configs", total=len(chosen))
    found.configs = _configs_in_parallel(
        chosen, str(target), 10 if quick else repeats, jobs, budget, lambda: bar.advance(task)
    )
    found.disagreements = disagreements(found.configs)
    if len(found.configs) < len(everything):
        found.left_out.append(f"{len(everything) - len(found.configs)} of {len(everything)} kernel configs")


def main() -> None:
    """Entry point of ``python -m fastnets.verify``."""
    typer.run(command)
