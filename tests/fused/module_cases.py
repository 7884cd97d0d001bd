"""The sample inputs that PyTorch's own module tests have, run through a stock module and ours."""

from __future__ import annotations

import contextlib
import copy
import warnings

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils import _pytree as pytree


def module_info(stock: type[nn.Module]) -> ModuleInfo:
    """PyTorch's description of how to test a module class."""
    return next(info for info in module_db if info.module_cls is stock)


def samples(stock: type[nn.Module], dtype: torch.dtype, training: bool) -> list:
    """Fresh constructor and forward inputs, seeded, with gradients asked for."""
    info = module_info(stock)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)


def results(module: nn.Module, arguments, training: bool, grad: bool) -> list[Tensor | None]:
    """Outputs, and gradients of the inputs and parameters from a fixed one."""
    module = copy.deepcopy(module).train(training)
    args, kwargs = pytree.tree_map(_fresh, (arguments.args, arguments.kwargs))
    torch.manual_seed(5)
    with contextlib.nullcontext() if grad else torch.no_grad():
        outputs = [y for y in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(y, Tensor)]
    if not grad:
        return outputs
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype) for y in outputs]
    differentiable = [(y, g) for y, g in zip(outputs, given) if y.requires_grad]
    torch.autograd.backward(*zip(*differentiable))
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())]


def _fresh(value: object) -> object:
    """A leaf of the same values and strides."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
