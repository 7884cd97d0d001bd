"""A depthwise convolution and the layer norm over its channels, as one op (ConvNeXt).

    y = layer_norm(conv2d(x, weight, bias, groups=C).permute(0, 2, 3, 1), (C,), norm_weight, norm_bias, eps)

What lies between the two is never stored. Inference gains by it; with gradients, and where our kernel does
not serve (more channels than a program holds), the two ops run one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fastnets.fused import composed, dispatch
from fastnets.fused.batch_norm import has_hooks
from fastnets.fused.chains import joined, put_one_call
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
    watched,
)
from fastnets.fused.layer_norm import _differentiable as _norm_op
from fastnets.fused.layer_norm import _infer as _norm_inference
from fastnets.fused.layer_norm import call_layer_norm

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, float eps, str backend) -> Tensor"
)
MOST_CHANNELS, MOST_ROWS = 1024, 7  # as kernels.depthwise_norm


@dispatch.replays(tensors=5)
def _body(x, weight, bias, norm_weight, norm_bias, stride, padding, dilation, eps, backend):
    arguments = (x, weight, bias, norm_weight, norm_bias, stride, padding, dilation, eps)
    _validate(*arguments)
    fits = weight.shape[0] == x.shape[1] <= MOST_CHANNELS and weight.shape[2] <= MOST_ROWS
    if x.numel() and fits and composed.choose(x, backend) == "triton":
        from fastnets.kernels.depthwise_norm import depthwise_layer_norm as launch

        return launch(
            x,
            *in_dtype_of(x, weight, bias),
            *(norm_weight, norm_bias),
            stride=stride,
            padding=padding,
            dilation=dilation,
            eps=eps,
        )
    return _composed(conv_below_autograd, _norm_inference, *arguments, backend)


def _composed(
    convolve, normalize, x, weight, bias, norm_weight, norm_bias, stride, padding, dilation, eps, backend
) -> Tensor:
    """The two ops one after the other: what the op means, and its gradient."""
    options = _options(x, stride, padding, dilation)
    z = convolve(x, weight, bias, *[None] * 5, *options, backend).permute(0, 2, 3, 1)
    return normalize(z, None, norm_weight, norm_bias, 1, eps, True, x.dtype, backend)


def _options(x: Tensor, stride, padding, dilation) -> Options:
    return Options(tuple(stride), tuple(padding), tuple(dilation), x.shape[1], 0.0, "none", 0.0)


def _validate(x, weight, bias, norm_weight, norm_bias, stride, padding, dilation, eps) -> tuple:
    """The shape of the result; errors name the argument, the fact and the remedy."""
    if x.dim() == 4 and weight.dim() == 4 and weight.shape[1] != 1:
        raise ValueError(
            f"depthwise_layer_norm: weight is {tuple(weight.shape)}, a depthwise filter is [C, 1, R, S]; "
            "call conv_bn_act and layer_norm one after the other"
        )
    weights = Weights(weight, bias, None, None, None, None)
    N, K, P, Q = validate_convolution(x, weights, None, _options(x, stride, padding, dilation))
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != (K,):
            raise ValueError(f"depthwise_layer_norm: {name} has shape {tuple(vector.shape)}, expected ({K},)")
        if vector is not None and vector.device != x.device:
            raise ValueError(f"depthwise_layer_norm: {name} is on {vector.device}, x on {x.device}; move one")
    return N, P, Q, K


def _fake(x, *arguments):
    return x.new_empty(_validate(x, *arguments[:-1]))


def _flops(x_shape, weight_shape, *shapes, out_shape=None, **kwargs) -> int:
    N, P, Q, K = out_shape
    return conv_flops(x_shape, weight_shape, out_shape=(N, K, P, Q))


def _with_gradients(*arguments):
    _validate(*arguments[:-1])
    return _composed(conv_bn_act_op, _norm_op, *arguments)


_differentiable, _infer = composed.register(
    *("depthwise_layer_norm", _SCHEMA, _body, _fake), with_gradients=_with_gradients, flops=_flops
)


def depthwise_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """``F.layer_norm(F.conv2d(x, weight, bias, groups=C).permute(0, 2, 3, 1), (K,), norm_weight, ...)``.

    Args:
        x: [N, C, H, W], a floating dtype, any strides.
        weight: [K, 1, R, S] of x's dtype, K a multiple of C; one launch serves K = C ≤ 1024 and R ≤ 7.
        bias, norm_weight, norm_bias: [K] or None.

    Returns:
        [N, P, Q, K] of x's dtype, contiguous. Differentiable once. Raises ``ValueError`` and ``TypeError``
        for what does not fit.
    """
    op = _differentiable if torch.is_grad_enabled() else _infer
    vectors = (bias, norm_weight, norm_bias)
    return op(x, weight, *vectors, stride, padding, dilation, eps, dispatch.validate_backend(backend))


# --- what rewritten networks call ---------------------------------------------------------------------------


def call_depthwise_norm(
    norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor, norm_backend: str, backend: str
) -> Tensor:
    """``norm(conv(x).permute(0, 2, 3, 1))``: in one launch where our kernel serves it in inference, else by
    ``call_conv_bn_act`` and ``call_layer_norm``, whose remarks hold."""
    if _in_one_launch(norm, conv, x, backend):
        parameters, affine = conv._parameters, norm._parameters
        arguments = (
            x, parameters["weight"], parameters.get("bias"), affine.get("weight"), affine.get("bias"),
            conv.stride, conv.padding, conv.dilation, norm.eps, backend,
        )  # fmt: skip
        return (_infer if watched(x) else _body)(*arguments)
    y = call_conv_bn_act(conv, None, None, x, None, "none", 0.0, backend)
    return call_layer_norm(norm, y.permute(0, 2, 3, 1), None, norm_backend)


def _in_one_launch(norm, conv, x, backend) -> bool:
    if torch.is_grad_enabled() or conv.training or not serves(conv, norm) or has_hooks(norm):
        return False
    if _has_any_global_hook() or must_run_stock(conv, None, None, x, conv._parameters.get("weight"), None):
        return False
    if x.dtype not in dispatch.OUR_DTYPES or torch.is_autocast_enabled(dispatch.device_type_of(x)):
        return False
    return implementation_of(conv, None, None, "none", x, backend) == "triton"


def serves(conv: nn.Conv2d, norm: nn.Module) -> bool:
    """Whether convolution and norm are of those that one launch does."""
    channels = conv.in_channels
    if type(norm) is not nn.LayerNorm or tuple(norm.normalized_shape) != (channels,):
        return False
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    depthwise = conv.groups == channels == conv.out_channels and 1 < channels <= MOST_CHANNELS
    return plain and depthwise and conv.kernel_size[0] <= MOST_ROWS


def join_depthwise_norms(graph: fx.Graph, modules: dict[str, nn.Module], fusions: tuple) -> tuple:
    """Let depthwise convolutions normalise their own result where a layer norm over channels alone reads it.

    For graphs of inference, after ``fuse``, whose ``fusions`` are returned with those that joined as one.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not call_layer_norm:
            continue
        norm, permuted, residual, norm_backend = node.args
        if residual is not None or not _puts_channels_last(permuted) or list(permuted.users) != [node]:
            continue
        y = permuted.args[0]
        if y.target is not call_conv_bn_act or list(y.users) != [permuted] or y.kwargs:
            continue
        conv, bn, act, x, added, activation, _, backend = y.args
        if any(part is not None for part in (bn, act, added)) or activation != "none":
            continue
        if not serves(modules[conv.target], modules[norm.target]):
            continue
        put_one_call(call_depthwise_norm, (norm, conv, x, norm_backend, backend), (node, permuted, y))
        fusions = joined(fusions, ("conv", conv.target), after=("norm", norm.target))
    return fusions


def _puts_channels_last(node: object) -> bool:
    """Whether the node is ``y.permute(0, 2, 3, 1)`` of a value y of the graph."""
    if not isinstance(node, fx.Node) or node.kwargs or (node.op, node.target) not in _PERMUTATIONS:
        return False
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    return isinstance(node.args[0], fx.Node) and tuple(dims) in ((0, 2, 3, 1), (0, -2, -1, 1))


_PERMUTATIONS = (("call_method", "permute"), ("call_function", torch.permute))
