"""A small network learns to read digits from a larger one.

    python examples/distill.py --student mobilenet_v2          (--stock for PyTorch's own layers)
    python examples/distill.py --student resnet18 --teacher-weights out/distill/resnet34.pt
    torchrun --nproc-per-node 2 examples/distill.py --sync-bn

The teacher learns from the labels first, unless its weights are given; then it stands still, and the student
minimises 0.7 · KL(teacher, student) at temperature 4 + 0.3 · cross-entropy.

G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import fastnets
from fastnets.fused.cross_entropy import distillation_loss

STUDENTS = ("mobilenet_v2", "resnet18")
TEACHERS = ("resnet34", "resnet18", "resnet50")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__.splitlines()[0], epochs=10, lr=0.1, output="distill")
    parser.add_argument("--student", choices=STUDENTS, default=STUDENTS[0])
    parser.add_argument("--width-mult", type=float, default=1.0, help="of a MobileNetV2 student")
    parser.add_argument("--teacher", choices=TEACHERS, default=TEACHERS[0])
    parser.add_argument("--teacher-weights", type=Path, help="a checkpoint; trained first if not given")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument(
        "--alpha", type=float, default=0.7, help="weight of the teacher; the labels' is the rest"
    )
    return parser.parse_args(words)


def create(name: str, **options) -> nn.Module:
    """A reference network for digits: one input channel, ten classes."""
    return fastnets.create_model(name, num_classes=digits.CLASSES, in_channels=1, fused=False, **options)


def stock_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − alpha) · cross-entropy."""
    soft, ours = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    divergence = F.kl_div(ours, soft, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(student, labels)


def from_teacher(teacher: nn.Module, options: argparse.Namespace) -> training.Objective:
    """What the teacher, who stands still, and the labels say of the student's answers."""
    teacher = teacher.eval()
    loss = distillation_loss if options.fused else stock_distillation

    def objective(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            soft = teacher(images)
        return loss(logits, soft, labels, alpha=options.alpha, temperature=options.temperature)

    return objective


def main(words: list[str] | None = None) -> None:
    options = parse_arguments(words)
    with training.ranks(options.device) as place:
        data = digits.load(options.limit).to(place.device)
        torch.manual_seed(options.seed)
        teacher = create(options.teacher, weights=options.teacher_weights)
        wrapped = training.prepare(teacher, options, place)
        if options.teacher_weights is None:
            objective = training.from_labels(options.fused)
            history = training.train(wrapped, objective, data, options, place, options.teacher)
            training.save(wrapped, history, options.output, place)
        narrowed = {"width_mult": options.width_mult} if options.student == "mobilenet_v2" else {}
        student = training.prepare(create(options.student, **narrowed), options, place)
        objective = from_teacher(training.plain(wrapped), options)
        name = f"{options.student}_of_{options.teacher}"
        history = training.train(student, objective, data, options, place, name)
        training.save(student, history, options.output, place)


if __name__ == "__main__":
    main()
