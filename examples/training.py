"""The training loop that the recipes share: SGD with warm-up and clipping, on one process or under torchrun.

Under ``torchrun`` the batch is divided among the ranks and gradients are averaged by
``DistributedDataParallel``: as many steps, of as many images, as one process takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastnets
from fastnets.bench import report
from fastnets.fused.cross_entropy import CrossEntropyLoss

ROOT = Path(__file__).resolve().parent.parent

# (logits, images, labels) -> the mean loss of the batch
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


class Place(NamedTuple):
    """Where this process stands among those that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


@dataclass
class History:
    """What one training run came to: the loss of each step, the held-out accuracy after each epoch."""

    name: str
    fused: bool
    world_size: int
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        how = "fused" if self.fused else "stock"
        ranks = f", {self.world_size} processes" if self.world_size > 1 else ""
        share = f"{self.accuracies[-1]:.1%} of the held-out digits"
        return f"{self.name}: {share} ({how}{ranks}, {self.seconds:.0f} s)"


# --- arguments ----------------------------------------------------------------------------------------------


def parser(description: str, *, epochs: int, lr: float, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every recipe takes; the keywords are its defaults."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    layers = made.add_mutually_exclusive_group()
    layers.add_argument(
        "--fused", action="store_true", default=True, help="train with fastnets' fused layers"
    )
    layers.add_argument("--stock", dest="fused", action="store_false", help="train with PyTorch's own layers")
    made.add_argument("--epochs", type=_positive, default=epochs)
    made.add_argument("-b", "--batch-size", type=_positive, default=128, help="images a step, of all ranks")
    made.add_argument("--lr", type=float, default=lr, help="learning rate at the end of the warm-up")
    made.add_argument("--momentum", type=float, default=0.9)
    made.add_argument("--weight-decay", type=float, default=5e-4)
    made.add_argument("--warm-up", type=float, default=0.05, help="share of the steps")
    made.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--limit", type=_positive, help="use so many digits only")
    made.add_argument("--sync-bn", action="store_true", help="batch norm over all ranks' images")
    made.add_argument("--device", help="cpu or cuda; cuda where there is one if not given")
    made.add_argument(
        "--output", type=Path, default=ROOT / "out" / output, help="folder for weights and curves"
    )
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


# --- one process or many ------------------------------------------------------------------------------------


@contextlib.contextmanager
def ranks(device: str | None) -> Iterator[Place]:
    """This process's place: alone, or among the processes that ``torchrun`` started."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Place(torch.device(kind))
        return
    here = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Place(here, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def prepare(model: nn.Module, options: argparse.Namespace, place: Place) -> nn.Module:
    """The network on its device, fused where that was asked for, wrapped where there are several ranks."""
    if options.batch_size % place.world_size:
        raise SystemExit(
            f"--batch-size {options.batch_size} cannot be divided among {place.world_size} ranks"
        )
    model = model.to(place.device, memory_format=torch.channels_last)
    if place.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
        if options.sync_bn:  # only now: DDP takes none on the CPU, where the fused ones do run
            nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    return fastnets.optimize(model, inplace=True) if options.fused else model


def plain(model: nn.Module) -> nn.Module:
    """The network itself, without the wrapper that averages its gradients."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def from_labels(fused: bool) -> Objective:
    """Cross-entropy of the labels."""
    loss = CrossEntropyLoss() if fused else nn.CrossEntropyLoss()
    return lambda logits, images, labels: loss(logits, labels)


# --- the loop -----------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warm_up: float) -> float:
    """The share of the full learning rate at a step: a straight line up, then half a cosine down to 0."""
    rising = math.ceil(warm_up * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(
    model: nn.Module,
    objective: Objective,
    digits,
    options: argparse.Namespace,
    place: Place,
    name: str,
) -> History:
    """Train ``model`` (as ``prepare`` gives it) in place; every rank returns the same history.

    digits: ``examples.digits.Digits`` on ``place.device``. Each epoch goes once through the images in a new
    order and leaves out those that do not fill a batch.
    """
    history = History(name, options.fused, place.world_size)
    per_epoch = len(digits.labels) // options.batch_size
    if not per_epoch:
        raise SystemExit(f"{len(digits.labels)} digits do not fill one batch of {options.batch_size}")
    steps = options.epochs * per_epoch
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps, options.warm_up)
    )
    order = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed + place.rank)  # dropout differs between ranks
    losses = []
    start = time.perf_counter()
    with _progress(place) as progress:
        bar = progress.add_task(name, total=steps, note="")
        for _ in range(options.epochs):
            model.train()
            shuffled = torch.randperm(len(digits.labels), generator=order).to(place.device)
            for batch in shuffled[: per_epoch * options.batch_size].split(options.batch_size):
                mine = batch[place.rank :: place.world_size]
                images, labels = digits.images[mine], digits.labels[mine]
                loss = objective(model(images), images, labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), options.clip)
                optimizer.step()
                scheduler.step()
                losses.append(loss.detach())
                progress.advance(bar)
            history.accuracies.append(accuracy(model, digits.held_out_images, digits.held_out_labels, place))
            progress.update(bar, note=f"loss {losses[-1]:.3f}, held out {history.accuracies[-1]:.1%}")
    history.losses = _mean_over_ranks(torch.stack(losses), place).tolist()
    history.seconds = time.perf_counter() - start
    return history


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, place: Place, batch_size: int = 250) -> float:
    """The share of right answers over all ranks, each of which judges its part of the images.

    Running statistics are rank 0's afterwards, on every rank.
    """
    model = plain(model).eval()
    if place.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    mine = slice(place.rank, None, place.world_size)
    right = torch.zeros((), dtype=torch.int64, device=place.device)
    for some_images, some_labels in zip(images[mine].split(batch_size), labels[mine].split(batch_size)):
        right += (model(some_images).argmax(1) == some_labels).sum()
    if place.world_size > 1:
        dist.all_reduce(right)
    return right.item() / len(labels)


def _mean_over_ranks(losses: Tensor, place: Place) -> Tensor:
    if place.world_size > 1:
        dist.all_reduce(losses)
    return losses / place.world_size


def _progress(place: Place) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, disable=place.rank > 0, console=Console(stderr=True))


# --- what is left behind ------------------------------------------------------------------------------------


def save(model: nn.Module, history: History, folder: Path, place: Place) -> None:
    """Weights (``NAME.pt``, for stock and fused networks alike), figures and curve, written by rank 0."""
    if place.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(plain(model).state_dict(), folder / f"{history.name}.pt")
    report.write_whole(folder / f"{history.name}.json", json.dumps(asdict(history)).encode())
    draw([history], folder / f"{history.name}.png")
    print(history.summary())
    print(f"weights, figures, curve: {folder / history.name}.pt .json .png")


def draw(histories: list[History], path: Path) -> None:
    """Loss by step beside held-out accuracy by epoch, one colour for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    loss, right = figure.subplots(1, 2)
    for history in histories:
        loss.plot(history.losses, linewidth=0.9, label=history.name)
        epochs = range(1, len(history.accuracies) + 1)
        right.plot(epochs, [100 * share for share in history.accuracies], marker="o", label=history.name)
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="held-out accuracy, %")
    right.xaxis.get_major_locator().set_params(integer=True)
    for panel in (loss, right):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle("; ".join(history.summary() for history in histories), fontsize=9)
    report.write_whole(path, report.png_bytes(figure))
