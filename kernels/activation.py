"""Activations as device functions, for the epilogue of every kernel.

``activate(x, ACTIVATION, negative_slope)`` takes fp32 and a compile-time name. NaN propagates and the
infinities give what PyTorch gives. Only arithmetic that Triton's interpreter runs too: no libdevice calls,
no inline assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "activate", "check_activation"]

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
