"""One stock network in, one fused network out: the trained MobileNetV2 on real photos.

    make demo            (or: python examples/demo.py --help)

Prints what each network sees in each photo, how far their answers are from float64, which layers were fused
and what serves them, and how fast each way of running the network is; draws the same as a chart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastnets
from fastnets.bench import baselines, environment, report, suite
from fastnets.bench.networks import Network

sys.path.insert(0, str(Path(__file__).resolve().parent))
import real_data

ROOT = Path(__file__).resolve().parent.parent
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one if not given")
    parser.add_argument("--output", type=Path, default=ROOT / "out", help="folder for demo.png and demo.json")
    parser.add_argument("--rounds", type=int, default=20, help="timed visits to each variant")
    parser.add_argument("--variants", help="comma-separated; those of `fastnets bench` if not given")
    return parser.parse_args()


def read_photos() -> tuple[list[Path], torch.Tensor]:
    """The photos and the batch [N, 3, 224, 224] that the network was trained to see."""
    from PIL import Image
    from torchvision.models import MobileNet_V2_Weights

    paths = real_data.photo_paths()
    if not paths:
        sys.exit("demo: no photos; pip install 'fastnets[examples]' brings scikit-learn's and scikit-image's")
    prepare = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    return paths, torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])


def class_names() -> Sequence[str]:
    from torchvision.models import MobileNet_V2_Weights

    return MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]


def show_answers(paths: list[Path], stock: torch.Tensor, fused: torch.Tensor) -> list[str]:
    """Print both networks' first class for each photo; returns a caption for each."""
    names = class_names()
    table = Table(title="What they see", title_justify="left", title_style="bold")
    for heading in ("photo", "stock", "p", "fused", "p", "same"):
        table.add_column(heading, justify="right" if heading == "p" else "left")
    captions = []
    for path, theirs, ours in zip(paths, stock.softmax(1), fused.softmax(1)):
        a, b = theirs.argmax().item(), ours.argmax().item()
        same = "yes" if a == b else "NO"
        table.add_row(path.name, names[a], f"{theirs[a]:.4f}", names[b], f"{ours[b]:.4f}", same)
        captions.append(f"{names[b]} {ours[b]:.2f}" + ("" if a == b else f"\n(stock: {names[a]})"))
    console.print(table)
    agree = (stock.argmax(1) == fused.argmax(1)).sum().item()
    difference = (stock.softmax(1) - fused.softmax(1)).abs().max().item()
    console.print(
        f"agreement {agree} of {len(paths)}; largest difference of a probability {difference:.1e}\n"
    )
    return captions


def draw(path: Path, photos: list[Path], captions: list[str], run: suite.Run) -> None:
    """The photos with the fused network's answers, above the speed of each variant."""
    from matplotlib.figure import Figure
    from PIL import Image

    result = run.results[0]
    columns = 4
    rows = -(-len(photos) // columns)
    figure = Figure(figsize=(10, 2.6 * rows + 1.8 + 0.42 * len(result.rows)), layout="constrained", dpi=110)
    pictures, speed = figure.subfigures(2, 1, height_ratios=[2.6 * rows, 1.8 + 0.42 * len(result.rows)])
    panels = list(pictures.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, photo, caption in zip(panels, photos, captions):
        panel.imshow(Image.open(photo).convert("RGB"))
        panel.set_title(caption, fontsize=9)
    if any(row.status == "measured" for row in result.rows):
        report.draw_speed(speed.subplots(), result)
    figure.suptitle(report.caption(run.environment), fontsize=8)
    report.write_whole(path, report.png_bytes(figure))


def main() -> int:
    arguments = parse_arguments()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    chart, figures = arguments.output / "demo.png", arguments.output / "demo.json"
    report.refuse_unwritable([chart, figures])

    for line in environment.summary(environment.describe(device)):
        console.print(line)
    try:
        weights = real_data.mobilenet_v2_weights()
    except real_data.Unobtainable as reason:
        sys.exit(f"demo: no weights: {reason}")
    paths, images = read_photos()
    console.print(f"weights    {weights} (torchvision's IMAGENET1K_V1)\nphotos     {len(paths)}\n")

    stock = fastnets.create_model("mobilenet_v2", weights=weights, fused=False).eval().to(device)
    x = images.to(device)
    start = time.perf_counter()
    fused = fastnets.optimize(stock)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        captions = show_answers(paths, stock(x).float().cpu(), fused(x).float().cpu())

    answers = fastnets.check(stock, fused, (x,))
    console.print("[bold]Accuracy, both against float64[/bold]")
    print(answers, end="\n\n")
    coverage = fastnets.explain(fused, (x,))
    console.print(f"[bold]What was fused[/bold] (optimize took {seconds:.2f} s)")
    print(coverage, end="\n\n")

    names = tuple(arguments.variants.split(",")) if arguments.variants else ()
    settings = suite.Settings(
        batch_size=len(paths),
        device=device,
        rounds=arguments.rounds,
        variants=names or tuple(baselines.default_variants(device)),
    )
    network = Network("mobilenet_v2 on the photos", stock, (3, 224, 224), "IMAGENET1K_V1", images=images)
    with console.status("measuring") as status:
        run = suite.run(
            [lambda: network],
            settings,
            tell=lambda _, phase, variant, step, steps: status.update(
                f"{phase} {variant} {step + 1}/{steps}"
            ),
        )
    for result in run.results:
        report.print_table(result, console)
    report.write(run, figures)
    if run.results:
        draw(chart, paths, captions, run)
        served = ", ".join(f"{count} by {name}" for name, count in run.results[0].implementations.items())
        console.print(f"\nEverything above ran on {run.environment['device']}; fused calls: {served}.")
    console.print(f"chart      {chart}\nraw times  {figures}")
    return 0 if answers.ok and run.ok else 1


if __name__ == "__main__":
    sys.exit(main())
