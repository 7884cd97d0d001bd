"""The ``fastnets`` command: list, explain, check, bench, compare, tune, bench-op, profile, env.

Flags are timm's where timm has the thing. Exit codes: 0 done, 1 answers were wrong or one of our variants
failed, 2 the request cannot be served (unknown network, bad path, missing device), 130 interrupted, with
what was done kept.
"""

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
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from fastnets.bench.networks import Inputs, Network

app = typer.Typer(
    name="fastnets",
    help="Stock PyTorch networks with fused layers: what is replaced, whether answers agree, what it gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output = Console(width=None if sys.stdout.isatty() else 136)  # a file or pipe gets whole lines
messages = Console(stderr=True)

Precision = enum.Enum(
    "Precision", {name: name for name in ("float32", "float16", "bfloat16", "fp32", "fp16", "bf16")}, type=str
)
Allocator = enum.Enum("Allocator", {"thp": "thp", "keep_pages": "keep-pages"}, type=str)
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="a name of `fastnets list`, torchvision:NAME or timm:NAME")
]
ModelNames = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="names of `fastnets list`, torchvision:NAME or timm:NAME"),
]
BatchSize = Annotated[int, typer.Option("-b", "--batch-size", min=1, help="images in a batch")]
ImageSize = Annotated[
    int | None, typer.Option("--img-size", min=1, help="height and width; the network's own if not given")
]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cuda, cuda:1, cpu, ...; cuda where there is one if not given")
]
DtypeName = Annotated[
    Precision, typer.Option("--dtype", "--precision", help="of weights and images", case_sensitive=False)
]
Classes = Annotated[int | None, typer.Option("--num-classes", min=1, help="outputs of the last layer")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", "--checkpoint", metavar="FILE", help="a checkpoint (.pth, .safetensors)"),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="torchvision's or timm's own weights; they download them")
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="put the stock network in channels-last too")
]
Backend = Annotated[str, typer.Option("--backend", help="auto, triton, library or reference")]
Seed = Annotated[int, typer.Option("--seed", help="of weights and images")]


class BadRequest(Exception):
    """What was asked for cannot be served; the message goes to the user, without a traceback."""


def _served(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can mend into one line and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from fastnets.bench.networks import MissingPackage

        try:
            command(*args, **kwargs)
        # ValueError: names, paths, checkpoints, sizes; each of the library's says what and what to do
        except (BadRequest, MissingPackage, ValueError, FileNotFoundError) as error:
            if os.environ.get("FASTNETS_TRACEBACK") == "1":
                raise
            messages.print(f"fastnets: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            messages.print("fastnets: interrupted")
            raise typer.Exit(130) from None

    return run


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"--device {name}: not a device name; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadRequest(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    if device.type not in ("cpu", "cuda"):
        raise BadRequest(f"--device {name}: fastnets runs on cpu and cuda")
    return device


def _dtype(precision: Precision) -> torch.dtype:
    import torch

    return getattr(torch, _SHORT.get(precision.value, precision.value))


def _side_by_side(
    model: str,
    device: str | None,
    dtype: Precision,
    backend: str,
    *,
    batch_size: int,
    channels_last: bool,
    **how: Any,
) -> tuple[Network, torch.nn.Module, torch.nn.Module, Inputs]:
    """The network, its stock and its fused form, and a batch for them; ``how`` goes to ``networks.load``."""
    import fastnets
    from fastnets.bench import baselines, networks
    from fastnets.fused.dispatch import validate_backend

    place = _device(device)
    validate_backend(backend, "--backend")
    network = networks.load(model, **how)
    stock = network.model.to(device=place, dtype=_dtype(dtype))
    x = network.inputs(batch_size, dtype=_dtype(dtype), device=place, seed=how["seed"])
    if channels_last:
        stock, x = baselines.lay_out(stock, x)
    return network, stock, fastnets.optimize(stock, backend=backend), x


@app.command("list")
@_served
def list_command(
    pattern: Annotated[str, typer.Argument(help="shell pattern; torchvision:PATTERN, timm:PATTERN")] = "*",
) -> None:
    """Print the names of networks, one a line."""
    from fastnets.bench.networks import list_names

    names = list_names(pattern)
    if not names:
        raise BadRequest(f"no network matches {pattern!r}; `fastnets list` prints all names")
    for name in names:
        print(name)


@app.command()
@_served
def explain(
    model: ModelName,
    batch_size: BatchSize = 1,
    img_size: ImageSize = None,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
    num_classes: Classes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    channels_last: ChannelsLast = False,
    backend: Backend = "auto",
    seed: Seed = 0,
) -> None:
    """Show for each layer what replaces it and which implementation runs, or why it stays stock."""
    import fastnets
    from fastnets.bench import networks

    network, _, fused, x = _side_by_side(
        model,
        device,
        dtype,
        backend,
        batch_size=batch_size,
        channels_last=channels_last,
        num_classes=num_classes,
        weights=weights,
        pretrained=pretrained,
        img_size=img_size,
        seed=seed,
    )
    output.print(
        f"{network.name} on {networks.first(x).device}, input {networks.describe(x)}", highlight=False
    )
    print(fastnets.explain(fused, networks.arguments(x)))


@app.command()
@_served
def check(
    model: ModelName,
    batch_size: BatchSize = 8,
    img_size: ImageSize = None,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
    num_classes: Classes = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    channels_last: ChannelsLast = False,
    backend: Backend = "auto",
    seed: Seed = 0,
) -> None:
    """Compare stock and fused answers, both against float64. Exit code 1 where they are too far off."""
    import fastnets
    from fastnets.bench import networks

    network, stock, fused, x = _side_by_side(
        model,
        device,
        dtype,
        backend,
        batch_size=batch_size,
        channels_last=channels_last,
        num_classes=num_classes,
        weights=weights,
        pretrained=pretrained,
        img_size=img_size,
        seed=seed,
    )
    output.print(f"{network.name} on {networks.first(x).device}, weights: {network.weights}", highlight=False)
    with messages.status("comparing with float64"):
        report = fastnets.check(stock, fused, networks.arguments(x))
    print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@_served
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="names of `fastnets list`, torchvision:NAME or timm:NAME"),
    ] = None,
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
    place = _device(device)
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
        for dtype in [_dtype(_precision(word)) for word in dtypes.split(",")]
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


@app.command()
@_served
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


@app.command()
@_served
def tune(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="names of `fastnets list`, torchvision:NAME or timm:NAME"),
    ] = None,
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
        network, stock, fused, x = _side_by_side(
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


@app.command("bench-op")
@_served
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
    place = _device(device)
    refuse_unwritable([result] if result else [], formats=(".json",))
    facts = environment.describe(place)
    for line in environment.summary(facts):
        output.print(line, highlight=False, soft_wrap=True)
    ceilings = measure_ceilings(place, _dtype(dtype))
    results = []
    with _progress() as tell:
        for step, operation in enumerate(chosen):
            tell(operation.name, "check and measure", "", step, len(chosen))
            options = {"batch_size": batch_size, "training": training, "backends": names, "rounds": rounds}
            results.append(layers.bench_operation(operation, place, _dtype(dtype), **options))
    layers.print_table(results, ceilings, output)
    if result:
        layers.write_json(results, ceilings, facts, result)
        output.print(f"written: {result}", highlight=False)


@app.command()
@_served
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
    from fastnets.bench import baselines, environment, networks
    from fastnets.bench import profile as profiling
    from fastnets.bench.report import refuse_unwritable
    from fastnets.fused.dispatch import validate_backend

    validate_backend(backend, "--backend")
    place = _device(device)
    refuse_unwritable([trace] if trace else [], formats=(".json",))
    refuse_unwritable([memory] if memory else [], formats=(".png", ".svg"))
    network = networks.load(model, weights=weights, pretrained=pretrained, img_size=img_size)
    net = network.model.to(device=place, dtype=_dtype(dtype)).train(training)
    if not stock:
        net = fastnets.optimize(net, backend=backend)
    net, x = baselines.lay_out(net, network.inputs(batch_size, dtype=_dtype(dtype), device=place))
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


@app.command()
@_served
def env(
    device: DeviceName = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Print what a figure measured here would depend on: device, versions, threads, allocator."""
    from fastnets.bench import environment

    facts = environment.describe(_device(device))
    print(json.dumps(facts, indent=1) if as_json else "\n".join(environment.summary(facts)))


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


def main() -> None:
    """Entry point of the ``fastnets`` command and of ``python -m fastnets``."""
    app()
