"""The commands that measure (bench, tune, bench-op, profile), and compare, which reads what bench writes."""

from __future__ import annotations

import contextlib
import difflib
import enum
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from fastnets.command_options import (
    Backend,
    BadRequest,
    BatchSize,
    ChannelsLast,
    Classes,
    DeviceName,
    DtypeName,
    ImageSize,
    ModelName,
    ModelNames,
    Precision,
    Pretrained,
    Seed,
    Weights,
    device_named,
    dtype_named,
    messages,
    output,
    served,
    side_by_side,
)

Allocator = enum.Enum("Allocator", {"thp": "thp", "keep_pages": "keep-pages"}, type=str)


@served
def bench(
    models: ModelNames = None,
    suite_name: Annotated[
        str | None, typer.Option("--suite", help="lineage, attention, layers or training, instead of names")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="one image, few rounds, no compilers: minutes for a suite")
    ] = False,
    batch_sizes: Annotated[
        str | None, typer.Option("-b", "--batch-size", help="images in a batch; several: 1,8,32")
    ] = None,
    img_sizes: Annotated[
        str | None, typer.Option("--img-size", help="height and width; several: 128,224")
    ] = None,
    device: DeviceName = None,
    dtypes: Annotated[
        str, typer.Option("--dtype", "--precision", help="of weights and images; several: fp32,bf16")
    ] = "float32",
    num_classes: Classes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    channels_last: ChannelsLast = False,
    variants: Annotated[
        str | None, typer.Option("--variants", help="comma-separated; `--variants help` names them")
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="time steps of training (forward, loss, backward, SGD)")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=3, help="visits to each variant; 20 if not given")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=0, help="end a network's rounds after this long")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")] = None,
    allocator: Annotated[
        Allocator | None,
        typer.Option(
            help="start again with this CPU allocator: thp asks for huge pages, keep-pages keeps freed memory"
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--output",
            "--results-file",
            metavar="FILE",
            help=".json, .csv, .md, .html, .png or .svg; repeatable",
        ),
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option("--fail-under", help="exit with 1 where fastnets is clearly under so many times eager"),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Time a network's variants side by side, each after its answers have passed the accuracy check."""
    from fastnets.bench import baselines, environment, networks, report, suite, suites

    if variants == "help":
        for variant in baselines.VARIANTS.values():
            print(f"{variant.name:18} {variant.description}")
        return
    if allocator is not None and environment.allocator() != allocator.value:
        _start_again(environment.ALLOCATORS[allocator.value])
    place = device_named(device)
    if bool(models) == bool(suite_name):
        raise BadRequest("name networks, or a suite by --suite; `fastnets bench resnet50`")
    if suite_name is not None and suite_name not in suites.SUITES:
        raise BadRequest(f"--suite {suite_name}: is not a suite{_near(suite_name, suites.SUITES)}")
    chosen = tuple(variants.split(",")) if variants else ()
    if quick and not chosen:
        training = training or (suite_name is not None and suites.trains(suite_name))
        known = [baselines.VARIANTS[name] for name in baselines.QUICK]
        chosen = tuple(variant.name for variant in known if variant.trains or not training)
    cases = [
        suite.Settings(
            batch_size=size,
            dtype=dtype,
            device=str(place),
            variants=chosen,
            rounds=rounds or (8 if quick else 20),
            max_seconds=max_seconds if max_seconds is not None else 5.0 if quick else None,
            threads=threads,
            channels_last=channels_last,
            training=training or (suite_name is not None and suites.trains(suite_name)),
            breakdown=any(str(path).endswith((".html", ".svg", ".png", ".json")) for path in results or ()),
            seed=seed,
        )
        for dtype in [dtype_named(_precision(word)) for word in dtypes.split(",")]
        for size in _numbers("--batch-size", batch_sizes or ("1" if quick else "8"))
    ]
    report.refuse_unwritable(results or ())
    for name in models or ():
        networks.refuse_unknown(name)
    builders = []
    for size in _numbers("--img-size", img_sizes) if img_sizes else [None]:
        load = functools.partial(
            networks.load,
            num_classes=num_classes,
            weights=weights,
            pretrained=pretrained,
            img_size=size,
            seed=seed,
        )
        named = [functools.partial(load, name) for name in models or ()]
        builders += suites.builders(suite_name, load, seed) if suite_name else named
    facts = environment.describe(place)
    for line in environment.summary(facts):
        output.print(line, highlight=False, soft_wrap=True)
    if environment.is_busy(facts):
        messages.print(f"fastnets: the machine is busy (load {facts['load_average']}); figures will scatter")
    with _progress(len(builders) * len(cases)) as tell:
        run = suite.run(
            builders, cases, tell=tell, finished=lambda result: report.print_table(result, output)
        )
    for path in results or ():
        report.write(run, path)
        output.print(f"written: {path}", highlight=False)
    if run.interrupted:
        messages.print("fastnets: interrupted; the figures above are of what was complete")
        raise typer.Exit(130)
    slow = [] if fail_under is None else report.clearly_under(run, fail_under)
    for line in slow:
        messages.print(f"fastnets: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if slow or not run.ok:
        raise typer.Exit(1)


@served
def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="an earlier `fastnets bench -o A.json`")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="a later one")],
    margin: Annotated[
        float, typer.Option("--margin", help="what two runs of the same code may differ by")
    ] = 0.05,
    fail_under: Annotated[
        float | None,
        typer.Option("--fail-under", help="exit with 1 where B is clearly under so many times A; 1 - margin"),
    ] = None,
) -> None:
    """Two benchmark files: what became faster or slower beside eager. Exit code 1 where ours is slower."""
    from fastnets.bench import compare as comparing
    from fastnets.bench import report

    changes = comparing.compare_runs(report.read_results(first), report.read_results(second), margin)
    comparing.print_changes(changes, output)
    bound = 1 - margin if fail_under is None else fail_under
    ours = [change for change in changes if change.variant.startswith("fastnets") and change.change]
    if any(change.change.high < bound for change in ours):
        raise typer.Exit(1)


@served
def tune(
    models: ModelNames = None,
    batch_size: BatchSize = 8,
    img_size: ImageSize = None,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
    num_classes: Classes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    channels_last: ChannelsLast = False,
    training: Annotated[bool, typer.Option("--training", help="steps of training, as a whole")] = False,
    budget: Annotated[
        float, typer.Option("--budget", metavar="SECONDS", help="for each network; the rest stays as it is")
    ] = 90.0,
    again: Annotated[bool, typer.Option("--again", help="measure also what is known already")] = False,
    export: Annotated[
        str | None, typer.Option("--export", metavar="FILE", help="write everything that is known, as JSON")
    ] = None,
    take: Annotated[
        str | None, typer.Option("--import", metavar="FILE", help="add what another machine exported, first")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure on this device which implementation of each layer is the fastest, and keep that for later."""
    from fastnets.bench import networks, report
    from fastnets.fused import selection
    from fastnets.fused.choices import Store

    if not models and export is None and take is None:
        raise BadRequest("name networks to tune, or use --export or --import")
    if not budget > 0:
        raise BadRequest(f"--budget {budget:g}: nothing can be measured in no time; give seconds")
    report.refuse_unwritable([export] if export else [], formats=(".json",))
    store = Store()
    if take is not None:
        try:
            content = json.loads(Path(take).read_text())
        except OSError as error:
            raise BadRequest(f"--import {take}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise BadRequest(f"--import {take}: is no JSON ({error})") from error
        try:
            output.print(f"{store.take(content)} choices added to {store.folder}", highlight=False)
        except ValueError as error:
            raise BadRequest(f"--import {take}: {error}") from error
    for name in models or ():
        networks.refuse_unknown(name)
    interrupted = False
    for name in models or ():
        how = {"num_classes": num_classes, "weights": weights, "pretrained": pretrained}
        network, stock, fused, x = side_by_side(
            name, device, dtype, "auto", batch_size=batch_size, channels_last=channels_last,
            img_size=img_size, seed=seed, **how,
        )  # fmt: skip
        with _progress(1) as tell:
            found = selection.select(
                stock.train(training), fused.train(training), networks.arguments(x),
                budget=budget, again=again, tell=functools.partial(tell, network.name),
            )  # fmt: skip
        output.print(f"{network.name}, input {networks.describe(x)}", highlight=False)
        print(f"{found}\n{found.seconds:.0f} seconds; kept in {store.path}")
        interrupted = found.interrupted
        if interrupted:
            break
    if export is not None:
        report.write_whole(Path(export), (json.dumps(store.export(), indent=1) + "\n").encode())
        output.print(f"written: {export}", highlight=False)
    if interrupted:
        messages.print("fastnets: interrupted; what was measured is kept")
        raise typer.Exit(130)


@served
def bench_op(
    operations: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATTERN]...", help='names or families, "conv*"; all if none is given'),
    ] = None,
    batch_size: BatchSize = 32,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
    training: Annotated[bool, typer.Option("--training", help="the backward instead of the forward")] = False,
    backends: Annotated[
        str | None, typer.Option("--backends", help="comma-separated; reference is stock")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="visits to each implementation")] = 20,
    listing: Annotated[bool, typer.Option("--list", help="only print the operations")] = False,
    result: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="the rows and raw samples, .json")
    ] = None,
) -> None:
    """Time single layers by every implementation: TFLOP/s, GB/s, and the share of this device's ceilings."""
    from fastnets.bench import environment, layers
    from fastnets.bench.ceilings import measure_ceilings
    from fastnets.bench.report import refuse_unwritable
    from fastnets.fused.dispatch import validate_backend

    chosen = layers.select_operations(operations or ())
    if training:
        chosen = [operation for operation in chosen if operation.trains]
    if listing:
        for operation in chosen:
            print(f"{operation.family:14} {operation.name}")
        return
    names = backends.split(",") if backends else None
    for name in names or ():
        validate_backend(name, "--backends")
    place = device_named(device)
    refuse_unwritable([result] if result else [], formats=(".json",))
    facts = environment.describe(place)
    for line in environment.summary(facts):
        output.print(line, highlight=False, soft_wrap=True)
    ceilings = measure_ceilings(place, dtype_named(dtype))
    results = []
    with _progress() as tell:
        for step, operation in enumerate(chosen):
            tell(operation.name, "check and measure", "", step, len(chosen))
            options = {"batch_size": batch_size, "training": training, "backends": names, "rounds": rounds}
            results.append(layers.bench_operation(operation, place, dtype_named(dtype), **options))
    layers.print_table(results, ceilings, output)
    if result:
        layers.write_json(results, ceilings, facts, result)
        output.print(f"written: {result}", highlight=False)


@served
def profile(
    model: ModelName,
    batch_size: BatchSize = 8,
    img_size: ImageSize = None,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
    weights: Weights = None,
    pretrained: Pretrained = False,
    backend: Backend = "auto",
    stock: Annotated[bool, typer.Option("--stock", help="the stock network, channels-last")] = False,
    training: Annotated[bool, typer.Option("--training", help="steps of training")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps that are profiled")] = 3,
    top: Annotated[int, typer.Option("--top", min=1, help="lines of each table")] = 15,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="a .json for Perfetto or chrome://tracing")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="FILE", help="allocated memory over time, .png or .svg")
    ] = None,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="the same ranges for Nsight")] = False,
) -> None:
    """Where the time and the memory of a network go, by op and by layer."""
    import fastnets
    from fastnets.bench import baselines, environment, networks, profiling
    from fastnets.bench.report import refuse_unwritable
    from fastnets.fused.dispatch import validate_backend

    validate_backend(backend, "--backend")
    place = device_named(device)
    refuse_unwritable([trace] if trace else [], formats=(".json",))
    refuse_unwritable([memory] if memory else [], formats=(".png", ".svg"))
    network = networks.load(model, weights=weights, pretrained=pretrained, img_size=img_size)
    net = network.model.to(device=place, dtype=dtype_named(dtype)).train(training)
    if not stock:
        net = fastnets.optimize(net, backend=backend)
    net, x = baselines.lay_out(net, network.inputs(batch_size, dtype=dtype_named(dtype), device=place))
    for line in environment.summary(environment.describe(place)):
        output.print(line, highlight=False, soft_wrap=True)
    found = profiling.profile(net, x, steps=steps, nvtx=nvtx)
    found.print(output, top)
    if trace:
        found.export_trace(trace)
        output.print(f"written: {trace}", highlight=False)
    if memory:
        found.plot_memory(memory)
        output.print(f"written: {memory}", highlight=False)
    for line in profiling.tool_commands(_arguments_without(sys.argv[2:], "--nvtx")):
        output.print(line, highlight=False, soft_wrap=True, markup=False)


def _arguments_without(arguments: list[str], *flags: str) -> list[str]:
    return [argument for argument in arguments if argument not in flags]


def _start_again(variables: dict[str, str]) -> None:
    """Replace this process by the same command under other environment variables."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "fastnets", *sys.argv[1:]], {**os.environ, **variables})


def _numbers(flag: str, words: str) -> list[int]:
    """``"1,8"`` as numbers."""
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        raise BadRequest(f"{flag} {words}: give numbers, such as 8 or 1,8,32") from None
    if min(numbers) < 1:
        raise BadRequest(f"{flag} {words}: at least 1")
    return numbers


def _precision(word: str) -> Precision:
    try:
        return Precision(word)
    except ValueError:
        known = [precision.value for precision in Precision]
        raise BadRequest(f"--dtype {word}: is not known{_near(word, known)}") from None


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (one of: {', '.join(known)})"


# The share of a network's time that comes before a phase, and that of the phase.
_PHASES = {
    "prepare and check": (0.0, 0.5),
    "warm-up": (0.5, 0.1),
    "measure": (0.6, 0.3),
    "layers": (0.9, 0.1),
}


@contextlib.contextmanager
def _progress(networks: int = 1) -> Iterator[Callable[[str, str, str, int, int], None]]:
    """A progress line with the time left on a terminal; elsewhere a line of text for each phase."""
    start, seen = time.perf_counter(), []

    def done(network: str, phase: str, step: int, steps: int) -> float:
        """How much of everything is done, 0 to 1."""
        if (phase == "prepare and check" and step == 0) or not seen:
            seen.append(network)
        before, share = _PHASES.get(phase, (0.0, 1.0))
        return min(1.0, (len(seen) - 1 + before + share * step / max(1, steps)) / networks)

    if messages.is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
        with Progress(*columns, TimeRemainingColumn(), console=messages, transient=True) as progress:
            task = progress.add_task("", total=1.0)

            def show(network: str, phase: str, variant: str, step: int, steps: int) -> None:
                share = done(network, phase, step, steps)
                progress.update(task, description=f"{network}: {phase} {variant}", completed=share)

            yield show
        return
    said: set[tuple[str, str, int]] = set()

    def say(network: str, phase: str, variant: str, step: int, steps: int) -> None:
        share = done(network, phase, step, steps)
        if (network, phase, len(seen)) not in said:
            said.add((network, phase, len(seen)))
            elapsed = time.perf_counter() - start
            left = f" (about {elapsed / share - elapsed:.0f} s left)" if share > 0.02 and networks > 1 else ""
            print(f"{network}: {phase}{left}", file=sys.stderr, flush=True)

    yield say
