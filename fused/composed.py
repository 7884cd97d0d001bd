"""What ops have in common that do in one launch what two ops do one after the other.

The two are what such an op means. They run where gradients are wanted and where our kernel does not serve;
vendors have no call for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnets.fused import dispatch


def choose(x: Tensor, backend: str) -> str:
    """The implementation that serves a call: "triton", or "reference" for the two ops after one another.

    Raises:
        UnsupportedByBackend: a backend was asked for by name and cannot serve the call.
    """
    wanted = dispatch.requested(backend)
    return "reference" if wanted == "library" else dispatch.triton_or_reference(x, backend)


def register(
    name: str, schema: str, body: Callable, fake: Callable, *, with_gradients: Callable, **rules: Callable
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The op and its twin below autograd, ``NAME_inference``; see ``dispatch.register``.

    with_gradients: the two ops by their differentiable forms, after a check of all arguments but the backend.
    """
    infer = dispatch.register(f"{name}_inference{schema}", body, fake, **rules)

    def autograd(*arguments):
        learns = torch.is_grad_enabled()
        if learns and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            return with_gradients(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return differentiable(*arguments)

    differentiable = dispatch.register(f"{name}{schema}", body, fake, autograd=autograd, **rules)
    return differentiable, infer
