"""Squeeze-and-excite before a 1×1 convolution, whose scaling the convolution does while it loads its input.

    m = mean of x over pixels;   g = gate(W₂ act_g(W₁ m + b₁) + b₂)
    y = act( bn( conv2d(x · g, weight, bias) ) + residual )

The blocks of EfficientNet, MobileNet v3 and RegNet-Y end like this. x · g is rounded to x's dtype as if it
had been stored, and never is: x is read twice, for its means and for the convolution, where scaling in a pass
of its own reads it once more and writes it. Only inference gains from this: with gradients, and wherever our
kernel does not serve, the two ops run one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import composed, dispatch
from fastnets.fused.batch_norm import watched
from fastnets.fused.chains import joined, put_one_call, sole_readers
from fastnets.fused.conv import (
    Weights,
    call_conv_bn_act,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    implementation_of,
    must_run_stock,
    validate_convolution,
    weights_of,
)
from fastnets.fused.patterns import CONV_CALLS
from fastnets.fused.pool import is_channels_last
from fastnets.fused.preactivation import pointwise_conv, pointwise_options, serves
from fastnets.fused.squeeze_excite import (
    _differentiable as _excite_op,
)
from fastnets.fused.squeeze_excite import (
    _infer as _excite_inference,
)
from fastnets.fused.squeeze_excite import (
    _validate as _validate_excite,
)
from fastnets.fused.squeeze_excite import (
    call_squeeze_excite,
    fused_arguments,
)

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? residual, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "str excite_activation, str gate, SymInt[2] stride, float eps, str activation, float negative_slope, "
    "str backend) -> Tensor"
)
MOST_SQUEEZED = 256  # as kernels.squeeze_excite


def _triton(
    x, weight, bias, mean, var, bn_weight, bn_bias, residual, w1, b1, w2, b2,
    excite_activation, gate, stride, eps, activation, negative_slope,
) -> Tensor:  # fmt: skip
    from fastnets.kernels.conv_shape import Prologue
    from fastnets.kernels.plane_mean import plane_mean
    from fastnets.kernels.squeeze_excite import gates

    means = plane_mean(x, channels_last=is_channels_last(x)).flatten(1)
    found = gates(means, w1.contiguous(), b1, w2.contiguous(), b2, excite_activation, gate)
    layer = (weight, bias, mean, var, bn_weight, bn_bias)
    return pointwise_conv(x, *layer, residual, stride, eps, activation, negative_slope, Prologue(gate=found))


@dispatch.replays(tensors=12)
def _body(*arguments):
    tensors, options, backend = arguments[:12], arguments[12:-1], arguments[-1]
    _validate(*tensors, *options)
    x, w1 = tensors[0], tensors[8]
    if x.numel() and w1.shape[0] <= MOST_SQUEEZED and composed.choose(x, backend) == "triton":
        return _triton(*tensors, *options)
    return _composed(_excite_inference, conv_below_autograd, *arguments)


def _composed(excite, convolve, *arguments) -> Tensor:
    """The two ops one after the other: what the op means, and its gradient."""
    x, *convolution, w1, b1, w2, b2 = arguments[:12]
    excite_activation, gate, *options, backend = arguments[12:]
    y = excite(x, w1, b1, w2, b2, excite_activation, gate, backend)
    return convolve(y, *convolution, *pointwise_options(*options), backend)


def _validate(*arguments) -> tuple:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    x, *convolution, residual, w1, b1, w2, b2 = arguments[:12]
    excite_activation, gate, *options = arguments[12:]
    weight = convolution[0]
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(
            f"squeeze_excite_conv_bn_act: the filter is {weight.shape[2]}×{weight.shape[3]}, only 1×1 is "
            "served; call squeeze_excite and conv_bn_act one after the other"
        )
    _validate_excite(x, w1, b1, w2, b2, excite_activation, gate)
    return validate_convolution(x, Weights(*convolution), residual, pointwise_options(*options))


def _fake(x, *arguments):
    return x.new_empty(_validate(x, *arguments[:-1])).to(memory_format=torch.channels_last)


def _with_gradients(*arguments):
    _validate(*arguments[:-1])
    return _composed(_excite_op, conv_bn_act_op, *arguments)


_differentiable, _infer = composed.register(
    *("squeeze_excite_conv_bn_act", _SCHEMA, _body, _fake), with_gradients=_with_gradients, flops=conv_flops
)


def squeeze_excite_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    w1: Tensor,
    b1: Tensor | None = None,
    w2: Tensor,
    b2: Tensor | None = None,
    excite_activation: str = "relu",
    gate: str = "sigmoid",
    stride: tuple[int, int] = (1, 1),
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``conv_bn_act(squeeze_excite(x, w1, b1, w2, b2), weight, ...)`` for a 1×1 filter; see the top of this
    file.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64, any strides.
        weight: [K, C, 1, 1], of x's dtype. The other vectors are [K], the residual [N, K, P, Q].
        w1, b1, w2, b2: as ``squeeze_excite`` takes them.

    Returns:
        [N, K, P, Q] of x's dtype, dense channels-last. Differentiable once, in everything but the statistics.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual, w1, b1, w2, b2),
        *(excite_activation, gate, stride, eps, activation, negative_slope),
        dispatch.validate_backend(backend),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_excited_conv(
    excite: nn.Module,
    excite_backend: str,
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
    """``act(bn(conv(excite(x))) + residual)``: in three launches where our kernels serve it in inference,
    else by ``call_squeeze_excite`` and ``call_conv_bn_act``, whose remarks hold."""
    gating = _gating(excite, excite_backend, conv, bn, act, x, residual, activation, backend)
    if gating is not None:
        *tensors, excite_activation, gate = gating
        arguments = (
            x, *weights_of(conv, bn), residual, *tensors, excite_activation, gate, conv.stride,
            0.0 if bn is None else bn.eps, activation, negative_slope, backend,
        )  # fmt: skip
        return (_infer if watched(x) else _body)(*arguments)
    y = call_squeeze_excite(excite, x, excite_backend)
    return call_conv_bn_act(
        conv, bn, act, y, residual, activation, negative_slope, backend, residual_dies=residual_dies
    )


CONV_CALLS[call_excited_conv] = 5


def _gating(excite, excite_backend, conv, bn, act, x, residual, activation, backend) -> tuple | None:
    """(w1, b1, w2, b2, activation, gate) where one op may do it all, else None."""
    if torch.is_grad_enabled() or conv.training or (bn is not None and bn.training):
        return None
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in dispatch.OUR_DTYPES:
        return None
    if (bn is not None and bn._buffers.get("running_mean") is None) or not serves(conv):
        return None
    if _has_any_global_hook() or torch.is_autocast_enabled(dispatch.device_type_of(x)):
        return None
    if must_run_stock(conv, bn, act, x, conv._parameters.get("weight"), residual):
        return None
    found = fused_arguments(excite, x, excite_backend)
    if found is None or found[0].shape[0] > MOST_SQUEEZED:
        return None
    chosen = implementation_of(conv, bn, act, activation, x, backend, residual is not None)
    return found if chosen == "triton" else None


def join_excited(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let 1×1 convolutions scale what they load where they alone read a squeeze-and-excite's result.

    For graphs of inference, after ``fuse``, whose ``fusions`` are returned with those that joined as one.
    """
    for node, x in sole_readers(graph, call_conv_bn_act, 3, call_squeeze_excite):
        conv, bn, act, _, residual, *rest = node.args
        excite, source, excite_backend = x.args
        if residual is x or not serves(modules[conv.target]):
            continue
        arguments = (excite, excite_backend, conv, bn, act, source, residual, *rest)
        put_one_call(call_excited_conv, arguments, (node, x))
        fusions = joined(fusions, ("conv", conv.target), before=("excite", excite.target))
    return fusions
