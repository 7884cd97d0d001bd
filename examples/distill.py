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


def cross_entropy(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


class Distillation:
    """alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − alpha) · cross-entropy."""

    def __init__(self, teacher: nn.Module, alpha: float, temperature: float):
        self.teacher = teacher.eval()
        self.alpha, self.temperature = alpha, temperature

    def __call__(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            soft = (self.teacher(images) / self.temperature).log_softmax(1)
        ours = (logits / self.temperature).log_softmax(1)
        from_teacher = F.kl_div(ours, soft, reduction="batchmean", log_target=True)
        from_labels = F.cross_entropy(logits, labels)
        return self.alpha * self.temperature**2 * from_teacher + (1 - self.alpha) * from_labels


def main(words: list[str] | None = None) -> None:
    options = parse_arguments(words)
    with training.ranks(options.device) as place:
        data = digits.load(options.limit).to(place.device)
        torch.manual_seed(options.seed)
        teacher = create(options.teacher, weights=options.teacher_weights)
        wrapped = training.prepare(teacher, options, place)
        if options.teacher_weights is None:
            history = training.train(wrapped, cross_entropy, data, options, place, options.teacher)
            training.save(wrapped, history, options.output, place)
        narrowed = {"width_mult": options.width_mult} if options.student == "mobilenet_v2" else {}
        student = training.prepare(create(options.student, **narrowed), options, place)
        objective = Distillation(training.plain(wrapped), options.alpha, options.temperature)
        name = f"{options.student} of {options.teacher}".replace(" ", "_")
        history = training.train(student, objective, data, options, place, name)
        training.save(student, history, options.output, place)


if __name__ == "__main__":
    main()
