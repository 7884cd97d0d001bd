"""Activations as device functions, for the epilogue of every kernel.

``activate(x, ACTIVATION, negative_slope)`` takes fp32 and a compile-time name. NaN propagates and the
infinities give what PyTorch gives. ``activation_backward(dy, u, ...)`` is the gradient at the
pre-activation u, ``activation_gradient(u, ...)`` the derivative alone. Only arithmetic that Triton's
interpreter runs too: no libdevice calls, no inline assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "ACTIVATIONS",
    "BINARY_DERIVATIVE",
    "activate",
    "activation_backward",
    "activation_gradient",
    "check_activation",
]

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
    "gelu",
    "gelu_tanh",
)

# Activations whose derivative is 0 or 1 everywhere: one bit per element is all their backward needs.
BINARY_DERIVATIVE = ("relu", "relu6")


def check_activation(name: str) -> None:
    """Raises ``ValueError`` for a name that is not in ``ACTIVATIONS``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})")


@triton.jit
def _sigmoid(x):
    # exp overflows to inf for x < -88, and 1 / inf is the right 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _clamp_0_6(x):
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2|x|) + 1) cancels near 0: an odd polynomial there, fitted to tanh(x)/x in z = x^2
    # (relative error 7e-9 on |x| < 0.65 before rounding, 1.4 half-ulps after).
    z = x * x
    p = -0.005528636276721954 * z + 0.020483318716287613
    p = p * z - 0.05369297042489052
    p = p * z + 0.1333089917898178
    p = p * z - 0.3333326280117035
    small = x + x * (z * p)
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(magnitude < 0.65, small, large)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, negative_slope):
    """x: fp32 of any shape. ``negative_slope`` is read by leaky_relu alone."""
    if ACTIVATION == "none":
        return x
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        return _clamp_0_6(x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, x * negative_slope)
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        return x * _clamp_0_6(x + 3.0) * 0.16666667163372040
    elif ACTIVATION == "hardsigmoid":
        return _clamp_0_6(x + 3.0) * 0.16666667163372040
    elif ACTIVATION == "sigmoid":
        return _sigmoid(x)
    elif ACTIVATION == "tanh":
        return _tanh(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation")
        # 0.5 (1 + tanh(u)) = sigmoid(2u), with no cancellation for large negative u.
        return x * _sigmoid(x * (1.5957691216057308 + 0.07135481282636183 * x * x))


@triton.jit
def _sigmoid_derivative(x):
    # sigmoid(x) sigmoid(-x); the same for x and -x, and no difference of near numbers for large ones.
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activation_backward(dy, u, ACTIVATION: tl.constexpr, negative_slope):
    """``dy * act'(u)`` as PyTorch's backward of each activation defines it, in fp32.

    dy, u: fp32 of one shape, u the pre-activation. Kinks fall as in PyTorch: relu'(0) = 0, relu6' is 1 on the
    open interval (0, 6). Where the derivative is 0 by a branch the result is 0 even for an infinite dy,
    which ``dy * activation_gradient(u)`` is not.
    """
    if ACTIVATION == "none":
        return dy
    elif ACTIVATION == "relu":
        return tl.where(u <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        return tl.where((u <= 0.0) | (u >= 6.0), 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0.0, dy, dy * negative_slope)
    elif ACTIVATION == "silu":
        s = _sigmoid(u)
        return dy * (s * (1.0 + u * (1.0 - s)))
    elif ACTIVATION == "hardswish":
        inside = dy * (u * 0.3333333432674408 + 0.5)
        return tl.where(u <= -3.0, 0.0, tl.where(u >= 3.0, dy, inside))
    elif ACTIVATION == "hardsigmoid":
        return tl.where((u > -3.0) & (u < 3.0), dy * 0.16666667163372040, 0.0)
    elif ACTIVATION == "sigmoid":
        return dy * _sigmoid_derivative(u)
    elif ACTIVATION == "tanh":
        return dy * (4.0 * _sigmoid_derivative(2.0 * u))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(u * 0.70710678118654752))
        return dy * (cdf + u * (0.3989422804014327 * tl.exp(-0.5 * u * u)))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation")
        # gelu_tanh(u) = u sigmoid(v) with v = u (1.5957... + 0.0713... u^2): see ``activate``.
        v = u * (1.5957691216057308 + 0.07135481282636183 * u * u)
        dv = 1.5957691216057308 + 0.21406443847908549 * u * u
        return dy * (_sigmoid(v) + u * _sigmoid_derivative(v) * dv)


@triton.jit
def activation_gradient(u, ACTIVATION: tl.constexpr, negative_slope):
    """``act'(u)`` in fp32 at the pre-activation u, an fp32 tensor: ``activation_backward`` of ones."""
    return activation_backward(tl.zeros_like(u) + 1.0, u, ACTIVATION, negative_slope)
