"""The ``fastnets`` command: list, explain, check, bench, bench-op, profile, env.

Flags are timm's where timm has the thing. Exit codes: 0 done, 1 answers were wrong or one of our variants
failed, 2 the request cannot be served (unknown network, bad path, missing device), 130 interrupted, with
what was done kept.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from fastnets.bench.networks import Network

app = typer.Typer(
    name="fastnets",
    help="Stock PyTorch networks with fused layers: what is replaced, whether answers agree, what it gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output = Console(width=None if sys.stdout.isatty() else 120)  # a file or pipe gets whole lines
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
) -> tuple[Network, torch.nn.Module, torch.nn.Module, torch.Tensor]:
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
        f"{network.name} on {x.device}, input {'×'.join(map(str, x.shape))} {x.dtype}", highlight=False
    )
    print(fastnets.explain(fused, (x,)))


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
    output.print(f"{network.name} on {x.device}, weights: {network.weights}", highlight=False)
    with messages.status("comparing with float64"):
        report = fastnets.check(stock, fused, (x,))
    print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@_served
def bench(
    models: ModelNames,
    batch_size: BatchSize = 8,
    img_size: ImageSize = None,
    device: DeviceName = None,
    dtype: DtypeName = Precision.float32,
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
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="visits to each variant")] = 20,
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
            "-o", "--output", "--results-file", metavar="FILE", help=".json, .csv, .md or .png; repeatable"
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Time a network's variants side by side, each after its answers have passed the accuracy check."""
    from fastnets.bench import baselines, environment, networks, report, suite

    if variants == "help":
        for variant in baselines.VARIANTS.values():
            print(f"{variant.name:18} {variant.description}")
        return
    if allocator is not None and environment.allocator() != allocator.value:
        _start_again(environment.ALLOCATORS[allocator.value])
    place = _device(device)
    settings = suite.Settings(
        batch_size=batch_size,
        dtype=_dtype(dtype),
        device=str(place),
        variants=tuple(variants.split(",")) if variants else (),
        rounds=rounds,
        max_seconds=max_seconds,
        threads=threads,
        channels_last=channels_last,
        training=training,
        seed=seed,
    )
    report.refuse_unwritable(results or ())
    for name in models:
        networks.refuse_unknown(name)
    builders = [
        functools.partial(
            networks.load,
            name,
            num_classes=num_classes,
            weights=weights,
            pretrained=pretrained,
            img_size=img_size,
            seed=seed,
        )
        for name in models
    ]
    facts = environment.describe(place)
    for line in environment.summary(facts):
        output.print(line, highlight=False, soft_wrap=True)
    if environment.is_busy(facts):
        messages.print(f"fastnets: the machine is busy (load {facts['load_average']}); figures will scatter")
    with _progress() as tell:
        run = suite.run(
            builders, settings, tell=tell, finished=lambda result: report.print_table(result, output)
        )
    for path in results or ():
        report.write(run, path)
        output.print(f"written: {path}", highlight=False)
    if run.interrupted:
        messages.print("fastnets: interrupted; the figures above are of what was complete")
        raise typer.Exit(130)
    if not run.ok:
        raise typer.Exit(1)


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


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, str, str, int, int], None]]:
    """A progress line on a terminal; elsewhere a line of text for each phase."""
    if messages.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=messages, transient=True) as progress:
            task = progress.add_task("")

            def show(network: str, phase: str, variant: str, step: int, steps: int) -> None:
                progress.update(
                    task, description=f"{network}: {phase} {variant}", completed=step, total=steps
                )

            yield show
        return
    said: set[tuple[str, str]] = set()

    def say(network: str, phase: str, variant: str, step: int, steps: int) -> None:
        if (network, phase) not in said:
            said.add((network, phase))
            print(f"{network}: {phase}", file=sys.stderr, flush=True)

    yield say


def main() -> None:
    """Entry point of the ``fastnets`` command and of ``python -m fastnets``."""
    app()
