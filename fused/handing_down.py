"""What follows a block, done by the block's last layer: ``residual + scale · block(x)``.

A block that ends in a linear layer can add in that layer's epilogue what its caller would add in a pass of
its own. The caller's graph calls ``call_then_add(block, residual, scale, x)``; a block that was rewritten
has, beside its forward, one that ends so. Where it has not, or carries hooks, it is called as it is.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused.batch_norm import has_hooks

THEN_ADD = "_fastnets_then_add"


def ends_in_linear(module: nn.Module) -> bool:
    """Whether the class of ``module`` has a forward that scales and adds at its end."""
    return hasattr(type(module), THEN_ADD)


def call_then_add(
    module: nn.Module,
    residual: Tensor | None,
    scale: Tensor | None,
    *arguments: object,
    **options: object,
) -> Tensor:
    """``module(...) · scale + residual``; of a module that returns a tuple, its first entry."""
    forward = getattr(type(module), THEN_ADD, None)
    if forward is None or has_hooks(module) or _has_any_global_hook():
        y = module(*arguments, **options)
        return finish(y[0] if isinstance(y, tuple) else y, residual, scale)
    return forward(module, residual, scale, *arguments, **options)


def finish(y: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    """``y · scale + residual``, as stock computes it."""
    if scale is not None:
        y = y * scale
    return y if residual is None else y + residual
