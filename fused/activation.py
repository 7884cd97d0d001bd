"""The activations that a fused op can end with: one table, from which everything else about them is derived.

An activation is named by a string in every op, kernel and report. This table says, for each name, what
PyTorch function defines it, its gradient from the pre-activation, what oneDNN calls it, and which stock
modules and functions mean it. The device code of the same names is
``fastnets.kernels.activation.activate``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Attributes:
        forward: ``(x, negative_slope) -> act(x)``, the PyTorch definition.
        backward: ``(grad, x, negative_slope) -> grad * act'(x)``, from the pre-activation ``x``.
        onednn: oneDNN's name, scalars and algorithm, as ``mkldnn::_convolution_pointwise`` takes them.
        in_place: ``forward`` written to its argument, where PyTorch has that.
        from_output: ``(grad, y, negative_slope) -> grad * act'(x)`` from ``y = act(x)``, where that tells.
    """

    name: str
    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    onednn: Callable[[float], tuple[str, list[float], str]]
    in_place: Callable[[Tensor, float], Tensor] | None = None
    from_output: Callable[[Tensor, Tensor, float], Tensor] | None = None


def _same(x: Tensor, negative_slope: float) -> Tensor:
    return x


def _sigmoid_backward(grad: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return aten.sigmoid_backward(grad, torch.sigmoid(x))


def _tanh_backward(grad: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return aten.tanh_backward(grad, torch.tanh(x))


_TABLE = (
    Activation(
        "none", _same, lambda g, x, s: g, lambda s: ("none", [], ""), _same, from_output=lambda g, y, s: g
    ),
    Activation(
        "relu",
        lambda x, s: torch.relu(x),
        lambda g, x, s: aten.threshold_backward(g, x, 0),
        lambda s: ("relu", [], ""),
        lambda x, s: torch.relu_(x),
        from_output=lambda g, y, s: aten.threshold_backward(g, y, 0),
    ),
    Activation(
        "relu6",
        lambda x, s: F.relu6(x),
        lambda g, x, s: aten.hardtanh_backward(g, x, 0.0, 6.0),
        lambda s: ("hardtanh", [0.0, 6.0], ""),
        lambda x, s: F.hardtanh_(x, 0.0, 6.0),
        from_output=lambda g, y, s: aten.hardtanh_backward(g, y, 0.0, 6.0),
    ),
    Activation(
        "leaky_relu",
        lambda x, s: F.leaky_relu(x, s),
        lambda g, x, s: aten.leaky_relu_backward(g, x, s, False),
        lambda s: ("leaky_relu", [s], ""),
        lambda x, s: F.leaky_relu_(x, s),
    ),
    Activation(
        "silu",
        lambda x, s: F.silu(x),
        lambda g, x, s: aten.silu_backward(g, x),
        lambda s: ("swish", [], ""),
        lambda x, s: F.silu(x, inplace=True),
    ),
    Activation(
        "hardswish",
        lambda x, s: F.hardswish(x),
        lambda g, x, s: aten.hardswish_backward(g, x),
        lambda s: ("hardswish", [], ""),
        lambda x, s: F.hardswish(x, inplace=True),
    ),
    Activation(
        "hardsigmoid",
        lambda x, s: F.hardsigmoid(x),
        lambda g, x, s: aten.hardsigmoid_backward(g, x),
        lambda s: ("hardsigmoid", [], ""),
        lambda x, s: F.hardsigmoid(x, inplace=True),
    ),
    Activation(
        "sigmoid",
        lambda x, s: torch.sigmoid(x),
        _sigmoid_backward,
        lambda s: ("sigmoid", [], ""),
        lambda x, s: torch.sigmoid_(x),
        from_output=lambda g, y, s: aten.sigmoid_backward(g, y),
    ),
    Activation(
        "tanh",
        lambda x, s: torch.tanh(x),
        _tanh_backward,
        lambda s: ("tanh", [], ""),
        lambda x, s: torch.tanh_(x),
        from_output=lambda g, y, s: aten.tanh_backward(g, y),
    ),
    Activation(
        "gelu",
        lambda x, s: F.gelu(x),
        lambda g, x, s: aten.gelu_backward(g, x, approximate="none"),
        lambda s: ("gelu", [], "none"),
        lambda x, s: aten.gelu_(x),
    ),
    Activation(
        "gelu_tanh",
        lambda x, s: F.gelu(x, approximate="tanh"),
        lambda g, x, s: aten.gelu_backward(g, x, approximate="tanh"),
        lambda s: ("gelu", [], "tanh"),
        lambda x, s: aten.gelu_(x, approximate="tanh"),
    ),
)

ACTIVATIONS: dict[str, Activation] = {entry.name: entry for entry in _TABLE}


def activation(name: str) -> Activation:
    """The activation called ``name``; an unknown name raises ``ValueError`` with the nearest ones."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown activation {name!r}{hint} (one of: {', '.join(ACTIVATIONS)})") from None


_MODULES: dict[type[nn.Module], Callable[[nn.Module], tuple[str, float] | None]] = {
    nn.Identity: lambda m: ("none", 0.0),
    nn.ReLU: lambda m: ("relu", 0.0),
    nn.ReLU6: lambda m: ("relu6", 0.0),
    nn.Hardtanh: lambda m: ("relu6", 0.0) if (m.min_val, m.max_val) == (0, 6) else None,
    nn.LeakyReLU: lambda m: ("leaky_relu", float(m.negative_slope)),
    nn.SiLU: lambda m: ("silu", 0.0),
    nn.Hardswish: lambda m: ("hardswish", 0.0),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", 0.0),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0),
    nn.Tanh: lambda m: ("tanh", 0.0),
    nn.GELU: lambda m: ("gelu_tanh" if m.approximate == "tanh" else "gelu", 0.0),
}


def recognise(module: nn.Module | None) -> tuple[str, float] | None:
    """``(name, negative_slope)`` of a stock activation module; None for any other module.

    No module at all is the activation "none". Exact types only: a subclass may have its own ``forward``.
    """
    if module is None:
        return "none", 0.0
    read = _MODULES.get(type(module))
    return read(module) if read is not None else None


def is_activation(module: nn.Module) -> bool:
    """Whether this is one of PyTorch's activation modules, with a fused form or without."""
    cls = type(module)
    return cls.__module__ == nn.ReLU.__module__ and cls is not nn.MultiheadAttention


def _gelu_name(approximate: str = "none") -> tuple[str, float] | None:
    return {"none": ("gelu", 0.0), "tanh": ("gelu_tanh", 0.0)}.get(approximate)


def _named(name: str) -> Callable[..., tuple[str, float] | None]:
    return lambda inplace=False: (name, 0.0)


def _hardtanh_name(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False):
    return ("relu6", 0.0) if (min_val, max_val) == (0, 6) else None


def _leaky_relu_name(negative_slope: float = 0.01, inplace: bool = False) -> tuple[str, float]:
    return "leaky_relu", float(negative_slope)


# Functions and tensor methods (by name) -> what their arguments after the input make of them.
_CALLS: dict[Callable | str, Callable[..., tuple[str, float] | None]] = {
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, "relu", "relu_"], _named("relu")),
    F.relu6: _named("relu6"),
    **dict.fromkeys([F.hardtanh, F.hardtanh_], _hardtanh_name),
    **dict.fromkeys([F.leaky_relu, F.leaky_relu_], _leaky_relu_name),
    F.silu: _named("silu"),
    F.hardswish: _named("hardswish"),
    F.hardsigmoid: _named("hardsigmoid"),
    **dict.fromkeys([F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"], _named("sigmoid")),
    **dict.fromkeys([F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"], _named("tanh")),
    F.gelu: _gelu_name,
}


def recognise_call(target: Callable | str, args: tuple, kwargs: dict) -> tuple[str, float] | None:
    """``(name, negative_slope)`` of a call to an activation function or tensor method, else None.

    ``args`` and ``kwargs`` are those after the input tensor.
    """
    read = _CALLS.get(target)
    if read is None:
        return None
    try:
        return read(*args, **kwargs)
    except TypeError:  # arguments the function does not have: let PyTorch say so when it runs
        return None
