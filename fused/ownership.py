"""Which tensors between the blocks of a network nobody else can see.

In inference: which residuals may be overwritten by the sum they go into. Out of place, a residual addition on
the CPU reads the residual and writes a result of the same size to cold memory; in place it writes where it
has just read. That is allowed only for a residual that nobody can read again:

* it is a dense tensor that a fused call of the same forward made, and this call is its last reader; or it is
  the forward's input, this call is its last reader there, and the caller has given it away;
* no module of the container carries a hook, which might have kept it.

``patterns`` finds the last readers in the graphs. The caller that gives inputs away is ``run_in_sequence``,
the forward of optimized stages such as ResNet's ``layer1``: between two blocks it alone holds the tensor,
and checks that by counting references to it and to its memory.

In training: whose gradient nobody can ask for, so that the block above may hand it down half finished (see
``conv_training``). That is a tensor which ``run_in_sequence`` alone holds, on its way into a block without
hooks.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused.batch_norm import has_hooks, in_transform, is_unobserved_inference
from fastnets.fused.layout import is_stock

_COUNTS = sys.version_info < (3, 14)  # later ones leave out the references that they borrow
MADE_HERE, GIVEN = "made here", "given"


class _Ownership(threading.local):
    active = False  # the container that runs was called by run_in_sequence, and no hook is in it
    given: Tensor | None = None
    private: Tensor | None = None  # on its way from one block to the next in training


_now = _Ownership()


def may_overwrite(residual: Tensor | None, dies: str) -> bool:
    """Whether the fused call that is the last reader of ``residual`` may write its result there."""
    if not _now.active:
        return False
    return dies == MADE_HERE or (dies == GIVEN and _now.given is residual)


def run_in_sequence(sequential: nn.Sequential, input: Tensor) -> Tensor:
    """``nn.Sequential``'s forward, which gives each block the tensor that only it will read."""
    if _is_unobserved_training(input):
        return _train_in_sequence(sequential, input)
    if not is_unobserved_inference(input):
        for module in sequential:
            input = module(input)
        return input
    ours = False  # the first input is the caller's
    for module in sequential:
        before = _now.active, _now.given
        _now.active = _consents(module)
        # One reference is this frame's variable, one the argument of the count itself.
        alone = ours and _now.active and _COUNTS and sys.getrefcount(input) <= 2 and _memory_is_its_own(input)
        _now.given = input if alone else None
        try:
            input = module(input)
        finally:
            _now.active, _now.given = before
        ours = True
    return input


def has_private_gradient(x: Tensor) -> bool:
    """Whether nobody but the layers on both sides can see the gradient of ``x``."""
    return _now.private is x


def _is_unobserved_training(x: object) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and not _has_any_global_hook()
        and not in_transform()
    )


def _train_in_sequence(sequential: nn.Sequential, input: Tensor) -> Tensor:
    ours = _now.private is input  # else it is the caller's
    for module in sequential:
        # One reference is this frame's variable, one the argument of the count itself; a private input has
        # more, in the frames between.
        alone = _now.private is input or (_COUNTS and ours and sys.getrefcount(input) <= 2)
        input = _call(module, input, alone)
        ours = True
    return input


def call_on_private(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in a graph where no other node reads ``x``, the result of another module's call."""
    if not _is_unobserved_training(x):
        return module(x)
    # The references of the calling frame's variable, of this one's, and of the argument of the count itself.
    alone = _now.private is x or (_COUNTS and sys.getrefcount(x) <= 3)
    return _call(module, x, alone)


def _call(module: nn.Module, x: Tensor, alone: bool) -> Tensor:
    before = _now.private
    observed = not alone or x._backward_hooks or x.retains_grad or not _keeps_private(module)
    _now.private = None if observed or any(map(has_hooks, module.modules())) else x
    try:
        return module(x)
    finally:
        _now.private = before


def _keeps_private(module: nn.Module) -> bool:
    """Whether the forward is known not to show its input to anybody: code of the user's own might keep it, or
    compute it again under a checkpoint."""
    if type(module) is nn.Sequential:
        return len(module) > 0 and _keeps_private(module[0])
    blueprint = getattr(type(module), "_fastnets", None)
    if blueprint is None or not blueprint.keeps_private:
        return False
    # Where a child's structure was changed, the child is called as a module.
    return all(is_stock(type(m)) or hasattr(type(m), "_fastnets") for m in module.modules())


def _consents(module: nn.Module) -> bool:
    """Whether ``module`` overwrites residuals, alone among what is in it, and nothing in it has hooks."""
    if not _overwrites(module):
        return False
    inner = list(module.modules())
    return not any(has_hooks(m) for m in inner) and not any(_overwrites(m) for m in inner[1:])


def _overwrites(module: nn.Module) -> bool:
    blueprint = getattr(type(module), "_fastnets", None)
    return blueprint is not None and blueprint.overwrites


def _memory_is_its_own(x: Tensor) -> bool:
    """Whether no view shares it: the tensor has one owner, the storage that and the handle that asks."""
    storage = x.untyped_storage()
    return x._use_count() == 1 and x._base is None and torch._C._storage_Use_Count(storage._cdata) <= 2
