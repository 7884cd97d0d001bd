"""The ``fastnets`` command: list, explain, check, bench, compare, tune, bench-op, profile, env.

Exit codes: 0 done, 1 answers were wrong or one of our variants failed, 2 the request cannot be served
(unknown network, bad path, missing device), 130 interrupted, with what was done kept.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fastnets import measuring_commands as measuring
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
    Precision,
    Pretrained,
    Seed,
    Weights,
    device_named,
    messages,
    output,
    served,
    side_by_side,
)

app = typer.Typer(
    name="fastnets",
    help="Stock PyTorch networks with fused layers: what is replaced, whether answers agree, what it gains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("list")
@served
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
@served
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

    network, _, fused, x = side_by_side(
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
@served
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

    network, stock, fused, x = side_by_side(
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


for command in (measuring.bench, measuring.compare, measuring.tune):
    app.command()(command)
app.command("bench-op")(measuring.bench_op)
app.command()(measuring.profile)


@app.command()
@served
def env(
    device: DeviceName = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Print what a figure measured here would depend on: device, versions, threads, allocator."""
    from fastnets.bench import environment

    facts = environment.describe(device_named(device))
    print(json.dumps(facts, indent=1) if as_json else "\n".join(environment.summary(facts)))


def main() -> None:
    """Entry point of the ``fastnets`` command and of ``python -m fastnets``."""
    app()
