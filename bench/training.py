"""The training step that a benchmark times, and its gradients, which are checked first.

A step is: gradients cleared, forward in train mode, cross-entropy on fixed targets, backward, SGD. Nothing of
it is left out of the time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnets.bench.baselines import lay_out
from fastnets.bench.networks import Inputs, arguments, first, map_inputs

__all__ = ["ALLOWED_RATIO", "GradientJudge", "answers_of", "training_step"]

ALLOWED_RATIO = 3.0  # of stock's own error, for gradients
LEARNING_RATE = 1e-4  # small: hundreds of steps on one batch must not run into other numbers


def loss_of(output: Tensor) -> Tensor:
    """Cross-entropy [] of logits [N, classes], in float32 at least, on targets that are the row numbers.

    The places of sequences, [N, L, classes], are rows of their own.
    """
    output = output.flatten(0, -2)
    N, classes = output.shape
    targets = torch.arange(N, device=output.device) % classes
    return F.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), targets)


def training_step(model: nn.Module, x: Inputs) -> Callable[[], Tensor]:
    """A function that trains ``model`` (in train mode, in place) by one step on x and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(*arguments(x)))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def answers_of(model: nn.Module, x: Inputs) -> list[Tensor]:
    """The loss, and the gradient of every parameter that learns, of one forward and backward in train mode.

    Random numbers are drawn from seed 0, and nobody else's are used up.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[first(x).device] if first(x).is_cuda else []), torch.enable_grad():
        torch.manual_seed(0)
        loss = loss_of(model(*arguments(x)))
        # zeros for what the forward does not use, such as a pooler
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return [loss.detach(), *gradients]


class GradientJudge:
    """Judges a network's loss and gradients against stock's in float64, by how far off stock itself may be.

    Rounding decides on which side of a ReLU's kink a value lies, and one that changes sides moves a gradient
    by far more than rounding does. So stock's own error is the largest of several runs in the dtype at hand:
    as it is, channels-last, and with images changed by a rounding error. Every parameter's error is taken
    relative to its gradient, so that a small gradient weighs as much as a large one.

    stock: in train mode, on x's device; it is not touched.
    """

    def __init__(self, stock: nn.Module, x: Inputs):
        self.exact = [
            t.double() for t in answers_of(copy.deepcopy(stock).double(), map_inputs(Tensor.double, x))
        ]
        norms = [float(t.norm()) for t in self.exact]
        self.norms = [max(norm, 1e-4 * max(norms)) for norm in norms]
        eps = torch.finfo(next(p.dtype for p in stock.parameters() if p.is_floating_point())).eps
        generator = torch.Generator().manual_seed(0)

        def rounded(t: Tensor) -> Tensor:
            return t * (1 + eps * torch.randn(t.shape, generator=generator).to(t))

        images = [x, *(map_inputs(rounded, x) for _ in range(4))]
        runs = [(copy.deepcopy(stock), image) for image in images]
        runs += [lay_out(copy.deepcopy(stock), image) for image in images[:2]]
        self.stock_error = max(eps / 4, *(self.error(answers_of(*run)) for run in runs))

    def error(self, answers: list[Tensor]) -> float:
        """Root mean square of the relative errors of loss and gradients; infinite where one is not finite."""
        if [t.shape for t in answers] != [t.shape for t in self.exact]:
            return float("inf")
        squares = [
            float((ours.double() - exact).square().sum()) / norm**2
            for ours, exact, norm in zip(answers, self.exact, self.norms)
        ]
        found = math.sqrt(sum(squares) / len(squares))
        return found if math.isfinite(found) else float("inf")

    def error_ratio(self, model: nn.Module, x: Inputs) -> float:
        """The error of ``model`` on x (the judge's images, in any layout) over stock's."""
        return self.error(answers_of(model, x)) / self.stock_error
