"""A block's last convolution and the one on its shortcut, added in one launch (ResNet, RegNet).

    y = act( bn( conv2d(x, weight) + bias ) + bn'( conv2d(x', weight') + bias' ) )

The second convolution has a 1×1 filter. Where the two run one after the other, its result is written and read
again; here both are sums of one program, the second is not even rounded, and y alone is stored. Batch norms
use running statistics. Only inference gains from this: with gradients, and wherever our kernel does not serve
or is predicted to lose, the two convolutions run one after the other, as they did.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fastnets.fused import composed, dispatch
from fastnets.fused.batch_norm import watched
from fastnets.fused.chains import may_write_between, put_one_call
from fastnets.fused.conv import (
    Options,
    Weights,
    call_conv_bn_act,
    conv_below_autograd,
    conv_bn_act_op,
    conv_flops,
    in_dtype_of,
    validate_convolution,
    weights_of,
)
from fastnets.fused.conv_training import output_shape
from fastnets.fused.patterns import call_conv_bn_iadd_act
from fastnets.fused.preactivation import pointwise_options, serves

_VECTORS = "Tensor? {0}bias, Tensor? {0}mean, Tensor? {0}var, Tensor? {0}bn_weight, Tensor? {0}bn_bias"
_SCHEMA = (
    f"(Tensor x, Tensor weight, {_VECTORS.format('')}, "
    f"Tensor shortcut_x, Tensor shortcut_weight, {_VECTORS.format('shortcut_')}, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float eps, "
    "SymInt[2] shortcut_stride, float shortcut_eps, str activation, float negative_slope, str backend) "
    "-> Tensor"
)
_TENSORS = 14


def _calls(arguments: tuple) -> tuple[tuple, tuple]:
    """The arguments of ``conv_bn_act`` without a residual and a backend: the shortcut's, and the others'."""
    x, *weights = arguments[:7]
    shortcut_x, *shortcut_weights = arguments[7:_TENSORS]
    *geometry, eps, shortcut_stride, shortcut_eps, activation, negative_slope = arguments[_TENSORS:-1]
    options = (Options(*geometry, eps, activation, negative_slope), arguments[-1])
    pointwise = pointwise_options(shortcut_stride, shortcut_eps, "none", 0.0)
    return (shortcut_x, shortcut_weights, pointwise), (x, weights, *options)


@dispatch.replays(tensors=_TENSORS)
def _body(*arguments):
    _validate(*arguments)
    x, backend = arguments[0], arguments[-1]
    if x.numel() and composed.choose(x, backend) == "triton":
        return _triton(*arguments)
    return _composed(conv_below_autograd, *arguments)


def _triton(*arguments) -> Tensor:
    from fastnets.kernels.conv import conv_bn_act as launch
    from fastnets.kernels.conv import joins_shortcut
    from fastnets.kernels.conv_shape import Shortcut

    (shortcut_x, shortcut_weights, pointwise), (x, weights, options, _) = _calls(arguments)
    weight, *vectors = *in_dtype_of(x, *weights[:2]), *weights[2:]
    added = *in_dtype_of(x, *shortcut_weights[:2]), *shortcut_weights[2:]
    shortcut = Shortcut(shortcut_x, *added, tuple(pointwise.stride), pointwise.eps)
    geometry = dict(zip(("stride", "padding", "dilation", "groups"), options[:4]))
    named = {**geometry, **dict(zip(("eps", "activation", "negative_slope"), options[4:]))}
    if joins_shortcut(x, weight, shortcut, **geometry):
        return launch(x, weight, *vectors, shortcut=shortcut, **named)
    residual = launch(*shortcut[:7], stride=shortcut.stride, eps=shortcut.eps)
    return launch(x, weight, *vectors, residual, **named)


def _composed(convolve, *arguments) -> Tensor:
    """The two convolutions one after the other: what the op means, and its gradient."""
    (shortcut_x, shortcut_weights, pointwise), (x, weights, options, backend) = _calls(arguments)
    residual = convolve(shortcut_x, *shortcut_weights, None, *pointwise, backend)
    return convolve(x, *weights, residual, *options, backend)


def _validate(*arguments) -> tuple:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    (shortcut_x, shortcut_weights, pointwise), (x, weights, options, _) = _calls(arguments)
    weight = shortcut_weights[0]
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(
            f"conv_shortcut: the shortcut's filter is {weight.shape[2]}×{weight.shape[3]}, only 1×1 is "
            "served; call conv_bn_act and give its result as the residual"
        )
    if shortcut_x.dtype != x.dtype:
        raise TypeError(f"conv_shortcut: x is {x.dtype}, shortcut_x {shortcut_x.dtype}; convert one of them")
    shape = validate_convolution(x, Weights(*weights), None, options)
    added = validate_convolution(shortcut_x, Weights(*shortcut_weights), None, pointwise)
    if shape != added:
        raise ValueError(
            f"conv_shortcut: the convolution gives {tuple(shape)}, its shortcut {tuple(added)}; "
            "they must agree"
        )
    return shape


def _fake(x, *arguments):
    return x.new_empty(_validate(x, *arguments)).to(memory_format=torch.channels_last)


def _flops(x_shape, weight_shape, *arguments, out_shape=None, **kwargs) -> int:
    return sum(
        conv_flops(*shapes, out_shape=out_shape) for shapes in ((x_shape, weight_shape), arguments[5:7])
    )


def _with_gradients(*arguments):
    _validate(*arguments)
    return _composed(conv_bn_act_op, *arguments)


_differentiable, _infer = composed.register(
    *("conv_shortcut", _SCHEMA, _body, _fake),
    with_gradients=_with_gradients, casts=(0, 7), flops=_flops,
)  # fmt: skip


def conv_shortcut(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    shortcut_x: Tensor,
    shortcut_weight: Tensor,
    shortcut_bias: Tensor | None = None,
    shortcut_mean: Tensor | None = None,
    shortcut_var: Tensor | None = None,
    shortcut_bn_weight: Tensor | None = None,
    shortcut_bn_bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    eps: float = 1e-5,
    shortcut_stride: tuple[int, int] = (1, 1),
    shortcut_eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """``conv_bn_act(x, weight, ..., residual=conv_bn_act(shortcut_x, shortcut_weight, ...))``; see the top of
    this file.

    Args:
        x: [N, C, H, W], shortcut_x: [N, C', H', W'], float32, float16, bfloat16 or float64, any strides.
        weight: [K, C/groups, R, S], shortcut_weight: [K, C', 1, 1], of x's dtype. The other vectors are [K].

    Returns:
        [N, K, P, Q] of x's dtype, dense channels-last. Differentiable once, in everything but the statistics.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    return op(
        *(x, weight, bias, running_mean, running_var, bn_weight, bn_bias),
        *(shortcut_x, shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var),
        *(shortcut_bn_weight, shortcut_bn_bias, stride, padding, dilation, groups, eps),
        *(shortcut_stride, shortcut_eps, activation, negative_slope, dispatch.validate_backend(backend)),
    )


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_conv_shortcut(
    conv: nn.Conv2d,
    bn: nn.Module | None,
    act: nn.Module | None,
    x: Tensor,
    shortcut_conv: nn.Conv2d,
    shortcut_bn: nn.Module | None,
    shortcut_x: Tensor,
    activation: str = "none",
    negative_slope: float = 0.0,
    backend: str = "auto",
    onto_shortcut: bool | None = None,
    residual_dies: str = "",
) -> Tensor:
    """``act(bn(conv(x)) + shortcut_bn(shortcut_conv(shortcut_x)))``: in one launch where our kernels serve it
    in inference, else by ``call_conv_bn_act`` twice, whose remarks hold.

    onto_shortcut: where stock adds in place, whether it writes to the shortcut's memory.
    """
    first, second = (conv, bn, x), (shortcut_conv, shortcut_bn, shortcut_x)
    if _in_one_launch(first, second, act, activation, backend):
        if not serves(shortcut_conv):
            first, second = second, first
        (conv, bn, x), (shortcut_conv, shortcut_bn, shortcut_x) = first, second
        arguments = (
            x, *weights_of(conv, bn), shortcut_x, *weights_of(shortcut_conv, shortcut_bn),
            conv.stride, conv.padding, conv.dilation, conv.groups, 0.0 if bn is None else bn.eps,
            shortcut_conv.stride, 0.0 if shortcut_bn is None else shortcut_bn.eps,
            activation, negative_slope, backend,
        )  # fmt: skip
        return (_infer if watched(x) else _body)(*arguments)
    residual = call_conv_bn_act(shortcut_conv, shortcut_bn, None, shortcut_x, None, "none", 0.0, backend)
    rest = (conv, bn, act, x, residual, activation, negative_slope, backend)
    if onto_shortcut is None:
        return call_conv_bn_act(*rest, residual_dies=residual_dies)
    return call_conv_bn_iadd_act(onto_shortcut, *rest, residual_dies=residual_dies)


def _in_one_launch(first, second, act, activation, backend) -> bool:
    x, shortcut_x = first[2], second[2]
    if not composed.may_be_ours(x, backend) or not composed.may_be_ours(shortcut_x, backend):
        return False
    if x.dtype != shortcut_x.dtype or not all(
        composed.runs_our_convolution(conv, bn, act, x, activation, backend, adds)
        for (conv, bn, x), adds in ((first, True), (second, False))
    ):
        return False
    return _output_shape(*first) == _output_shape(*second)


def _output_shape(conv: nn.Conv2d, _, x: Tensor) -> tuple:
    return output_shape(x, conv._parameters["weight"], conv.stride, conv.padding, conv.dilation)


def join_shortcuts(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let convolutions compute the 1×1 convolutions whose results they alone read, to add them.

    For graphs of inference, after ``mark_dying_residuals``; returns the fusions, which say so.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (call_conv_bn_act, call_conv_bn_iadd_act):
            continue
        in_place = node.target is call_conv_bn_iadd_act
        conv, bn, act, x, shortcut, *rest = node.args[in_place:]
        if not isinstance(shortcut, fx.Node) or shortcut.target is not call_conv_bn_act:
            continue
        shortcut_conv, shortcut_bn, _, shortcut_x, added, activation, *_ = shortcut.args
        if added is not None or activation != "none" or shortcut.kwargs or list(shortcut.users) != [node]:
            continue
        pair = [modules[conv.target], modules[shortcut_conv.target]]
        if not any(map(serves, pair)) or may_write_between(shortcut, node):
            continue
        arguments = (conv, bn, act, x, shortcut_conv, shortcut_bn, shortcut_x, *rest)
        options = {"onto_shortcut": node.args[0]} if in_place else {}
        put_one_call(call_conv_shortcut, arguments, (node, shortcut), {**options, **node.kwargs})
        fusions = tuple(
            replace(f, joins=conv.target)
            if f.family == "conv" and f.path("conv") == shortcut_conv.target
            else f
            for f in fusions
        )
    return fusions
