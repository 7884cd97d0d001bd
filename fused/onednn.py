"""The CPU library path: oneDNN's fused convolution and linear layer, MKL's packed product; weights packed,
BN folded in.

``mkldnn::_convolution_pointwise``, its ``binary`` form, ``mkldnn::_linear_pointwise`` and
``mkl::_mkl_linear`` are private names of PyTorch's. Their presence is probed, and where they are missing or
do not take a dtype, ``unsupported`` says so and the op stays with another implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnets.fused.activation import activation as activation_of

Run = Callable[..., Tensor]  # (x, residual, in_place=False): in_place lets the result overwrite the residual

_FEW_PIXELS, _MOST_UNROLLED = 1024, 50_000
_MOST_OF_TINY, _MOST_MULTIPLICATIONS = 60_000, 1_400_000
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 / 2}


@functools.cache
def _pointwise() -> tuple[Callable, Callable, Callable] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if packet is None or not {"default", "binary"} <= set(packet.overloads()):
        return None
    in_place = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
    if in_place is None or "binary" not in in_place.overloads():
        return None
    return packet.default, packet.binary, in_place.binary


@functools.cache
def _takes(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    probe = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return probe is not None and getattr(torch.ops.mkldnn, probe)()


def unsupported(dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused convolution cannot serve tensors of this dtype here; None if it can."""
    if _pointwise() is None:
        return "this PyTorch has no mkldnn::_convolution_pointwise"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    if not _takes(dtype):
        return f"oneDNN does not take {dtype} on this CPU"
    return None


def fold(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the convolution that BN was folded into, as ``dtype``.

    The scale is computed in float64 and the product in float32. None where ``dtype`` cannot hold the folded
    weights: a tiny running variance overflows them, a tiny scale pushes them among the subnormals of
    float16, and the result would be further from the truth than stock's.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if running_mean is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    scale = torch.rsqrt(running_var.detach().double() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.detach()
    shift = -running_mean.detach().double() if bias is None else bias.double() - running_mean.detach()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.detach()
    exact = weight.float() * scale.float().view(-1, *[1] * (weight.dim() - 1))
    folded = exact.to(dtype)
    if dtype != torch.float32 and not exact.is_meta:
        lost = (folded.float() - exact).flatten(1).norm(dim=1)
        if not bool((lost <= 2 * _UNIT_ROUNDOFF[dtype] * exact.flatten(1).norm(dim=1)).all()):
            return None
    return folded, shift.to(dtype)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] in dense channels-last strides, also where sizes of one leave them ambiguous."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, C, H, W = x.shape
    if C == 1 or (H == 1 and W == 1):
        return x.as_strided(x.shape, (H * W * C, 1, W * C, C))
    return x


def prepare_convolution(
    x: Tensor,
    folded: tuple[Tensor, Tensor | None],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    negative_slope: float,
    has_residual: bool,
    pack: bool,
) -> Run:
    """``run(x, residual)`` for tensors shaped like ``x``: convolution, bias, residual and activation in one
    call.

    ``pack`` reorders the weights once for this shape; without it oneDNN reorders them in every call.
    A 1×1 convolution over few pixels is a product by MKL, see ``over_few_pixels``. Where PyTorch itself would
    not use oneDNN and has little to unroll (one image of a few pixels) its own convolution is faster than a
    oneDNN call can be. In both the epilogue runs in place on the result.
    """
    weight, bias = folded
    if not x.is_meta and over_few_pixels(x, weight.shape) and _is_product(x, stride, padding):
        return _by_product(x, weight, bias, activation, negative_slope, pack)
    if not x.is_meta and _stays_native(x, weight, bias, stride, padding, dilation, groups):
        return _native(weight, bias, stride, padding, dilation, groups, activation, negative_slope)
    if pack and not x.is_meta:
        weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), padding, stride, dilation, groups, list(x.shape)
        )
    unary, binary, binary_in_place = _pointwise()
    entry = activation_of(activation)
    attribute, scalars, algorithm = entry.onednn(negative_slope)
    as_channels_last = channels_last if 1 in x.shape[1:] else _dense

    if not has_residual:

        def run(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
            x = as_channels_last(x)
            return unary(x, weight, bias, padding, stride, dilation, groups, attribute, scalars, algorithm)

        return run

    # What the binary form takes after the addition; grouped, it is a convolution and a float32 add_relu.
    in_call = activation == "none" or (activation == "relu" and (groups == 1 or x.dtype == torch.float32))
    attribute = "relu" if in_call and activation == "relu" else None
    may_write = groups == 1 and x.dtype == torch.float32

    def run_with_residual(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
        x, added = as_channels_last(x), channels_last(residual)
        rest = (weight, bias, padding, stride, dilation, groups, "add", 1.0, attribute, [], None)
        if in_place and may_write and added is residual and not _overlap(x, residual):
            y = binary_in_place(residual, x, *rest)
        else:
            y = binary(x, added, *rest)
        return y if in_call else activate_in_place(y, activation, negative_slope)

    return run_with_residual


def activate_in_place(y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation on a tensor that nobody else has seen yet, in place where PyTorch has such a form."""
    entry = activation_of(activation)
    return (entry.in_place or entry.forward)(y, negative_slope)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _windows(x, weight, stride, padding, dilation) -> int:
    """Elements of all windows of one image."""
    windows = math.prod(weight.shape[1:])
    for size, length, step, pad, dilated in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation):
        windows *= (size + 2 * pad - dilated * (length - 1) - 1) // step + 1
    return windows


def is_tiny(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether x is one image in contiguous layout, so small that PyTorch's ``thnn_conv2d`` has unrolled its
    windows and multiplied them before a oneDNN call would have begun.

    Measured (fp32, two cores): LeNet-5's convolutions take 0.7 of the time of oneDNN's call; up to 1.4
    million multiplications over 60,000 elements it is not slower. In channels-last layout it unrolls slowly.
    """
    if len(x) != 1 or groups != 1 or tuple(dilation) != (1, 1) or x.dtype != torch.float32:
        return False
    _, C, H, W = x.shape
    sides = zip((H, W), weight.shape[2:], padding)
    if C != weight.shape[1] or any(size + 2 * pad < length for size, length, pad in sides):
        return False  # stock says what is wrong
    windows = _windows(x, weight, stride, padding, dilation)
    few = windows <= _MOST_OF_TINY and windows * len(weight) <= _MOST_MULTIPLICATIONS
    return few and x.stride()[1:] == (H * W, W, 1)


def _stays_native(x, weight, bias, stride, padding, dilation, groups) -> bool:
    """Whether PyTorch would not use oneDNN, and its own convolution has little to unroll.

    Measured (fp32, one and two cores, caches cold): up to 50,000 elements of windows its product takes 0.75
    to 1.0 of the time of oneDNN's call, from 56,000 on 1.05 to 1.8 times as long.
    """
    if _windows(x, weight, stride, padding, dilation) > _MOST_UNROLLED:
        return False
    chosen = torch._C._select_conv_backend(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [weight.shape[0]] if bias is not None else None,
    )
    return chosen != torch._C._ConvBackend.Mkldnn


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def over_few_pixels(x: Tensor, filter_shape: tuple[int, ...]) -> bool:
    """Whether a 1×1 filter [K, C, 1, 1] meets so few pixels of x [N, C, H, W] that MKL is the faster one.

    Measured (fp32, one and two cores, caches cold): up to 1,024 pixels MKL with an epilogue in place takes
    0.5 to 0.9 of the time of oneDNN's call, which looks up its kernel each time; from 3,136 on up to 1.3.
    """
    N, C, H, W = x.shape
    return N * H * W <= _FEW_PIXELS and filter_shape[1:] == (C, 1, 1)


def _is_product(x: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether a 1×1 convolution of x is a product of matrices that MKL has."""
    plain = tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    return plain and x.dtype == torch.float32 and _mkl_calls() is not None


def _by_product(x, weight, bias, activation, negative_slope, pack) -> Run:
    """As a linear layer over the pixels. Packed weights serve as many pixels as x has; others get stock's."""
    N, _, H, W = x.shape
    product = _linear_product(N * H * W, weight.flatten(1).contiguous(), bias, None, pack)
    entry = activation_of(activation)
    activate = None if activation == "none" else entry.in_place or entry.forward

    def run(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
        y = product(_dense(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if residual is not None:
            y += residual
        return y if activate is None else channels_last(activate(y, negative_slope))

    return run


def _native(weight, bias, stride, padding, dilation, groups, activation, negative_slope) -> Run:
    weight = weight.contiguous(memory_format=torch.channels_last)
    entry = activation_of(activation)
    activate = entry.in_place or entry.forward

    def run(x: Tensor, residual: Tensor | None, in_place: bool = False) -> Tensor:
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y += residual
        return channels_last(activate(y, negative_slope))

    return run


# --- linear layers ------------------------------------------------------------------------------------------

# What oneDNN computes in its own epilogue. Not the ReLUs: its maximum makes 0 of NaN.
_LINEAR_EPILOGUES = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
# Measured (fp32, one core): fewer rows than this are a product of vectors, which no packing helps.
_PACKED_ROWS = 4


@functools.cache
def _linear_calls() -> tuple[Callable, Callable] | None:
    """(the fused call, what packs for it) of oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return None
    pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pointwise is None or pack is None or "default" not in pointwise.overloads():
        return None
    return pointwise.default, pack.default


@functools.cache
def _mkl_calls() -> tuple[Callable, Callable] | None:
    """(the call, what packs for it) of MKL: fp32 alone."""
    if not torch.backends.mkl.is_available():
        return None
    linear = getattr(torch.ops.mkl, "_mkl_linear", None)
    pack = getattr(torch.ops.mkl, "_mkl_reorder_linear_weight", None)
    return None if linear is None or pack is None else (linear.default, pack.default)


def linear_unsupported(dtype: torch.dtype) -> str | None:
    """Why oneDNN and MKL cannot serve a linear layer of this dtype here; None if they can."""
    if _linear_calls() is None:
        return "this PyTorch has no mkldnn::_linear_pointwise"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    if not _takes(dtype):
        return f"oneDNN does not take {dtype} on this CPU"
    return None


def prepare_linear(
    rows: int,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    activation: str,
    negative_slope: float,
    pack: bool,
) -> Run:
    """``run(x, residual, given)`` of a linear layer for an x of so many rows: the product by the fastest call
    that was measured, the epilogue in it or in place on its result. given: a layer scale of this call alone.

    fp32 goes to MKL with packed weights: measured, its product is up to 15 % faster than stock's for many
    rows and up to twice as fast for 4 to 16, and it adds in stock's order, where oneDNN's single chain of
    2,000 terms is 2.6 times as far off. 16 bits go to oneDNN. A layer scale without an activation before it
    is folded into the packed weights.
    """
    weight, bias, scale = (None if t is None else t.detach() for t in (weight, bias, layer_scale))
    entry = activation_of(activation)
    fused = pack and weight.dtype != torch.float32 and activation in _LINEAR_EPILOGUES
    if scale is not None and activation == "none" and pack and weight.dtype == scale.dtype == torch.float32:
        folded = weight * scale[:, None], None if bias is None else bias * scale
        if all(bool(t.isfinite().all()) for t in folded if t is not None):
            (weight, bias), scale = folded, None
    product = _linear_product(rows, weight, bias, entry.onednn(negative_slope) if fused else None, pack)
    activate = entry.in_place or entry.forward
    if fused or activation == "none":
        activate = None

    def run(x: Tensor, residual: Tensor | None, given: Tensor | None = None) -> Tensor:
        y = product(x)
        if activate is not None:
            y = activate(y, negative_slope)
        factor = scale if given is None else given
        if residual is None:
            return y if factor is None else y * factor
        if factor is not None:
            return torch.addcmul(residual, y, factor)
        return y.add_(residual) if residual.dtype == y.dtype else y + residual

    return run


def _linear_product(rows, weight, bias, epilogue, pack) -> Callable[[Tensor], Tensor]:
    pointwise, reorder = _linear_calls()
    attribute, scalars, algorithm = epilogue or ("none", [], "")
    mkl = _mkl_calls() if weight.dtype == torch.float32 else None
    if weight.dtype == torch.float32:
        if mkl is None or rows < _PACKED_ROWS or not pack:
            return lambda x: torch.nn.functional.linear(x, weight, bias)
        linear, reorder = mkl
        packed = reorder(weight.contiguous(), rows)
        return lambda x: linear(x, packed, weight, bias, rows)
    if not pack:
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    packed = reorder(weight.contiguous(), rows)
    return lambda x: pointwise(x, packed, bias, attribute, scalars, algorithm)
