"""The training step that a benchmark times, and its gradients, which are checked first.

A step is: gradients cleared, forward in train mode, cross-entropy on fixed targets, backward, SGD. Nothing of
it is left out of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ALLOWED_RATIO", "Gradients", "training_step"]

ALLOWED_RATIO = 3.0  # of stock's own error, for gradients
LEARNING_RATE = 1e-4  # small: hundreds of steps on one batch must not run into other numbers


def loss_of(output: Tensor) -> Tensor:
    """Cross-entropy [] of logits [N, classes], in float32 at least, on targets that are the row numbers."""
    N, classes = output.shape
    targets = torch.arange(N, device=output.device) % classes
    return F.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), targets)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A function that trains ``model`` (in train mode, in place) by one step on x and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class Gradients(nn.Module):
    """What a step computes, as a module's answer, so that ``fastnets.check`` can judge it.

    Calling it with images gives the loss and the gradient of every parameter, flat, each divided by
    ``norms``: a small gradient that is wrong then weighs as much as a large one.
    """

    def __init__(self, model: nn.Module, norms: list[float] | None = None):
        super().__init__()
        self.model = model
        self.norms = norms

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = loss_of(self.model(x))
            gradients = torch.autograd.grad(loss, parameters)
        norms = self.norms or [1.0] * len(gradients)
        return loss.detach(), *(g.flatten() / norm for g, norm in zip(gradients, norms))

    def normalized(self, x: Tensor) -> Gradients:
        """The same with ``norms`` of the gradients on x; those that are all but zero count as larger."""
        norms = [float(g.double().norm()) for g in self(x)[1:]]
        return Gradients(self.model, [max(norm, 1e-4 * max(norms)) for norm in norms])
