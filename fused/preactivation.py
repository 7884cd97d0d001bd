"""Batch norm and activation before a 1×1 convolution, done while it loads its input (DenseNet, ResNet v2).

    y = act( bn( conv2d( act_x(bn_x(x)), weight, bias ) ) + residual )

Both batch norms use running statistics; the outer one, the activations and the residual may be left out. What
lies between the first activation and the convolution is rounded to x's dtype as if it had been stored, and
never is. Only inference gains from this: with gradients, the parts run one after the other, and training has
``conv_training.Pending``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnets.fused import composed, dispatch
from fastnets.fused.activation import activation as activation_of
from fastnets.fused.batch_norm import (
    BATCH_NORMS,
    bn_add_act_inference,
    bn_add_act_op,
    call_bn_add_act,
    has_hooks,
    watched,
)
from fastnets.fused.conv import (
    Options,
    Weights,
    call_conv_bn_act,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    implementation_of,
    in_dtype_of,
    must_run_stock,
    validate_convolution,
    weights_of,
)

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? residual, Tensor x_mean, Tensor x_var, Tensor? x_bn_weight, Tensor? x_bn_bias, "
    "float x_eps, str x_activation, float x_negative_slope, SymInt[2] stride, "
    "float eps, str activation, float negative_slope, str backend) -> Tensor"
)


def pointwise_options(stride, eps, activation, negative_slope) -> Options:
    """The convolution's: a 1×1 filter without padding, dilation or groups."""
    return Options(tuple(stride), (0, 0), (1, 1), 1, eps, activation, negative_slope)


def pointwise_conv(
    x,
    weight,
    bias,
    mean,
    var,
    bn_weight,
    bn_bias,
    residual,
    stride,
    eps,
    activation,
    negative_slope,
    prologue,
) -> Tensor:
    """Our kernel for a 1×1 filter, with a ``kernels.conv_shape.Prologue`` over what it loads of x."""
    from fastnets.kernels.conv import conv_bn_act as launch

    return launch(
        x,
        *in_dtype_of(x, weight, bias),
        *(mean, var, bn_weight, bn_bias, residual),
        stride=stride,
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
        prologue=prologue,
    )


def _triton(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual, x_mean, x_var, x_bn_weight, x_bn_bias,
    x_eps, x_activation, x_negative_slope, stride, eps, activation, negative_slope,
) -> Tensor:  # fmt: skip
    from fastnets.kernels.conv_shape import Prologue

    before = (x_mean, x_var, x_bn_weight, x_bn_bias, x_activation, x_negative_slope, x_eps)
    layer = (weight, bias, mean, var, bn_weight, bn_bias)
    return pointwise_conv(x, *layer, residual, stride, eps, activation, negative_slope, Prologue(*before))


@dispatch.replays(tensors=12)
def _body(*arguments):
    tensors, options, backend = arguments[:12], arguments[12:-1], arguments[-1]
    _validate(*tensors, *options)
    x = tensors[0]
    if x.numel() and composed.choose(x, backend) == "triton":
        return _triton(*tensors, *options)
    return _composed(bn_add_act_inference, conv_below_autograd, *arguments)


def _composed(
    normalize, convolve,
    x, weight, bias, mean, var, bn_weight, bn_bias, residual, x_mean, x_var, x_bn_weight, x_bn_bias,
    x_eps, x_activation, x_negative_slope, stride, eps, activation, negative_slope, backend,
) -> Tensor:  # fmt: skip
    """The two ops one after the other: what the op means, and its gradient."""
    before = (x_eps, x_activation, x_negative_slope, backend)
    y = normalize(x, None, x_mean, x_var, x_bn_weight, x_bn_bias, None, *before)
    options = pointwise_options(stride, eps, activation, negative_slope)
    return convolve(y, weight, bias, mean, var, bn_weight, bn_bias, residual, *options, backend)


def _validate(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual, x_mean, x_var, x_bn_weight, x_bn_bias,
    x_eps, x_activation, x_negative_slope, stride, eps, activation, negative_slope,
) -> tuple:  # fmt: skip
    """The shape of the result; errors name the argument, the fact and the remedy."""
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(
            f"bn_act_conv_bn_act: the filter is {weight.shape[2]}×{weight.shape[3]}, only 1×1 is served; "
            "call bn_add_act and conv_bn_act one after the other"
        )
    vectors = {"x_mean": x_mean, "x_var": x_var, "x_bn_weight": x_bn_weight, "x_bn_bias": x_bn_bias}
    for name, vector in vectors.items():
        if vector is not None and (x.dim() != 4 or vector.shape != (x.shape[1],)):
            raise ValueError(
                f"bn_act_conv_bn_act: {name} has shape {tuple(vector.shape)}, x {tuple(x.shape)} needs "
                "one value for each channel"
            )
        if vector is not None and vector.device != x.device:
            raise ValueError(f"bn_act_conv_bn_act: {name} is on {vector.device}, x on {x.device}; move one")
    activation_of(x_activation)
    weights = Weights(weight, bias, mean, var, bn_weight, bn_bias)
    options = pointwise_options(stride, eps, activation, negative_slope)
    return validate_convolution(x, weights, residual, options)


def _fake(x, *arguments):
    shape = _validate(x, *arguments[:-1])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _with_gradients(*arguments):
    _validate(*arguments[:-1])
    return _composed(bn_add_act_op, conv_bn_act_op, *arguments)


_differentiable, _infer = composed.register(
    *("bn_act_conv_bn_act", _SCHEMA, _body, _fake),
    with_gradients=_with_gradients, casts=(0, 7), flops=conv_flops,
)  # fmt: skip


def bn_act_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    x_mean: Tensor,
    x_var: Tensor,
    x_bn_weight: Tensor | None = None,
    x_bn_bias: Tensor | None = None,
    x_eps: float = 1e-5,
    x_activation: str = "relu",
    x_negative_slope: float = 0.01,
    stride: tuple[int, int] = (1, 1),
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``conv_bn_act(act_x(bn_x(x)), weight, ...)`` for a 1×1 filter; see the top of this file.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, any strides.
        x_mean, x_var, x_bn_weight, x_bn_bias: [C], running statistics and affine vectors of the first BN.
        weight: [K, C, 1, 1], of x's dtype. The other vectors are [K], the residual [N, K, P, Q].

    Returns:
        [N, K, P, Q] of x's dtype, dense channels-last. Differentiable once, in everything but the statistics.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual),
        *(x_mean, x_var, x_bn_weight, x_bn_bias),
        *(x_eps, x_activation, x_negative_slope),
        *(stride, eps, activation, negative_slope, dispatch.validate_backend(backend)),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_preactivated_conv(
    before: nn.Module,
    act_before: nn.Module | None,
    activation_before: str,
    slope_before: float,
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
    residual_dies: str = "",
) -> Tensor:
    """``act(bn(conv(act_before(before(x)))) + residual)``: in one launch where our kernels serve it in
    inference, else by ``call_bn_add_act`` and ``call_conv_bn_act``, whose remarks hold."""
    if _in_one_launch(before, act_before, conv, bn, act, x, residual, activation, backend):
        vectors, affine = before._buffers, before._parameters
        return bn_act_conv_bn_act_below_autograd(
            x, *weights_of(conv, bn), residual, vectors["running_mean"], vectors["running_var"],
            affine.get("weight"), affine.get("bias"), before.eps, activation_before, slope_before,
            conv.stride, 0.0 if bn is None else bn.eps, activation, negative_slope, backend,
        )  # fmt: skip
    y = call_bn_add_act(before, act_before, x, None, activation_before, slope_before, backend)
    return call_conv_bn_act(
        conv, bn, act, y, residual, activation, negative_slope, backend, residual_dies=residual_dies
    )


def bn_act_conv_bn_act_below_autograd(x: Tensor, *arguments: object) -> Tensor:
    """The op; its computation alone where nobody watches."""
    return (_infer if watched(x) else _body)(x, *arguments)


def serves(conv: nn.Conv2d) -> bool:
    """Whether a convolution's shape allows its input to be normalised while it is loaded."""
    plain = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid", "same")
    return plain and conv.groups == 1


def _in_one_launch(before, act_before, conv, bn, act, x, residual, activation, backend) -> bool:
    if torch.is_grad_enabled() or before.training or conv.training or (bn is not None and bn.training):
        return False
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    if (
        before.__class__ not in BATCH_NORMS
        or before._buffers.get("running_mean") is None
        or has_hooks(before)
        or (act_before is not None and has_hooks(act_before))
        or (bn is not None and bn._buffers.get("running_mean") is None)
        or must_run_stock(conv, bn, act, x, conv._parameters.get("weight"), residual)
        or not serves(conv)
    ):
        return False
    return implementation_of(conv, bn, act, activation, x, backend, residual is not None) == "triton"
