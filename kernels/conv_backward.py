"""The gradients of a convolution: of its input and of its weight, dense, grouped and depthwise.

    dx = conv_input_gradient(dy, weight, x.shape, ...)        kernels in ``conv_input_gradient``
    dw = conv_weight_gradient(dy, x, weight.shape, ...)       kernels in ``conv_weight_gradient``

Depthwise filters are no matrix products and go to ``depthwise_backward``. This file checks the arguments and
sends a call where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastnets.kernels.activation import BINARY_DERIVATIVE, check_activation
from fastnets.kernels.bitmask import bytes_of
from fastnets.kernels.conv_configs import kernel_of
from fastnets.kernels.conv_input_gradient import InputGradientCall, Normalized, input_gradient
from fastnets.kernels.conv_shape import ConvShape, Prologue, convolution_shape, product_precision
from fastnets.kernels.conv_weight_gradient import WeightGradientCall, weight_gradient
from fastnets.kernels.launch import DTYPES, Config

__all__ = ["Normalized", "conv_input_gradient", "conv_weight_gradient"]


def conv_input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    input_shape: Sequence[int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    added: torch.Tensor | None = None,
    normalized: Normalized | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The gradient of conv2d's input: dx [N, C, H, W] of input_shape, dense channels-last.

    dy [N, K, P, Q] and weight [K, C/groups, R, S] share a dtype (fp32, fp16, bf16) and have any strides;
    channels-last ones load fastest. added [N, C, H, W], of any float dtype and strides, is added before the
    one rounding, to dtype (default: dy's).

    normalized: the input was act(bn(z)), or act(bn(z) + a residual), whose act' is read from a mask; then the
    gradient goes on through the activation, and the result is (dv, sums): dv = (dx + added) · act' in dx's
    place, and sums [2, C] fp32 = Σ dv and Σ dv · (z - mean) · rstd over N, H and W, of dv as rounded.

    config: one of ``conv_input_gradient.configs``, or None to have it chosen. Raises ``ValueError`` or
    ``TypeError`` for arguments that are no convolution's, ``UnsupportedConfig`` for a config that misfits.
    """
    shape = _checked_shape(dy, "weight", weight, input_shape, weight.shape, stride, padding, dilation, groups)
    _check_like_input("added", added, shape, dy)
    if normalized is not None:
        _check_like_input("z", normalized.z, shape, dy)
        prologue = _checked_prologue(normalized.prologue, shape)
        _check_mask(normalized.mask, normalized.z, prologue)
        normalized = normalized._replace(prologue=prologue)
    dtype = _checked_dtype(dtype, dy)
    if kernel_of(shape) == "depthwise":
        from fastnets.kernels.depthwise_backward import depthwise_input_gradient

        return depthwise_input_gradient(
            dy, weight, input_shape, stride=stride, padding=padding, dilation=dilation, groups=groups,
            added=added, normalized=normalized, dtype=dtype, config=config,
        )  # fmt: skip
    precision = product_precision(dy)
    dx, sums = input_gradient(
        InputGradientCall(shape, dy, weight, added, normalized, dtype, precision, config)
    )
    return dx if normalized is None else (dx, sums)


def conv_weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight_shape: Sequence[int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    prologue: Prologue | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """The gradient of conv2d's weight: dw [K, C/groups, R, S] of weight_shape, dense channels-last.

    dy [N, K, P, Q] and x [N, C, H, W] share a dtype (fp32, fp16, bf16) and have any strides; channels-last
    ones load fastest. Products are added in fp32 and rounded once, to dtype (default: dy's).

    prologue: x is what an earlier convolution gave, and the input of this one was act(bn(x)), rounded to x's
    dtype; it is computed again while x is loaded.

    config: one of ``conv_weight_gradient.configs``, or None to have it chosen; splits: into how many shares
    the pixels are split, whose sums are added in order; None likewise. Raises ``ValueError`` or ``TypeError``
    for arguments that are no convolution's.
    """
    shape = _checked_shape(dy, "x", x, x.shape, weight_shape, stride, padding, dilation, groups)
    if prologue is not None:
        prologue = _checked_prologue(prologue, shape)
    dtype = _checked_dtype(dtype, dy)
    if splits is not None and splits < 1:
        raise ValueError(f"splits={splits} must be at least 1")
    if kernel_of(shape) == "depthwise":
        from fastnets.kernels.depthwise_backward import depthwise_weight_gradient

        return depthwise_weight_gradient(
            dy, x, weight_shape, stride=stride, padding=padding, dilation=dilation, groups=groups,
            prologue=prologue, dtype=dtype, config=config,
        )  # fmt: skip
    precision = product_precision(dy)
    return weight_gradient(WeightGradientCall(shape, dy, x, prologue, dtype, precision, config, splits))


def _checked_dtype(dtype: torch.dtype | None, dy: torch.Tensor) -> torch.dtype:
    dtype = dy.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; supported: float32, float16, bfloat16")
    return dtype


def _checked_shape(dy, name, operand, x, weight, stride, padding, dilation, groups) -> ConvShape:
    """The convolution of x [N, C, H, W] (a shape) under weight (a shape) whose output's gradient is dy."""
    shape = convolution_shape(x, weight, stride, padding, dilation, groups)
    if dy.shape != (shape.N, shape.K, shape.P, shape.Q):
        raise ValueError(
            f"dy has shape {list(dy.shape)}, but x {list(x)} under weight {list(weight)} gives "
            f"{[shape.N, shape.K, shape.P, shape.Q]}"
        )
    if dy.dtype not in DTYPES:
        raise TypeError(f"dy is {dy.dtype}; supported: float32, float16, bfloat16")
    if operand.dtype != dy.dtype:
        raise TypeError(f"{name} is {operand.dtype} but dy is {dy.dtype}; cast one of them")
    return shape


def _check_like_input(name: str, tensor: torch.Tensor | None, shape: ConvShape, dy: torch.Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != (shape.N, shape.C, shape.H, shape.W):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected that of the input, "
            f"{[shape.N, shape.C, shape.H, shape.W]}; expand it"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; supported: float32, float16, bfloat16")


def _check_mask(mask: torch.Tensor | None, z: torch.Tensor, prologue: Prologue) -> None:
    if mask is None:
        return
    if prologue.activation not in BINARY_DERIVATIVE:
        raise ValueError(
            f"mask says where a derivative is 1 and where 0, which that of {prologue.activation!r} is not "
            f"everywhere (those are: {', '.join(BINARY_DERIVATIVE)})"
        )
    if mask.dtype != torch.uint8 or mask.shape != (bytes_of(z),) or not mask.is_contiguous():
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)}, expected contiguous uint8 of {[bytes_of(z)]}: one bit "
            "for each element of z"
        )
    if not (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"z with a mask must be dense, it has strides {z.stride()}; copy it")


def _checked_prologue(prologue: Prologue, shape: ConvShape) -> Prologue:
    """The prologue with its vectors contiguous."""
    check_activation(prologue.activation)
    for name, vector in zip(Prologue._fields, prologue.tensors):
        if vector is not None and vector.shape != (shape.C,):
            raise ValueError(f"{name} has shape {list(vector.shape)}, expected [{shape.C}]")
    vectors = (v if v is None else v.contiguous() for v in prologue.tensors)
    return Prologue(*vectors, prologue.activation, prologue.negative_slope)
