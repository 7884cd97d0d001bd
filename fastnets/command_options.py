"""What the commands share: their flags, which are timm's where timm has the thing, and how these are read.

Exit codes: see ``cli``.
"""

from __future__ import annotations

import enum
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from fastnets.bench.networks import Inputs, Network

output = Console(width=None if sys.stdout.isatty() else 136)  # a file or pipe gets whole lines
messages = Console(stderr=True)

Precision = enum.Enum(
    "Precision", {name: name for name in ("float32", "float16", "bfloat16", "fp32", "fp16", "bf16")}, type=str
)
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="a name of `fastnets list`, torchvision:NAME or timm:NAME")
]
ModelNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]...", help="names of `fastnets list`, torchvision:NAME or timm:NAME"),
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


def served(command: Callable[..., None]) -> Callable[..., None]:
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


def device_named(name: str | None) -> torch.device:
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


def dtype_named(precision: Precision) -> torch.dtype:
    import torch

    return getattr(torch, _SHORT.get(precision.value, precision.value))


def side_by_side(
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

    place = device_named(device)
    validate_backend(backend, "--backend")
    network = networks.load(model, **how)
    stock = network.model.to(device=place, dtype=dtype_named(dtype))
    x = network.inputs(batch_size, dtype=dtype_named(dtype), device=place, seed=how["seed"])
    if channels_last:
        stock, x = baselines.lay_out(stock, x)
    return network, stock, fastnets.optimize(stock, backend=backend), x
